#include "cpu/packed_matmul.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>

#include "codebook.h"

namespace blaq {

struct Workspace {
  Buffer data, panel, scale_at;
};

}  // namespace blaq

#define BLAQ_KERNEL_FILE "cpu/packed_matmul_kernel.h"
#include "cpu/foreach_isa.h"

namespace blaq {
namespace {

// Tables of a row of inputs pay from this many outputs on, for each bit (measured on 3 x 3
// kernels).
constexpr int64_t kTableOutputs = 20;

// Whether round(level × scale) = level × round(scale) for every level and scale.
bool rounds_with_its_scale(const std::vector<double>& levels, Rounding rounding) {
  int exponent;
  const auto is_power = [&](double level) {
    return level == 0 || std::frexp(level, &exponent) == 0.5;
  };
  const bool powers = std::all_of(levels.begin(), levels.end(), is_power);
  // A small level × scale is subnormal in float16, and keeps fewer bits.
  return rounding == Rounding::none || levels.size() == 1 || (rounding == Rounding::bf16 && powers);
}

// Makes the largest of the levels at least 1/2 and below 1, as integers want them; returns the power of two
// that they were divided by.
const float* take_power_of_two(float (&levels)[16]) {
  constexpr int kLeast = -148, kMost = 127;
  static const auto powers = [] {
    std::array<float, kMost - kLeast + 1> table;
    for (int i = kLeast; i <= kMost; ++i) table[i - kLeast] = std::ldexp(1.0f, i);
    return table;
  }();
  float top = 0;
  for (float level : levels) top = std::max(top, std::fabs(level));  // NaN is not larger
  int exponent = 0;
  if (top > 0 && std::isfinite(top)) std::frexp(top, &exponent);
  exponent = std::clamp(exponent, kLeast, kMost);
  for (float& level : levels) level = std::ldexp(level, -exponent);
  return &powers[exponent - kLeast];
}

}  // namespace

PackedMatrix packed_matrix(const torch::stable::Tensor& qweight, const torch::stable::Tensor& scale,
                           const std::vector<double>& levels, int64_t group_size,
                           int64_t in_features, ScalarType dtype, int64_t groups) {
  const Rounding rounding = dtype == ScalarType::BFloat16 ? Rounding::bf16
                            : dtype == ScalarType::Half   ? Rounding::half
                                                          : Rounding::none;
  PackedMatrix weight{static_cast<const uint8_t*>(qweight.const_data_ptr()),
                      static_cast<int>(qweight.size(0)),
                      qweight.size(1),
                      in_features,
                      qweight.size(1) / groups,
                      {},
                      static_cast<const float*>(scale.const_data_ptr()),
                      group_size};
  signed_levels(levels, weight.bits, weight.levels);
  if (rounds_with_its_scale(levels, rounding)) {
    weight.round_scale = rounding;
  } else if (group_size == 0) {
    for (float& level : weight.levels) level = rounded(level * *weight.scale, rounding);
    weight.scale = take_power_of_two(weight.levels);
  } else {
    weight.round_weight = rounding;
    if (group_size == -1) weight.group_size = std::max<int64_t>(in_features, 1);  // one group a row
  }
  return weight;
}

void multiply_rows(const PackedMatrix& weight, const Product& product) {
  thread_local Workspace space;
  const bool whole_words = weight.group_size <= 0 || weight.group_size % 32 == 0;
  const bool tables = weight.bits <= 2 && whole_words && weight.round_weight == Rounding::none &&
                      weight.sharing >= kTableOutputs * weight.bits;
  const auto run = !tables            ? BLAQ_VARIANT(multiply<false, 4>)
                   : weight.bits == 1 ? BLAQ_VARIANT(multiply<true, 1>)
                                      : BLAQ_VARIANT(multiply<true, 2>);
  run(weight, product, space);
}

}  // namespace blaq
