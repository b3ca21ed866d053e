// One pass over a weight: the update, a histogram of its result, and params with the last scale. The
// histogram of all weights then proves that no other scale is better by more than a tolerance, as most often
// in training, or gives one that is; then params are written again.
#include "cpu/step_once.h"

#include <utility>

#include "cpu/histogram.h"
#include "cpu/scratch.h"

namespace blaq {
namespace {

constexpr int64_t kTogether = 1 << 22;  // elements of a batch of weights: the codes that it keeps stay in cache

int64_t size_of(const Weight& weight) { return weight.rows * weight.cols; }

class OnePass {
 public:
  OnePass(const Runner& runner, const Weight& weight, uint8_t* old_codes)
      : runner_(runner), weight_(weight), n_(size_of(weight)), last_(*weight.scale), old_codes_(old_codes),
        histogram_(expected_histogram(n_, last_)), flips_(histogram_.parts()) {}

  int64_t parts() const { return histogram_.parts(); }

  void run(int64_t part) {
    alignas(64) float own_w[kChunk], d[kChunk];
    Sums unused;
    const int64_t end = histogram_.end(part);
    histogram_.clear(part);
    for (int64_t i = histogram_.begin(part); i < end; i += kChunk) {
      const int64_t count = std::min(kChunk, end - i);
      const float* w = runner_.commits() ? weight_.latent + i : own_w;
      if (old_codes_) runner_.kernels().codes(w, count, runner_.book(), last_, old_codes_ + i);
      runner_.update(weight_, i, count, own_w, d, &unused);
      histogram_.add(part, w, d, count, runner_.inputs_at(weight_, i + count));
      flips_[part] += write(i, count, w, last_);
    }
  }

  void settle() {
    histogram_.accumulate();
    scale_ = blaq::settle(histogram_, runner_.book(), last_);
  }

  // After settle(): all that is left.
  void finish() {
    if (scale_ == 0 || scale_ != last_) solve();
    if (runner_.commits()) *weight_.scale = scale_;
    if (!old_codes_) return;
    *weight_.flips = 0;
    for (int64_t flips : flips_) *weight_.flips += flips;
  }

 private:
  int64_t write(int64_t i, int64_t count, const float* w, float scale) const {
    return runner_.write_values(weight_, i, count, w, scale, old_codes_ ? old_codes_ + i : nullptr);
  }

  // w and, unless the histogram gave the scale, d again; then params.
  void solve() {
    Scratch scratch(2 * Scratch::bytes_of<float>(n_), 2);
    float *own_w = scratch.take<float>(n_), *d = scratch.take<float>(n_);
    const float* w = runner_.commits() ? weight_.latent : own_w;
    if (!runner_.commits() || scale_ == 0) {
      for_each_chunk([&](int64_t, int64_t i, int64_t count) {
        Sums unused;
        runner_.commits() ? runner_.curvature(weight_, i, count, d + i)
                          : runner_.update(weight_, i, count, own_w + i, d + i, &unused);
      });
    }
    if (scale_ == 0) scale_ = solve_scale({w, d, n_}, runner_.solver(), last_);
    flips_.assign(blocks_of(n_), 0);
    for_each_chunk([&](int64_t block, int64_t i, int64_t count) {
      flips_[block] += write(i, count, w + i, scale_);
    });
  }

  template <typename Body>
  void for_each_chunk(const Body& body) const {
    for_each_block(n_, [&](int64_t block, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i += kChunk) body(block, i, std::min(kChunk, end - i));
    });
  }

  const Runner& runner_;
  const Weight& weight_;
  const int64_t n_;
  const float last_;
  uint8_t* const old_codes_;
  Histogram histogram_;
  std::vector<int64_t> flips_;  // of each part, or block
  float scale_ = 0;
};

void run_batch(const Runner& runner, const Weight* const* weights, int64_t count, int64_t elements) {
  Scratch scratch(elements + 64 * count, 1);
  std::vector<OnePass> passes;
  std::vector<std::pair<int64_t, int64_t>> parts;  // weight, part
  for (int64_t i = 0; i < count; ++i) {
    const Weight& weight = *weights[i];
    passes.emplace_back(runner, weight,
                        runner.counts(weight) ? scratch.take<uint8_t>(size_of(weight)) : nullptr);
    for (int64_t p = 0; p < passes.back().parts(); ++p) parts.push_back({i, p});
  }
  torch::stable::parallel_for(0, static_cast<int64_t>(parts.size()), 1, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) passes[parts[p].first].run(parts[p].second);
  });
  torch::stable::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) passes[i].settle();
  });
  for (OnePass& pass : passes) pass.finish();
}

}  // namespace

bool takes_one_pass(const Solver& solver, int64_t n) {
  return solver.exact && !solver.book.is_binary() && n >= kTrustFrom;
}

void run_once(const Runner& runner, const std::vector<const Weight*>& weights) {
  size_t first = 0;
  while (first < weights.size()) {
    size_t last = first;
    int64_t elements = 0;
    while (last < weights.size() && (last == first || elements + size_of(*weights[last]) <= kTogether)) {
      elements += size_of(*weights[last++]);
    }
    run_batch(runner, weights.data() + first, last - first, elements);
    first = last;
  }
}

}  // namespace blaq
