// The codebook as kernels see it: ascending magnitudes, and the thresholds between neighbours.
#pragma once

#include <cstddef>
#include <limits>
#include <vector>

namespace blaq {

constexpr int kMaxLevels = 8;
constexpr float kScaleTiny = 0x1p-100f;      // scale of a group of zeros: level × scale stays a normal float
constexpr float kCurvatureFloor = 1e-8f;

struct Codebook {
  int count = 0;              // magnitudes
  int sign_shift = 0;         // a code is sign << sign_shift | index
  bool is_pow2 = true;        // levels 1, 1/2, 1/4, …
  float level[kMaxLevels] = {};
  float mid[kMaxLevels] = {};  // mid[j] between level[j] and level[j + 1], as a fraction of the scale

  Codebook() = default;
  explicit Codebook(const std::vector<double>& levels) : count(static_cast<int>(levels.size())) {
    while ((1 << sign_shift) < count) ++sign_shift;
    for (int j = 0; j < count; ++j) {
      level[j] = static_cast<float>(levels[j]);
      if (j + 1 < count) mid[j] = static_cast<float>((levels[j] + levels[j + 1]) / 2);
      is_pow2 = is_pow2 && level[j] == 1.0f / static_cast<float>(1 << (count - 1 - j));
    }
  }

  bool is_binary() const { return count == 1; }
};

// table[code] = signed level, 2^bits entries; a code that no level has is NaN, never a wrong number.
template <typename T>
void signed_levels(const std::vector<double>& levels, int bits, T* table) {
  const int half = 1 << (bits - 1);
  for (int i = 0; i < half; ++i) {
    const bool known = i < static_cast<int>(levels.size());
    table[i] = known ? static_cast<T>(levels[i]) : std::numeric_limits<T>::quiet_NaN();
    table[half + i] = -table[i];
  }
}

// Thresholds of a codebook of any size, as fractions of the scale.
template <typename T>
std::vector<T> midpoints(const std::vector<double>& levels) {
  std::vector<T> mids;
  for (size_t i = 0; i + 1 < levels.size(); ++i) {
    mids.push_back(static_cast<T>((levels[i] + levels[i + 1]) / 2));
  }
  return mids;
}

}  // namespace blaq
