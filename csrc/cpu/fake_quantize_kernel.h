// Nearest level × scale of a run of weights that share a scale; see foreach_isa.h.
#include "cpu/convert_kernel.h"

constexpr int64_t kFakeQuantizeBlock = 512;  // elements that pass through the cache at a time

// `both_signs`: the smallest magnitude has a negative twin, for it is not zero.
//
// At most 8 magnitudes: each threshold that |w| reaches selects the next value.
template <typename S>
void nearest_by_thresholds(const S* w, int64_t count, const S* thresholds, const S* values,
                           int magnitudes, bool both_signs, S* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = values[0];
  for (int t = 0; t + 1 < magnitudes; ++t) {
    const S threshold = thresholds[t], value = values[t + 1];
    for (int64_t i = 0; i < count; ++i) out[i] = std::abs(w[i]) >= threshold ? value : out[i];
  }
  const S first =
      both_signs || magnitudes < 2 ? -std::numeric_limits<S>::infinity() : thresholds[0];
  for (int64_t i = 0; i < count; ++i) {
    const bool negative = w[i] < 0 && std::abs(w[i]) >= first;
    out[i] = negative ? -out[i] : out[i];
  }
}

// Any number of magnitudes: bisection counts the thresholds that |w| reaches. Those past the last
// are NaN.
template <typename S>
void nearest_by_bisection(const S* w, int64_t count, const S* thresholds, const S* values,
                          int magnitudes, bool both_signs, S* out) {
  int32_t index[kFakeQuantizeBlock] = {};
  for (int half = 64; half > 0; half /= 2) {
    for (int64_t i = 0; i < count; ++i) {
      index[i] += std::abs(w[i]) >= thresholds[index[i] + half - 1] ? half : 0;
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    const bool negative = (w[i] < 0) & (both_signs | (index[i] > 0));
    out[i] = negative ? -values[index[i]] : values[index[i]];
  }
}

// A run of elements with one scale; `mids` has magnitudes - 1 values, `levels` one for each
// magnitude.
template <typename S, typename T>
void fake_quantize_run(const T* latent, int64_t count, S scale, const S* mids, const S* levels,
                       int magnitudes, T* out) {
  constexpr int64_t kBlock = kFakeQuantizeBlock;
  S thresholds[128], values[128], wide[kBlock], nearest[kBlock];
  for (int i = 0; i < magnitudes; ++i) values[i] = levels[i] * scale;
  for (int i = 0; i + 1 < magnitudes; ++i) thresholds[i] = scale * mids[i];
  std::fill(thresholds + magnitudes - 1, thresholds + 128, std::numeric_limits<S>::quiet_NaN());
  const bool both_signs = levels[0] != 0;
  for (int64_t start = 0; start < count; start += kBlock) {
    const int64_t length = count - start < kBlock ? count - start : kBlock;
    widen(latent + start, wide, length);
    if (magnitudes <= 8) {
      nearest_by_thresholds(wide, length, thresholds, values, magnitudes, both_signs, nearest);
    } else {
      nearest_by_bisection(wide, length, thresholds, values, magnitudes, both_signs, nearest);
    }
    narrow_run(nearest, out + start, length);
  }
}
