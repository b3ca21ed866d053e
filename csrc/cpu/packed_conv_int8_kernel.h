// The inner loops of packed_conv_int8.cpp, which includes this file where AVX-512 with VBMI and
// VNNI may be used. A way says what a pixel is prepared to, and how a weight's registers meet it:
// - kChannelBytes: of a prepared channel; kVectors: of 16 outputs, so that sums stay in registers;
// - prepare(): a segment of channels, false where it has no unit; correction is what each sum of the
//   segment is too large by;
// - add(): the sums of MR pixels and NV vectors over `words` words of 32 channels.

#include "cpu/packed_int8_kernel.h"

// The unit of numbers of which the largest shall become `limit`; false where there is none.
inline bool unit_of(float most, float limit, float* unit, float* inverse) {
  const bool zero = most == 0;
  *unit = zero ? 0 : most / limit;
  *inverse = zero ? 0 : limit / most;
  return zero || (most >= kLeast && most <= __FLT_MAX__ / 2);
}

// 1 and 2 bits: tables of all sums that four channels can make, of signs alone. A 2-bit weight is
// the sum of two signs with coefficients: ±high = a ± b, ±low = a - (±b).
template <int DIGITS>
struct TableWay {
  static constexpr int kChannelBytes = 4 * DIGITS, kVectors = 4 / DIGITS;
  static constexpr float kLimit = DIGITS == 1 ? 127.0f : 32700.0f;
  int planes;
  float coefficient[2];
  Coefficients signs;

  explicit TableWay(const PackedMatrix& weight)
      : planes(weight.bits), signs(std::array{1.0f, -1.0f}.data(), 1) {
    const float low = weight.levels[0], high = weight.levels[planes - 1];
    coefficient[0] = planes == 1 ? low : (high + low) / 2;
    coefficient[1] = (high - low) / 2;
  }

  bool prepare(const float* x, int words, uint8_t* out, float* unit, int32_t* correction) const {
    float inverse;
    if (!unit_of(largest_sum<1>(x, words * 32), kLimit, unit, &inverse)) return false;
    build_tables<1, DIGITS>(x, words, inverse, signs, out);
    *correction = 0;
    return true;
  }

  template <int MR, int NV>
  [[gnu::always_inline]] void add(const uint8_t* weights, int64_t step,
                                  const uint8_t* const* pixels, int words, const int32_t*,
                                  __m512i (&sums)[MR][NV]) const {
    const __m512i digit = _mm512_set1_epi8(15), quarter = _mm512_set1_epi32(0x30201000);
    const __m512i ones = _mm512_set1_epi8(1);
    __m512i low[DIGITS == 2 ? MR : 1][NV];
    each<MR * NV>([&](auto i) __attribute__((always_inline)) {
      sums[i / NV][i % NV] = _mm512_setzero_si512();
      if (DIGITS == 2) low[i / NV][i % NV] = _mm512_setzero_si512();
    });
    for (int64_t w = 0, at = 0; w < words; ++w, weights += 64) {
      each<2>([&](auto half) __attribute__((always_inline)) {
        __m512i index[NV];
        each<NV>([&](auto v) __attribute__((always_inline)) {
          __m512i digits = _mm512_load_si512(weights + v * step);
          if (half) digits = _mm512_srli_epi32(digits, 4);
          index[v] = _mm512_ternarylogic_epi32(digits, digit, quarter,
                                               0xEA);  // (digits & digit) | quarter
          settle(index[v]);
        });
        each<MR>([&](auto r) __attribute__((always_inline)) {
          const __m512i entries = _mm512_load_si512(pixels[r] + at);
          each<NV>([&](auto v) __attribute__((always_inline)) {
            __m512i& sum = sums[r][v];
            sum = _mm512_dpbusd_epi32(sum, ones, _mm512_permutexvar_epi8(index[v], entries));
            settle(sum);
          });
          if constexpr (DIGITS == 2) {
            const __m512i rest = _mm512_load_si512(pixels[r] + at + 64);
            each<NV>([&](auto v) __attribute__((always_inline)) {
              __m512i& sum = low[r][v];
              sum = _mm512_dpbusd_epi32(sum, _mm512_permutexvar_epi8(index[v], rest), ones);
              settle(sum);
            });
          }
        });
        at += 64 * DIGITS;
      });
    }
    if constexpr (DIGITS == 2) {
      each<MR * NV>([&](auto i) __attribute__((always_inline)) {
        __m512i& sum = sums[i / NV][i % NV];
        sum = _mm512_add_epi32(_mm512_slli_epi32(sum, 8), low[i / NV][i % NV]);
      });
    }
  }
};

// 3 and 4 bits: codes become levels, and are multiplied with channels as integers: both of 8 bits,
// or WIDE, of 16.
template <bool WIDE>
struct LevelWay {
  static constexpr int kChannelBytes = WIDE ? 2 : 1, kVectors = 4;
  static constexpr float kLimit = WIDE ? 32700.0f : 127.0f;
  static constexpr int planes = 1;
  static constexpr float coefficient[1] = {1.0f};
  LevelTable levels;

  explicit LevelWay(const PackedMatrix& weight) : levels(weight.levels, weight.bits) {}

  bool prepare(const float* x, int words, uint8_t* out, float* unit, int32_t* correction) const {
    float inverse;
    if (!unit_of(largest(x, words * 32), kLimit, unit, &inverse)) return false;
    *unit *= WIDE ? levels.wide_unit : levels.unit;
    if constexpr (WIDE) {
      quantize16(x, words, inverse, out);
      *correction = 0;
    } else {
      *correction = 128 * quantize8(x, words, inverse, out);
    }
    return true;
  }

  template <int MR, int NV>
  [[gnu::always_inline]] void add(const uint8_t* weights, int64_t step,
                                  const uint8_t* const* pixels, int words,
                                  const int32_t* correction, __m512i (&sums)[MR][NV]) const {
    const __m512i low = _mm512_set1_epi8(15);
    const __m512i level =
        WIDE ? _mm512_load_si512(levels.wide)
             : _mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)levels.level));
    each<MR * NV>([&](auto i) __attribute__((always_inline)) {
      sums[i / NV][i % NV] = _mm512_set1_epi32(-correction[i / NV]);
    });
    for (int64_t w = 0; w < words; ++w, weights += 256) {
      each<4>([&](auto p) __attribute__((always_inline)) {
        each<(WIDE ? 4 : 2)>([&](auto shift) __attribute__((always_inline)) {
          __m512i value[NV];
          each<NV>([&](auto v) __attribute__((always_inline)) {
            __m512i digits = _mm512_load_si512(weights + v * step + p * 64);
            if (WIDE) {  // the table is there twice: bit 4, of another digit, does not matter
              if (shift) digits = _mm512_srli_epi16(digits, 4 * shift);
              value[v] = _mm512_permutexvar_epi16(digits, level);
            } else {
              if (shift) digits = _mm512_srli_epi32(digits, 4);
              value[v] = _mm512_shuffle_epi8(level, _mm512_and_si512(digits, low));
            }
            settle(value[v]);
          });
          const int64_t at = w * 32 * kChannelBytes + 4 * (WIDE ? 4 * shift + p : 2 * p + shift);
          each<MR>([&](auto r) __attribute__((always_inline)) {
            const __m512i x = four_bytes(pixels[r] + at);
            each<NV>([&](auto v) __attribute__((always_inline)) {
              __m512i& sum = sums[r][v];
              sum = WIDE ? _mm512_dpwssd_epi32(sum, value[v], x)
                         : _mm512_dpbusd_epi32(sum, value[v], x);
              settle(sum);
            });
          });
        });
      });
    }
  }
};
