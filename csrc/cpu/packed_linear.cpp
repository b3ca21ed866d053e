// torch.ops.blaq.packed_linear: input @ weightᵀ + bias, the weight read from its bit planes.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

#include "cpu/float_types.h"
#include "cpu/packed_int8.h"
#include "cpu/unpack.h"
#include "packed_checks.h"

#define BLAQ_KERNEL_FILE "cpu/convert_kernel.h"
#include "cpu/foreach_isa.h"

namespace blaq {
namespace {

template <typename T>
void linear(const Tensor& input, PackedMatrix weight, const std::optional<Tensor>& bias,
            Tensor& output) {
  const int64_t k = weight.k, n = weight.n, m = output.numel() / n, stride = padded(k);
  const T* x = static_cast<const T*>(input.const_data_ptr());
  T* y = static_cast<T*>(output.mutable_data_ptr());
  std::vector<float> wide_bias(bias ? n : 0);
  if (bias) {
    BLAQ_VARIANT(widen<T, float>)(static_cast<const T*>(bias->const_data_ptr()), wide_bias.data(),
                                  n);
    weight.bias = wide_bias.data();
  }
  share_matrix(m, n, k, [&](int64_t first_row, int64_t last_row, int64_t begin, int64_t end) {
    thread_local Buffer row_buffer, result_buffer;
    for (int64_t row = first_row; row < last_row; row += kRows) {
      const int count = static_cast<int>(std::min<int64_t>(kRows, last_row - row));
      float* rows = row_buffer.take(kRows * stride);
      for (int r = 0; r < count; ++r) {
        BLAQ_VARIANT(widen<T, float>)(x + (row + r) * k, rows + r * stride, k);
        std::fill(rows + r * stride + k, rows + (r + 1) * stride, 0.0f);
      }
      T* to = y + row * n + begin;
      if constexpr (std::is_same_v<T, float>) {
        multiply_rows(weight, {rows, stride, count, begin, end, to, n});
      } else {
        const int64_t width = end - begin;
        float* result = result_buffer.take(kRows * width);
        multiply_rows(weight, {rows, stride, count, begin, end, result, width});
        for (int r = 0; r < count; ++r) {
          BLAQ_VARIANT(narrow_run<float, T>)(result + r * width, to + r * n, width);
        }
      }
    }
  });
}

// The same in 8-bit arithmetic.
template <typename T>
void linear_int8(const Tensor& input, PackedMatrix weight, const uint8_t* repacked, Accuracy accuracy,
                 const std::optional<Tensor>& bias, Tensor& output) {
  constexpr int64_t kOutputs = 64, kFewRows = 8, kProducts = 1 << 20;  // that a thread is worth waking for
  const int64_t k = weight.k, n = weight.n, m = output.numel() / n, stride = padded(k);
  const T* x = static_cast<const T*>(input.const_data_ptr());
  T* y = static_cast<T*>(output.mutable_data_ptr());
  std::vector<float> wide_bias(bias ? n : 0);
  if (bias) {
    BLAQ_VARIANT(widen<T, float>)(static_cast<const T*>(bias->const_data_ptr()), wide_bias.data(), n);
    weight.bias = wide_bias.data();
  }
  const auto body = [&](int64_t first_row, int64_t last_row, int64_t begin, int64_t end) {
    thread_local Buffer row_buffer, result_buffer;
    constexpr bool kDirect = std::is_same_v<T, float>;
    const int64_t width = end - begin;
    for (int64_t row = first_row; row < last_row; row += kFewRows) {
      const int count = static_cast<int>(std::min(kFewRows, last_row - row));
      const float* rows = reinterpret_cast<const float*>(x + row * k);
      if (!kDirect || stride != k) {
        float* copy = row_buffer.take(kFewRows * stride);
        for (int r = 0; r < count; ++r) {
          BLAQ_VARIANT(widen<T, float>)(x + (row + r) * k, copy + r * stride, k);
          std::fill(copy + r * stride + k, copy + (r + 1) * stride, 0.0f);
        }
        rows = copy;
      }
      T* to = y + row * n + begin;
      float* out = kDirect ? reinterpret_cast<float*>(to) : result_buffer.take(kFewRows * width);
      multiply_int8(weight, repacked, accuracy, {rows, stride, count, begin, end, out, kDirect ? n : width});
      for (int r = 0; !kDirect && r < count; ++r) {
        BLAQ_VARIANT(narrow_run<float, T>)(out + r * width, to + r * n, width);
      }
    }
  };
  const auto grain = [&](int64_t products) { return std::max<int64_t>(1, kProducts / (products + 1)); };
  if (m >= kFewRows * torch::stable::get_num_threads()) {
    torch::stable::parallel_for(
        0, (m + kFewRows - 1) / kFewRows, grain(kFewRows * k * n),
        [&](int64_t a, int64_t b) { body(a * kFewRows, std::min(m, b * kFewRows), 0, n); });
  } else {
    torch::stable::parallel_for(
        0, (n + kOutputs - 1) / kOutputs, grain(m * k * kOutputs),
        [&](int64_t a, int64_t b) { body(0, m, a * kOutputs, std::min(n, b * kOutputs)); });
  }
}

// float64 serves gradcheck: torch's own product with the unpacked weight.
Tensor float64_linear(const Tensor& input, const Tensor& qweight, const Tensor& scale,
                      const std::optional<Tensor>& bias, const std::vector<double>& levels,
                      int64_t group_size) {
  using torch::stable::detail::from;
  const Tensor weight =
      unpack_weight(qweight, scale, levels, group_size, input.sizes().back(), ScalarType::Double);
  std::array<StableIValue, 3> stack{from(input), from(weight), from(bias)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor packed_linear(const Tensor& input, const Tensor& qweight, const Tensor& scale,
                     const std::optional<Tensor>& bias, std::vector<double> levels, int64_t group_size,
                     const std::optional<Tensor>& repacked, std::string accuracy_name) {
  const char* op = "packed_linear";
  const Accuracy accuracy = accuracy_of(op, accuracy_name);
  BLAQ_REQUIRE(input.dim() >= 1, op, "input", "have at least 1 dimension", input.dim());
  check_dtype(op, "input", input, kFloatDtypes);
  const int64_t in_features = input.sizes().back();
  const bool wide = input.scalar_type() == ScalarType::Double;
  check_qweight(op, qweight, scale, levels, group_size, in_features,
                {wide ? ScalarType::Double : ScalarType::Float}, repacked.has_value());
  check_packed_input(op, input, qweight, bias);
  if (repacked) check_repacked(op, *repacked, qweight, in_features);
  const auto with_planes = [&] {
    return packed_linear(input, unrepack(*repacked, qweight.size(0), qweight.size(1), in_features), scale, bias,
                         levels, group_size, repacked, accuracy_name);
  };
  const bool whole = has_planes(qweight, in_features);
  if (wide && !whole) return with_planes();
  if (wide) return float64_linear(input, qweight, scale, bias, levels, group_size);

  std::vector<int64_t> shape = input.sizes().vec();
  shape.back() = qweight.size(1);
  Tensor output = torch::stable::new_empty(input, shape);
  if (output.numel() == 0) return output;
  const Tensor rows = input.is_contiguous() ? input : torch::stable::contiguous(input);
  PackedMatrix weight = packed_matrix(qweight, scale, levels, group_size, in_features, input.scalar_type());
  const bool int8 = repacked && has_int8(weight, accuracy);
  std::atomic<bool> wants_planes = !whole && !int8;
  if (wants_planes) return with_planes();
  if (!whole) weight.wants_planes = &wants_planes;
  with_float_type(input.scalar_type(), [&]<typename T>() {
    if constexpr (sizeof(T) <= 4) {
      if (int8) {
        linear_int8<T>(rows, weight, repacked->const_data_ptr<uint8_t>(), accuracy, bias, output);
      } else {
        linear<T>(rows, weight, bias, output);
      }
    }
  });
  return wants_planes ? with_planes() : output;
}

}  // namespace
}  // namespace blaq

STABLE_TORCH_LIBRARY_IMPL(blaq, CPU, m) {
  m.impl("packed_linear", TORCH_BOX(&blaq::packed_linear));
}
