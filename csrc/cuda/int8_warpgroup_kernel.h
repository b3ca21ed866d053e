// packed_linear in 8-bit arithmetic on sm_90a: products of warpgroups, whose weights are decoded in
// registers while the products before them run.
//
// A block is two warpgroups, of 64 outputs each, and one, of which a thread is awake, that fetches
// 128 rows of inputs into a ring in shared memory, which both multiply. Two or four blocks side by
// side share their rows: each fetches a part for all, or inputs would leave L2 too slowly. Sums
// of a unit are integers, and go to sums in fp32; meanwhile the other warpgroup multiplies, for
// they meet at nothing but the ring. A block takes tile after tile, so that the ring fills for the
// next while sums are stored.
#pragma once

#include <algorithm>

#include "bulk.h"
#include "int8_product.h"

namespace blaq {

constexpr int kInt8Stages = 10;
constexpr int kMultiplying = 256, kInt8Threads = 384;  // the last warpgroup fetches

struct Int8Ring {
  RowChunk chunks[kInt8Stages];
  float values[kMultiplying / 32][kStoreFloats];
  SharedLevels levels;
  Barrier full[kInt8Stages], empty[kInt8Stages];
};

// Tiles of a cluster of `size` blocks, each of which fetches a part of the rows for all. Past the
// last output a block stores nothing, but fetches for the others.
struct Int8Clusters {
  Int8Product product;
  unsigned size, tiles_across, tiles;
};

// Place in the ring, and the parity of the phase in which it is full.
struct RingPlace {
  int stage = 0;
  uint32_t parity = 0;

  BLAQ_DEVICE void advance() {
    if (++stage < kInt8Stages) return;
    stage = 0;
    parity ^= 1;
  }
};

// This block's tiles: those of a cluster lie side by side.
template <typename Each>
BLAQ_DEVICE void for_each_tile(const Int8Clusters& call, const Each& each) {
  const unsigned size = call.size;
  for (unsigned tile = blockIdx.x / size; tile < call.tiles; tile += gridDim.x / size) {
    const unsigned output_tile = tile % call.tiles_across * size + blockIdx.x % size;
    each(int64_t{tile / call.tiles_across}, int64_t{output_tile} * kChunkRows);
  }
}

BLAQ_DEVICE void fetch_chunks(const Int8Clusters& call, Int8Ring& ring) {
  const int part_bytes = sizeof(RowChunk) / call.size, part = blockIdx.x % call.size * part_bytes;
  RingPlace place;
  for_each_tile(call, [&](int64_t row_tile, int64_t) {
    const auto* from =
        reinterpret_cast<const unsigned char*>(call.product.rows + row_tile * call.product.chunks);
    for (int chunk = 0; chunk < call.product.chunks; ++chunk, from += sizeof(RowChunk)) {
      Barrier& full = ring.full[place.stage];
      wait_for_phase(ring.empty[place.stage], place.parity ^ 1);  // at first at once
      arrive_and_expect(full, sizeof(RowChunk));
      bulk_copy(reinterpret_cast<unsigned char*>(&ring.chunks[place.stage]) + part, from + part,
                part_bytes, full, call.size);
      place.advance();
    }
  });
}

template <int bits>
BLAQ_DEVICE void multiply_chunks(const Int8Clusters& clusters, Int8Ring& ring) {
  const Int8Product& call = clusters.product;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const LevelBytes levels = ring.levels.get();
  const int64_t plane_bytes = call.planes.n * call.planes.row_bytes;
  RingPlace place;
  for_each_tile(clusters, [&](int64_t row_tile, int64_t tile_output) {
    const int64_t output = tile_output + 16 * warp;
    uint32_t words[2][bits], a[2][4][4];
    const uint8_t* const words_of[2] = {call.planes.words_of(output + lane / 4),
                                        call.planes.words_of(output + lane / 4 + 8)};
    const auto load = [&](int chunk) {
#pragma unroll
      for (int o = 0; o < 2; ++o) {
        load_words<bits>(words_of[o], plane_bytes, min(chunk, call.chunks - 1), words[o]);
      }
    };
    const auto decode = [&](uint32_t (&to)[4][4]) {
#pragma unroll
      for (int step = 0; step < 4; ++step) decode_fragment<bits>(words, step, levels, to[step]);
    };
    float total[16][4] = {};
    int sum[16][4];
    load(0);
    decode(a[0]);
    load(1);
    for (int pair = 0; pair < call.chunks; pair += 2) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int chunk = pair + h;
        const RowChunk& rows = ring.chunks[place.stage];
        wait_for_phase(ring.full[place.stage], place.parity);
        begin_products(a[h]);
        const MatrixB b(rows.bytes, sizeof rows.bytes[0], 128);
#pragma unroll
        for (int step = 0; step < 4; ++step) {
          const bool adds = step > 0 || (h == 1 && !ends_each_chunk(call));
          wgmma_m64n128k32_s8(sum, a[h][step], b.moved(step * sizeof rows.bytes[0] * 2), adds);
        }
        commit_products();
        decode(a[1 - h]);
        load(chunk + 2);
        wait_for_products<0>(sum);
        if (h == 1 ? call.group_chunks != 0 : ends_each_chunk(call)) {
          add_sums<true>(call, sum, rows, 0, output, chunk, total);
        } else if (h == 1) {
          add_sums<false>(call, sum, rows, 0, output, chunk, total);
        }
        __syncwarp();
        if (lane < static_cast<int>(clusters.size)) arrive_in_block(ring.empty[place.stage], lane);
        place.advance();
      }
    }
    store_sums(call, total, row_tile * kChunkRows, output, ring.values[warp]);
  });
}

template <int bits>
__global__ void __launch_bounds__(kInt8Threads, 1)
    int8_warpgroup_kernel(const __grid_constant__ Int8Clusters call) {
#if defined(__CUDACC__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
  BLAQ_SM90A("");  // never launched there
#else
  Int8Ring& ring = *dynamic_shared<Int8Ring>();
  if (threadIdx.x == 0) {
    for (int i = 0; i < kInt8Stages; ++i) {
      init_barrier(ring.full[i], 1);
      init_barrier(ring.empty[i], kMultiplying / 32 * call.size);
    }
    fence_barriers();
    ring.levels.put(call.product.levels);
  }
  sync_cluster();
  if (threadIdx.x < kMultiplying) {
    take_registers<240>();
    multiply_chunks<bits>(call, ring);
  } else {
    give_registers<32>();
    if (threadIdx.x == kMultiplying) fetch_chunks(call, ring);
  }
  sync_cluster();
#endif
}

// Clusters of four where they divide the outputs: by count two leave L2 the slowest from 3 bits on.
template <int bits>
void launch_by_warpgroups(const Int8Product& product, Stream stream) {
  Int8Clusters call = {product, product.tiles_across() % 4 == 0 ? 4u : 2u, 0, 0};
  call.tiles_across = (product.tiles_across() + call.size - 1) / call.size;
  call.tiles = call.tiles_across * (product.tiles() / product.tiles_across());
  Grid grid = {call.size, kInt8Threads, sizeof(Int8Ring), call.size};
  const unsigned together = clusters_at_once(int8_warpgroup_kernel<bits>, grid);
  grid.blocks.x = call.size * std::max(1u, std::min(call.tiles, together));
  launch(int8_warpgroup_kernel<bits>, grid, stream, call);
}

}  // namespace blaq
