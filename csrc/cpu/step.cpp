// Two passes over a weight: update and sums; then, with the scale known, params. A group of at most a
// block stays in its thread's cache between the two; a larger one is cut into blocks. Where the exact scale
// of a large weight is asked, step_once.cpp does with one.
//
// Bytes a float32 parameter that must move: trial reads 16 and writes 4, step reads 20 and writes 16.
#include <atomic>
#include <memory>
#include <optional>
#include <utility>

#include "cpu/histogram.h"
#include "cpu/scratch.h"
#include "cpu/step_once.h"
#include "cpu/step_runner.h"

namespace blaq {
namespace {

class TwoPasses : public Runner {
 public:
  using Runner::Runner;

  // A whole group by one thread. Returns the number of flips, where they are counted.
  int64_t run_group(const Weight& weight, int64_t begin, int64_t n, float* scale) const {
    return book().is_binary() ? run_binary_group(weight, begin, n, scale)
                              : run_level_group(weight, begin, n, scale);
  }

  // One scale for more than a block: each pass in parallel. The second pass, which only writes params,
  // goes with the first pass of the next such weight, which mostly reads.
  void run_blocks(const Weight& weight, int64_t n) {
    const Solver& solver = stage_.solver;
    const float old_scale = *weight.scale;
    std::optional<Histogram> histogram;
    if (solver.exact && !book().is_binary()) histogram.emplace(expected_histogram(n, old_scale));
    auto now = std::make_unique<Large>(weight, n, book().is_binary(), !commits_, turn_);
    turn_ = 3 - turn_;
    const int64_t parts = histogram ? histogram->parts() : blocks_of(n);
    const int64_t before = last_ ? blocks_of(last_->n) : 0;
    std::vector<Pair> sums(blocks_of(n));
    torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
      for (int64_t p = first; p < last; ++p) {
        if (histogram) histogram->clear(p);
        int64_t i = histogram ? histogram->begin(p) : p * kBlock;
        const int64_t end = histogram ? histogram->end(p) : std::min(n, (p + 1) * kBlock);
        int64_t j = before * p / parts * kBlock;
        const int64_t stop = last_ ? std::min(last_->n, before * (p + 1) / parts * kBlock) : 0;
        Sums partial;
        while (i < end || j < stop) {
          if (i < end) {
            const int64_t count = std::min(kChunk, end - i);
            first_pass(*now, i, old_scale, &partial);
            if (histogram) histogram->add(p, now->w + i, now->d + i, count, inputs_at(weight, i + count));
            i += count;
            if (i % kBlock == 0 || i == n) sums[(i - 1) / kBlock] = total(std::exchange(partial, {}));
          }
          if (j < stop) second_pass(*last_, j), j += kChunk;
        }
      }
    });
    finish_counts();
    const Pair all = in_order(sums);
    if (histogram) histogram->accumulate();
    now->alpha = solve_scale({now->w, now->d, n}, solver, old_scale, &all, histogram ? &*histogram : nullptr);
    if (commits_) *weight.scale = now->alpha;
    last_ = std::move(now);
  }

  // The second pass of the last large weight.
  void flush() {
    if (!last_) return;
    for_each_block(last_->n, [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i += kChunk) second_pass(*last_, i);
    });
    finish_counts();
    last_.reset();
  }

 private:
  int64_t run_binary_group(const Weight& weight, int64_t begin, int64_t n, float* scale) const {
    uint16_t negative[kBlock / kSumLanes];
    std::unique_ptr<uint16_t[]> more;
    uint16_t* signs = negative;
    if (n > kBlock) more = std::make_unique<uint16_t[]>(n / kSumLanes + 1), signs = more.get();
    Sums partial;
    int64_t flips = 0;
    for (int64_t i = 0; i < n; i += kChunk) {
      flips += update_signs(weight, begin + i, std::min(kChunk, n - i), signs + i / kSumLanes, &partial);
    }
    const Pair sums = total(partial);
    const float alpha = solve_scale({}, stage_.solver, *scale, &sums);
    if (commits_) *scale = alpha;
    for (int64_t i = 0; i < n; i += kChunk) {
      write_signs(weight, begin + i, std::min(kChunk, n - i), signs + i / kSumLanes, alpha);
    }
    return flips;
  }

  int64_t run_level_group(const Weight& weight, int64_t begin, int64_t n, float* scale) const {
    const bool counts = this->counts(weight);
    Scratch scratch(2 * Scratch::bytes_of<float>(n) + Scratch::bytes_of<uint8_t>(n));
    float* d = scratch.take<float>(n);
    float* own_w = scratch.take<float>(n);
    uint8_t* old = counts ? scratch.take<uint8_t>(n) : nullptr;
    if (counts) kernels_.codes(weight.latent + begin, n, book(), *scale, old);
    Sums partial;
    for (int64_t i = 0; i < n; i += kChunk) {
      update(weight, begin + i, std::min(kChunk, n - i), own_w + i, d + i, &partial);
    }
    const Pair sums = total(partial);
    const float* w = commits_ ? weight.latent + begin : own_w;
    const float alpha = solve_scale({w, d, n}, stage_.solver, *scale, &sums);
    if (commits_) *scale = alpha;
    int64_t flips = 0;
    for (int64_t i = 0; i < n; i += kChunk) {
      flips += write_values(weight, begin + i, std::min(kChunk, n - i), w + i, alpha, counts ? old + i : old);
    }
    return flips;
  }

  // A large weight between its passes: w and d, or for one bit the signs, which are final before the
  // scale is.
  struct Large {
    const Weight& weight;
    const int64_t n;
    Scratch scratch;
    float* d = nullptr;
    float* own_w = nullptr;
    const float* w = nullptr;
    uint8_t* old_codes = nullptr;
    uint16_t* negative = nullptr;
    std::vector<int64_t> flips;  // of each block
    float alpha = 0;

    Large(const Weight& weight_, int64_t n_, bool binary, bool keeps_w, int which)
        : weight(weight_), n(n_), scratch(bytes(n_, binary, keeps_w), which), flips(blocks_of(n_)) {
      if (binary) {
        negative = scratch.take<uint16_t>(n / kSumLanes + 1);
        return;
      }
      d = scratch.take<float>(n);
      old_codes = scratch.take<uint8_t>(n);
      w = keeps_w ? own_w = scratch.take<float>(n) : weight.latent;
    }
    static int64_t bytes(int64_t n, bool binary, bool keeps_w) {
      if (binary) return Scratch::bytes_of<uint16_t>(n / kSumLanes + 1);
      return (keeps_w ? 2 : 1) * Scratch::bytes_of<float>(n) + Scratch::bytes_of<uint8_t>(n);
    }
  };

  // Both passes take the chunk at i.
  void first_pass(Large& large, int64_t i, float old_scale, Sums* sums) const {
    const int64_t count = std::min(kChunk, large.n - i);
    if (large.negative) {
      large.flips[i / kBlock] +=
          update_signs(large.weight, i, count, large.negative + i / kSumLanes, sums);
      return;
    }
    if (counts(large.weight)) {
      kernels_.codes(large.weight.latent + i, count, book(), old_scale, large.old_codes + i);
    }
    update(large.weight, i, count, large.own_w + i, large.d + i, sums);
  }

  void second_pass(Large& large, int64_t i) const {
    const int64_t count = std::min(kChunk, large.n - i);
    if (large.negative) {
      return write_signs(large.weight, i, count, large.negative + i / kSumLanes, large.alpha);
    }
    large.flips[i / kBlock] += write_values(large.weight, i, count, large.w + i, large.alpha,
                                            counts(large.weight) ? large.old_codes + i : nullptr);
  }

  void finish_counts() {
    if (!last_ || !counts(last_->weight)) return;
    *last_->weight.flips = 0;
    for (int64_t f : last_->flips) *last_->weight.flips += f;
  }

  int turn_ = 1;
  std::unique_ptr<Large> last_;
};

// How a weight falls into groups.
struct Groups {
  int64_t count, per_row, row, length;

  Groups(const Weight& weight, int64_t group_size) {
    row = group_size == 0 ? weight.rows * weight.cols : weight.cols;
    length = group_size > 0 ? group_size : row;
    per_row = group_size > 0 ? (row + length - 1) / length : 1;
    count = group_size == 0 ? 1 : weight.rows * per_row;
  }
  int64_t begin(int64_t g) const { return g / per_row * row + g % per_row * length; }
  int64_t size(int64_t g) const { return std::min(length, row - g % per_row * length); }
};

// body(weight, group, begin, size) for every group of every weight, in parallel; a weight of one group
// larger than a block goes to `large(weight)` instead, which is parallel in itself.
template <typename Body, typename Large>
void for_each_group(const std::vector<Weight>& weights, int64_t group_size, const Body& body,
                    const Large& large) {
  struct Unit {
    const Weight* weight;
    int64_t first, last;
  };
  std::vector<Unit> units;
  int64_t elements = 0;
  for (const Weight& weight : weights) {
    const int64_t n = weight.rows * weight.cols;
    const Groups groups(weight, group_size);
    if (n == 0) continue;
    if (groups.count == 1 && n > kBlock) {
      large(weight);
      continue;
    }
    elements += n;
    const int64_t together = std::max<int64_t>(1, kBlock / groups.length);
    for (int64_t g = 0; g < groups.count; g += together) {
      units.push_back({&weight, g, std::min(groups.count, g + together)});
    }
  }
  if (units.empty()) return;
  const int64_t count = static_cast<int64_t>(units.size());
  const int64_t grain = std::max<int64_t>(1, count * kBlock / std::max<int64_t>(1, elements));
  torch::stable::parallel_for(0, count, grain, [&](int64_t first, int64_t last) {
    for (int64_t u = first; u < last; ++u) {
      const Groups groups(*units[u].weight, group_size);
      for (int64_t g = units[u].first; g < units[u].last; ++g) {
        body(*units[u].weight, g, groups.begin(g), groups.size(g));
      }
    }
  });
}

int64_t parameters_of(const std::vector<Weight>& weights) {
  int64_t count = 0;
  for (const Weight& weight : weights) count += weight.rows * weight.cols;
  return count;
}

void run(const std::vector<Weight>& weights, const Stage& stage, bool commits) {
  TwoPasses runner(stage, commits, parameters_of(weights));
  std::vector<const Weight*> once;
  for (const Weight& weight : weights) {
    if (commits && weight.flips) *weight.flips = 0;
  }
  for_each_group(
      weights, stage.group_size,
      [&](const Weight& weight, int64_t g, int64_t begin, int64_t n) {
        const int64_t flips = runner.run_group(weight, begin, n, weight.scale + g);
        if (commits && weight.flips) std::atomic_ref(*weight.flips) += flips;  // integers: any order
      },
      [&](const Weight& weight) {
        const int64_t n = weight.rows * weight.cols;
        takes_one_pass(stage.solver, n) ? once.push_back(&weight) : runner.run_blocks(weight, n);
      });
  runner.flush();
  run_once(runner, once);
}

}  // namespace

void run_trial(const std::vector<Weight>& weights, const Stage& stage) { run(weights, stage, false); }

void run_step(const std::vector<Weight>& weights, const Stage& stage) { run(weights, stage, true); }

void run_restore(const std::vector<Weight>& weights, const Stage& stage) {
  const Runner runner(stage, false, parameters_of(weights));
  const auto body = [&](const Weight& weight, int64_t g, int64_t begin, int64_t n) {
    runner.restore(weight, begin, begin + n, weight.scale[g]);
  };
  for (const Weight& weight : weights) {
    if (weight.flips) *weight.flips = 0;
  }
  for_each_group(weights, stage.group_size, body, [&](const Weight& weight) {
    for_each_block(weight.rows * weight.cols,
                   [&](int64_t, int64_t begin, int64_t end) { body(weight, 0, begin, end - begin); });
  });
}

}  // namespace blaq
