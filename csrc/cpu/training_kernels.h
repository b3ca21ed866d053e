// What the training ops do to a stretch of memory, in the variant that capability() asks for.
// Every function is serial and gives the same bits in every variant.
#pragma once

#include <cstdint>

#include "codebook.h"
#include "update.h"

namespace blaq {

constexpr int kSumLanes = 16;
constexpr int kBinShift = 17;  // of a float's bits: 64 bins an octave

// Σ over elements i of two terms, element i into lane i mod 16: one order for every variant.
struct Sums {
  double first[kSumLanes] = {};
  double second[kSumLanes] = {};
};

struct Pair {
  double first = 0, second = 0;
  Pair& operator+=(const Pair& other) {
    first += other.first, second += other.second;
    return *this;
  }
};

// What the caller reads next: fetched meanwhile by a kernel that would leave memory idle.
struct Next {
  static constexpr int kMost = 5;
  int streams = 0;
  const char* begin[kMost] = {};
  int64_t step[kMost] = {};  // bytes of kSumLanes elements

  void add(const void* stream, int64_t element_bytes) {
    begin[streams] = static_cast<const char*>(stream), step[streams] = kSumLanes * element_bytes, ++streams;
  }
};

// A histogram's part: an element adds (d|w|, d) to bin clamp((bits of |w| >> kBinShift) - base).
struct Bins {
  Pair* sums;
  int base, count;
};

enum class Dtype : int { f32, bf16, f16 };

struct TrainingKernels {
  // 16-bit floats to float32 times `factor`, and back with one rounding to nearest even.
  void (*widen)(Dtype, const void* in, float factor, int64_t n, float* out);
  void (*narrow)(Dtype, const float* in, int64_t n, void* out);
  // Stage 1: w = ω* and d, nothing else is written. Adds the weighted sums.
  void (*trial)(const float* grad, const float* latent, const float* m, const float* v, int64_t n,
                const StepScalars&, float* w, float* d, Sums*);
  // The same for one bit, of which only the signs of ω* are kept: bit i mod 16 of word i / 16.
  void (*trial_signs)(const float* grad, const float* latent, const float* m, const float* v, int64_t n,
                      const StepScalars&, uint16_t* negative, Sums*);
  // Stage 2: latent, m and v are updated; trial_grad null is LAQ. Adds the weighted sums of the new latent.
  void (*step)(const float* grad, const float* trial_grad, float* latent, float* m, float* v, int64_t n,
               const StepScalars&, float* d, Sums*);
  // The same for one bit; returns how many signs are new.
  int64_t (*step_signs)(const float* grad, const float* trial_grad, float* latent, float* m, float* v,
                        int64_t n, const StepScalars&, uint16_t* negative, Sums*);
  // The d of a step, from what it left in v.
  void (*curvature)(const float* grad, const float* trial_grad, const float* v, int64_t n,
                    const StepScalars&, float* d);
  // Σ d|w| and Σ d; Σ dβ|w| and Σ dβ². d counts as at least kCurvatureFloor.
  void (*weighted_sums)(const float* w, const float* d, int64_t n, Sums*);
  void (*level_sums)(const float* w, const float* d, int64_t n, const Codebook&, float scale, Sums*);
  float (*max_abs)(const float* w, int64_t n);  // NaN where there is one
  void (*histogram)(const float* w, const float* d, int64_t n, const Bins&, const Next&);
  void (*codes)(const float* w, int64_t n, const Codebook&, float scale, uint8_t* out);
  // level × scale, around the cache where `streams`; returns how many codes differ from the old ones, 0
  // where those are not given.
  int64_t (*values)(const float* w, int64_t n, const Codebook&, float scale, const uint8_t* old_codes,
                    bool streams, float* out);
  void (*sign_values)(const uint16_t* negative, int64_t n, float scale, bool streams, float* out);
  void (*scaled_update)(const float* latent, const float* grad, const float* curvature, int64_t n,
                        float* out);
  void (*blend)(const float* current, const float* trial, float a, float one_minus_a, int64_t n,
                float* out);
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
