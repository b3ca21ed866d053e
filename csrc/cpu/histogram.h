// The weighted histogram of |w|, by the leading bits of a float: 64 bins an octave.
#pragma once

#include <bit>
#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/scale_search.h"

namespace blaq {

inline int bin_of(double x) {
  return static_cast<int>(std::bit_cast<uint32_t>(static_cast<float>(x)) >> kBinShift);
}

constexpr int64_t kTrustFrom = 4 * kBlock;  // elements, from which the bins alone are precise enough

// The lowest bin that has a say among weights of this weighted mean.
inline int least_bin(const Codebook& book, double mean) {
  return bin_of(std::max(book.mid[0] * mean / 2, static_cast<double>(kScaleTiny)));
}

// Sums of (d|w|, d) over bins [base, base + bins); the first also takes what lies below, the last what
// lies above. Parts are cut by the group's size alone, so that threads do not matter: each part is one
// thread's, and adds its elements in order.
class Histogram {
 public:
  Histogram(int64_t n, int base, int bins)
      : n_(n), base_(base), bins_(bins), sums_(std::make_unique_for_overwrite<Pair[]>(parts() * bins)) {}

  int64_t parts() const { return (blocks_of(n_) + part_blocks() - 1) / part_blocks(); }
  int64_t begin(int64_t part) const { return part * part_blocks() * kBlock; }
  int64_t end(int64_t part) const { return std::min(n_, begin(part + 1)); }

  void clear(int64_t part) { std::fill_n(sums_.get() + part * bins_, bins_, Pair{}); }
  void add(int64_t part, const float* w, const float* d, int64_t n, const Next& next = {}) {
    training_kernels().histogram(w, d, n, {sums_.get() + part * bins_, base_, bins_}, next);
  }
  // To call once, when every part is whole: each bin becomes the sum of itself and all above.
  void accumulate();

  // Sums over the elements in bins from `bin` on.
  Pair from(int bin) const { return bin >= base_ + bins_ ? Pair{} : sums_[std::max(bin - base_, 0)]; }
  Pair all() const { return sums_[0]; }
  // Σ dw², from below: that of weights which are all the mean of their bin.
  double squares() const;
  // Whether every threshold that counts, among weights of this weighted mean, is the edge of a bin.
  bool holds(const Codebook& book, double mean) const {
    return least_bin(book, mean) > base() && highest() < top();
  }
  int base() const { return base_; }
  int top() const { return base_ + bins_ - 1; }
  int highest() const;  // the highest bin that is not empty; base() where all are

 private:
  static constexpr int64_t kLeastBlocks = 4, kMostParts = 16;
  int64_t part_blocks() const {
    return std::max(kLeastBlocks, (blocks_of(n_) + kMostParts - 1) / kMostParts);
  }

  int64_t n_;
  int base_, bins_;
  std::unique_ptr<Pair[]> sums_;
};

// A histogram of n elements where weights of this scale are expected, to be filled along with the update.
Histogram expected_histogram(int64_t n, float scale);

// The last α where a whole histogram shows it to be as good as any; else the best; 0 where the histogram
// does not hold every threshold.
float settle(const Histogram& histogram, const Codebook& book, float last);

// The best α of many elements, nearly exactly; `mean` are their weighted sums. `ready` is a histogram of
// the group, or null; it serves where it holds every threshold that counts.
double scan(const Group& group, const Codebook& book, const Pair& mean_sums, const Histogram* ready);

}  // namespace blaq
