// Two passes over a weight: update and sums; then, with the scale known, params. A group of at most a
// block stays in its thread's cache between the two; a larger one is cut into blocks.
//
// Bytes a float32 parameter that must move: trial reads 16 and writes 4, step reads 20 and writes 16.
#include "cpu/step.h"

#include <array>
#include <atomic>
#include <memory>

namespace blaq {
namespace {

constexpr int64_t kChunk = 1024;              // elements between the steps of one pass: stays in L1
constexpr int64_t kStreamFrom = 1 << 20;      // parameters of a call, from which params bypass the cache
constexpr int64_t kKeptScratch = 64 << 20;    // bytes a thread keeps between calls

// Memory between the two passes; kept by the thread, so that a step does not fault pages in anew. A
// thread has three: one for groups, and two that large weights take in turn.
class Scratch {
 public:
  explicit Scratch(int64_t bytes, int which = 0) : kept_(kept()[which]) {
    if (bytes > kept_.capacity) {
      kept_.capacity = 0;
      kept_.buffer.reset(static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)));
      if (!kept_.buffer) throw std::bad_alloc();
      kept_.capacity = bytes;
    }
    next_ = kept_.buffer.get();
  }
  ~Scratch() {
    if (kept_.capacity > kKeptScratch) kept_.buffer.reset(), kept_.capacity = 0;
  }
  Scratch(const Scratch&) = delete;
  template <typename T>
  T* take(int64_t n) {
    T* here = reinterpret_cast<T*>(next_);
    next_ += bytes_of<T>(n);
    return here;
  }
  template <typename T>
  static int64_t bytes_of(int64_t n) {
    return (n * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
  }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  struct Kept {
    std::unique_ptr<char, Free> buffer;
    int64_t capacity = 0;
  };
  static std::array<Kept, 3>& kept() {
    thread_local std::array<Kept, 3> buffers;
    return buffers;
  }
  Kept& kept_;
  char* next_;
};

int64_t size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

class Runner {
 public:
  Runner(const Stage& stage, bool commits, int64_t parameters)
      : stage_(stage), commits_(commits), streams_(parameters >= kStreamFrom) {}

  // Elements [begin, begin + n) of a weight: the update, and the weighted sums of its result. w and d are
  // the chunk's; w is unused where the step commits, for then it is the latent. Returns new signs.
  int64_t update(const Weight& weight, int64_t begin, int64_t n, float* w, float* d, Sums* sums) const {
    float wide[2][kChunk];
    const float factor = stage_.scalars.inverse_grad_scale;
    const auto floats = [&](const void* grad, float* buffer) -> const float* {
      if (!grad) return nullptr;
      const char* at = static_cast<const char*>(grad) + begin * size_of(weight.dtype);
      if (weight.dtype == Dtype::f32 && factor == 1.0f) return reinterpret_cast<const float*>(at);
      kernels_.widen(weight.dtype, at, factor, n, buffer);
      return buffer;
    };
    const float* grad = floats(weight.grad, wide[0]);
    if (commits_) {
      return kernels_.step(grad, floats(weight.trial_grad, wide[1]), weight.latent + begin,
                           weight.m + begin, weight.v + begin, n, stage_.scalars, d, sums);
    }
    kernels_.trial(grad, weight.latent + begin, weight.m + begin, weight.v + begin, n, stage_.scalars, w, d,
                   sums);
    return 0;
  }

  void write(const Weight& weight, int64_t begin, int64_t n, const float* values) const {
    char* to = static_cast<char*>(weight.param) + begin * size_of(weight.dtype);
    if (weight.dtype == Dtype::f32) return copy(values, n * 4, to);
    uint16_t halves[kChunk];
    kernels_.narrow(weight.dtype, values, n, halves);
    copy(halves, n * 2, to);
  }

  // A whole group by one thread. Returns the number of flips, where they are counted.
  int64_t run_group(const Weight& weight, int64_t begin, int64_t n, float* scale) const {
    const bool counts = commits_ && weight.flips, by_signs = book().is_binary();
    Scratch scratch(2 * Scratch::bytes_of<float>(n) + Scratch::bytes_of<uint8_t>(n));
    float* d = scratch.take<float>(n);
    float* own_w = scratch.take<float>(n);
    uint8_t* old = scratch.take<uint8_t>(n);
    if (counts && !by_signs) kernels_.codes(weight.latent + begin, n, book(), *scale, old);
    Sums partial;
    int64_t signs = 0;
    for (int64_t i = 0; i < n; i += kChunk) {
      signs += update(weight, begin + i, std::min(kChunk, n - i), own_w + i, d + i, &partial);
    }
    const Pair sums = total(partial);
    const float* w = commits_ ? weight.latent + begin : own_w;
    const float alpha = solve_scale({w, d, n}, stage_.solver, *scale, &sums);
    if (commits_) *scale = alpha;
    const int64_t flips = finish(weight, begin, n, w, alpha, counts && !by_signs ? old : nullptr);
    return by_signs ? signs : flips;
  }

  // Second pass over [begin, begin + n).
  int64_t finish(const Weight& weight, int64_t begin, int64_t n, const float* w, float alpha,
                 const uint8_t* old) const {
    int64_t flips = 0;
    float values[kChunk];
    for (int64_t i = 0; i < n; i += kChunk) {
      const int64_t count = std::min(kChunk, n - i);
      flips += kernels_.values(w + i, count, book(), alpha, old ? old + i : nullptr, values);
      write(weight, begin + i, count, values);
    }
    return flips;
  }

  // One scale for more than a block: each pass in parallel, d (and w in a trial) kept in between. For
  // one bit the signs are enough to keep, and they are final before the scale is. The second pass, which
  // only writes params, goes with the first pass of the next such weight, which mostly reads.
  void run_blocks(const Weight& weight, int64_t n) {
    const bool counts = commits_ && weight.flips, binary = book().is_binary();
    auto now = std::make_unique<Large>(weight, n, binary, !binary && !commits_, turn_);
    turn_ = 3 - turn_;
    const float old_scale = *weight.scale;
    std::vector<Pair> sums(blocks_of(n));
    const auto first_pass = [&](int64_t block, int64_t begin, int64_t end) {
      Sums partial;
      float chunk_w[kChunk], chunk_d[kChunk];
      int64_t signs = 0;
      for (int64_t i = begin; i < end; i += kChunk) {
        const int64_t count = std::min(kChunk, end - i);
        float* di = now->d ? now->d + i : chunk_d;
        float* wi = now->w ? now->w + i : chunk_w;
        if (counts && !binary) kernels_.codes(weight.latent + i, count, book(), old_scale, now->bytes + i);
        signs += update(weight, i, count, wi, di, &partial);
        if (binary) kernels_.signs(commits_ ? weight.latent + i : wi, count, now->bytes + i);
      }
      sums[block] = total(partial);
      now->flips[block] = signs;
    };
    const int64_t blocks = blocks_of(n), before = last_ ? blocks_of(last_->n) : 0;
    torch::stable::parallel_for(0, std::max(blocks, before), 1, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) {
        if (b < blocks) first_pass(b, b * kBlock, std::min(n, (b + 1) * kBlock));
        if (b < before) second_pass(*last_, b);
      }
    });
    finish_counts();
    const Pair all = in_order(sums);
    if (commits_) now->w = weight.latent;
    now->alpha = solve_scale({now->w, now->d, n}, stage_.solver, old_scale, &all);
    if (commits_) *weight.scale = now->alpha;
    last_ = std::move(now);
  }

  // The second pass of the last large weight.
  void flush() {
    if (!last_) return;
    torch::stable::parallel_for(0, blocks_of(last_->n), 1, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) second_pass(*last_, b);
    });
    finish_counts();
    last_.reset();
  }

  const Codebook& book() const { return stage_.solver.book; }

 private:
  void copy(const void* from, int64_t bytes, void* to) const {
    streams_ ? kernels_.stream(from, bytes, to) : static_cast<void>(__builtin_memcpy(to, from, bytes));
  }

  // A large weight between its passes.
  struct Large {
    const Weight& weight;
    const int64_t n;
    Scratch scratch;
    float* d;        // null for one bit
    float* w;        // null for one bit; the latent where the step commits
    uint8_t* bytes;  // signs of one bit, else the old codes
    std::vector<int64_t> flips;
    float alpha = 0;

    Large(const Weight& weight_, int64_t n_, bool binary, bool keeps_w, int which)
        : weight(weight_), n(n_),
          scratch((binary ? 0 : (keeps_w ? 2 : 1) * Scratch::bytes_of<float>(n_)) +
                      Scratch::bytes_of<uint8_t>(n_), which),
          d(binary ? nullptr : scratch.take<float>(n_)),
          w(keeps_w ? scratch.take<float>(n_) : nullptr), bytes(scratch.take<uint8_t>(n_)),
          flips(blocks_of(n_)) {}
  };

  void second_pass(Large& large, int64_t block) const {
    const int64_t begin = block * kBlock, end = std::min(large.n, begin + kBlock);
    if (!book().is_binary()) {
      const bool counts = commits_ && large.weight.flips;
      large.flips[block] = finish(large.weight, begin, end - begin, large.w + begin, large.alpha,
                                  counts ? large.bytes + begin : nullptr);
      return;
    }
    float values[kChunk];
    for (int64_t i = begin; i < end; i += kChunk) {
      const int64_t count = std::min(kChunk, end - i);
      kernels_.sign_values(large.bytes + i, count, large.alpha, values);
      write(large.weight, i, count, values);
    }
  }

  void finish_counts() {
    if (!last_ || !commits_ || !last_->weight.flips) return;
    *last_->weight.flips = 0;
    for (int64_t f : last_->flips) *last_->weight.flips += f;
  }

  const Stage& stage_;
  const TrainingKernels& kernels_ = training_kernels();
  const bool commits_, streams_;
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
  Runner runner(stage, commits, parameters_of(weights));
  for (const Weight& weight : weights) {
    if (commits && weight.flips) *weight.flips = 0;
  }
  for_each_group(
      weights, stage.group_size,
      [&](const Weight& weight, int64_t g, int64_t begin, int64_t n) {
        const int64_t flips = runner.run_group(weight, begin, n, weight.scale + g);
        if (commits && weight.flips) std::atomic_ref(*weight.flips) += flips;  // integers: any order
      },
      [&](const Weight& weight) { runner.run_blocks(weight, weight.rows * weight.cols); });
  runner.flush();
}

}  // namespace

void run_trial(const std::vector<Weight>& weights, const Stage& stage) { run(weights, stage, false); }

void run_step(const std::vector<Weight>& weights, const Stage& stage) { run(weights, stage, true); }

void run_restore(const std::vector<Weight>& weights, const Stage& stage) {
  const Runner runner(stage, false, parameters_of(weights));
  const auto body = [&](const Weight& weight, int64_t g, int64_t begin, int64_t n) {
    runner.finish(weight, begin, n, weight.latent + begin, weight.scale[g], nullptr);
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
