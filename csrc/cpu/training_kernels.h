// What the training ops do to a stretch of memory, in the variant that capability() asks for.
// Every function is serial and gives the same bits in every variant.
#pragma once

#include <cstdint>

#include "codebook.h"
#include "update.h"

namespace blaq {

constexpr int kSumLanes = 16;
constexpr int kBinShift = 16;  // of a float's bits: 128 bins an octave

// Σ over elements i of two terms, element i into lane i mod 16: one order for every variant.
struct Sums {
  double first[kSumLanes] = {};
  double second[kSumLanes] = {};
};

struct Pair {
  double first = 0, second = 0;
};

enum class Dtype : int { f32, bf16, f16 };

struct TrainingKernels {
  // 16-bit floats to float32 times `factor`, and back with one rounding to nearest even.
  void (*widen)(Dtype, const void* in, float factor, int64_t n, float* out);
  void (*narrow)(Dtype, const float* in, int64_t n, void* out);
  // Stage 1: w = ω* and d, nothing else is written. Adds the weighted sums.
  void (*trial)(const float* grad, const float* latent, const float* m, const float* v, int64_t n,
                const StepScalars&, float* w, float* d, Sums*);
  // Stage 2: latent, m and v are updated; trial_grad null is LAQ. Adds the weighted sums of the new
  // latent; returns how many of its signs are new.
  int64_t (*step)(const float* grad, const float* trial_grad, float* latent, float* m, float* v, int64_t n,
                  const StepScalars&, float* d, Sums*);
  // Σ d|w| and Σ d; Σ dβ|w| and Σ dβ². d counts as at least kCurvatureFloor.
  void (*weighted_sums)(const float* w, const float* d, int64_t n, Sums*);
  void (*level_sums)(const float* w, const float* d, int64_t n, const Codebook&, float scale, Sums*);
  float (*max_abs)(const float* w, int64_t n);  // NaN where there is one
  // Adds (d|w|, d) to bin clamp((bits of |w| >> kBinShift) - base).
  void (*histogram)(const float* w, const float* d, int64_t n, int base, int bins, Pair* out);
  void (*codes)(const float* w, int64_t n, const Codebook&, float scale, uint8_t* out);
  // level × scale; returns how many codes differ from the old ones, 0 where those are not given.
  int64_t (*values)(const float* w, int64_t n, const Codebook&, float scale, const uint8_t* old_codes,
                    float* out);
  void (*signs)(const float* w, int64_t n, uint8_t* out);  // 1 where negative
  void (*sign_values)(const uint8_t* signs, int64_t n, float scale, float* out);
  void (*scaled_update)(const float* latent, const float* grad, const float* curvature, int64_t n,
                        float* out);
  void (*blend)(const float* current, const float* trial, float a, float one_minus_a, int64_t n,
                float* out);
  void (*stream)(const void* in, int64_t bytes, void* out);  // copy that leaves `out` out of the cache
};

const TrainingKernels& training_kernels();

inline Pair total(const Sums& sums) {
  double first[kSumLanes], second[kSumLanes];
  for (int l = 0; l < kSumLanes; ++l) first[l] = sums.first[l], second[l] = sums.second[l];
  for (int half = kSumLanes / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) first[l] += first[l + half], second[l] += second[l + half];
  }
  return {first[0], second[0]};
}

}  // namespace blaq
