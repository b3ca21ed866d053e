#include "cpu/packed_int8.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "cpu/capability.h"
#include "cpu/level_table.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,fma"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target( \
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,fma,prefer-vector-width=512")
#endif

namespace blaq {
namespace {

constexpr int64_t kPrepared = 24 << 10;        // bytes of a tile's tables or digits that stay in L1
constexpr int64_t kMostSegments = 32;          // of a tile
constexpr float kLeast = 1e-30f;               // inputs below which a unit would be subnormal

// The most inputs that share a unit: a divisor of the group, so that a segment has one scale.
int segment_of(int64_t group_size, int most) {
  if (group_size <= 0) return most;
  int segment = most;
  while (group_size % segment != 0) segment -= 32;
  return segment;
}

// What a tile of rows is for every output, chunk by chunk of inputs.
struct Prepared {
  uint8_t* data;        // of row r at r * stride
  int64_t stride;
  float* unit;          // [row][segment]
  int32_t* offset;      // [row][segment]: 128 Σ inputs, which level + 128 counts too much
  int64_t segments;
};

#include "cpu/packed_int8_kernel.h"

// One shape of the kernel. WORDS 4 is the way by levels, whose two digits are one number of 16 bits.
template <int WORDS, int DIGITS>
struct Kernel {
  static constexpr bool kTables = WORDS < 4;
  static constexpr int kInputBytes = kTables ? 4 * WORDS * DIGITS : DIGITS;  // of a prepared input
  static constexpr int kRowsOfTile = 4;
  static constexpr int kSums = DIGITS == 2 && kTables ? 8 : 16;  // that stay in registers
  // Inputs of one unit at most: sums of two inputs in 8 bits are within 1e-2 with fewer.
  static constexpr int kSegment = WORDS == 2 && DIGITS == 1 ? 128 : 256;

  const PackedMatrix& weight;
  const uint8_t* repacked;
  const LevelTable& levels;
  const Coefficients coefficients;  // of tables

  Kernel(const PackedMatrix& weight_, const uint8_t* repacked_, const LevelTable& levels_)
      : weight(weight_), repacked(repacked_), levels(levels_), coefficients(weight.levels, kTables ? WORDS : 1) {}

  // False where the row has no such unit.
  bool prepare(const float* x, int words, int segment_words, uint8_t* data, float* unit,
               int32_t* offset) const {
    constexpr float kMost = DIGITS == 1 ? 127.0f : 32700.0f;
    for (int w = 0; w < words; w += segment_words) {
      const int count = std::min(segment_words, words - w);
      const float most = kTables ? largest_sum<(kTables ? WORDS : 1)>(x + w * 32, count * 32)
                                 : largest(x + w * 32, count * 32);
      const bool zero = most == 0;
      if (!(zero || (most >= kLeast && most <= __FLT_MAX__ / 2))) return false;
      const float inverse = zero ? 0 : kMost / most;
      *unit++ = zero ? 0 : most / kMost * (kTables ? 1 : DIGITS == 1 ? levels.unit : levels.wide_unit);
      uint8_t* to = data + w * 32 * kInputBytes;
      if constexpr (kTables) {
        build_tables<WORDS, DIGITS>(x + w * 32, count, inverse, coefficients, to);
      } else if constexpr (DIGITS == 1) {
        *offset++ = 128 * quantize8(x + w * 32, count, inverse, to);
      } else {
        quantize16(x + w * 32, count, inverse, to);
      }
    }
    return true;
  }

  // totals[r][16 v + lane] += the product over the prepared words, from word0 on.
  template <int MR, int NV>
  void add(const Prepared& tile, int64_t output, int64_t word0, int words, int segment_words,
           float* totals, int64_t totals_stride) const {
    const int64_t step = padded(weight.k) / 32 * WORDS * 64;
    float scale[kMostSegments * 16 * NV];
    if (weight.group_size > 0) group_scales<NV>(output, word0, words, segment_words, scale);
    const Block block{repacked + output / 16 * step + word0 * WORDS * 64, step, tile.data, tile.stride, words,
                      segment_words, tile.unit, tile.offset, tile.segments,
                      weight.group_size > 0 ? scale : nullptr, totals, totals_stride};
    if constexpr (kTables) {
      add_tables<WORDS, DIGITS, MR, NV>(block);
    } else {
      add_levels<DIGITS == 2, MR, NV>(block, levels);
    }
  }

  // Scales of 16 NV outputs, segment by segment.
  template <int NV>
  void group_scales(int64_t output, int64_t word0, int words, int segment_words, float* scale) const {
    const int64_t groups = (weight.k + weight.group_size - 1) / weight.group_size;
    for (int w = 0; w < words; w += segment_words) {
      const int64_t group = (word0 + w) * 32 / weight.group_size;
      for (int i = 0; i < 16 * NV; ++i) {
        const int64_t n = std::min(output + i, weight.n - 1);
        *scale++ = rounded(weight.scale[n * groups + group], weight.round_scale);
      }
    }
  }

  template <int MR>
  void add_outputs(const Prepared& tile, int64_t begin, int64_t end, int64_t word0, int words,
                   int segment_words, float* totals, int64_t stride) const {
    constexpr int kWide = MR == 1 && DIGITS == 1 ? 8 : std::min(4, kSums / MR);
    int64_t n = begin;
    for (; n + 16 * kWide <= end; n += 16 * kWide) {
      add<MR, kWide>(tile, n, word0, words, segment_words, totals + n - begin, stride);
    }
    for (; n < end; n += 16) add<MR, 1>(tile, n, word0, words, segment_words, totals + n - begin, stride);
  }

  bool run(const Product& product, Buffer& buffer, Buffer& totals_buffer) const {
    const int64_t words = product.row_stride / 32, width = (product.end - product.begin + 15) / 16 * 16;
    const int segment_words = segment_of(weight.group_size, kSegment) / 32;
    const int rows = std::min(product.count, kRowsOfTile);
    int64_t chunk = kPrepared / (32 * kInputBytes * rows) / segment_words * segment_words;
    chunk = std::clamp<int64_t>(chunk, segment_words, kMostSegments * segment_words);
    chunk = std::min(chunk, words);
    const int64_t segments = (chunk + segment_words - 1) / segment_words;
    Prepared tile;
    tile.stride = (chunk * 32 * kInputBytes + 63) / 64 * 64;
    tile.segments = segments;
    float* memory = buffer.take((tile.stride * kRowsOfTile) / 4 + 2 * segments * kRowsOfTile);
    tile.data = reinterpret_cast<uint8_t*>(memory);
    tile.unit = memory + tile.stride * kRowsOfTile / 4;
    tile.offset = reinterpret_cast<int32_t*>(tile.unit + segments * kRowsOfTile);
    float* totals = totals_buffer.take(product.count * width);
    std::memset(totals, 0, product.count * width * sizeof(float));
    for (int r = 0; r < product.count; r += kRowsOfTile) {
      const int count = std::min(product.count - r, kRowsOfTile);
      for (int64_t word = 0; word < words; word += chunk) {
        const int now = static_cast<int>(std::min(chunk, words - word));
        for (int i = 0; i < count; ++i) {
          const float* x = product.rows + (r + i) * product.row_stride + word * 32;
          if (!prepare(x, now, segment_words, tile.data + i * tile.stride, tile.unit + i * segments,
                       tile.offset + i * segments)) {
            return false;
          }
        }
        const auto add_rows = [&](auto mr) {
          if (count == mr) {
            add_outputs<mr>(tile, product.begin, product.begin + width, word, now, segment_words,
                            totals + r * width, width);
          }
        };
        add_rows(std::integral_constant<int, 1>{});
        add_rows(std::integral_constant<int, 2>{});
        add_rows(std::integral_constant<int, 3>{});
        add_rows(std::integral_constant<int, 4>{});
      }
    }
    finish(product, totals, width);
    return true;
  }

  void finish(const Product& product, const float* totals, int64_t width) const {
    const int64_t count = product.end - product.begin;
    for (int r = 0; r < product.count; ++r) {
      float* __restrict out = product.out + r * product.out_stride;
      const float* __restrict from = totals + r * width;
      if (weight.group_size == -1) {
        const float* scale = weight.scale + product.begin;
        for (int64_t i = 0; i < count; ++i) out[i] = from[i] * rounded(scale[i], weight.round_scale);
      } else {
        const float scale = weight.group_size == 0 ? rounded(*weight.scale, weight.round_scale) : 1.0f;
        for (int64_t i = 0; i < count; ++i) out[i] = from[i] * scale;
      }
      if (weight.bias) {
        const float* __restrict bias = weight.bias + product.begin;
        for (int64_t i = 0; i < count; ++i) out[i] += bias[i];
      }
    }
  }
};

template <int WORDS, int DIGITS>
bool run(const PackedMatrix& weight, const uint8_t* repacked, const LevelTable& levels,
         const Product& product) {
  thread_local Buffer prepared, totals;
  return Kernel<WORDS, DIGITS>(weight, repacked, levels).run(product, prepared, totals);
}

bool try_int8(const PackedMatrix& weight, const uint8_t* repacked, Accuracy accuracy,
                   const Product& product) {
  const LevelTable levels(weight.levels, weight.bits);
  const bool high = accuracy == Accuracy::high;
  const auto call = weight.bits == 1   ? (high ? run<1, 2> : run<1, 1>)
                    : weight.bits == 2 ? (high ? run<2, 2> : run<2, 1>)
                                       : (high ? run<4, 2> : run<4, 1>);
  return call(weight, repacked, levels, product);
}

}  // namespace

}  // namespace blaq

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace blaq {

void multiply_int8(const PackedMatrix& weight, const uint8_t* repacked, Accuracy accuracy,
                   const Product& product) {
  if (try_int8(weight, repacked, accuracy, product)) return;
  Product one = product;
  one.count = 1;
  for (int r = 0; r < product.count; ++r) {
    if (!try_int8(weight, repacked, accuracy, one)) multiply_rows(weight, one);
    one.rows += product.row_stride, one.out += product.out_stride;
  }
}

bool processor_has_int8() {
  return __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
}

bool has_int8(const PackedMatrix& weight, Accuracy accuracy) {
  static const bool here = processor_has_int8();
  // A code that no level has is NaN, which integers do not know.
  const bool whole_book = std::all_of(weight.levels, weight.levels + (1 << weight.bits),
                                      [](float level) { return level == level; });
  const bool whole_words = weight.group_size <= 0 || weight.group_size % 32 == 0;
  return here && capability() == Capability::avx512 && accuracy != Accuracy::exact && whole_words && whole_book &&
         weight.round_weight == Rounding::none &&
         (weight.bits <= 2 || accuracy == Accuracy::fast ||
          LevelTable(weight.levels, weight.bits).exact);
}

}  // namespace blaq

#else

namespace blaq {

bool processor_has_int8() { return false; }
bool has_int8(const PackedMatrix&, Accuracy) { return false; }
void multiply_int8(const PackedMatrix&, const uint8_t*, Accuracy, const Product&) {}

}  // namespace blaq

#endif
