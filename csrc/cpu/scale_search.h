// The scale of one group: argmin over α of ½ Σ d (w - αβ)², β the nearest levels (Eqs. 5 and 7).
#pragma once

#include "cpu/training_kernels.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

namespace blaq {

constexpr int64_t kBlock = 1 << 14;  // elements of one partial sum: fixed, so that threads do not matter

struct Group {
  const float* w;
  const float* d;
  int64_t n;
};

struct Solver {
  Codebook book;
  bool exact;
  int64_t max_iter;
};

inline int64_t blocks_of(int64_t n) { return (n + kBlock - 1) / kBlock; }

// Runs body(block, begin, end) for every block of [0, n), on torch's pool.
template <typename Body>
void for_each_block(int64_t n, const Body& body) {
  const int64_t blocks = blocks_of(n);
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) body(b, b * kBlock, std::min(n, (b + 1) * kBlock));
  });
}

inline Pair in_order(const std::vector<Pair>& parts) {
  Pair sum;
  for (const Pair& part : parts) sum += part;
  return sum;
}

// For a fixed β, A = Σ dβ|w| and B = Σ dβ², the best E is ½ (Σ dw² - A²/B), at α = A/B.
inline double ratio(const Pair& sums) { return sums.second > 0 ? sums.first / sums.second : 0.0; }
inline double gain(const Pair& sums) { return sums.first * ratio(sums); }

// Of equally good scales, as α and α/2 often are in pow2, the larger counts: a gain must be larger by more.
constexpr double kMoreThanEqual = 1 + 1e-12;

// The best α of few elements, exactly; `mean` is the weighted mean of |w|.
double sweep(const Group& group, const Codebook& book, double mean);

// Σ d|w| and Σ d.
Pair weighted_sums(const Group& group);
// Σ dβ|w| and Σ dβ², β the nearest levels at `scale`.
Pair level_sums(const Group& group, const Codebook& book, float scale);

class Histogram;

// `init` is the last scale, 0 for none; `sums` and `histogram` are the group's where they are known, else
// null. Always positive.
float solve_scale(const Group& group, const Solver& solver, float init, const Pair* sums = nullptr,
                  const Histogram* histogram = nullptr);

}  // namespace blaq
