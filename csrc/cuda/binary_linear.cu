// torch.ops.blaq.binary_linear on a CUDA device, from a weight that binary_repack made.
#include <algorithm>

#include "binary_warpgroup_kernel.h"
#include "op.h"

namespace blaq {
namespace {

constexpr int64_t kManyRows = 64;  // beyond, a tile of 128 rows is worth its shared memory

template <typename Type>
void multiply(const Tensor& input, const Tensor& words, const Tensor& scale, const std::optional<Tensor>& bias,
              int64_t group_size, Tensor& output, Stream stream) {
  using Word = typename Type::Word;
  const int64_t k = input.sizes().back(), n = output.sizes().back(), m = output.numel() / n;
  const Tensor rows = torch::stable::contiguous(input);
  const BinaryProduct<Type> call = {
      reinterpret_cast<const uint64_t*>(words.const_data_ptr()),
      nullptr,
      static_cast<const typename Type::Sum*>(scale.const_data_ptr()),
      bias ? static_cast<const Word*>(bias->const_data_ptr()) : nullptr,
      static_cast<Word*>(output.mutable_data_ptr()), m, n, k, group_size};
  // Hopper's own rate for bits is that of its warpgroups.
  const bool by_warpgroups = device_attribute(cudaDevAttrComputeCapabilityMajor) == 9 && m > kManyRows &&
                             group_size <= 0;
  const int64_t row_words = by_warpgroups ? padded_row_bytes(k) / 8 : call.words();
  const Tensor bits = torch::stable::new_empty(input, {m, row_words}, ScalarType::Long);
  uint64_t* to = reinterpret_cast<uint64_t*>(bits.mutable_data_ptr());
  const Word* x = static_cast<const Word*>(rows.const_data_ptr());
  if (by_warpgroups) {
    binary_linear_by_warpgroups<Type>(x, to, call, stream);
  } else {
    binary_linear<Type>(x, to, call, stream);
  }
}

Tensor linear(const Tensor& input, const Tensor& qweight, const Tensor& scale, const std::optional<Tensor>& bias,
              int64_t group_size, const std::optional<Tensor>& repacked) {
  const OnDevice device(input);
  STD_TORCH_CHECK(repacked.has_value(), "blaq_cuda.binary_linear: called for what it does not cover");
  std::vector<int64_t> shape = input.sizes().vec();
  shape.back() = qweight.size(1);
  Tensor output = torch::stable::new_empty(input, shape);
  if (output.numel() == 0) return output;
  const auto run = [&] {
    switch (input.scalar_type()) {
      case ScalarType::Half: return multiply<Narrow<Fp16>>;
      case ScalarType::BFloat16: return multiply<Narrow<Bf16>>;
      case ScalarType::Double: return multiply<Fp64>;
      default: return multiply<Fp32>;
    }
  }();
  run(input, *repacked, scale, bias, group_size, output, device.stream());
  return output;
}

}  // namespace
}  // namespace blaq

STABLE_TORCH_LIBRARY_IMPL(blaq_cuda, CUDA, m) { m.impl("binary_linear", TORCH_BOX(&blaq::linear)); }
