// Bit planes of a weight, decoded to signed bytes in the order of tensor cores' fragments.
//
// A lane 4 g + t reads a word of every plane, 32 neighbouring inputs from 32 t of a chunk's 128 on,
// of outputs g and g + 8. Every fourth bit of it, planes side by side, makes nibbles; prmt looks
// four of them up at once in a table of 8 bytes. So the format's own planes serve, and nothing is
// repacked.
#pragma once

#include "device.h"

namespace blaq {

// The levels of all codes: 8 bytes up to 3 bits; with 4 bits the positive ones, then the negative
// ones.
struct LevelBytes {
  uint32_t word[4];
  uint32_t masks = 0x0000ff00;  // bytes by sign
};

// Levels as a kernel needs them: in registers. What all lanes have alike would be moved to one
// before each prmt, so each half of a warp reads a copy of its own.
struct SharedLevels {
  LevelBytes copies[2];

  BLAQ_DEVICE void put(const LevelBytes& levels) { copies[0] = copies[1] = levels; }  // one thread
  BLAQ_DEVICE const LevelBytes& get() const { return copies[threadIdx.x / 16 % 2]; }
};

struct Planes {
  const uint8_t* start;  // [bits, n, row_bytes], 4-byte aligned
  int64_t n, row_bytes;  // row_bytes: a multiple of 32

  // This lane's words of an output; past the last, which is never stored, the last's.
  BLAQ_DEVICE const uint8_t* words_of(int64_t output) const {
    return start + (output < n ? output : n - 1) * row_bytes + threadIdx.x % 4 * 4;
  }
};

// A chunk's words of one output; plane_bytes: n · row_bytes.
template <int bits>
BLAQ_DEVICE void load_words(const uint8_t* words_of, int64_t plane_bytes, int chunk,
                            uint32_t (&words)[bits]) {
  words_of += chunk * 16;
#pragma unroll
  for (int b = 0; b < bits; ++b) {
    words[b] = __ldg(reinterpret_cast<const uint32_t*>(words_of));
    words_of += plane_bytes;
  }
}

template <int bits>
BLAQ_DEVICE uint32_t look_up(const LevelBytes& levels, uint32_t indices, uint32_t signs) {
  const uint32_t byte = prmt(levels.word[0], levels.word[1], indices);
  if constexpr (bits < 4) return byte;
  const uint32_t negative = prmt(levels.word[2], levels.word[3], indices);
  const uint32_t is_negative = prmt(levels.masks, 0, signs);
  return lop3<(0xf0 & 0xcc) | (0x0f & 0xaa)>(is_negative, negative, byte);
}

// Inputs `step` and every fourth of 32: the first four of eight in `low`, the others in `high`.
template <int bits>
BLAQ_DEVICE void decode_step(const uint32_t (&words)[bits], int step, const LevelBytes& levels,
                             uint32_t& low, uint32_t& high) {
  constexpr uint32_t kEveryFourth = 0x11111111;
  uint32_t indices = 0;
#pragma unroll
  for (int b = 0; b < (bits < 4 ? bits : 3); ++b) {
    const uint32_t moved = step >= b ? words[b] >> (step - b) : words[b] << (b - step);
    indices = lop3<(0xf0 & 0xcc) | 0xaa>(moved, kEveryFourth << b, indices);
  }
  const uint32_t signs = bits < 4 ? 0 : (words[bits - 1] >> step) & kEveryFourth;
  low = look_up<bits>(levels, indices, signs);
  high = look_up<bits>(levels, indices >> 16, signs >> 16);
}

// The fragment of 16 outputs and a step's 32 inputs, from the words of outputs g and g + 8.
template <int bits>
BLAQ_DEVICE void decode_fragment(const uint32_t (&words)[2][bits], int step,
                                 const LevelBytes& levels, uint32_t (&a)[4]) {
  decode_step<bits>(words[0], step, levels, a[0], a[2]);
  decode_step<bits>(words[1], step, levels, a[1], a[3]);
}

// Planes whose rows are not whole units of inputs, or not aligned: copied, zeros past the last. A
// block a row.
__global__ void __launch_bounds__(64)
    pad_planes_kernel(const uint8_t* planes, int64_t row_bytes, uint32_t* out, int64_t words) {
  planes += blockIdx.x * row_bytes;
  for (int64_t i = threadIdx.x; i < words; i += 64) {
    uint32_t word = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (4 * i + j < row_bytes) word |= static_cast<uint32_t>(planes[4 * i + j]) << 8 * j;
    }
    out[blockIdx.x * words + i] = word;
  }
}

inline bool is_padded(const uint8_t* planes, int64_t row_bytes) {
  return row_bytes % 32 == 0 && reinterpret_cast<uintptr_t>(planes) % 4 == 0;
}
inline int64_t padded_row_bytes_of(int64_t row_bytes) { return (row_bytes + 31) / 32 * 32; }

// rows: bits · n.
inline void pad_planes(const uint8_t* planes, int64_t rows, int64_t row_bytes, void* out,
                       Stream stream) {
  if (rows == 0 || row_bytes == 0) return;
  launch(pad_planes_kernel, {static_cast<unsigned>(rows), 64}, stream, planes, row_bytes,
         static_cast<uint32_t*>(out), padded_row_bytes_of(row_bytes) / 4);
}

}  // namespace blaq
