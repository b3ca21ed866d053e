// torch.ops.blaq.binary_linear on tensor cores: signs of inputs times signs of weights.
//
// Σ of K products of signs = K − 2 · (bits that differ). sm_80 to sm_89 count a ^ b in one instruction
// (256 bits of 16 × 8 pairs); later ones count a & b, so popcount(a ^ b) = popcount(a) + popcount(b)
// − 2 popcount(a & b), where a product with a register of ones counts a weight's bits along the way. From
// sm_100 on that instruction is made of eight int8 products: 0 and 1 in place of −1 and 1, at the same rate.
//
// Weights are the left operand, as binary_repack makes them: words[block][word][8], of 64 inputs and 8
// outputs. A dot product does not care for the order of its inputs, nor a tile for that of its outputs: a
// lane's 16 bytes are the words of two neighbouring outputs, whose halves are the registers of a fragment.
// So every load of a weight is 16 bytes, a warp's are whole lines, and nothing is staged in shared memory.
#pragma once

#include "number_types.h"

namespace blaq {

BLAQ_DEVICE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// y[m, n] = (signs of x[m, k]) · (signs of the weight) · scale + bias.
template <typename Type>
struct BinaryProduct {
  const uint64_t* weight;             // [ceil(n / 8)][ceil(k / 64)][8]; 1 is negative; past k: 0
  const uint64_t* rows;               // [m][ceil(k / 64)], as pack_signs makes them
  const typename Type::Sum* scale;    // [1], [n, 1] or [n, groups]
  const typename Type::Word* bias;    // [n], or null
  typename Type::Word* out;           // [m, n]
  int64_t m, n, k, group_size;        // a group: whole words
  int64_t parts = 1;                  // groups of an output

  __host__ __device__ int64_t words() const { return (k + 63) / 64; }
};

constexpr int kPackThreads = 256;

// bits[m][bytes]: 1 where an input is negative, which −0 and NaN are not; past k: 0. For products of a
// warpgroup the low halves of four words come first, then the high ones.
template <typename Type, bool halves_apart>
__global__ void __launch_bounds__(kPackThreads)
pack_signs_kernel(const typename Type::Word* x, int64_t m, int64_t k, int64_t bytes, uint8_t* bits) {
  using Word = typename Type::Word;
  constexpr int kLoads = sizeof(Word) / 2;  // of 16 bytes, for the 8 inputs of a byte
  const int64_t byte = int64_t{blockIdx.x} * kPackThreads + threadIdx.x, begin = byte * 8;
  if (byte >= bytes) return;
  const int64_t to = halves_apart ? byte / 32 * 32 + byte % 8 / 4 * 16 + byte % 32 / 8 * 4 + byte % 4 : byte;
  for (int64_t row = blockIdx.y; row < m; row += gridDim.y) {
    const Word* from = x + row * k + begin;
    Word inputs[8] = {};
    if (begin + 8 <= k && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
      for (int i = 0; i < kLoads; ++i) {
        reinterpret_cast<uint4*>(inputs)[i] = reinterpret_cast<const uint4*>(from)[i];
      }
    } else {
      for (int i = 0; i < 8 && begin + i < k; ++i) inputs[i] = from[i];
    }
    uint32_t negative = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) negative |= static_cast<uint32_t>(Type::read(inputs[i]) < 0) << i;
    bits[row * bytes + to] = static_cast<uint8_t>(negative);
  }
}

// What a warp multiplies at a time: 16 · kOutputs outputs and 8 · kRows rows. kSplit warps of a block
// share a tile, each with its part of the inputs; or, of 1, four warps have a tile each. With groups,
// products of a part become numbers before those of the next.
template <int outputs, int rows, int split, bool groups>
struct BinaryTile {
  static_assert(split == 1 || !groups);
  static constexpr int kOutputs = outputs, kRows = rows, kSplit = split;
  static constexpr bool kGroups = groups;
  static constexpr int kWarps = 4, kSteps = 4 / outputs;  // whose weights are loaded ahead
  static constexpr int kTileOutputs = 16 * outputs * (split == 1 ? 2 : 1);  // of a block
  static constexpr int kTileRows = 8 * rows * (split == 1 ? 2 : 1);
};

// Bits that differ, of a warp's tile: [i][j][e] is output 2 (g % 4) + e / 2 of block 2 i + g / 4, and row
// 8 j + 2 t + e % 2, for lane 4 g + t.
template <typename Tile, bool exclusive>
struct Differences {
  static constexpr int kI = Tile::kOutputs, kJ = Tile::kRows;
  int count[kI][kJ][4] = {};
  int ones[kI][4] = {};  // of the weight, the same in every column
  int row_ones[kJ] = {}; // of this lane's words of row 8 j + g

  BLAQ_DEVICE void add(const uint4 (&weight)[kI], const uint2 (&rows)[kJ]) {
    constexpr uint32_t kAll[2] = {~0u, ~0u};
#pragma unroll
    for (int i = 0; i < kI; ++i) {
      const uint32_t a[4] = {weight[i].x, weight[i].z, weight[i].y, weight[i].w};
#pragma unroll
      for (int j = 0; j < kJ; ++j) {
        const uint32_t b[2] = {rows[j].x, rows[j].y};
        if constexpr (exclusive) {
          mma_m16n8k256_xor(count[i][j], a, b);
        } else {
          mma_m16n8k256_and(count[i][j], a, b);
        }
      }
      if constexpr (!exclusive) mma_m16n8k256_and(ones[i], a, kAll);
    }
    if constexpr (!exclusive) {
#pragma unroll
      for (int j = 0; j < kJ; ++j) row_ones[j] += __popc(rows[j].x) + __popc(rows[j].y);
    }
  }

  // From common ones to differences.
  BLAQ_DEVICE void finish() {
    if constexpr (exclusive) return;
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j < kJ; ++j) {
      int sum = row_ones[j];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      const int of_column[2] = {__shfl_sync(~0u, sum, 8 * t), __shfl_sync(~0u, sum, 8 * t + 4)};
#pragma unroll
      for (int i = 0; i < kI; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          count[i][j][e] = ones[i][e] + of_column[e % 2] - 2 * count[i][j][e];
        }
      }
    }
  }
};

// Where lane 4 g + t of a warp has its sums: tile i's e-th is that of this output, and of row 2 t + e % 2.
BLAQ_DEVICE int64_t output_of(int64_t block0, int i, int e) {
  const int g = threadIdx.x % 32 / 4;
  return (block0 + 2 * i + g / 4) * 8 + 2 * (g % 4) + e / 2;
}

// Rounded as training rounded the weight.
template <typename Type>
BLAQ_DEVICE typename Type::Sum scale_of(const BinaryProduct<Type>& call, int64_t output, int64_t part) {
  const int64_t at = call.group_size == 0 ? 0 : least(output, call.n - 1) * call.parts + part;
  return Type::read(Type::write(call.scale[at]));
}

// out = value(i, j, e, scale) + bias, two neighbouring outputs of a row at a time.
template <typename Type, int kI, int kJ, typename Value>
BLAQ_DEVICE void write_products(const BinaryProduct<Type>& call, int64_t block0, int64_t row0,
                                const Value& value) {
  using Sum = typename Type::Sum;
  using Word = typename Type::Word;
  struct alignas(2 * sizeof(Word)) Two {
    Word value[2];
  };
  const bool together = call.n % 2 == 0 && reinterpret_cast<uintptr_t>(call.out) % sizeof(Two) == 0;
#pragma unroll
  for (int i = 0; i < kI; ++i) {
    const int64_t output = output_of(block0, i, 0);
    if (output >= call.n) continue;
    const bool has_second = output + 1 < call.n;
    Sum bias[2] = {}, scale[2];
#pragma unroll
    for (int o = 0; o < 2; ++o) {
      if (call.bias && (o == 0 || has_second)) bias[o] = Type::read(call.bias[output + o]);
      scale[o] = scale_of(call, output + o, 0);
    }
#pragma unroll
    for (int j = 0; j < kJ; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int64_t row = row0 + 8 * j + 2 * (threadIdx.x % 4) + e;
        if (row >= call.m) continue;
        Two two;
#pragma unroll
        for (int o = 0; o < 2; ++o) two.value[o] = Type::write(value(i, j, e + 2 * o, scale[o]) + bias[o]);
        Word* to = call.out + row * call.n + output;
        if (together) {
          *reinterpret_cast<Two*>(to) = two;
        } else {
          to[0] = two.value[0];
          if (has_second) to[1] = two.value[1];
        }
      }
    }
  }
}

// Native: what the architecture has; the emulation asks for either.
template <typename Type, typename Tile, bool exclusive_on_host>
__global__ void __launch_bounds__(32 * Tile::kWarps)
binary_product_kernel(const BinaryProduct<Type> call) {
#if defined(__CUDA_ARCH__)
  constexpr bool kExclusive = __CUDA_ARCH__ < 900;
#else
  constexpr bool kExclusive = exclusive_on_host;
#endif
  using Counts = Differences<Tile, kExclusive>;
  using Sum = typename Type::Sum;
  constexpr int kI = Tile::kOutputs, kJ = Tile::kRows, kSteps = Tile::kSteps, kSplit = Tile::kSplit;
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int64_t words = call.words(), blocks = (call.n + 7) / 8;
  const int64_t block0 = int64_t{blockIdx.x} * Tile::kTileOutputs / 8 + (kSplit == 1 ? warp % 2 * 2 * kI : 0);
  const int64_t row0 = int64_t{blockIdx.y} * Tile::kTileRows + (kSplit == 1 ? warp / 2 * 8 * kJ : 0);

  // Past the last output or row, the last: never written.
  const uint4* weight[kI];
  const uint2* rows[kJ];
#pragma unroll
  for (int i = 0; i < kI; ++i) {
    const int64_t block = least(block0 + 2 * i + g / 4, blocks - 1);
    weight[i] = reinterpret_cast<const uint4*>(call.weight + block * words * 8) + g % 4;
  }
#pragma unroll
  for (int j = 0; j < kJ; ++j) {
    rows[j] = reinterpret_cast<const uint2*>(call.rows + least(row0 + 8 * j + g, call.m - 1) * words);
  }
  const auto load = [&](int64_t step, int64_t begin, int64_t end, uint4 (&out)[kI]) {
    const int64_t word = begin + 4 * step + t;
#pragma unroll
    for (int i = 0; i < kI; ++i) out[i] = word < end ? __ldg(weight[i] + word * 4) : make_uint4(0, 0, 0, 0);
  };

  Sum sums[Tile::kGroups ? kI : 1][kJ][4] = {};
  Counts counts;
  for (int64_t part = 0; part < (Tile::kGroups ? call.parts : 1); ++part) {
    const int64_t part_words = Tile::kGroups ? call.group_size / 64 : words;
    const int64_t begin = part * part_words, end = least(begin + part_words, words);
    const int64_t steps = (end - begin + 3) / 4;
    uint4 now[kSteps][kI], next[kSteps][kI];
    int64_t step = kSplit == 1 ? 0 : warp;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) load(step + s * kSplit, begin, end, now[s]);
    for (; step < steps; step += kSteps * kSplit) {
#pragma unroll
      for (int s = 0; s < kSteps; ++s) load(step + (kSteps + s) * kSplit, begin, end, next[s]);
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        const int64_t word = begin + 4 * (step + s * kSplit) + t;
        uint2 bits[kJ];
#pragma unroll
        for (int j = 0; j < kJ; ++j) bits[j] = word < end ? __ldg(rows[j] + word) : make_uint2(0, 0);
        counts.add(now[s], bits);
      }
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
#pragma unroll
        for (int i = 0; i < kI; ++i) now[s][i] = next[s][i];
      }
    }
    counts.finish();
    if constexpr (kSplit > 1) {  // one part: the other warps' counts come over shared memory
      struct Shared {
        int count[kSplit - 1][kI * kJ * 4][32];
      };
      Shared& others = shared<Shared>();
      const int* mine = &counts.count[0][0][0];
      if (warp > 0) {
#pragma unroll
        for (int i = 0; i < kI * kJ * 4; ++i) others.count[warp - 1][i][threadIdx.x % 32] = mine[i];
      }
      __syncthreads();
      if (warp > 0) return;
#pragma unroll
      for (int i = 0; i < kI * kJ * 4; ++i) {
#pragma unroll
        for (int w = 0; w < kSplit - 1; ++w) {
          (&counts.count[0][0][0])[i] += others.count[w][i][threadIdx.x];
        }
      }
    }
    if constexpr (Tile::kGroups) {
      const int64_t inputs = least(call.k - begin * 64, part_words * 64);
#pragma unroll
      for (int i = 0; i < kI; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const Sum scale = scale_of(call, output_of(block0, i, e), part);
#pragma unroll
          for (int j = 0; j < kJ; ++j) {
            sums[i][j][e] += static_cast<Sum>(inputs - 2 * counts.count[i][j][e]) * scale;
          }
        }
      }
      counts = Counts();
    }
  }

  write_products<Type, kI, kJ>(call, block0, row0, [&](int i, int j, int e, Sum scale) {
    return Tile::kGroups ? sums[Tile::kGroups ? i : 0][j][e]
                         : static_cast<Sum>(call.k - 2 * counts.count[i][j][e]) * scale;
  });
}

template <typename Tile, bool exclusive, typename Type>
void launch_binary_product(const BinaryProduct<Type>& call, Stream stream) {
  const auto tiles = [](int64_t n, int64_t tile) { return static_cast<unsigned>((n + tile - 1) / tile); };
  launch(binary_product_kernel<Type, Tile, exclusive>,
         {{tiles(call.n, Tile::kTileOutputs), tiles(call.m, Tile::kTileRows)}, 32 * Tile::kWarps}, stream, call);
}

template <typename Type, bool halves_apart>
void pack_signs(const typename Type::Word* x, int64_t m, int64_t k, int64_t bytes, uint64_t* bits,
                Stream stream) {
  if (bytes == 0) return;
  launch(pack_signs_kernel<Type, halves_apart>,
         {{static_cast<unsigned>((bytes + kPackThreads - 1) / kPackThreads),
           static_cast<unsigned>(std::min<int64_t>(m, 65535))}, kPackThreads},
         stream, x, m, k, bytes, reinterpret_cast<uint8_t*>(bits));
}

// Both launches. `bits` [m, ceil(k / 64)] becomes the rows' signs.
template <typename Type, bool exclusive = false>
void binary_linear(const typename Type::Word* x, uint64_t* bits, BinaryProduct<Type> call, Stream stream) {
  if (call.m == 0 || call.n == 0) return;
  pack_signs<Type, false>(x, call.m, call.k, call.words() * 8, bits, stream);
  call.rows = bits;
  if (call.group_size > 0) call.parts = (call.k + call.group_size - 1) / call.group_size;
  // Few rows: all warps read the weight, which is what there is to read. Many: products bound.
  if (call.parts != 1) return launch_binary_product<BinaryTile<2, 2, 1, true>, exclusive>(call, stream);
  if (call.m <= 8) return launch_binary_product<BinaryTile<1, 1, 4, false>, exclusive>(call, stream);
  if (call.m <= 64) return launch_binary_product<BinaryTile<1, 4, 4, false>, exclusive>(call, stream);
  launch_binary_product<BinaryTile<4, 4, 1, false>, exclusive>(call, stream);
}

}  // namespace blaq
