// One optimizer stage over a list of tensors: what fused_trial and fused_step run after their checks.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/scale_search.h"
#include "update.h"

namespace blaq {

// One weight [rows, cols] and its state. `trial_grad` null is LAQ; `flips` null counts nothing.
struct Weight {
  void* param;
  const void* grad;
  const void* trial_grad;
  float* latent;
  float* m;
  float* v;
  float* scale;
  int64_t* flips;
  int64_t rows, cols;
  Dtype dtype;
};

struct Stage {
  StepScalars scalars;
  Solver solver;
  int64_t group_size;
};

// Stage 1: params become ω̂* (Eqs. 6, 5); nothing else is written.
void run_trial(const std::vector<Weight>& weights, const Stage& stage);
// Stage 2: blend, moments, Eqs. 8 and 7; everything is committed.
void run_step(const std::vector<Weight>& weights, const Stage& stage);
// A skipped step: params go back to the codes of (latent, scale), and nothing flips.
void run_restore(const std::vector<Weight>& weights, const Stage& stage);

}  // namespace blaq
