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
  int turns;              // blocks of input's rows; those with the same outputs are neighbours
  int scale_stride;       // 0: one for all; else scales of a row
  int group_size;         // 0: a scale has the whole row
  uint32_t group_factor, group_shift;  // of group_of
  bool powers;            // levels are 2^-j, and group_size is 0 or a multiple of kScaled
  float level[8];
};

constexpr int kScaled = 64;  // inputs that share a scale where scales multiply sums
constexpr int kMaxRows = 64, kMaxInputs = 1 << 24;

template <int columns>
struct LinearShape {  // columns: tiles of 8 rows of input, at most 4: more registers there are not
  static constexpr int kTiles = 2;           // of 16 outputs, for a warp
  static constexpr int kRows = columns * 8;  // of input, for a block
  // Three bits with 16 rows would spill a little to keep to registers for two blocks.
  static constexpr int least_blocks(int bits) { return bits == 3 && columns == 2; }
  static constexpr int kWarps = columns == 1 ? 16 : 8;
  static constexpr size_t shared_bytes() {
    return sizeof(float) * kWarps * columns * 4 * 32;  // sums of a tile
  }
};

// Which rows of input a block has, and which outputs.
template <int columns>
BLAQ_DEVICE int turn_of_block(const PackedLinear& p) {
  return columns == 4 ? blockIdx.x % p.turns : 0;
}
template <int columns>
BLAQ_DEVICE int outputs_of_block(const PackedLinear& p) {
  return columns == 4 ? blockIdx.x / p.turns : blockIdx.x;
}

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
  static constexpr int kAhead = bits == 3 ? 1 : columns == 1 ? 4 : 2;  // units

  const PackedLinear& p;
  int lane, first_tile, split;
  const uint4* first_unit[kTiles];    // what the lane reads of each tile
  const uint16_t* first_in[columns];  // and of the inputs
  float sum[kTiles][columns][4];

  BLAQ_DEVICE explicit LinearWarp(const PackedLinear& args) : p(args) {
    const int warp = threadIdx.x / 32;
    lane = threadIdx.x % 32;
    split = warp / p.row_warps;
    first_tile = (outputs_of_block<columns>(p) * p.row_warps + warp % p.row_warps) * kTiles;
    // A tile past the last, and a row of input, is the last again; nobody stores it.
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const int64_t place = min(first_tile + tile, p.tiles - 1);
      first_unit[tile] = p.weight + place * p.units * (F::kLoads * 32) + lane;
    }
#pragma unroll
    for (int c = 0; c < columns; ++c) {
      const int of_turn = c * 8 + lane / 4;
      const int64_t row = min(turn_of_block<columns>(p) * Shape::kRows + of_turn, p.m - 1);
      first_in[c] = p.x + row * p.x_stride + lane % 4 * 8;
    }
#pragma unroll
    for (int i = 0; i < kTiles * columns * 4; ++i) sum[i / (columns * 4)][i / 4 % columns][i % 4] = 0;
  }

  BLAQ_DEVICE const uint4* unit_address(int tile, int unit) const {
    return first_unit[tile] + static_cast<int64_t>(unit) * (F::kLoads * 32);
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

  struct Inputs {  // of a unit, as the lane finds them
    const uint16_t* from[columns];
    int left;  // from the lane's first on
  };
  BLAQ_DEVICE Inputs inputs_at(int k) const {
    Inputs in;
#pragma unroll
    for (int c = 0; c < columns; ++c) in.from[c] = first_in[c] + k;
    in.left = p.width - (k + lane % 4 * 8);
    return in;
  }
  // The lane's 8 neighbouring inputs of rows lane / 4 + 8c, of the j-th 32; zeros past the last. Not
  // by the read-only path: the kernel that writes them may have been running when this one began.
  template <int j>
  static BLAQ_DEVICE void load_inputs(uint4 (&x)[columns], const Inputs& in) {
#pragma unroll
    for (int c = 0; c < columns; ++c) x[c] = load_16_if<64 * j>(in.left > 32 * j, in.from[c]);
  }

  // Inputs of the next kWindow pairs of fragments, the pair j at j % kWindow.
  static constexpr int kPairs = F::kFragments / 2;
  static constexpr int kWindow = columns == 1 && kPairs >= 4 ? 4 : 2;
  using Window = uint4[kWindow][columns];

  template <int j = 0>
  static BLAQ_DEVICE void open(Window& x, const Inputs& in) {
    if constexpr (j < kWindow) load_inputs<j>(x[j], in), open<j + 1>(x, in);
  }

  // Fragments of the unit of inputs k from pair j on; each pair's place goes to inputs further on,
  // in this unit or in the next, which begins at `next` and is what `in` is left at.
  template <bool grouped, int j = 0>
  BLAQ_DEVICE void multiply(const Unit& unit, int k, int next, Inputs& in, Window& x,
                            float (&part)[kTiles][columns][4]) {
    if constexpr (j < kPairs) {
      multiply_one<2 * j>(unit, x[j % kWindow], part);
      multiply_one<2 * j + 1>(unit, x[j % kWindow], part);
      constexpr int ahead = j + kWindow;
      if constexpr (ahead == kPairs) in = inputs_at(next);
      load_inputs<ahead % kPairs>(x[j % kWindow], in);
      if constexpr (grouped && j % 2 == 1) add_scaled(part, k + 32 * (j - 1));
      multiply<grouped, j + 1>(unit, k, next, in, x, part);
    }
  }

  template <int f>
  BLAQ_DEVICE void multiply_one(const Unit& unit, const uint4 (&x)[columns],
                                float (&part)[kTiles][columns][4]) {
    if constexpr (bits == 1) {
      choose_one<f>(unit, x, part);
    } else {
      decode_one<f>(unit, x, part);
    }
  }

  template <int f>
  BLAQ_DEVICE void choose_one(const Unit& unit, const uint4 (&x)[columns],
                              float (&part)[kTiles][columns][4]) {
    constexpr uint32_t kOnes = Type::kOne << 16 | Type::kOne;
    const uint32_t ones[4] = {kOnes, kOnes, kOnes, kOnes};
    uint32_t chosen[kTiles];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      chosen[tile] = choices_of<f / 2 % 2 != 0>(word_of(unit.words[tile], f / 4));
    }
#pragma unroll
    for (int c = 0; c < columns; ++c) {
      const uint32_t low = f % 2 ? x[c].z : x[c].x, high = f % 2 ? x[c].w : x[c].y;
      const uint32_t b[4] = {either_sign<Type, false>(low), either_sign<Type, true>(low),
                             either_sign<Type, false>(high), either_sign<Type, true>(high)};
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        mma_m16n8k32_sparse<Type, f % 2>(part[tile][c], ones, b, chosen[tile]);
      }
    }
  }

  template <int f>
  BLAQ_DEVICE void decode_one(const Unit& unit, const uint4 (&x)[columns],
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
    Inputs in = inputs_at(split * F::kInputs);
    open(x, in);
    for (int unit = split; unit < p.units; unit += kAhead * p.splits) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int at = unit + i * p.splits;
        if (at >= p.units) break;
        const int k = at * F::kInputs, next = (at + p.splits) * F::kInputs;
        if constexpr (grouped) {
          multiply<true>(ahead[i], k, next, in, x, part);
        } else {
          multiply<false>(ahead[i], k, next, in, x, sum);
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
        load_inputs<0>(x, inputs_at(k));
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
    const int group = f * 4 / F::kPairs, t = lane % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t* const from = address + (F::owner(f, i, t) - t) * 4;
      uint32_t words[F::kWords];
#pragma unroll
      for (int j = 0; j < F::kWords; ++j) {
        const int word = group * F::kWords + j;
        words[j] = __ldg(from + word / 4 * 128 + word % 4);
      }
      a[i] = 0;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = min(k + i / 2 * 2 + half, p.k - 1);
        const uint32_t code = code_of<bits>(words, F::pair(f, i, t), half);
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
    const int first_row = turn_of_block<columns>(p) * Shape::kRows;
    const int in_rows = min(Shape::kRows, p.m - first_row), block = outputs_of_block<columns>(p);
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
      for (int at = threadIdx.x; at < rows * in_rows; at += blockDim.x) {
        const int column = at / rows, of_block = at % rows, row_warp = of_block / 16, r = of_block % 16;
        const int row = ((block * p.row_warps + row_warp) * kTiles + tile) * 16 + r;
        if (row >= p.n) continue;
        const int slot = (column / 8 * 4 + r / 8 * 2 + column % 2) * 32 + r % 8 * 4 + column % 8 / 2;
        float total = 0;
        for (int s = 0; s < p.splits; ++s) total += shared[(s * p.row_warps + row_warp) * kSlots + slot];
        if (!scaled) total *= rounded<Type>(scale_of(p, row, 0));
        if (p.bias) total += Type::to_float(p.bias[row]);
        p.out[static_cast<int64_t>(first_row + column) * p.n + row] = Type::from_float(total);
      }
    }
  }
};

template <int bits, typename Type, int columns>
__global__ void __launch_bounds__(32 * LinearShape<columns>::kWarps,
                                  LinearShape<columns>::least_blocks(bits))
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

  const int rows = p.row_warps * Warp::kTiles * 16, first_row = outputs_of_block<columns>(p) * rows;
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
  p.turns = (p.m + Shape::kRows - 1) / Shape::kRows;
  const Grid grid = {static_cast<unsigned>((pairs + p.row_warps - 1) / p.row_warps * p.turns),
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
    launch_packed_linear<b, Type, 4>(p, multiprocessors, stream);
  };
  if (bits == 1) of_bits.template operator()<1>();
  if (bits == 2) of_bits.template operator()<2>();
  if (bits == 3) of_bits.template operator()<3>();
  if (bits == 4) of_bits.template operator()<4>();
}

}  // namespace blaq
