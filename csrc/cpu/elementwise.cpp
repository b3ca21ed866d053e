// torch.ops.blaq.scaled_update (Eqs. 6, 8) and blend (Eqs. 9, 10), alone: for those who compose them.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>

#include "cpu/training_kernels.h"
#include "training_checks.h"

#include <torch/csrc/stable/ops.h>

namespace blaq {
namespace {

constexpr int64_t kChunk = 1024, kGrain = 1 << 15;

Dtype narrow_dtype(ScalarType dtype) { return dtype == ScalarType::BFloat16 ? Dtype::bf16 : Dtype::f16; }

// `wide(inputs, begin, count, out)` on float32 chunks of any dtype but float64, where `body64` runs.
template <size_t kInputs, typename Body32, typename Body64>
Tensor elementwise(const Tensor (&inputs)[kInputs], const Body32& body32, const Body64& body64) {
  const ScalarType dtype = inputs[0].scalar_type();
  const auto& kernels = training_kernels();
  Tensor out = torch::stable::empty_like(inputs[0]);
  const char* in[kInputs];
  for (size_t k = 0; k < kInputs; ++k) in[k] = static_cast<const char*>(inputs[k].const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, inputs[0].numel(), kGrain, [&](int64_t begin, int64_t end) {
    if (dtype == ScalarType::Double) {
      const double* from[kInputs];
      for (size_t k = 0; k < kInputs; ++k) from[k] = reinterpret_cast<const double*>(in[k]) + begin;
      body64(from, end - begin, reinterpret_cast<double*>(to) + begin);
    } else if (dtype == ScalarType::Float) {
      const float* from[kInputs];
      for (size_t k = 0; k < kInputs; ++k) from[k] = reinterpret_cast<const float*>(in[k]) + begin;
      body32(from, end - begin, reinterpret_cast<float*>(to) + begin);
    } else {
      float wide[kInputs][kChunk], result[kChunk];
      for (int64_t i = begin; i < end; i += kChunk) {
        const int64_t count = std::min(kChunk, end - i);
        const float* from[kInputs];
        for (size_t k = 0; k < kInputs; ++k) {
          kernels.widen(narrow_dtype(dtype), in[k] + 2 * i, 1.0f, count, wide[k]);
          from[k] = wide[k];
        }
        body32(from, count, result);
        kernels.narrow(narrow_dtype(dtype), result, count, to + 2 * i);
      }
    }
  });
  return out;
}

Tensor scaled_update(const Tensor& latent, const Tensor& grad, const Tensor& curvature) {
  const char* op = "scaled_update";
  check_dtype(op, "latent", latent, kFloatDtypes);
  check_contiguous(op, "latent", latent);
  check_like(op, "grad", grad, "latent", latent, {latent.scalar_type()});
  check_like(op, "curvature", curvature, "latent", latent, {latent.scalar_type()});
  const auto& kernels = training_kernels();
  return elementwise<3>(
      {latent, grad, curvature},
      [&](const float* const* in, int64_t n, float* out) {
        kernels.scaled_update(in[0], in[1], in[2], n, out);
      },
      [](const double* const* in, int64_t n, double* out) {
        for (int64_t i = 0; i < n; ++i) out[i] = in[0][i] - in[1][i] / in[2][i];
      });
}

Tensor blend(const Tensor& current, const Tensor& trial, double a) {
  const char* op = "blend";
  check_dtype(op, "current", current, kFloatDtypes);
  check_contiguous(op, "current", current);
  check_like(op, "trial", trial, "current", current, {current.scalar_type()});
  BLAQ_REQUIRE(a > 0.0 && a <= 1.0, op, "backtrack", "be in (0, 1]", a);
  if (a == 1.0) return torch::stable::clone(current);
  const auto& kernels = training_kernels();
  return elementwise<2>(
      {current, trial},
      [&](const float* const* in, int64_t n, float* out) {
        kernels.blend(in[0], in[1], static_cast<float>(a), static_cast<float>(1 - a), n, out);
      },
      [a](const double* const* in, int64_t n, double* out) {
        for (int64_t i = 0; i < n; ++i) out[i] = a * in[0][i] + (1 - a) * in[1][i];
      });
}

}  // namespace
}  // namespace blaq

STABLE_TORCH_LIBRARY_IMPL(blaq, CPU, m) {
  m.impl("scaled_update", TORCH_BOX(&blaq::scaled_update));
  m.impl("blend", TORCH_BOX(&blaq::blend));
}
