// The scalars of one optimizer step, and the element's share of Eqs. 6 and 8-10 (BLAQ, AAAI 2024).
//
// The learning rate stays out of the curvature: d = sqrt(v̂) + eps = lr · D. It cancels in the solve,
// and lr = 0 then divides by nothing.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define BLAQ_INLINE __host__ __device__ __forceinline__
#else
#define BLAQ_INLINE inline __attribute__((always_inline))
#endif

namespace blaq {

struct StepScalars {
  float beta1, beta2, one_minus_beta1, one_minus_beta2;
  float inverse_bias2;  // 1 / (1 - beta2^t)
  float step_size;      // lr / (1 - beta1^t)
  float decay;          // 1 - lr · weight_decay
  float eps, clip;      // clip 0 is off
  float backtrack, one_minus_backtrack;
  float inverse_grad_scale;

  StepScalars() = default;
  StepScalars(double lr, double step, double b1, double b2, double epsilon, double weight_decay,
              double clip_at, double a, double grad_scale)
      : beta1(b1), beta2(b2), one_minus_beta1(1 - b1), one_minus_beta2(1 - b2),
        inverse_bias2(1 / (1 - std::pow(b2, step))), step_size(lr / (1 - std::pow(b1, step))),
        decay(1 - lr * weight_decay), eps(epsilon), clip(clip_at), backtrack(a),
        one_minus_backtrack(1 - a), inverse_grad_scale(1 / grad_scale) {}
};

// T is float, or a vector of them.
template <typename T>
BLAQ_INLINE T second_moment(T v, T g, const StepScalars& s) {
  return s.beta2 * v + s.one_minus_beta2 * (g * g);
}

template <typename T>
BLAQ_INLINE T first_moment(T m, T g, const StepScalars& s) {
  return s.beta1 * m + s.one_minus_beta1 * g;
}

template <typename T, typename Root>
BLAQ_INLINE T curvature_of(T v, const StepScalars& s, const Root& root) {
  return root(v * s.inverse_bias2) + s.eps;
}

// Eqs. 9 and 10.
template <typename T>
BLAQ_INLINE T blended(T current, T trial, const StepScalars& s) {
  return s.backtrack * current + s.one_minus_backtrack * trial;
}

// Eqs. 6 and 8 with decoupled weight decay; `m` is the committed first moment, d the curvature.
template <typename T>
BLAQ_INLINE T target_of(T latent, T m, T d, const StepScalars& s) {
  return s.decay * latent - s.step_size * m / d;
}

}  // namespace blaq
