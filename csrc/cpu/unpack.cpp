// torch.ops.blaq.unpack: bit planes to weights, near the speed of memory.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>

#include "codebook.h"
#include "cpu/float_types.h"
#include "cpu/unpack.h"
#include "packed_checks.h"

#define BLAQ_KERNEL_FILE "cpu/unpack_kernel.h"
#include "cpu/foreach_isa.h"
#include "cpu/runs.h"

namespace blaq {
namespace {

constexpr int64_t kGrainBytes = 1 << 9;  // of one plane, a thread: 4096 weights

template <typename S, typename T>
void unpack_all(const Tensor& qweight, const Tensor& scale, const std::vector<double>& levels,
                int64_t group_size, int64_t in_features, Tensor& weight) {
  const int bits = static_cast<int>(qweight.size(0));
  const int64_t n = qweight.size(1), row_bytes = qweight.size(2);
  const int64_t row_scales = group_size == 0 ? 0 : scale.size(1);
  const uint8_t* planes = qweight.const_data_ptr<uint8_t>();
  const S* scales = static_cast<const S*>(scale.const_data_ptr());
  T* out = static_cast<T*>(weight.mutable_data_ptr());
  S values[16];
  signed_levels(levels, bits, values);
  torch::stable::parallel_for(0, n * row_bytes, kGrainBytes, [&](int64_t begin, int64_t end) {
    for_each_run(begin, end, row_bytes, [&](int64_t row, int64_t first, int64_t last) {
      BLAQ_VARIANT(unpack_row<S, T>)
      (planes + row * row_bytes, n * row_bytes, bits, first, std::min(in_features, last * 8),
       values, scales + row * row_scales, group_size, out + row * in_features);
    });
  });
}

Tensor unpack(const Tensor& qweight, const Tensor& scale, const std::vector<double>& levels,
              int64_t group_size, int64_t in_features, ScalarType dtype) {
  const char* op = "unpack";
  check_qweight(op, qweight, scale, levels, group_size, in_features,
                {ScalarType::Float, ScalarType::Double});
  BLAQ_REQUIRE(is_one_of(dtype, kFloatDtypes), op, "dtype", "be " + dtype_names(kFloatDtypes),
               dtype_name(dtype));
  return unpack_weight(qweight, scale, levels, group_size, in_features, dtype);
}

}  // namespace

Tensor unpack_weight(const Tensor& qweight, const Tensor& scale, const std::vector<double>& levels,
                     int64_t group_size, int64_t in_features, ScalarType dtype) {
  Tensor weight = torch::stable::new_empty(qweight, {qweight.size(1), in_features}, dtype);
  with_float_type(dtype, [&]<typename T>() {
    const bool wide = scale.scalar_type() == ScalarType::Double;
    const auto run = wide ? unpack_all<double, T> : unpack_all<float, T>;
    run(qweight, scale, levels, group_size, in_features, weight);
  });
  return weight;
}

}  // namespace blaq

STABLE_TORCH_LIBRARY_IMPL(blaq, CPU, m) { m.impl("unpack", TORCH_BOX(&blaq::unpack)); }
