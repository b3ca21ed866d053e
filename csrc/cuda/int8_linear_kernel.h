// packed_linear in 8-bit arithmetic by mma.sync m16n8k32: eight warps, each with 32 outputs of 64
// rows, decode the weight in registers; rows of inputs come through a ring of chunks in shared
// memory.
#pragma once

#include "int8_product.h"

namespace blaq {

constexpr int kMmaStages = 4, kMmaThreads = 256;

struct Int8Chunks {
  RowChunk chunks[kMmaStages];
  float values[kMmaThreads / 32][kStoreFloats];
  SharedLevels levels;
};

// B of one step for 8 kJ rows, [j][inputs of word t, of word t + 4].
template <int kJ>
BLAQ_DEVICE void load_rows(const RowChunk& rows, int row, int step, uint32_t (&b)[kJ][2]) {
  const int lane = threadIdx.x % 32, matrix = lane / 8;
#pragma unroll
  for (int j = 0; j < kJ; j += 2) {
    uint32_t four[4];
    ldmatrix(four, &rows.bytes[2 * step + matrix % 2][row + 8 * (j + matrix / 2) + lane % 8]);
    b[j][0] = four[0], b[j][1] = four[1], b[j + 1][0] = four[2], b[j + 1][1] = four[3];
  }
}

template <int bits>
__global__ void __launch_bounds__(kMmaThreads)
    int8_linear_kernel(const __grid_constant__ Int8Product call) {
  Int8Chunks& memory = *dynamic_shared<Int8Chunks>();
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4;
  const int64_t row_tile = blockIdx.x / call.tiles_across();
  const int64_t output = int64_t{blockIdx.x % call.tiles_across()} * kChunkRows + warp % 4 * 32;
  const int row = warp / 4 * 64;  // of the tile
  const RowChunk* from = call.rows + row_tile * call.chunks;

  const auto fetch = [&](int chunk) {
    if (chunk < call.chunks) {
      constexpr int kPieces = sizeof(RowChunk) / 16;
      uint4* to = reinterpret_cast<uint4*>(&memory.chunks[chunk % kMmaStages]);
      const uint4* pieces = reinterpret_cast<const uint4*>(from + chunk);
      for (int i = threadIdx.x; i < kPieces; i += kMmaThreads) cp_async(to + i, pieces + i);
    }
    cp_async_commit();
  };
  uint32_t words[2][2][bits], next[2][2][bits];
  const int64_t plane_bytes = call.planes.n * call.planes.row_bytes;
  const uint8_t* words_of[2][2];
#pragma unroll
  for (int i = 0; i < 4; ++i) words_of[i / 2][i % 2] = call.planes.words_of(output + 8 * i + g);
  const auto load = [&](int chunk) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      load_words<bits>(words_of[i / 2][i % 2], plane_bytes, min(chunk, call.chunks - 1),
                       next[i / 2][i % 2]);
    }
  };

  if (threadIdx.x == 0) memory.levels.put(call.levels);
  __syncthreads();
  const LevelBytes levels = memory.levels.get();
  float total[2][8][4] = {};
  int sum[2][8][4] = {};
  load(0);
#pragma unroll
  for (int i = 0; i < kMmaStages - 1; ++i) fetch(i);
#pragma unroll 1
  for (int chunk = 0; chunk < call.chunks; ++chunk) {
#pragma unroll
    for (int i = 0; i < 4 * bits; ++i) (&words[0][0][0])[i] = (&next[0][0][0])[i];
    load(chunk + 1);
    cp_async_wait<kMmaStages - 2>();
    __syncthreads();
    fetch(chunk + kMmaStages - 1);  // where all have done with the chunk before
    const RowChunk& rows = memory.chunks[chunk % kMmaStages];
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      uint32_t b[8][2];
      load_rows(rows, row, step, b);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint32_t a[4];
        decode_fragment<bits>(words[i], step, levels, a);
#pragma unroll
        for (int j = 0; j < 8; ++j) mma_m16n8k32_s8<true>(sum[i][j], a, b[j]);
      }
    }
    if (chunk % 2 == 0 && !ends_each_chunk(call)) continue;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (call.group_chunks) {
        add_sums<true>(call, sum[i], rows, row, output + 16 * i, chunk, total[i]);
      } else {
        add_sums<false>(call, sum[i], rows, row, output + 16 * i, chunk, total[i]);
      }
#pragma unroll
      for (int e = 0; e < 32; ++e) sum[i][e / 4][e % 4] = 0;
    }
  }
  cp_async_wait<0>();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    store_sums(call, total[i], row_tile * kChunkRows + row, output + 16 * i, memory.values[warp]);
  }
}

template <int bits>
void launch_by_warps(const Int8Product& call, Stream stream) {
  launch(int8_linear_kernel<bits>, {call.tiles(), kMmaThreads, sizeof(Int8Chunks)}, stream, call);
}

}  // namespace blaq
