// torch.ops.blaq.packed_linear on a CUDA device, for at most kMaxRows rows of fp16 or bf16 and a
// repacked weight.
#include "codebook.h"
#include "op.h"
#include "packed_linear_kernel.h"

namespace blaq {

extern template void packed_linear<Fp16>(PackedLinear, int, bool, int, Stream);
extern template void packed_linear<Bf16>(PackedLinear, int, bool, int, Stream);

namespace {

// Rows of inputs as the kernel reads them: 16-byte aligned, filled up with zeros to a multiple of
// 8.
Tensor aligned_rows(const Tensor& input, int64_t m, int64_t k) {
  const bool in_place = input.is_contiguous() && k % 8 == 0 &&
                        reinterpret_cast<uintptr_t>(input.const_data_ptr()) % 16 == 0;
  if (in_place) return input;
  Tensor rows = torch::stable::new_zeros(input, {m, (k + 7) / 8 * 8});
  Tensor inner = torch::stable::narrow(rows, 1, 0, k);
  torch::stable::copy_(inner, torch::stable::reshape(input, {m, k}));
  return rows;
}

Tensor linear(const Tensor& input, const Tensor& qweight, const Tensor& scale,
              const std::optional<Tensor>& bias, std::vector<double> levels, int64_t group_size,
              const std::optional<Tensor>& repacked, std::string) {
  const OnDevice device(input);
  const int64_t n = qweight.size(1), k = input.sizes().back();
  std::vector<int64_t> shape = input.sizes().vec();
  shape.back() = n;
  Tensor output = torch::stable::new_empty(input, shape);
  if (output.numel() == 0) return output;
  const int64_t m = output.numel() / n;
  STD_TORCH_CHECK(repacked && m <= kMaxRows && k < kMaxInputs && n < 1 << 30,
                  "blaq_cuda.packed_linear: called for what it does not cover");
  const Tensor rows = aligned_rows(input, m, k);
  const Codebook codebook(levels);
  PackedLinear p = {};
  p.x = static_cast<const uint16_t*>(rows.const_data_ptr());
  p.weight = static_cast<const uint4*>(repacked->const_data_ptr());
  p.scale = scale.const_data_ptr<float>();
  p.bias = bias ? static_cast<const uint16_t*>(bias->const_data_ptr()) : nullptr;
  p.out = static_cast<uint16_t*>(output.mutable_data_ptr());
  p.width = static_cast<int>((k + 7) / 8 * 8);
  p.x_stride = p.width;
  p.m = static_cast<int>(m), p.n = static_cast<int>(n), p.k = static_cast<int>(k);
  p.scale_stride = group_size == 0 ? 0 : static_cast<int>(scale.size(1));
  p.group_size = group_size > 0 && group_size < k ? static_cast<int>(group_size) : 0;
  std::vector<float> table(16);
  const int bits = static_cast<int>(qweight.size(0));
  signed_levels(levels, bits, table.data());
  std::copy_n(table.data(), 1 << (bits - 1), p.level);
  const bool powers = codebook.is_pow2 && codebook.count == 1 << (bits - 1);
  const auto run = input.scalar_type() == ScalarType::Half ? packed_linear<Fp16> : packed_linear<Bf16>;
  run(p, bits, powers, multiprocessors(), device.stream());
  return output;
}

}  // namespace
}  // namespace blaq

STABLE_TORCH_LIBRARY_IMPL(blaq_cuda, CUDA, m) { m.impl("packed_linear", TORCH_BOX(&blaq::linear)); }
