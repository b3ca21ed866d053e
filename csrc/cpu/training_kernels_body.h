// The functions of TrainingKernels, once for each variant; see foreach_isa.h. Without contraction the
// order of every rounding is the source's.
#include "cpu/update_kernel.h"
#include "cpu/levels_kernel.h"
#include "cpu/histogram_kernel.h"
#include "cpu/convert_kernel.h"

static void widen_floats(Dtype dtype, const void* in, float factor, int64_t n, float* out) {
  if (dtype == Dtype::f32) {
    std::memcpy(out, in, n * sizeof(float));
  } else if (dtype == Dtype::bf16) {
    widen(static_cast<const BFloat16*>(in), out, n);
  } else {
    widen(static_cast<const Half*>(in), out, n);
  }
  if (factor != 1.0f) {
    for (int64_t i = 0; i < n; ++i) out[i] *= factor;
  }
}

static void narrow_floats(Dtype dtype, const float* in, int64_t n, void* out) {
  if (dtype == Dtype::f32) {
    std::memcpy(out, in, n * sizeof(float));
  } else if (dtype == Dtype::bf16) {
    narrow_run(in, static_cast<BFloat16*>(out), n);
  } else {
    narrow_run(in, static_cast<Half*>(out), n);
  }
}

static void scaled_update(const float* __restrict latent, const float* __restrict grad,
                          const float* __restrict curvature, int64_t n, float* __restrict out) {
  for (int64_t i = 0; i < n; ++i) out[i] = latent[i] - grad[i] / curvature[i];
}

static void blend_range(const float* __restrict current, const float* __restrict trial_values, float a,
                        float one_minus_a, int64_t n, float* __restrict out) {
  for (int64_t i = 0; i < n; ++i) out[i] = a * current[i] + one_minus_a * trial_values[i];
}

static const TrainingKernels kTable = {
    widen_floats,  narrow_floats, trial,   trial_signs, step,       step_signs, curvature,
    weighted_sums, level_sums,    max_abs, histogram,   codes,      values,     sign_values,
    scaled_update, blend_range};
