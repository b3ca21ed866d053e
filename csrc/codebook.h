// The codebook as kernels see it: ascending magnitudes, and the thresholds between neighbours.
#pragma once

#include <vector>

namespace blaq {

constexpr int kMaxLevels = 8;
constexpr float kScaleTiny = 0x1p-100f;      // scale of a group of zeros: level × scale stays a normal float
constexpr float kCurvatureFloor = 1e-8f;

struct Codebook {
  int count = 0;              // magnitudes
  int sign_shift = 0;         // a code is sign << sign_shift | index
  float level[kMaxLevels] = {};
  float mid[kMaxLevels] = {};  // mid[j] between level[j] and level[j + 1], as a fraction of the scale

  Codebook() = default;
  explicit Codebook(const std::vector<double>& levels) : count(static_cast<int>(levels.size())) {
    while ((1 << sign_shift) < count) ++sign_shift;
    for (int j = 0; j < count; ++j) {
      level[j] = static_cast<float>(levels[j]);
      if (j + 1 < count) mid[j] = static_cast<float>((levels[j] + levels[j + 1]) / 2);
    }
  }

  bool is_binary() const { return count == 1; }
};

}  // namespace blaq
