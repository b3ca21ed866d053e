#include "cpu/scale_search.h"

#include <bit>
#include <cmath>

namespace blaq {
namespace {

constexpr double kTolerance = 1e-6;    // of α, ends the alternation
constexpr int64_t kSweepAtMost = 1024;  // elements; above, a histogram is faster and close enough
constexpr int kMaxBins = (1 << (23 - kBinShift)) * 40;  // 40 octaves
constexpr int kMaxParts = 16;
constexpr int kPeaks = 3;  // local maxima that a smaller group refits, each kRefits times
constexpr int kRefits = 2;
constexpr int64_t kTrustFrom = 4 * kBlock;  // elements, from which the bins alone are precise enough

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

Pair level_sums(const Group& group, const Codebook& book, float scale) {
  const auto& kernels = training_kernels();
  return reduce(group.n, [&](int64_t begin, int64_t end, Sums* sums) {
    kernels.level_sums(group.w + begin, group.d + begin, end - begin, book, scale, sums);
  });
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

int bin_of(double x) { return static_cast<int>(std::bit_cast<uint32_t>(static_cast<float>(x)) >> kBinShift); }

// Number of bins that lie below x, when each bin counts as lying at its middle.
int edge_of(double x) {
  const uint32_t u = std::bit_cast<uint32_t>(static_cast<float>(x));
  return static_cast<int>((u + (1u << (kBinShift - 1))) >> kBinShift);
}

// Sums over the elements in bins >= b, for b in [0, bins]. Parts are cut by the group's size alone, so
// that threads do not matter.
std::vector<Pair> suffix_sums(const Group& group, int base, int bins) {
  const auto& kernels = training_kernels();
  const int64_t blocks = blocks_of(group.n);
  const int64_t parts = std::min<int64_t>(kMaxParts, (blocks + 3) / 4);
  const int64_t size = (blocks + parts - 1) / parts * kBlock;
  std::vector<Pair> sums(parts * (bins + 1));
  torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) {
      const int64_t begin = std::min(group.n, p * size), end = std::min(group.n, begin + size);
      kernels.histogram(group.w + begin, group.d + begin, end - begin, base, bins,
                        sums.data() + p * (bins + 1));
    }
  });
  for (int64_t p = 1; p < parts; ++p) {
    for (int b = 0; b < bins; ++b) {
      sums[b].first += sums[p * (bins + 1) + b].first;
      sums[b].second += sums[p * (bins + 1) + b].second;
    }
  }
  sums.resize(bins + 1);
  for (int b = bins - 1; b >= 0; --b) {
    sums[b].first += sums[b + 1].first;
    sums[b].second += sums[b + 1].second;
  }
  return sums;
}

float largest_magnitude(const Group& group) {
  const auto& kernels = training_kernels();
  if (group.n <= kBlock) return kernels.max_abs(group.w, group.n);
  std::vector<float> parts(blocks_of(group.n));
  for_each_block(group.n, [&](int64_t block, int64_t begin, int64_t end) {
    parts[block] = kernels.max_abs(group.w + begin, end - begin);
  });
  return *std::max_element(parts.begin(), parts.end());
}

// A candidate scale, the sums of its codes, and what those gain.
struct Peak {
  double gain = 0, alpha = 0;
  Pair sums;
};

// Nearly exact for many elements: every α of a grid, by a weighted histogram of |w|. α is sought from
// half the weighted mean, below which all weights saturate, to where all are on the lowest level.
double scan(const Group& group, const Codebook& book, const Pair& mean_sums) {
  const double mean = ratio(mean_sums);
  const float largest = largest_magnitude(group);
  if (!(mean > 0) || !(largest > kScaleTiny)) return 0;
  const int steps = book.count - 1;
  const int top = bin_of(largest);
  const int lowest = bin_of(std::max(book.mid[0] * mean / 2, static_cast<double>(kScaleTiny)));
  const int base = std::max(lowest, top - kMaxBins + 1), bins = std::max(1, top - base + 1);
  const std::vector<Pair> above = suffix_sums(group, base, bins);

  // Each bin goes to one level, so every candidate is a true assignment of codes, and its sums are exact.
  const int first = bin_of(mean / 2), last = bin_of(largest / book.mid[0]);
  std::vector<Peak> peaks;
  Peak before{}, here{};
  for (int b = first; b <= last + 1; ++b) {
    Peak after{};
    if (b <= last) {
      after.alpha = std::bit_cast<float>(static_cast<uint32_t>(b) << kBinShift);
      after.sums = {book.level[0] * above[0].first,
                    static_cast<double>(book.level[0]) * book.level[0] * above[0].second};
      for (int j = 0; j < steps; ++j) {
        const double low = book.level[j], high = book.level[j + 1];
        const Pair& reach = above[std::clamp(edge_of(book.mid[j] * after.alpha) - base, 0, bins)];
        after.sums.first += (high - low) * reach.first;
        after.sums.second += (high * high - low * low) * reach.second;
      }
      after.gain = gain(after.sums);
    }
    if (here.gain > 0 && here.gain >= before.gain && here.gain > after.gain) peaks.push_back(here);
    before = here, here = after;
  }
  const size_t kept = std::min<size_t>(kPeaks, peaks.size());
  std::partial_sort(peaks.begin(), peaks.begin() + kept, peaks.end(),
                    [](const Peak& x, const Peak& y) { return x.gain > y.gain; });
  if (kept == 0) return mean;
  if (group.n >= kTrustFrom) return ratio(peaks[0].sums);
  // In a smaller group one weight on the wrong side of a threshold counts: refit the best exactly.
  peaks.resize(kept);
  std::sort(peaks.begin(), peaks.end(), [](const Peak& x, const Peak& y) { return x.alpha > y.alpha; });
  Pair best;
  for (const Peak& peak : peaks) {
    Pair sums = peak.sums;
    for (int i = 0; i < kRefits; ++i) sums = level_sums(group, book, static_cast<float>(ratio(sums)));
    if (gain(sums) > gain(best) * kMoreThanEqual) best = sums;
  }
  return ratio(best);
}

}  // namespace

Pair weighted_sums(const Group& group) {
  const auto& kernels = training_kernels();
  return reduce(group.n, [&](int64_t begin, int64_t end, Sums* sums) {
    kernels.weighted_sums(group.w + begin, group.d + begin, end - begin, sums);
  });
}

float solve_scale(const Group& group, const Solver& solver, float init, const Pair* sums) {
  double alpha;
  if (solver.book.is_binary()) {
    alpha = ratio(sums ? *sums : weighted_sums(group));
  } else if (!solver.exact) {
    alpha = alternate(group, solver, init > 0 ? init : ratio(sums ? *sums : weighted_sums(group)));
  } else if (group.n <= kSweepAtMost) {
    alpha = sweep(group, solver.book, ratio(sums ? *sums : weighted_sums(group)));
  } else {
    alpha = scan(group, solver.book, sums ? *sums : weighted_sums(group));
  }
  const float scale = static_cast<float>(alpha);
  return scale > kScaleTiny ? scale : kScaleTiny;  // NaN too
}

}  // namespace blaq
