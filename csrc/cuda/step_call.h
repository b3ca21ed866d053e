// One call of a training op as kernels see it, and what their blocks share.
#pragma once

#include <type_traits>

#include "cuda/places.h"
#include "cuda/settle.h"
#include "cuda/weights.h"
#include "update.h"

namespace blaq {

// By value to every kernel. Pointers may be null where a comment says so.
struct Call {
  const Row* table;
  const int32_t *row_of_part, *row_of_group;
  const int32_t* runs;  // of the parts of long groups: the first, and how many
  int64_t parts, groups, run_count;
  int64_t part;  // elements of a part, a multiple of a tile
  int64_t run;   // most parts of a run

  const void *lr, *step, *backtrack;    // float, or double where bit 0, 1, 2 of `doubles` is set
  const float *grad_scale, *found_inf;  // null: 1, 0
  int64_t doubles;
  double beta1, beta2, log_beta1, log_beta2, eps, weight_decay, clip;
  Book book;
  int64_t max_iter, exact;
  unsigned long long* flips;  // null, or zeros at first

  // Scratch, of which every part, run or group has its own.
  Sums* sums;     // [parts]
  float2* bins;   // [parts, kBins]: Σd and Σd · place; null with one level
  float* scales;  // [groups]
  float* w;       // [parts, part]: ω* of a trial, of groups that one block takes
  uint8_t* places;  // [parts, part], of the others: see places.h
  void* marks;    // [parts, part / 8]: eight old codes of 4 bits; of one level, eight new signs

  // A solve: where the alternation starts, the scale whose sums are taken and where the scale is
  // expected; null: at the row's scale.
  const float *first, *start, *centre;
  int64_t codes;  // address of the codes

  BLAQ_DEVICE bool skips() const { return found_inf && *found_inf != 0.0f; }
  BLAQ_INLINE bool binary() const { return book.count == 1; }
  BLAQ_DEVICE uint32_t* codes_of(const Part& p) const {
    return static_cast<uint32_t*>(marks) + p.number * (part / 8);
  }
  BLAQ_DEVICE uint8_t* signs_of(const Part& p) const {
    return static_cast<uint8_t*>(marks) + p.number * (part / 8);
  }
  BLAQ_DEVICE uint2* places_of(const Part& p) const {
    return reinterpret_cast<uint2*>(places) + p.number * (part / 8);
  }
  BLAQ_DEVICE int64_t w_of(const Part& p) const {  // so that element i of the weight is at i
    return reinterpret_cast<int64_t>(w + p.number * part - p.first);
  }
};

BLAQ_DEVICE float* scales_of(const Row& row) { return reinterpret_cast<float*>(row.scale); }

// Where the search begins: the last scale, or what a solve is given.
struct Start {
  float first, scale;
  int window;

  BLAQ_DEVICE Start(const Call& call, const Row& row, int64_t group, int64_t own) {
    const auto positive = [](float x) { return x > 0.0f ? x : 0.0f; };
    scale = positive(call.start ? call.start[group] : scales_of(row)[own]);
    first = call.first ? positive(call.first[group]) : scale;
    window = window_of(call.centre ? call.centre[group] : scale);
  }
};

BLAQ_DEVICE double scalar_of(const void* address, bool is_double) {
  return is_double ? *static_cast<const double*>(address) : *static_cast<const float*>(address);
}

// As StepScalars' own constructor; 1 - beta^step without the difference, which cancels.
BLAQ_DEVICE StepScalars scalars_of(const Call& call) {
  const double lr = scalar_of(call.lr, call.doubles & 1),
               step = scalar_of(call.step, call.doubles & 2);
  const double a = call.backtrack ? scalar_of(call.backtrack, call.doubles & 4) : 1.0;
  StepScalars s;
  s.beta1 = static_cast<float>(call.beta1), s.one_minus_beta1 = static_cast<float>(1 - call.beta1);
  s.beta2 = static_cast<float>(call.beta2), s.one_minus_beta2 = static_cast<float>(1 - call.beta2);
  s.inverse_bias2 = static_cast<float>(1 / -expm1(step * call.log_beta2));
  s.step_size = static_cast<float>(lr / -expm1(step * call.log_beta1));
  s.decay = static_cast<float>(1 - lr * call.weight_decay);
  s.eps = static_cast<float>(call.eps), s.clip = static_cast<float>(call.clip);
  s.backtrack = static_cast<float>(a), s.one_minus_backtrack = static_cast<float>(1 - a);
  s.inverse_grad_scale = call.grad_scale ? static_cast<float>(1 / double{*call.grad_scale}) : 1.0f;
  return s;
}

struct Nothing {};

// What the threads of a block share; the histogram is read before its sums take its place.
template <bool kBinary>
struct Shared {
  union Memory {
    Bins bins;
    Reach reach;
  };
  std::conditional_t<kBinary, Nothing, Memory> memory;
  Sums of_warps[kThreads / 32];
  Found found;
  uint32_t largest[kThreads / 32];
  StepScalars scalars;
  float scale;
};

// Sums over a part: the weighted sums of the codes at the start, and the histogram.
template <bool kBinary>
class Collector {
 public:
  BLAQ_DEVICE Collector(const Call& call, const Start& start, Shared<kBinary>& shared)
      : call_(call), shared_(shared), window_(start.window), levels_{call.book, start.scale} {
    if constexpr (!kBinary) shared.memory.bins.clear();  // a barrier follows before the first tile
  }

  // Eight weights of a thread and their floored curvatures, 0 where there is none. All threads
  // together.
  BLAQ_DEVICE void add(const float (&w)[8], const float (&d)[8]) {
    if (kBinary || !call_.exact) {
      float first = 0, second = 0;
      float beta[8];
      if (kBinary) {
#pragma unroll
        for (int k = 0; k < 8; ++k) beta[k] = 1.0f;
      } else {
        levels_.choose(w, call_.book.level, beta);
      }
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        const float weighted = d[k] * beta[k];
        first += weighted * magnitude_of(w[k]);
        second += weighted * beta[k];
      }
      sums = sums + Sums{first, second};
    }
    if constexpr (!kBinary) {
      float largest = 0;
#pragma unroll
      for (int k = 0; k < 8; ++k) largest = d[k] <= largest ? largest : d[k];
      point.make_room(largest, shared_.memory.bins, shared_.largest);
      shared_.memory.bins.add(w, d, window_, point.unit());
    }
  }

  Sums sums = {0, 0};
  FixedPoint point;

 private:
  const Call& call_;
  Shared<kBinary>& shared_;
  const int window_;
  const ScaledBook levels_;
};

// Leaves a part's sums for the launches that follow.
template <bool kBinary>
BLAQ_DEVICE void leave(const Call& call, const Part& part, const Collector<kBinary>& collected,
                       Shared<kBinary>& shared) {
  const Sums all = block_sum(collected.sums, shared.of_warps);  // behind it the bins are whole
  if (threadIdx.x == 0) call.sums[part.number] = all;
  if constexpr (!kBinary) {
    const double value = collected.point.value();
    for (int i = threadIdx.x; i < kBins; i += kThreads) {
      const auto& bins = shared.memory.bins;
      call.bins[part.number * kBins + i] =
          make_float2(static_cast<float>(static_cast<double>(bins.total(0, i)) * value),
                      static_cast<float>(static_cast<double>(bins.total(1, i)) * value));
    }
  }
}

// The scale of a group: `bin_sums(bin)` of its histogram, `sums` at the start. All threads have it.
template <bool kBinary, typename BinSums>
BLAQ_DEVICE float settled(const Call& call, const Start& start, Sums sums, Shared<kBinary>& shared,
                          const BinSums& bin_sums) {
  double alpha = 0;
  if constexpr (kBinary) {
    alpha = sums.first / sums.second;
  } else {
    Reach& reach = shared.memory.reach;
    reach.fill(start.window, shared.of_warps, bin_sums);
    if (call.exact) {
      alpha = best_scale(call.book, reach, start.window, shared.found);
    } else if (threadIdx.x < 32) {
      alpha = alternate(call.book, reach, start.window, start.first, start.scale, sums,
                        static_cast<int>(call.max_iter));
    }
  }
  if (threadIdx.x == 0) shared.scale = usable(static_cast<float>(alpha));
  __syncthreads();
  return shared.scale;
}

}  // namespace blaq
