// torch.ops.blaq.packed_linear on a CUDA device with accuracy 'fast': many rows of inputs, rounded to 8 bits,
// times the weight's levels as integers, by torch's own int8 product.
#include <array>

#include "codebook.h"
#include "cpu/level_table.h"
#include "op.h"
#include "packed_int8_kernel.h"

namespace blaq {
namespace {

// a [m, k] · b [n, k]ᵀ in int32.
Tensor int8_product(const Tensor& a, const Tensor& b) {
  using torch::stable::detail::from;
  std::array<StableIValue, 2> stack{from(a), from(torch::stable::transpose(b, 0, 1))};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::_int_mm", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor linear(const Tensor& input, const Tensor& qweight, const Tensor& scale, const std::optional<Tensor>& bias,
              std::vector<double> levels, int64_t group_size, const std::optional<Tensor>&, std::string) {
  const OnDevice device(input);
  const Stream stream = device.stream();
  const int bits = static_cast<int>(qweight.size(0));
  const int64_t n = qweight.size(1), row_bytes = qweight.size(2), k = input.sizes().back();
  std::vector<int64_t> shape = input.sizes().vec();
  shape.back() = n;
  Tensor output = torch::stable::new_empty(input, shape);
  if (output.numel() == 0) return output;
  const int64_t m = output.numel() / n, padded_k = (k + 15) / 16 * 16, padded_n = (n + 7) / 8 * 8;
  STD_TORCH_CHECK(group_size <= 0 && m > 16 && k > 0,
                  "blaq_cuda.packed_int8: called for what it does not cover");

  const Tensor rows = torch::stable::new_empty(input, {m, padded_k}, ScalarType::Char);
  const Tensor units = torch::stable::new_empty(input, {m}, ScalarType::Float);
  const Tensor weight = torch::stable::new_empty(input, {padded_n, padded_k}, ScalarType::Char);
  std::array<float, 16> signed_table{};
  signed_levels(levels, bits, signed_table.data());
  const LevelTable table(signed_table.data(), bits);
  Int8Levels integers;
  for (int code = 0; code < 16; ++code) integers.of_code[code] = static_cast<int8_t>(table.level[code] - 128);
  decode_int8(qweight.const_data_ptr<uint8_t>(), bits, n, row_bytes, k, integers, weight.mutable_data_ptr(),
              padded_n, padded_k, stream);

  const auto run = [&]<typename Type>(Type) {
    using Word = typename Type::Word;
    const Tensor x = torch::stable::contiguous(input);
    quantize_rows<Type>(static_cast<const Word*>(x.const_data_ptr()), m, k, padded_k, rows.mutable_data_ptr(),
                        units.mutable_data_ptr<float>(), stream);
    const Tensor sums = int8_product(rows, weight);
    scale_sums<Type>(sums.const_data_ptr<int32_t>(), padded_n, units.const_data_ptr<float>(), table.unit,
                     scale.const_data_ptr<float>(), group_size == -1,
                     bias ? static_cast<const Word*>(bias->const_data_ptr()) : nullptr,
                     static_cast<Word*>(output.mutable_data_ptr()), m, n, stream);
  };
  switch (input.scalar_type()) {
    case ScalarType::Half: run(Narrow<Fp16>()); break;
    case ScalarType::BFloat16: run(Narrow<Bf16>()); break;
    default: run(Fp32());
  }
  return output;
}

}  // namespace
}  // namespace blaq

STABLE_TORCH_LIBRARY_IMPL(blaq_cuda, CUDA, m) { m.impl("packed_int8", TORCH_BOX(&blaq::linear)); }
