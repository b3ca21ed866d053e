// What both passes of a step do to a stretch of a weight.
#pragma once

#include "cpu/step.h"

namespace blaq {

constexpr int64_t kChunk = 512;  // elements between the steps of one pass: stays in L1

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

class Runner {
 public:
  Runner(const Stage& stage, bool commits, int64_t parameters)
      : stage_(stage), commits_(commits), streams_(parameters >= kStreamFrom) {}

  bool commits() const { return commits_; }
  bool counts(const Weight& weight) const { return commits_ && weight.flips; }
  const Solver& solver() const { return stage_.solver; }
  const Codebook& book() const { return stage_.solver.book; }
  const TrainingKernels& kernels() const { return kernels_; }

  // Elements [begin, begin + n) of a weight, at most a chunk: the update, and the weighted sums of its
  // result. w and d take it; w is unused where the step commits, for then it is the latent.
  void update(const Weight& weight, int64_t begin, int64_t n, float* w, float* d, Sums* sums) const {
    const Inputs in(*this, weight, begin, n);
    if (commits_) {
      kernels_.step(in.grad, in.trial_grad, weight.latent + begin, weight.m + begin, weight.v + begin, n,
                    stage_.scalars, d, sums);
    } else {
      kernels_.trial(in.grad, weight.latent + begin, weight.m + begin, weight.v + begin, n, stage_.scalars,
                     w, d, sums);
    }
  }

  // The curvature of what update() has committed, from what that left: to float32's rounding.
  void curvature(const Weight& weight, int64_t begin, int64_t n, float* d) const {
    const Inputs in(*this, weight, begin, n);
    kernels_.curvature(in.grad, in.trial_grad, weight.v + begin, n, stage_.scalars, d);
  }

  // update() for one bit: only the signs of the result are kept. Returns how many are new.
  int64_t update_signs(const Weight& weight, int64_t begin, int64_t n, uint16_t* negative,
                       Sums* sums) const {
    const Inputs in(*this, weight, begin, n);
    if (commits_) {
      return kernels_.step_signs(in.grad, in.trial_grad, weight.latent + begin, weight.m + begin,
                                 weight.v + begin, n, stage_.scalars, negative, sums);
    }
    kernels_.trial_signs(in.grad, weight.latent + begin, weight.m + begin, weight.v + begin, n,
                         stage_.scalars, negative, sums);
    return 0;
  }

  // Writes params at [begin, begin + n), at most a chunk: `fill(streams, values)` makes them.
  template <typename Fill>
  int64_t write(const Weight& weight, int64_t begin, int64_t n, const Fill& fill) const {
    if (weight.dtype == Dtype::f32) return fill(streams_, static_cast<float*>(weight.param) + begin);
    float values[kChunk];
    const int64_t result = fill(false, values);
    kernels_.narrow(weight.dtype, values, n, static_cast<char*>(weight.param) + begin * 2);
    return result;
  }

  int64_t write_values(const Weight& weight, int64_t begin, int64_t n, const float* w, float alpha,
                       const uint8_t* old) const {
    return write(weight, begin, n, [&](bool streams, float* out) {
      return kernels_.values(w, n, book(), alpha, old, streams, out);
    });
  }

  void write_signs(const Weight& weight, int64_t begin, int64_t n, const uint16_t* negative,
                   float alpha) const {
    write(weight, begin, n, [&](bool streams, float* out) {
      kernels_.sign_values(negative, n, alpha, streams, out);
      return 0;
    });
  }

  // Params of (latent, scale) over [begin, end).
  void restore(const Weight& weight, int64_t begin, int64_t end, float scale) const {
    for (int64_t i = begin; i < end; i += kChunk) {
      write_values(weight, i, std::min(kChunk, end - i), weight.latent + i, scale, nullptr);
    }
  }

  Next inputs_at(const Weight& weight, int64_t i) const {
    Next next;
    for (const float* state : {weight.latent, weight.m, weight.v}) next.add(state + i, 4);
    for (const void* grad : {weight.grad, weight.trial_grad}) {
      if (grad) next.add(static_cast<const char*>(grad) + i * size_of(weight.dtype), size_of(weight.dtype));
    }
    return next;
  }

 protected:
  const Stage& stage_;
  const TrainingKernels& kernels_ = training_kernels();
  const bool commits_, streams_;

 private:
  static constexpr int64_t kStreamFrom = 1 << 20;  // parameters of a call whose params go around the cache

  // Gradients of a chunk as floats.
  struct Inputs {
    float wide[2][kChunk];
    const float *grad, *trial_grad;

    Inputs(const Runner& runner, const Weight& weight, int64_t begin, int64_t n)
        : grad(floats(runner, weight, weight.grad, begin, n, wide[0])),
          trial_grad(floats(runner, weight, weight.trial_grad, begin, n, wide[1])) {}
    static const float* floats(const Runner& runner, const Weight& weight, const void* grad, int64_t begin,
                               int64_t n, float* buffer) {
      if (!grad) return nullptr;
      const float factor = runner.stage_.scalars.inverse_grad_scale;
      const char* at = static_cast<const char*>(grad) + begin * size_of(weight.dtype);
      if (weight.dtype == Dtype::f32 && factor == 1.0f) return reinterpret_cast<const float*>(at);
      runner.kernels_.widen(weight.dtype, at, factor, n, buffer);
      return buffer;
    }
  };
};

}  // namespace blaq
