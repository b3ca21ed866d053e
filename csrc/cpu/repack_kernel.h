// Bit planes to registers of packed_int8.h; see foreach_isa.h.
#include "cpu/lanes.h"

// `count` words of 16 rows, which have 16 bytes.
template <int BITS>
inline void repack_words(const uint8_t* row, int64_t stride, int64_t plane, int64_t count, Words* to) {
  constexpr int WORDS = BITS <= 2 ? BITS : 4, NB = 16 / kLanes;
  for (int b = 0; b < NB; ++b, row += kLanes * stride) {
    Words x[4 * WORDS] = {};
#pragma GCC unroll 4
    for (int p = 0; p < BITS; ++p) transpose_16_bytes(row + p * plane, stride, x + 4 * p, 1);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      interleave<WORDS>(x + i, 4);
      if (i >= count) break;
#pragma GCC unroll 4
      for (int p = 0; p < WORDS; ++p) to[(i * WORDS + p) * NB + b] = x[4 * p + i];
    }
  }
}

// Groups of 16 outputs.
template <int BITS>
void repack_groups(const uint8_t* planes, int64_t n, int64_t bytes, int64_t first, int64_t last, uint8_t* out) {
  constexpr int WORDS = BITS <= 2 ? BITS : 4, NB = 16 / kLanes;
  const int64_t words = (bytes + 3) / 4, plane = n * bytes;
  Words* to = reinterpret_cast<Words*>(out) + first * words * WORDS * NB;
  for (int64_t group = first; group < last; ++group) {
    const uint8_t* row = planes + group * 16 * bytes;
    const int64_t rows = std::min<int64_t>(16, n - group * 16);
    for (int64_t word = 0; word < words; word += 4, row += 16) {
      const int64_t count = std::min<int64_t>(4, words - word), some = std::min<int64_t>(16, bytes - word * 4);
      for (int p = 0; p < BITS && word % 16 == 0; ++p) {
        const uint8_t* next = row + p * plane + 16 * bytes;
        for (int i = 0; i < 16; ++i, next += bytes) __builtin_prefetch(next, 0, 2);
      }
      if (rows == 16 && some == 16) {
        repack_words<BITS>(row, bytes, plane, count, to);
      } else {
        uint8_t edge[BITS][16][16] = {};
        for (int i = 0; i < 16 * BITS; ++i) {
          std::memcpy(edge[i / 16][i % 16], row + i / 16 * plane + std::min<int64_t>(i % 16, rows - 1) * bytes, some);
        }
        repack_words<BITS>(edge[0][0], 16, 256, count, to);
      }
      to += count * WORDS * NB;
    }
  }
}
