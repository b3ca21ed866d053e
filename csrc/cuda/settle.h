// The scale of a group from the histogram of its weights: argmin over α of ½ Σ d (w - αβ)², β the
// nearest levels (Eqs. 5 and 7 of BLAQ, AAAI 2024). One block, every sum in float64 and in one
// order.
//
// For fixed β the best E is ½ (Σdw² - A²/B), A = Σdβ|w|, B = Σdβ², at α = A/B; A and B are sums
// over the weights beyond each threshold.
#pragma once

#include "cuda/bins.h"
#include "cuda/book.h"

namespace blaq {

constexpr int kSettleBins = (kBins + kThreads - 1) / kThreads;  // of one thread: neighbours
constexpr double kTolerance = 1e-6;                             // of α, ends the alternation
constexpr double kEqualGain = 1 - 1e-9;  // the larger of equally good scales counts
constexpr double kExactFrom = 1e-4;      // of Σd: below, A and B at the first scale are no help
constexpr int kPolish = 2;               // alternations after the scan, which knows whole bins only

struct Sums {  // A and B, or Σd|w| and Σd
  double first, second;
};

BLAQ_DEVICE Sums operator+(Sums a, Sums b) { return {a.first + b.first, a.second + b.second}; }

// Of all threads of the block, in one order; all have it, behind a barrier.
BLAQ_DEVICE Sums block_sum(Sums mine, Sums* of_warps) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    mine.first += __shfl_xor_sync(~0u, mine.first, lanes);
    mine.second += __shfl_xor_sync(~0u, mine.second, lanes);
  }
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = mine;
  __syncthreads();
  Sums all = of_warps[0];
  for (int i = 1; i < kThreads / 32; ++i) all = all + of_warps[i];
  __syncthreads();
  return all;
}

// Σd|w| and Σd over the bins from each on, of one group.
struct Reach {
  double moment[kBins + 1], mass[kBins + 1];

  // `bin_sums(bin)` are (Σd, Σd · place) of one bin. Where they lie in this memory, they are read
  // before it is written.
  template <typename BinSums>
  BLAQ_DEVICE void fill(int window, Sums* of_warps, const BinSums& bin_sums) {
    const int first = threadIdx.x * kSettleBins;
    Sums here[kSettleBins], mine = {0, 0};
#pragma unroll
    for (int i = 0; i < kSettleBins; ++i) {
      here[i] = {0, 0};
      if (first + i >= kBins) continue;
      const Sums sums = bin_sums(first + i);  // mass, place
      if (sums.first == 0) continue;          // an infinite edge times nothing is nothing
      const double low = edge_of(first + i, window), high = edge_of(first + i + 1, window);
      here[i] = {low * sums.first + (high - low) * sums.second, sums.first};
      mine = mine + here[i];
    }
    Sums above = mine;  // of this thread's bins and those of later lanes
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      const double a = __shfl_down_sync(~0u, above.first, lanes);
      const double b = __shfl_down_sync(~0u, above.second, lanes);
      if (threadIdx.x % 32 + lanes < 32) above = above + Sums{a, b};
    }
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = above;
    __syncthreads();
    for (int i = kThreads / 32 - 1; i > static_cast<int>(threadIdx.x / 32); --i) {
      above = above + of_warps[i];
    }
    // Sums of sums: subtracting again would leave what rounding makes of nothing.
    Sums later = {__shfl_down_sync(~0u, above.first, 1), __shfl_down_sync(~0u, above.second, 1)};
    if (threadIdx.x % 32 == 31) {
      later = {0, 0};
      for (int i = kThreads / 32 - 1; i > static_cast<int>(threadIdx.x / 32); --i) {
        later = later + of_warps[i];
      }
    }
#pragma unroll
    for (int i = kSettleBins - 1; i >= 0; --i) {
      if (first + i >= kBins) continue;
      later = later + here[i];
      moment[first + i] = later.first, mass[first + i] = later.second;
    }
    if (threadIdx.x == 0) moment[kBins] = mass[kBins] = 0;
    __syncthreads();
  }

  BLAQ_DEVICE Sums from(int bin) const { return {moment[bin], mass[bin]}; }
  // Over the weights from x on: those of x's bin as if they lay evenly around their mean, as far as
  // the bin reaches on its shorter side.
  BLAQ_DEVICE Sums beyond(float x, int window) const {
    const int bin = place_of(x, window).bin;
    const Sums above = from(bin + 1);
    const double inside = mass[bin] - above.second;
    if (!(inside > 0)) return above;
    const double low = edge_of(bin, window), high = edge_of(bin + 1, window);
    double mean = (moment[bin] - above.first) / inside;
    mean = mean < low ? low : mean > high ? high : mean;
    const double half = mean - low < high - mean ? mean - low : high - mean;
    const double least = mean - half > x ? mean - half : x, most = mean + half;
    double share = x <= mean ? 1 : 0;
    if (half > 0) share = most > least ? (most - least) / (2 * half) : 0;
    const double middle = half > 0 ? (least + most) / 2 : mean;
    return {above.first + share * inside * middle, above.second + share * inside};
  }
};

// A and B where threshold j leaves reach_of(j) beyond it. One warp: lane j has threshold j.
template <typename ReachOf>
BLAQ_DEVICE Sums level_sums(const Book& book, Sums all, const ReachOf& reach_of) {
  const int j = threadIdx.x % 32;
  Sums mine = {0, 0};
  if (j == 0)
    mine = {book.level[0] * all.first, double{book.level[0]} * book.level[0] * all.second};
  if (j > 0 && j < book.count) {
    const double low = book.level[j - 1], high = book.level[j];
    const Sums reach = reach_of(j - 1);
    mine = {(high - low) * reach.first, (high * high - low * low) * reach.second};
  }
#pragma unroll
  for (int lanes = 4; lanes > 0; lanes /= 2) {
    mine.first += __shfl_xor_sync(~0u, mine.first, lanes);
    mine.second += __shfl_xor_sync(~0u, mine.second, lanes);
  }
  return {__shfl_sync(~0u, mine.first, 0), __shfl_sync(~0u, mine.second, 0)};
}

BLAQ_DEVICE Sums sums_at(const Book& book, const Reach& reach, int window, double alpha) {
  return level_sums(book, reach.from(0), [&](int j) {
    return reach.beyond(static_cast<float>(book.mid[j] * alpha), window);
  });
}

// At most `max_iter` alternations from `first`. Of the scale `near` the sums with its own codes are
// known, `exact`; what the histogram adds is the weights between its thresholds and those of the
// scale so far: the nearer the alternations are to it, the more exact. For one warp.
BLAQ_DEVICE double alternate(const Book& book, const Reach& reach, int window, double first,
                             double near, Sums exact, int max_iter) {
  exact = {exact.first * kShrink, exact.second * kShrink};
  const double all = reach.from(0).second;
  const Sums known = sums_at(book, reach, window, near);
  double alpha = first;
  for (int i = 0; i < max_iter; ++i) {
    Sums sums = exact;
    if (alpha != near) {
      const Sums here = sums_at(book, reach, window, alpha);
      sums = {exact.first + (here.first - known.first),
              exact.second + (here.second - known.second)};
      if (!(sums.second > kExactFrom * all)) sums = here;
    }
    // Every weight on a zero level: α has no say in E; smaller is where E can fall.
    const double refit = sums.second > 0 ? sums.first / sums.second : alpha / 2;
    const double moved = refit > alpha ? refit - alpha : alpha - refit;
    const bool settled = !(moved > kTolerance * alpha);
    alpha = refit;
    if (settled) break;
  }
  return alpha;
}

// A and B of the codes at `alpha`, each bin whole on one side of a threshold; nothing where all
// weights are on the lowest level, which is no better than all on another.
BLAQ_DEVICE Sums whole_bin_sums(const Book& book, const Reach& reach, int window, float alpha) {
  const Sums all = reach.from(0);
  Sums sums = {book.level[0] * all.first, double{book.level[0]} * book.level[0] * all.second};
  for (int j = 0; j + 1 < book.count; ++j) {
    const BinPlace place = place_of(book.mid[j] * alpha, window);
    const Sums beyond = reach.from(place.bin + static_cast<int>(place.within >> 31));
    if (j == 0 && !(beyond.second > 0)) return {0, 0};
    const double low = book.level[j], high = book.level[j + 1];
    sums.first += (high - low) * beyond.first;
    sums.second += (high * high - low * low) * beyond.second;
  }
  return sums;
}

struct Found {  // by the threads of a block together
  double gain[kThreads / 32];
  int bin;
};

// The scale whose codes gain most: the highest threshold at every bin's edge, from half the
// weighted mean on, below which no scale is best. Each bin goes to one level, so every candidate is
// a true assignment of codes but for weights that share a bin with a threshold, which the last
// alternations divide. All threads of the block.
BLAQ_DEVICE double best_scale(const Book& book, const Reach& reach, int window, Found& found) {
  const Sums all = reach.from(0);
  const double mean = all.second > 0 ? all.first / all.second : 0;
  const float top_mid = book.mid[book.count - 2];
  double gains[kSettleBins], most = 0;
#pragma unroll
  for (int i = 0; i < kSettleBins; ++i) {
    const int bin = threadIdx.x + i * kThreads;
    const float alpha = edge_of(min(bin, kBins - 1), window) / top_mid;
    gains[i] = 0;
    if (bin >= kBins || !(alpha >= mean / 2)) continue;
    const Sums sums = whole_bin_sums(book, reach, window, alpha);
    if (sums.second > 0) gains[i] = sums.first * (sums.first / sums.second);
    most = gains[i] > most ? gains[i] : most;
  }
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    const double other = __shfl_xor_sync(~0u, most, lanes);
    most = other > most ? other : most;
  }
  if (threadIdx.x % 32 == 0) found.gain[threadIdx.x / 32] = most;
  if (threadIdx.x == 0) found.bin = -1;
  __syncthreads();
  for (int i = 0; i < kThreads / 32; ++i) most = found.gain[i] > most ? found.gain[i] : most;
  int best = -1;
#pragma unroll
  for (int i = 0; i < kSettleBins; ++i) {
    if (gains[i] > 0 && gains[i] >= most * kEqualGain) best = threadIdx.x + i * kThreads;
  }
  if (best >= 0) atomicMax(&found.bin, best);
  __syncthreads();
  if (found.bin < 0) return mean;
  const Sums sums = whole_bin_sums(book, reach, window, edge_of(found.bin, window) / top_mid);
  double alpha = sums.first / sums.second;
  for (int i = 0; i < kPolish; ++i) {
    const Sums divided = sums_at(book, reach, window, alpha);
    if (divided.second > 0) alpha = divided.first / divided.second;
  }
  return alpha;
}

}  // namespace blaq
