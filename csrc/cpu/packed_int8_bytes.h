// The inner loops of 8-bit arithmetic where no instruction multiplies and accumulates bytes by itself into
// 32 bits for a look-up's result: AVX2 and NEON. See packed_int8_driver.h for what a block is.

// Nearest integers, ties to even, of what is below 2^22: all that has a unit is.
inline Ints nearest(Floats x) {
  const Floats shift = broadcast(12582912.0f);
  return (Ints)(x + shift) - (Ints)shift;
}

inline Ints magnitude_bits(Floats x) { return (Ints)x & 0x7fffffff; }

// Of magnitudes' bits, which order as the magnitudes do; NaN's are above all others.
inline Ints larger_bits(Ints a, Ints b) { return a > b ? a : b; }

inline float largest_lane(Ints x) {
  int32_t most = x[0];
  for (int l = 1; l < kLanes; ++l) most = std::max(most, static_cast<int32_t>(x[l]));
  return std::bit_cast<float>(most);
}

inline Floats magnitude(Floats x) { return (Floats)magnitude_bits(x); }

#include "cpu/packed_int8_bytes_isa.h"

template <int WORDS, int DIGITS>
constexpr int kRowsOfTile = WORDS < 4 && DIGITS == 2 ? 2 : 4;
template <int WORDS, int DIGITS, int MR>
constexpr int kVectors = WORDS < 4 ? (MR == 1 ? 4 : kBytes / 16) : MR == 1 ? 2 : 1;
// Sums of two inputs in 8 bits, or two that share 8 bits, are within 1e-2 with fewer.
template <int WORDS, int DIGITS, bool WIDE>
constexpr int kSegment = DIGITS == 1 && (WORDS == 2 || (WORDS == 4 && WIDE)) ? 128 : 256;

// The largest sum that a digit can make of its inputs' magnitudes, 4i + p + WORDS · j.
template <int WORDS>
inline float largest_sum(const float* x, int count) {
  Ints most = {};
  for (int i = 0; i < count; i += kLanes) {
    Floats a = magnitude(load(x + i));
    if (WORDS == 1) a += swap_pairs<1>(a);
    most = larger_bits(most, (Ints)(a + swap_pairs<2>(a)));
  }
  return largest_lane(most);
}

// Levels by the sums of a digit's inputs.
struct Coefficients {
  alignas(64) float of[4][16];

  Coefficients(const float* levels, int words) {
    for (int j = 0; j < 4; ++j) {
      for (int e = 0; e < 16; ++e) of[j][e] = levels[e >> (j * words & 3) & ((1 << words) - 1)];
    }
  }
};

// Tables of a segment: for each word and each of its registers 128 bytes, the even digits' and the odd
// digits'; of two 8-bit digits first the high, then the low. Entries are 128 too large, so not negative.
template <int WORDS, int DIGITS>
void build_tables(const float* x, int words, float inverse, const Coefficients& coefficients,
                  uint8_t* tables) {
  constexpr int kTerms = 4 / WORDS, kParts = 16 / kLanes;
  Floats c[kTerms][kParts];
  for (int j = 0; j < kTerms; ++j) {
    for (int part = 0; part < kParts; ++part) {
      c[j][part] = load(coefficients.of[j] + part * kLanes) * inverse;
    }
  }
  for (int w = 0; w < words; ++w, x += 32) {
    for (int p = 0; p < WORDS; ++p, tables += 128 * DIGITS) {
      for (int i = 0; i < 8; ++i) {
        uint8_t* to = tables + (i & 1) * 64 * DIGITS + (i / 2) * 16;
        for (int part = 0; part < kParts; ++part) {
          Floats sum = c[0][part] * broadcast(x[4 * i + p]);
          for (int j = 1; j < kTerms; ++j) {
            sum = multiply_add(c[j][part], broadcast(x[4 * i + p + WORDS * j]), sum);
          }
          const Ints entries = nearest(sum);
          const Ints first = DIGITS == 1 ? entries : entries >> 8;
          store_bytes(to + part * kLanes, (Words)(first + 128));
          if (DIGITS == 2) store_bytes(to + 64 + part * kLanes, (Words)entries & 255);
        }
      }
    }
  }
}

// totals += unit · scale · sum: of segment s and kLanes outputs from `at` on.
[[gnu::always_inline]] inline void add_segment(const Block& block, int64_t s, int r, int nv, int at, Ints sum) {
  Floats by = broadcast(block.unit[r * block.segments + s]);
  if (block.scale) by *= load(block.scale + s * 16 * nv + at);
  float* total = block.totals + r * block.totals_stride + at;
  store(total, multiply_add(__builtin_convertvector(sum, Floats), by, load(total)));
}

template <int WORDS, int DIGITS, int MR, int NV>
[[gnu::noinline]] void add_tables(const Block& block) {
  constexpr int kRegisters = (16 * NV + kBytes - 1) / kBytes;
  constexpr int kSecond = kBytes == 32 && NV > 1;  // of 16 outputs, where a register has 32
  const uint8_t *weights = block.weights, *tables = block.data;
  for (int word = 0, s = 0; word < block.words; word += block.segment_words, ++s) {
    Sums sums[DIGITS][MR][kRegisters] = {};
    const int count = std::min(block.segment_words, block.words - word) * WORDS;
    for (int w = 0; w < count; ++w, weights += 64, tables += 128 * DIGITS) {
      Bytes plane[kRegisters][4];
#pragma GCC unroll 4
      for (int v = 0; v < kRegisters; ++v) {
        const uint8_t* from = weights + v * (kBytes / 16) * block.step;
        load_planes(from, from + kSecond * block.step, plane[v]);
      }
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          Bytes index[kRegisters];
#pragma GCC unroll 4
          for (int v = 0; v < kRegisters; ++v) index[v] = half ? high_digits(plane[v][j]) : low_digits(plane[v][j]);
#pragma GCC unroll 4
          for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 2
            for (int d = 0; d < DIGITS; ++d) {
              const Bytes table = load_table(tables + r * block.stride + (half * DIGITS + d) * 64 + j * 16);
#pragma GCC unroll 4
              for (int v = 0; v < kRegisters; ++v) sums[d][r][v].add(look_up(table, index[v]));
            }
          }
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kRegisters; ++v) {
        Ints sum[kBytes / kLanes], rest[kBytes / kLanes];
        sums[0][r][v].outputs(sum);
        if (DIGITS == 2) sums[DIGITS - 1][r][v].outputs(rest);
#pragma GCC unroll 8
        for (int i = 0; i < 16 * NV / kRegisters / kLanes; ++i) {
          Ints total = sum[i] - 128 * 8 * count;
          if (DIGITS == 2) total = (total << 8) + rest[i];
          add_segment(block, s, r, NV, v * kBytes + i * kLanes, total);
        }
      }
    }
  }
}

template <int WORDS, int DIGITS>
class Tables {
 public:
  static constexpr int kInputBytes = 4 * WORDS * DIGITS;
  static constexpr int64_t kPrepared = 24 << 10;  // stays in the L1 cache
  static constexpr float kMost = DIGITS == 1 ? 127.0f : 32700.0f;

  explicit Tables(const float* levels) : coefficients_(levels, WORDS) {}
  static float largest(const float* x, int count) { return largest_sum<WORDS>(x, count); }
  void build(const float* x, int words, float inverse, uint8_t* tables) const {
    build_tables<WORDS, DIGITS>(x, words, inverse, coefficients_, tables);
  }
  template <int MR, int NV>
  static void add(const Block& block) {
    add_tables<WORDS, DIGITS, MR, NV>(block);
  }

 private:
  Coefficients coefficients_;
};

// Inputs of a segment as integers in the order that digits have them. Returns what the levels' zero adds.
template <int DIGITS>
int32_t quantize(const float* x, int words, float inverse, const Levels& levels, uint8_t* out) {
  Ints sum = {};
  for (int w = 0; w < words; ++w, x += 32, out += 32 * DIGITS) {
    alignas(64) int32_t whole[32];
    for (int i = 0; i < 32; i += kLanes) {
      const Ints y = nearest(load(x + i) * inverse);
      std::memcpy(whole + i, &y, sizeof y);
      sum += y;
    }
    put_inputs<DIGITS>(whole, out);
  }
  int32_t total = 0;
  for (int l = 0; l < kLanes; ++l) total += sum[l];
  return levels.zero * total;
}

template <int DIGITS, bool WIDE, int MR, int NV>
[[gnu::noinline]] void add_levels(const Block& block, const Levels& table) {
  using Multiply = Products<DIGITS, WIDE>;
  constexpr int kRegisters = NV * 64 / kBytes, kRun = Multiply::kRun;  // digits whose products share a register
  const Multiply products(table);
  const uint8_t *weights = block.weights, *inputs = block.data;
  for (int word = 0, s = 0; word < block.words; word += block.segment_words, ++s) {
    Ints sums[MR][kRegisters] = {};
    const int count = std::min(block.segment_words, block.words - word);
    for (int w = 0; w < count * 8 / kRun; ++w, weights += 32 * kRun, inputs += 4 * DIGITS * kRun) {
#pragma GCC unroll 8
      for (int v = 0; v < kRegisters; ++v) {
        const uint8_t* from = weights + v / (64 / kBytes) * block.step + v % (64 / kBytes) * kBytes;
        typename Multiply::Register levels[kRun];
#pragma GCC unroll 4
        for (int i = 0; i < kRun; i += 2) {
          const Bytes digits = load_bytes_of(from + i * 32);
          levels[i] = products.levels(low_digits(digits));
          levels[i + 1] = products.levels(high_digits(digits));
        }
#pragma GCC unroll 4
        for (int r = 0; r < MR; ++r) {
          Ints& sum = sums[r][v];
          sum = products.add(levels, inputs + r * block.stride, sum);
          settle(sum);
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kRegisters; ++v) {
        add_segment(block, s, r, NV, v * kLanes, sums[r][v] - block.offset[r * block.segments + s]);
      }
    }
  }
}
