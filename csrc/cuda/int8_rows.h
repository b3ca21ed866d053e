// Rows of inputs for packed_linear in 8-bit arithmetic: integers of a unit that 256 neighbouring
// inputs share, in the order in which tensor cores take them.
//
// A unit a row would be cheaper, for sums could stay integers; but a few channels of large inputs,
// as language models have, then leave the others no digits. Floats of 8 bits (e4m3), which the
// tensor cores multiply at the same rate, have 3 bits of mantissa: 2.6e-2 off on Gaussian inputs,
// against 7e-3 here.
#pragma once

#include "number_types.h"

namespace blaq {

constexpr int kChunkInputs = 128, kChunkRows = 128, kUnitInputs = 256;

// What a tile of rows is for a chunk of inputs, as shared memory holds it too. A product of 32
// inputs takes its steps' bytes from two pieces; byte 4 t + b of piece 2 s + h is input 32 t + 16 h
// + 4 b + s, since so lane t's word of a plane of the weight, 32 neighbours, holds what it
// multiplies (int8_weights.h).
struct RowChunk {
  uint4 bytes[8][kChunkRows];
  float unit[kChunkRows];
};

inline int64_t chunks_of(int64_t k) { return (k + kUnitInputs - 1) / kUnitInputs * 2; }
inline int64_t row_tiles_of(int64_t m) { return (m + kChunkRows - 1) / kChunkRows; }

// Eight neighbours of a row; past the last, and of rows past the last, 0.
template <typename Type>
BLAQ_DEVICE void read_eight(const typename Type::Word* x, int64_t m, int64_t k, int64_t row,
                            int64_t at, float (&out)[8]) {
  using Word = typename Type::Word;
  constexpr int kLoads = sizeof(Word) / 2;
  alignas(16) Word words[8] = {};
  const Word* from = x + row * k + at;
  if (row < m && at + 8 <= k && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      reinterpret_cast<uint4*>(words)[i] = reinterpret_cast<const uint4*>(from)[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (row < m && at + i < k) words[i] = from[i];
    }
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) out[i] = Type::read(words[i]);
}

// chunks[row tile][chunk]. A warp makes a row's integers of one unit, a block eight rows'. Where an
// input is NaN or infinite the unit is NaN, and so are all outputs of the row.
template <typename Type>
__global__ void __launch_bounds__(256)
    round_rows_kernel(const typename Type::Word* x, int64_t m, int64_t k, RowChunk* chunks,
                      unsigned count) {
  struct Shared {
    uint32_t words[16][8][4];  // [piece of both chunks][row][word]
  };
  Shared& memory = shared<Shared>();
  const int lane = threadIdx.x % 32, of_block = threadIdx.x / 32;
  const int64_t row0 = int64_t{blockIdx.x / (count / 2)} * 8, row = row0 + of_block,
                pair = blockIdx.x % (count / 2);
  RowChunk* const to = chunks + row / kChunkRows * count + 2 * pair;
  float value[8];
  read_eight<Type>(x, m, k, row, pair * kUnitInputs + 8 * lane, value);
  uint32_t largest = 0;  // bits of a magnitude order as the magnitudes do, and NaN is above all
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint32_t magnitude = float_bits(value[i]) & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
  }
  largest = __reduce_max_sync(~0u, largest);
  const bool finite = largest < 0x7f800000;
  const float unit = finite ? bits_float(largest) / 127.0f : bits_float(0x7fc00000);
  const float inverse = unit >= 0x1p-126f ? 1.0f / unit : 0.0f;  // of subnormal units, and NaN: 0
  // For each step s the bytes of inputs s and s + 4 of this lane's eight: of a number beside 2^23
  // the lowest bits are its nearest integer's.
  uint32_t two[4];
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    const uint32_t low = float_bits(value[s] * inverse + 12582912.0f);
    two[s] = prmt(low, float_bits(value[s + 4] * inverse + 12582912.0f), 0x0040);
  }
  // A neighbour has the other half of every word: the even lane makes those of steps 0 and 1.
  const bool odd = lane % 2;
  const uint32_t lower = prmt(two[0], two[1], 0x5410), upper = prmt(two[2], two[3], 0x5410);
  const uint32_t mine = odd ? upper : lower;
  const uint32_t others = __shfl_xor_sync(~0u, odd ? lower : upper, 1);
  const uint32_t first = odd ? others : mine, second = odd ? mine : others;
  const int half = lane % 4 / 2, piece = lane / 16 * 8 + half, step = odd ? 2 : 0;
  memory.words[piece + 2 * step][of_block][lane / 4 % 4] = prmt(first, second, 0x5410);
  memory.words[piece + 2 * step + 2][of_block][lane / 4 % 4] = prmt(first, second, 0x7632);
  if (lane < 2) to[lane].unit[row % kChunkRows] = unit;
  __syncthreads();
  if (threadIdx.x < 128) {
    const int i = threadIdx.x / 8, r = threadIdx.x % 8;
    const uint32_t* words = memory.words[i][r];
    to[i / 8].bytes[i % 8][row0 % kChunkRows + r] =
        make_uint4(words[0], words[1], words[2], words[3]);
  }
}

// `chunks`: row_tiles_of(m) · chunks_of(k) of them.
template <typename Type>
void round_rows(const typename Type::Word* x, int64_t m, int64_t k, RowChunk* chunks,
                Stream stream) {
  const auto count = static_cast<unsigned>(chunks_of(k));
  if (m == 0 || count == 0) return;
  launch(round_rows_kernel<Type>,
         {static_cast<unsigned>(row_tiles_of(m) * (kChunkRows / 8) * (count / 2)), 256}, stream, x,
         m, k, chunks, count);
}

}  // namespace blaq
