// torch.ops.blaq.packed_linear for at most 64 rows of input, from a repacked weight (fragments.h).
//
// A warp multiplies kTiles tiles of 16 outputs by all rows, over every `splits`-th unit of inputs.
// It asks for its first kAhead units at once, before it waits for the kernel that made the input;
// inputs come straight from global memory in the order of the fragments, and through L1 serve the
// block's other warps. Warps of the same outputs then add up in shared memory, in one order, and
// store once.
//
// Scales: where the codebook is powers of two, round(level × scale) = level × round(scale) unless
// that is subnormal or overflows, so scales multiply sums, of a row or of 64 inputs of a group; a
// block looks at its scales first. Otherwise, and for other codebooks and groups, each weight is
// made from its level and its scale, as reference.py has it.
#pragma once

#include "fragments.h"

namespace blaq {

struct PackedLinear {
  const uint16_t* x;  // [m, width], x_stride between rows, which begin at multiples of 16 bytes
  const uint4* weight;
  const float* scale;  // [n, groups], or one
  const uint16_t* bias;
  uint16_t* out;  // [m, n]
  uint32_t x_stride;
  int m, n, k, width;  // k below 2^24; width: k up to a multiple of 8, zeros past k
  int units, tiles;       // of inputs, of 16 outputs
  int row_warps, splits;  // of a block: warps side by side over outputs, and over inputs
  int scale_stride;       // 0: one for all; else scales of a row
  int group_size;         // 0: a scale has the whole row
  uint32_t group_factor, group_shift;  // of group_of
  bool powers;            // levels are 2^-j, and group_size is 0 or a multiple of kScaled
  float level[8];
};

constexpr int kScaled = 64;  // inputs that share a scale where scales multiply sums
constexpr int kMaxRows = 64, kMaxInputs = 1 << 24;

template <int columns>
struct LinearShape {  // columns: tiles of 8 rows of input
  static constexpr int kTiles = columns == 8 ? 1 : 2;  // of 16 outputs, for a warp
  static constexpr int kWarps = columns == 1 ? 16 : 8;
  static constexpr size_t shared_bytes() {
    return sizeof(float) * kWarps * columns * 4 * 32;  // sums of a tile
  }
};

BLAQ_DEVICE float scale_of(const PackedLinear& p, int row, int group) {
  return p.scale[static_cast<int64_t>(min(row, p.n - 1)) * p.scale_stride + group];
}

// k / group_size, for multiples of kScaled below kMaxInputs, without a division: 24-bit numbers
// times the factor rounded up are exact (Granlund and Montgomery, PLDI 1994).
inline void plan_groups(PackedLinear& p) {
  if (p.group_size < kScaled) return;
  const int size = p.group_size / kScaled;
  int log2 = 0;
  while (1 << log2 < size) ++log2;
  p.group_shift = 24 + log2;
  p.group_factor = static_cast<uint32_t>(((1ull << p.group_shift) + size - 1) / size);
}

BLAQ_DEVICE int group_of(const PackedLinear& p, int k) {
  return static_cast<int>(static_cast<uint64_t>(k / kScaled) * p.group_factor >> p.group_shift);
}

// Whether round(level × scale) is level × round(scale) for every power of two of the codebook.
template <int bits, typename Type>
BLAQ_DEVICE bool scales_sums(float scale) {
  constexpr float kLowest = 1.0f / (1 << (Fragments<bits>::kLevels - 1));
  return bits == 1 || (scale * kLowest >= Type::kSmallest && scale <= Type::kLargest);
}

template <typename Type>
BLAQ_DEVICE float rounded(float x) { return Type::to_float(Type::from_float(x)); }

template <int bits, typename Type, int columns>
struct LinearWarp {
  using F = Fragments<bits>;
  using Shape = LinearShape<columns>;
  static constexpr int kTiles = Shape::kTiles;
  static constexpr int kAhead = bits == 3 || columns == 8 ? 1 : columns == 1 ? 4 : 2;  // units

  const PackedLinear& p;
  int lane, first_tile, split;
  float sum[kTiles][columns][4];

  BLAQ_DEVICE explicit LinearWarp(const PackedLinear& args) : p(args) {
    const int warp = threadIdx.x / 32;
    lane = threadIdx.x % 32;
    split = warp / p.row_warps;
    first_tile = (blockIdx.x * p.row_warps + warp % p.row_warps) * kTiles;
#pragma unroll
    for (int i = 0; i < kTiles * columns * 4; ++i) sum[i / (columns * 4)][i / 4 % columns][i % 4] = 0;
  }

  // A tile past the last is the last again; nobody stores it.
  BLAQ_DEVICE const uint4* unit_address(int tile, int unit) const {
    const int64_t at = static_cast<int64_t>(min(first_tile + tile, p.tiles - 1)) * p.units + unit;
    return p.weight + at * (F::kLoads * 32) + lane;
  }

  struct Unit {
    uint4 words[kTiles][F::kLoads];
  };

  BLAQ_DEVICE void load(Unit& to, int unit) const {
    if (unit >= p.units) return;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < F::kLoads; ++i) {
        to.words[tile][i] = load_stream(unit_address(tile, unit) + i * 32);
      }
    }
  }

  // The lane's 8 neighbouring inputs of rows lane / 4 + 8c; zeros past the last of both. Not by the
  // read-only path: the kernel that writes them may have been running when this one began.
  BLAQ_DEVICE void load_inputs(uint4 (&x)[columns], int k) const {
    const int at = k + lane % 4 * 8;
#pragma unroll
    for (int c = 0; c < columns; ++c) {
      const int row = c * 8 + lane / 4;
      x[c] = load_16_if(row < p.m && at < p.width,
                        p.x + (static_cast<uint32_t>(row) * p.x_stride + at));
    }
  }

  // Inputs of the next kWindow pairs of fragments, the pair j at j % kWindow.
  static constexpr int kPairs = F::kFragments / 2;
  static constexpr int kWindow = columns == 1 && kPairs >= 4 ? 4 : 2;
  using Window = uint4[kWindow][columns];

  BLAQ_DEVICE void open(Window& x, int k) const {
#pragma unroll
    for (int j = 0; j < kWindow; ++j) load_inputs(x[j], k + 32 * j);
  }

  // Fragments of the unit of inputs k from pair j on; each pair's place goes to inputs further on,
  // in this unit or in the next, which begins at `next`.
  template <bool grouped, int j = 0>
  BLAQ_DEVICE void multiply(const Unit& unit, int k, int next, Window& x,
                            float (&part)[kTiles][columns][4]) {
    if constexpr (j < kPairs) {
      multiply_one<2 * j>(unit, x[j % kWindow], part);
      multiply_one<2 * j + 1>(unit, x[j % kWindow], part);
      constexpr int ahead = j + kWindow;
      load_inputs(x[j % kWindow], ahead < kPairs ? k + 32 * ahead : next + 32 * (ahead - kPairs));
      if constexpr (grouped && j % 2 == 1) add_scaled(part, k + 32 * (j - 1));
      multiply<grouped, j + 1>(unit, k, next, x, part);
    }
  }

  template <int f>
  BLAQ_DEVICE void multiply_one(const Unit& unit, const uint4 (&x)[columns],
                                float (&part)[kTiles][columns][4]) {
    constexpr int kGroup = f * 4 / F::kPairs, kPair = f * 4 % F::kPairs;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      uint32_t words[F::kWords];
#pragma unroll
      for (int i = 0; i < F::kWords; ++i) words[i] = word_of(unit.words[tile], kGroup * F::kWords + i);
      const uint32_t a[4] = {
          powers_of<bits, Type, kPair>(words), powers_of<bits, Type, kPair + 1>(words),
          powers_of<bits, Type, kPair + 2>(words), powers_of<bits, Type, kPair + 3>(words)};
#pragma unroll
      for (int c = 0; c < columns; ++c) {
        const uint32_t b[2] = {f % 2 ? x[c].z : x[c].x, f % 2 ? x[c].w : x[c].y};
        mma_m16n8k16<Type>(part[tile][c], a, b);
      }
    }
  }

  static BLAQ_DEVICE uint32_t word_of(const uint4 (&loads)[F::kLoads], int word) {
    const uint4& v = loads[word / 4];
    return word % 4 == 0 ? v.x : word % 4 == 1 ? v.y : word % 4 == 2 ? v.z : v.w;
  }

  // The sums of one group of inputs, by its scales.
  BLAQ_DEVICE void add_scaled(float (&part)[kTiles][columns][4], int k) {
    const int group = group_of(p, min(k, p.k - 1) & -kScaled);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = (first_tile + tile) * 16 + lane / 4 + half * 8;
        const float scale = rounded<Type>(scale_of(p, row, group));
#pragma unroll
        for (int c = 0; c < columns; ++c) {
#pragma unroll
          for (int i = half * 2; i < half * 2 + 2; ++i) {
            sum[tile][c][i] = fmaf(scale, part[tile][c][i], sum[tile][c][i]);
            part[tile][c][i] = 0;
          }
        }
      }
    }
  }

  template <bool grouped>
  BLAQ_DEVICE void powers(Unit (&ahead)[kAhead]) {
    float part[kTiles][columns][4] = {};
    Window x;
    open(x, split * F::kInputs);
    for (int unit = split; unit < p.units; unit += kAhead * p.splits) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int at = unit + i * p.splits;
        if (at >= p.units) break;
        const int k = at * F::kInputs, next = (at + p.splits) * F::kInputs;
        if constexpr (grouped) {
          multiply<true>(ahead[i], k, next, x, part);
        } else {
          multiply<false>(ahead[i], k, next, x, sum);
        }
        load(ahead[i], at + kAhead * p.splits);
      }
    }
  }

  // Any codebook, any group: every weight by its own level and scale, read again word by word.
  BLAQ_DEVICE void weights(const float* levels) {
#pragma unroll 1
    for (int unit = split; unit < p.units; unit += p.splits) {
#pragma unroll 1
      for (int f = 0; f < F::kFragments; ++f) {
        const int k = unit * F::kInputs + f / 2 * 32;
        uint4 x[columns];
        load_inputs(x, k);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          uint32_t a[4];
          made(a, reinterpret_cast<const uint32_t*>(unit_address(tile, unit)), f,
               (first_tile + tile) * 16 + lane / 4, k + lane % 4 * 8 + f % 2 * 4, levels);
#pragma unroll
          for (int c = 0; c < columns; ++c) {
            const uint32_t b[2] = {f % 2 ? x[c].z : x[c].x, f % 2 ? x[c].w : x[c].y};
            mma_m16n8k16<Type>(sum[tile][c], a, b);
          }
        }
      }
    }
  }

  BLAQ_DEVICE void made(uint32_t (&a)[4], const uint32_t* address, int f, int row, int k,
                        const float* levels) const {
    const int group = f * 4 / F::kPairs;
    uint32_t words[F::kWords];
#pragma unroll
    for (int i = 0; i < F::kWords; ++i) {
      const int word = group * F::kWords + i;
      words[i] = __ldg(address + word / 4 * 128 + word % 4);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      a[i] = 0;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = min(k + i / 2 * 2 + half, p.k - 1);
        const uint32_t code = code_of<bits>(words, f * 4 % F::kPairs + i, half);
        const int scales = p.group_size ? at / p.group_size : 0;
        const float weight = levels[code] * scale_of(p, row + i % 2 * 8, scales);
        a[i] |= static_cast<uint32_t>(Type::from_float(weight)) << 16 * half;
      }
    }
  }

  // Adds the sums of warps of the same outputs and stores them. `scaled`: scales are in already.
  BLAQ_DEVICE void store(float* shared, bool scaled) const {
    constexpr int kSlots = columns * 4 * 32;
    const int warp = threadIdx.x / 32, rows = p.row_warps * 16;
    for (int tile = 0; tile < kTiles; ++tile) {
      __syncthreads();
#pragma unroll
      for (int i = 0; i < columns * 4; ++i) {
        float value = 0;
#pragma unroll
        for (int t = 0; t < kTiles; ++t) value = t == tile ? sum[t][i / 4][i % 4] : value;
        shared[warp * kSlots + i * 32 + lane] = value;
      }
      __syncthreads();
      for (int at = threadIdx.x; at < rows * min(columns * 8, p.m); at += blockDim.x) {
        const int column = at / rows, of_block = at % rows, row_warp = of_block / 16, r = of_block % 16;
        const int row = ((blockIdx.x * p.row_warps + row_warp) * kTiles + tile) * 16 + r;
        if (row >= p.n) continue;
        const int slot = (column / 8 * 4 + r / 8 * 2 + column % 2) * 32 + r % 8 * 4 + column % 8 / 2;
        float total = 0;
        for (int s = 0; s < p.splits; ++s) total += shared[(s * p.row_warps + row_warp) * kSlots + slot];
        if (!scaled) total *= rounded<Type>(scale_of(p, row, 0));
        if (p.bias) total += Type::to_float(p.bias[row]);
        p.out[static_cast<int64_t>(column) * p.n + row] = Type::from_float(total);
      }
    }
  }
};

template <int bits, typename Type, int columns>
__global__ void __launch_bounds__(32 * LinearShape<columns>::kWarps)
    packed_linear_kernel(const __grid_constant__ PackedLinear p) {
  using Warp = LinearWarp<bits, Type, columns>;
  launch_dependents();
  Warp warp(p);
  typename Warp::Unit ahead[Warp::kAhead];
  if (p.powers) {
#pragma unroll
    for (int i = 0; i < Warp::kAhead; ++i) warp.load(ahead[i], warp.split + i * p.splits);
  }
  struct Levels {
    float level[16];
  };
  float* levels = shared<Levels>().level;
  if (threadIdx.x < 1 << bits) {
    const float level = p.level[threadIdx.x % Fragments<bits>::kLevels];
    levels[threadIdx.x] = threadIdx.x < Fragments<bits>::kLevels ? level : -level;
  }
  wait_for_dependencies();

  const int rows = p.row_warps * Warp::kTiles * 16, first_row = blockIdx.x * rows;
  bool by_sums = p.powers;
  if (bits > 1 && p.powers) {
    const int scales = p.scale_stride ? min(rows, p.n - first_row) * p.scale_stride : 1;
    const float* scale = p.scale + static_cast<int64_t>(first_row) * p.scale_stride;
    for (int i = threadIdx.x; i < scales; i += blockDim.x) {
      by_sums = by_sums && scales_sums<bits, Type>(scale[i]);
    }
  }
  by_sums = __syncthreads_and(by_sums);
  const bool grouped = p.group_size > 0;
  if (!by_sums) {
    warp.weights(levels);
  } else if (grouped) {
    warp.template powers<true>(ahead);
  } else {
    warp.template powers<false>(ahead);
  }
  warp.store(dynamic_shared<float>(), grouped || !by_sums);
}

// Chooses a block's shape: as many warps over outputs as leave a block for every multiprocessor.
template <int bits, typename Type, int columns>
void launch_packed_linear(PackedLinear p, int multiprocessors, Stream stream) {
  using Shape = LinearShape<columns>;
  const int pairs = (p.tiles + Shape::kTiles - 1) / Shape::kTiles;
  p.row_warps = 1;
  while (p.row_warps < Shape::kWarps / 2 && (pairs + p.row_warps - 1) / p.row_warps > multiprocessors) {
    p.row_warps *= 2;
  }
  p.splits = Shape::kWarps / p.row_warps;
  const Grid grid = {static_cast<unsigned>((pairs + p.row_warps - 1) / p.row_warps),
                     32 * Shape::kWarps, Shape::shared_bytes()};
  launch_after(packed_linear_kernel<bits, Type, columns>, grid, stream, p);
}

// p.m at most kMaxRows; bits 1 to 4. Fills in what the arguments above imply.
template <typename Type>
void packed_linear(PackedLinear p, int bits, bool levels_are_powers, int multiprocessors, Stream stream) {
  p.powers = levels_are_powers && (p.group_size == 0 || p.group_size % kScaled == 0);
  plan_groups(p);
  p.tiles = (p.n + 15) / 16;
  const auto of_bits = [&]<int b>() {
    p.units = static_cast<int>(Fragments<b>::units(p.k));
    if (p.m <= 8) return launch_packed_linear<b, Type, 1>(p, multiprocessors, stream);
    if (p.m <= 16) return launch_packed_linear<b, Type, 2>(p, multiprocessors, stream);
    if (p.m <= 32) return launch_packed_linear<b, Type, 4>(p, multiprocessors, stream);
    launch_packed_linear<b, Type, 8>(p, multiprocessors, stream);
  };
  if (bits == 1) of_bits.template operator()<1>();
  if (bits == 2) of_bits.template operator()<2>();
  if (bits == 3) of_bits.template operator()<3>();
  if (bits == 4) of_bits.template operator()<4>();
}

}  // namespace blaq
