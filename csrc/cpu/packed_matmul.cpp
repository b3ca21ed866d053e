#include "cpu/packed_matmul.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "codebook.h"
#include "cpu/packed_int8.h"

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

}  // namespace

PackedMatrix packed_matrix(const torch::stable::Tensor& qweight, const torch::stable::Tensor& scale,
                           const std::vector<double>& levels, int64_t group_size,
                           int64_t in_features, ScalarType dtype, int64_t groups) {
  static const float one = 1.0f;
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
    weight.scale = &one;
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

#if defined(__x86_64__)
namespace {

template <int WORDS>
void repack_with(const PackedMatrix& weight, uint8_t* out) {
  using avx512::Words;
  constexpr int kBlock = avx512::kWords;
  const int64_t words = padded(weight.k) / 32, step = words * WORDS * sizeof(Words);
  torch::stable::parallel_for(0, (weight.n + 15) / 16, 4, [&](int64_t first, int64_t last) {
    alignas(64) Words digits[(kBlock + 4) * WORDS];
    for (int64_t t = first; t < last; ++t) {
      for (int64_t word = 0; word < words; word += kBlock) {
        const int count = static_cast<int>(std::min<int64_t>(kBlock, words - word));
        avx512::load_digits<WORDS, 1>(weight, t * 16, word, count, digits);
        std::memcpy(out + t * step + word * WORDS * sizeof(Words), digits, count * WORDS * sizeof(Words));
      }
    }
  });
}

}  // namespace

void repack(const PackedMatrix& weight, uint8_t* out) {
  const int words = words_of(weight.bits);
  const auto run = words == 1 ? repack_with<1> : words == 2 ? repack_with<2> : repack_with<4>;
  run(weight, out);
}
#else
void repack(const PackedMatrix&, uint8_t*) {}
#endif

}  // namespace blaq
