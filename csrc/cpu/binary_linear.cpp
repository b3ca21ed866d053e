// torch.ops.blaq.binary_linear: signs of the input times a 1-bit weight.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <bit>
#include <cstring>

#include "binary_checks.h"
#include "cpu/packed_matmul.h"

#define BLAQ_KERNEL_FILE "cpu/binary_kernel.h"
#include "cpu/foreach_isa.h"

namespace blaq {
namespace {

// Groups of inputs are of whole words.
template <typename T>
void linear(const Tensor& input, const BinaryMatrix& weight, const BinaryScale<T>& scale,
            const std::optional<Tensor>& bias, Tensor& output) {
  using S = Sum<T>;
  const int64_t k = weight.k(), n = weight.n, m = output.numel() / n, words = weight.row_words();
  const T* x = static_cast<const T*>(input.const_data_ptr());
  const T* b = bias ? static_cast<const T*>(bias->const_data_ptr()) : nullptr;
  T* y = static_cast<T*>(output.mutable_data_ptr());
  const Tensor bits = torch::stable::new_empty(input, {m, words}, ScalarType::Long);
  uint64_t* rows = reinterpret_cast<uint64_t*>(bits.mutable_data_ptr<int64_t>());
  torch::stable::parallel_for(0, m, 1 + (1 << 17) / (k + 1), [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) BLAQ_VARIANT(sign_bits<T>)(x + r * k, k, rows + r * words);
  });
  const int64_t part_words = scale.group_size > 0 ? scale.group_size / 64 : words;
  constexpr int64_t kCheaper = 16;  // than the products that share_matrix counts
  share_matrix(m, n, k / kCheaper, [&](int64_t first_row, int64_t last_row, int64_t begin, int64_t end) {
    int32_t counts[kBinaryRows * kBinaryWidth];
    S sums[kBinaryRows * kBinaryWidth], scales[kBinaryWidth], biases[kBinaryWidth] = {};
    for (int64_t row = first_row; row < last_row; row += kBinaryRows) {
      const int count = static_cast<int>(std::min<int64_t>(kBinaryRows, last_row - row));
      for (int64_t at = begin; at < end; at += kBinaryWidth) {
        const int64_t width = std::min(kBinaryWidth, end - at);
        constexpr bool kDirect = std::is_same_v<T, S>;
        T* to = y + row * n + at;
        S* out = kDirect ? reinterpret_cast<S*>(to) : sums;
        const int64_t out_stride = kDirect ? n : kBinaryWidth;
        if (b) BLAQ_VARIANT(widen<T, S>)(b + at, biases, width);
        for (int r = 0; r < count; ++r) {  // the result is far away: it comes meanwhile
          for (int64_t j = 0; j < width; j += 64 / sizeof(T)) __builtin_prefetch(to + r * n + j, 1);
        }
        for (int64_t part = 0; part < scale.parts; ++part) {
          const int64_t word = part * part_words, some = std::min(part_words, words - word);
          count_differences(weight, 0, at / 8, width, word, some, rows + row * words, words, count, counts);
          for (int64_t j = 0; j < width; ++j) scales[j] = scale(at + j, part);
          const int32_t inputs = static_cast<int32_t>(std::min(k - word * 64, some * 64));
          BLAQ_VARIANT(scale_counts<S>)
          (counts, kBinaryWidth, count, width, inputs, nullptr, scales, part ? out : biases,
           part ? out_stride : 0, out, out_stride);
        }
        for (int r = 0; k == 0 && r < count; ++r) std::copy_n(biases, width, out + r * out_stride);
        for (int r = 0; !kDirect && r < count; ++r) {
          BLAQ_VARIANT(narrow_run<S, T>)(sums + r * kBinaryWidth, to + r * n, width);
        }
      }
    }
  });
}

Tensor binary_linear(const Tensor& input, const Tensor& qweight, const Tensor& scale,
                     const std::optional<Tensor>& bias, int64_t group_size,
                     const std::optional<Tensor>& repacked) {
  const char* op = "binary_linear";
  BLAQ_REQUIRE(input.dim() >= 1, op, "input", "have at least 1 dimension", input.dim());
  check_dtype(op, "input", input, kFloatDtypes);
  BLAQ_REQUIRE(group_size >= -1 && (group_size <= 0 || group_size % 64 == 0), op, "group_size",
               "be 0, -1 or a multiple of 64", group_size);
  const int64_t in_features = input.sizes().back();
  const bool wide = input.scalar_type() == ScalarType::Double;
  check_qweight(op, qweight, scale, {1.0}, group_size, in_features,
                {wide ? ScalarType::Double : ScalarType::Float});
  check_packed_input(op, input, qweight, bias);
  const int64_t outputs = qweight.size(1);
  const Tensor words = repacked_or_new(op, repacked, qweight, in_features, 1, 1);

  std::vector<int64_t> shape = input.sizes().vec();
  shape.back() = outputs;
  Tensor output = torch::stable::new_empty(input, shape);
  if (output.numel() == 0) return output;
  const Tensor rows = input.is_contiguous() ? input : torch::stable::contiguous(input);
  const BinaryMatrix weight{reinterpret_cast<const uint64_t*>(words.const_data_ptr<int64_t>()), 1, outputs,
                            1, in_features};
  with_float_type(input.scalar_type(), [&]<typename T>() {
    const BinaryScale<T> scales{static_cast<const Sum<T>*>(scale.const_data_ptr()),
                                groups_per_row(in_features, group_size), group_size};
    linear<T>(rows, weight, scales, bias, output);
  });
  return output;
}

}  // namespace
}  // namespace blaq

STABLE_TORCH_LIBRARY_IMPL(blaq, CPU, m) { m.impl("binary_linear", TORCH_BOX(&blaq::binary_linear)); }
