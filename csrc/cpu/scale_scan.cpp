// The exact scale of many elements: every α of a grid, by a weighted histogram of |w|.
#include <cmath>

#include "cpu/histogram.h"

namespace blaq {
namespace {

constexpr int kOctave = 1 << (23 - kBinShift);  // bins
constexpr int kMaxBins = kOctave * 40;
constexpr int kPeaks = 3;  // local maxima that a smaller group refits, each kRefits times
constexpr int kRefits = 2;
constexpr double kAsGood = 2e-4;  // of E, by which the last scale may miss the best of the bins

// The first bin whose middle is at x or above.
int edge_of(double x) {
  const uint32_t u = std::bit_cast<uint32_t>(static_cast<float>(x));
  return static_cast<int>((u + (1u << (kBinShift - 1))) >> kBinShift);
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

Histogram histogram_of(const Group& group, int lowest, int top) {
  const int base = std::max(lowest, top - kMaxBins + 1);
  Histogram histogram(group.n, base, std::max(1, top - base + 1));
  torch::stable::parallel_for(0, histogram.parts(), 1, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) {
      const int64_t begin = histogram.begin(p);
      histogram.clear(p);
      histogram.add(p, group.w + begin, group.d + begin, histogram.end(p) - begin);
    }
  });
  histogram.accumulate();
  return histogram;
}

// What a weight adds to the sums where it rises above a threshold.
struct Rises {
  const Codebook& book;
  double first[kMaxLevels], second[kMaxLevels];

  explicit Rises(const Codebook& book_) : book(book_) {
    for (int j = 0; j + 1 < book.count; ++j) {
      const double low = book.level[j], high = book.level[j + 1];
      first[j] = high - low, second[j] = high * high - low * low;
    }
  }
  // Sums of the codes whose thresholds are the edges of bins nearest to those of α.
  Pair sums(const Histogram& histogram, double alpha) const {
    const double lowest = book.level[0];
    Pair sums = {lowest * histogram.all().first, lowest * lowest * histogram.all().second};
    for (int j = 0; j + 1 < book.count; ++j) {
      const Pair reach = histogram.from(edge_of(book.mid[j] * alpha));
      sums.first += first[j] * reach.first;
      sums.second += second[j] * reach.second;
    }
    return sums;
  }
};

// A candidate scale, the sums of its codes, and what those gain.
struct Peak {
  double gain = 0, alpha = 0;
  Pair sums;
};

// α from half the weighted mean, below which all weights saturate, to where all are on the lowest level.
// Each bin goes to one level, so every candidate is a true assignment of codes, and its sums are exact.
// The highest threshold of a candidate is the edge of a bin; of levels 1, 1/2, 1/4, … so is every other.
std::vector<Peak> peaks_of(const Histogram& histogram, const Codebook& book, double mean) {
  const Rises rises(book);
  const double largest = std::bit_cast<float>(static_cast<uint32_t>(histogram.highest() + 1) << kBinShift);
  const double highest_mid = book.mid[book.count - 2];
  const int first = bin_of(mean / 2 * highest_mid), last = bin_of(largest / book.mid[0] * highest_mid);
  std::vector<Peak> peaks;
  Peak before{}, here{};
  for (int b = first; b <= last + 1; ++b) {
    Peak after{};
    if (b <= last) {
      after.alpha = std::bit_cast<float>(static_cast<uint32_t>(b) << kBinShift) / highest_mid;
      after.sums = rises.sums(histogram, after.alpha);
      after.gain = gain(after.sums);
    }
    if (here.gain > 0 && here.gain >= before.gain && here.gain > after.gain) peaks.push_back(here);
    before = here, here = after;
  }
  return peaks;
}

}  // namespace

void Histogram::accumulate() {
  Pair* sums = sums_.get();
  for (int64_t p = 1; p < parts(); ++p) {
    for (int b = 0; b < bins_; ++b) sums[b] += sums[p * bins_ + b];
  }
  for (int b = bins_ - 2; b >= 0; --b) sums[b] += sums[b + 1];
}

int Histogram::highest() const {
  int bin = bins_ - 1;
  while (bin > 0 && sums_[bin].second == 0) --bin;
  return base_ + bin;
}

double Histogram::squares() const {
  double sum = 0;
  for (int b = 0; b < bins_; ++b) {
    const Pair above = b + 1 < bins_ ? sums_[b + 1] : Pair{};
    sum += gain({sums_[b].first - above.first, sums_[b].second - above.second});
  }
  return sum;
}

Histogram expected_histogram(int64_t n, float scale) {
  constexpr int kBelow = 12 * kOctave, kAbove = 4 * kOctave;  // a codebook's thresholds span 8 octaves
  return Histogram(n, std::max(0, bin_of(scale) - kBelow), kBelow + kAbove);
}

float settle(const Histogram& histogram, const Codebook& book, float last) {
  const double mean = ratio(histogram.all());
  if (!(mean > 0) || !histogram.holds(book, mean)) return 0;
  Peak best;
  for (const Peak& peak : peaks_of(histogram, book, mean)) {
    if (peak.gain > best.gain) best = peak;
  }
  // The nearest codes gain no less than those at the edges of bins; and squares() is no more than Σ dw².
  const Pair sums = Rises(book).sums(histogram, last);
  const double here = last * (2 * sums.first - last * sums.second);
  if (last > kScaleTiny && best.gain - here <= kAsGood * (histogram.squares() - best.gain)) return last;
  const auto scale = static_cast<float>(ratio(best.sums));
  return scale > kScaleTiny ? scale : 0;
}

double scan(const Group& group, const Codebook& book, const Pair& mean_sums, const Histogram* ready) {
  const double mean = ratio(mean_sums);
  if (!(mean > 0)) return 0;
  std::vector<Peak> peaks;
  if (ready && ready->holds(book, mean)) {
    peaks = peaks_of(*ready, book, mean);
  } else {
    const float largest = largest_magnitude(group);
    if (!(largest > kScaleTiny)) return 0;
    peaks = peaks_of(histogram_of(group, least_bin(book, mean), bin_of(largest)), book, mean);
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

}  // namespace blaq
