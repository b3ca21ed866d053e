// torch.ops.blaq.fake_quantize: nearest level × scale, rounded once to the latent's dtype.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "codebook.h"
#include "cpu/float_types.h"
#include "cpu/runs.h"
#include "packed_checks.h"

#define BLAQ_KERNEL_FILE "cpu/fake_quantize_kernel.h"
#include "cpu/foreach_isa.h"

namespace blaq {
namespace {

constexpr size_t kMostLevels = 128;  // 8 bits: sign and 7 bits of index
constexpr int64_t kGrain = 1 << 13;

template <typename S, typename T>
void run(const Tensor& latent, const Tensor& scale, const std::vector<double>& levels,
         int64_t group_size, Tensor& out) {
  const auto [n, k] = matrix_shape(latent);
  const std::vector<S> mids = midpoints<S>(levels), magnitudes(levels.begin(), levels.end());
  const int count = static_cast<int>(levels.size());
  const T* from = static_cast<const T*>(latent.const_data_ptr());
  const S* scales = static_cast<const S*>(scale.const_data_ptr());
  T* to = static_cast<T*>(out.mutable_data_ptr());
  const int64_t groups = group_size == 0 ? 0 : groups_per_row(k, group_size);
  const int64_t width = group_size > 0 ? group_size : k;
  torch::stable::parallel_for(0, n * k, kGrain, [&, k = k](int64_t begin, int64_t end) {
    for_each_run(begin, end, k, [&](int64_t row, int64_t first, int64_t last) {
      while (first < last) {
        const int64_t group = first / width, stop = std::min(last, (group + 1) * width);
        const int64_t at = row * k + first;
        BLAQ_VARIANT(fake_quantize_run<S, T>)
        (from + at, stop - first, scales[row * groups + group], mids.data(), magnitudes.data(),
         count, to + at);
        first = stop;
      }
    });
  });
}

Tensor fake_quantize(const Tensor& latent, const Tensor& scale, const std::vector<double>& levels,
                     int64_t group_size) {
  const char* op = "fake_quantize";
  check_dtype(op, "latent", latent, kFloatDtypes);
  check_contiguous(op, "latent", latent);
  check_levels(op, levels, kMostLevels);
  check_group_size(op, group_size);
  const bool wide = latent.scalar_type() == ScalarType::Double;
  check_scale(op, "scale", scale, matrix_shape(latent), group_size,
              {wide ? ScalarType::Double : ScalarType::Float});
  Tensor out = torch::stable::empty_like(latent);
  with_float_type(latent.scalar_type(), [&]<typename T>() {
    run<std::conditional_t<std::is_same_v<T, double>, double, float>, T>(latent, scale, levels,
                                                                         group_size, out);
  });
  return out;
}

}  // namespace
}  // namespace blaq

STABLE_TORCH_LIBRARY_IMPL(blaq, CPU, m) {
  m.impl("fake_quantize", TORCH_BOX(&blaq::fake_quantize));
}
