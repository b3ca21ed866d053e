// binary_linear for many rows on sm_90a: products of a warpgroup, whose rate for bits is Hopper's own.
//
// Weights come to registers as in binary_linear_kernel.h, a tile of 128 rows through shared memory in a ring
// of chunks. popcount(a ^ b) = popcount(a) + popcount(b) − 2 popcount(a & b): both first terms are counted
// while the tensor cores make the third.
#pragma once

#include "binary_linear_kernel.h"
#include "wgmma.h"

namespace blaq {

constexpr int kGroupThreads = 256, kGroupRows = 128, kGroupOutputs = 128;  // two warpgroups, their tile
constexpr int kChunkSteps = 4, kChunks = 3;                                // of 256 inputs; in the ring
constexpr int kPieces = kChunkSteps * 2;                                   // of 16 bytes, of a row in a chunk

struct BinaryChunks {
  // [chunk][step][half][row / 8][row % 8]: a core matrix is 8 rows of one half.
  uint4 bits[kChunks][kPieces][kGroupRows];
  int row_ones[kGroupRows];
};

inline int64_t padded_row_bytes(int64_t k) { return (k + 255) / 256 * 32; }

template <typename Type>
__global__ void __launch_bounds__(kGroupThreads)
binary_warpgroup_kernel(const BinaryProduct<Type> call) {
  BinaryChunks& memory = *dynamic_shared<BinaryChunks>();
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int64_t words = call.words(), blocks = (call.n + 7) / 8, steps = (words + 3) / 4;
  const int64_t chunks = (steps + kChunkSteps - 1) / kChunkSteps;
  const int64_t block0 = int64_t{blockIdx.x} * (kGroupOutputs / 8) + 2 * warp;
  const int64_t row0 = int64_t{blockIdx.y} * kGroupRows;
  const uint4* weight =
      reinterpret_cast<const uint4*>(call.weight + least(block0 + g / 4, blocks - 1) * words * 8) + g % 4;

  const auto fetch = [&](int64_t chunk) {  // rows past the last and steps past the last are 0
    if (chunk < chunks) {
#pragma unroll
      for (int q = 0; q < kPieces * kGroupRows / kGroupThreads; ++q) {
        const int i = q * kGroupThreads + threadIdx.x, row = i / kPieces, piece = i % kPieces;
        const int64_t step = chunk * kChunkSteps + piece / 2;
        const bool is_there = row0 + row < call.m && step < steps;
        const uint64_t* from = call.rows + (is_there ? ((row0 + row) * steps + step) * 4 + piece % 2 * 2 : 0);
        cp_async(&memory.bits[chunk % kChunks][piece][row], from, is_there ? 16 : 0);
      }
    }
    cp_async_commit();
  };
  uint4 next[kChunkSteps];
  const auto load = [&](int64_t chunk) {
#pragma unroll
    for (int s = 0; s < kChunkSteps; ++s) {
      const int64_t word = (chunk * kChunkSteps + s) * 4 + t;
      next[s] = word < words ? __ldg(weight + word * 4) : make_uint4(0, 0, 0, 0);
    }
  };
  // In a fragment's order.
  uint32_t a[kChunkSteps][4];
  const auto take = [&] {
#pragma unroll
    for (int s = 0; s < kChunkSteps; ++s) {
      a[s][0] = next[s].x, a[s][1] = next[s].z, a[s][2] = next[s].y, a[s][3] = next[s].w;
    }
  };

  int count[kGroupRows / 8][4] = {};
  int ones[2] = {}, row_ones = 0;  // of this lane's words of two outputs; of half a row in shared memory
  fetch(0);
  fetch(1);
  load(0);
  take();
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    cp_async_wait<1>();
    fence_shared_for_products();
    __syncthreads();
    fetch(chunk + 2);  // where all have done with the chunk before last
    const auto& bits = memory.bits[chunk % kChunks];
    begin_products(a);
#pragma unroll
    for (int s = 0; s < kChunkSteps; ++s) {
      wgmma_m64n128k256_and(count, a[s], MatrixB(bits[2 * s], kGroupRows * 16, 128));
    }
    commit_products();
    load(chunk + 1);
#pragma unroll
    for (int s = 0; s < kChunkSteps; ++s) {
      ones[0] += __popc(a[s][0]) + __popc(a[s][2]);
      ones[1] += __popc(a[s][1]) + __popc(a[s][3]);
    }
#pragma unroll
    for (int q = 0; q < kPieces / 2; ++q) {
      const uint4 x = bits[2 * q + threadIdx.x / kGroupRows][threadIdx.x % kGroupRows];
      row_ones += __popc(x.x) + __popc(x.y) + __popc(x.z) + __popc(x.w);
    }
    wait_for_products<0>(count);
    take();
  }
  cp_async_wait<0>();

  if (threadIdx.x < kGroupRows) memory.row_ones[threadIdx.x] = row_ones;
  __syncthreads();
  if (threadIdx.x >= kGroupRows) memory.row_ones[threadIdx.x - kGroupRows] += row_ones;
  __syncthreads();
#pragma unroll
  for (int o = 0; o < 2; ++o) {
    ones[o] += __shfl_xor_sync(~0u, ones[o], 1);
    ones[o] += __shfl_xor_sync(~0u, ones[o], 2);
  }
  using Sum = typename Type::Sum;
  write_products<Type, 1, kGroupRows / 8>(call, block0, row0, [&](int, int j, int e, Sum scale) {
    const int differ = ones[e / 2] + memory.row_ones[8 * j + 2 * t + e % 2] - 2 * count[j][e];
    return static_cast<Sum>(call.k - 2 * differ) * scale;
  });
}

// As binary_linear, of one scale for a row or all. `bits` is [m, padded_row_bytes(k) / 8], 16-byte aligned.
template <typename Type>
void binary_linear_by_warpgroups(const typename Type::Word* x, uint64_t* bits, BinaryProduct<Type> call,
                                 Stream stream) {
  if (call.m == 0 || call.n == 0) return;
  pack_signs<Type, true>(x, call.m, call.k, padded_row_bytes(call.k), bits, stream);
  call.rows = bits;
  launch(binary_warpgroup_kernel<Type>,
         {{static_cast<unsigned>((call.n + kGroupOutputs - 1) / kGroupOutputs),
           static_cast<unsigned>((call.m + kGroupRows - 1) / kGroupRows)}, kGroupThreads, sizeof(BinaryChunks)},
         stream, call);
}

}  // namespace blaq
