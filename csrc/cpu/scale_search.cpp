#include "cpu/histogram.h"

#include <cmath>

namespace blaq {
namespace {

constexpr double kTolerance = 1e-6;    // of α, ends the alternation
constexpr int64_t kSweepAtMost = 1024;  // elements; above, a histogram is faster and close enough

// Block sums of a group in block order, by `body(begin, end, sums)`.
template <typename Body>
Pair reduce(int64_t n, const Body& body) {
  if (n <= kBlock) {
    Sums sums;
    body(0, n, &sums);
    return total(sums);
  }
  std::vector<Pair> parts(blocks_of(n));
  for_each_block(n, [&](int64_t block, int64_t begin, int64_t end) {
    Sums sums;
    body(begin, end, &sums);
    parts[block] = total(sums);
  });
  return in_order(parts);
}

double alternate(const Group& group, const Solver& solver, double alpha) {
  for (int64_t i = 0; i < solver.max_iter; ++i) {
    const Pair sums = level_sums(group, solver.book, static_cast<float>(alpha));
    // Every weight on a zero level: α has no say in E; smaller is where E can fall.
    const double refit = sums.second > 0 ? sums.first / sums.second : alpha / 2;
    const bool moved = std::abs(refit - alpha) > kTolerance * alpha;
    alpha = refit;
    if (!moved) break;
  }
  return alpha;
}

}  // namespace

Pair level_sums(const Group& group, const Codebook& book, float scale) {
  const auto& kernels = training_kernels();
  return reduce(group.n, [&](int64_t begin, int64_t end, Sums* sums) {
    kernels.level_sums(group.w + begin, group.d + begin, end - begin, book, scale, sums);
  });
}

Pair weighted_sums(const Group& group) {
  const auto& kernels = training_kernels();
  return reduce(group.n, [&](int64_t begin, int64_t end, Sums* sums) {
    kernels.weighted_sums(group.w + begin, group.d + begin, end - begin, sums);
  });
}

float solve_scale(const Group& group, const Solver& solver, float init, const Pair* sums,
                  const Histogram* histogram) {
  double alpha;
  if (solver.book.is_binary()) {
    alpha = ratio(sums ? *sums : weighted_sums(group));
  } else if (!solver.exact) {
    alpha = alternate(group, solver, init > 0 ? init : ratio(sums ? *sums : weighted_sums(group)));
  } else if (group.n <= kSweepAtMost) {
    alpha = sweep(group, solver.book, ratio(sums ? *sums : weighted_sums(group)));
  } else {
    alpha = scan(group, solver.book, sums ? *sums : weighted_sums(group), histogram);
  }
  const float scale = static_cast<float>(alpha);
  return scale > kScaleTiny ? scale : kScaleTiny;  // NaN too
}

}  // namespace blaq
