// The exact scale of few elements. As α falls, weights cross thresholds one by one, at α = |w| / mid,
// and one of the assignments between two crossings is the best. The crossings are summed by buckets of
// α; a bound drops the buckets that cannot hold the best α, which leaves few crossings to sort and try.
#include <bit>
#include <cmath>
#include <functional>
#include <utility>

#include "cpu/scale_search.h"

namespace blaq {
namespace {

constexpr int kBucketShift = 18;  // of a float's bits: 32 buckets an octave

int bucket_of(float alpha) { return static_cast<int>(std::bit_cast<uint32_t>(alpha) >> kBucketShift); }

double lower_edge(int bucket) {
  return std::bit_cast<float>(static_cast<uint32_t>(bucket) << kBucketShift);
}

class Sweep {
 public:
  Sweep(const Group& group, const Codebook& book)
      : n_(static_cast<int>(group.n)), steps_(book.count - 1), a_(n_), d_(n_) {
    const double level = book.level[0];
    for (int i = 0; i < n_; ++i) {
      const float a = std::fabs(group.w[i]);
      a_[i] = a <= __builtin_inff() ? a : 0;  // NaN: no order, no weight
      d_[i] = std::max(group.d[i], kCurvatureFloor);
      start_.first += d_[i] * level * a_[i];
      start_.second += d_[i] * level * level;
    }
    for (int j = 0; j < steps_; ++j) {
      const double low = book.level[j], high = book.level[j + 1];
      inverse_mid_[j] = static_cast<float>(2 / (low + high));
      up_[j] = {high - low, high * high - low * low};
    }
  }

  // α is at least the weighted mean of |w|: A / B >= Σdβ|w| / Σdβ >= mean, for β <= 1 rises with |w|.
  double best_scale(double mean) const {
    const float largest = *std::max_element(a_.begin(), a_.end());
    const int base = bucket_of(static_cast<float>(mean)) - 2;  // bucket 0 takes what lies below
    const auto place = [&](int i, int j) { return std::max(bucket_of(a_[i] * inverse_mid_[j]) - base, 0); };
    const int buckets = std::max(1, bucket_of(largest * inverse_mid_[0]) - base + 1);

    std::vector<Pair> before(buckets);  // the sums at the upper edge of each bucket
    for (int i = 0; i < n_; ++i) {
      for (int j = 0; j < steps_; ++j) cross(i, j, &before[place(i, j)]);
    }
    Pair sums = start_;
    double most = 0;
    for (int b = buckets - 1; b >= 0; --b) {
      const Pair inside = std::exchange(before[b], sums);
      most = std::max(most, gain(sums));
      sums.first += inside.first, sums.second += inside.second;
    }
    // No assignment gains more than 2αA - α²B of the nearest codes at α plus its own B (α - A/B)².
    std::vector<char> holds(buckets);
    for (int b = buckets - 1; b > 0; --b) {
      const double high = lower_edge(base + b + 1), low = lower_edge(base + b);
      const Pair &above = before[b], &below = before[b - 1];
      const double at_high = high * (2 * above.first - high * above.second);
      const double at_low = low * (2 * below.first - low * below.second);
      holds[b] = std::max(at_high, at_low) + below.second * (high - low) * (high - low) / 4 >= most;
    }
    std::vector<uint64_t> crossings(n_ * steps_ + 1);  // bits of α, element, threshold
    size_t count = 0;
    for (int i = 0; i < n_; ++i) {
      for (int j = 0; j < steps_; ++j) {
        const auto alpha = std::bit_cast<uint32_t>(a_[i] * inverse_mid_[j]);
        crossings[count] = static_cast<uint64_t>(alpha) << 32 | static_cast<uint32_t>(i * kMaxLevels + j);
        count += holds[place(i, j)];
      }
    }
    std::sort(crossings.begin(), crossings.begin() + count, std::greater<>());

    Pair best;
    size_t next = 0;
    for (int b = buckets - 1; b > 0; --b) {
      if (!holds[b]) continue;
      sums = before[b];
      keep_better(sums, &best);
      for (; next < count; ++next) {
        const auto which = static_cast<uint32_t>(crossings[next]);
        const int i = which / kMaxLevels, j = which % kMaxLevels;
        if (place(i, j) != b) break;
        cross(i, j, &sums);
        keep_better(sums, &best);
      }
    }
    return ratio(best);
  }

 private:
  void cross(int i, int j, Pair* sums) const {
    sums->first += up_[j].first * d_[i] * a_[i];
    sums->second += up_[j].second * d_[i];
  }
  static void keep_better(const Pair& sums, Pair* best) {
    if (gain(sums) > gain(*best) * kMoreThanEqual) *best = sums;
  }

  int n_, steps_;
  std::vector<float> a_, d_;
  float inverse_mid_[kMaxLevels];
  Pair up_[kMaxLevels], start_;
};

}  // namespace

double sweep(const Group& group, const Codebook& book, double mean) {
  return mean > 0 ? Sweep(group, book).best_scale(mean) : 0;
}

}  // namespace blaq
