// A codebook in integers.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace blaq {

// The least factor up to 128 that makes integers of all levels; 0 where there is none.
inline int level_factor(const float* levels, int bits) {
  const auto fits = [&](int factor) {
    return std::all_of(levels, levels + (1 << bits), [&](float level) {
      return level != level || level * factor == std::nearbyint(level * factor);
    });
  };
  int factor = 1;
  while (factor <= 128 && !fits(factor)) ++factor;
  return factor <= 128 ? factor : 0;
}

inline float largest_level(const float* levels, int bits) {
  float most = 0;
  for (int c = 0; c < 1 << bits; ++c) most = std::max(most, std::fabs(levels[c]));
  return most;
}

// The factor that makes the most of 127 where no such factor makes integers.
inline float nearest_factor(const float* levels, int bits) {
  return 127 / std::max(largest_level(levels, bits), 0.5f);
}

// Levels as integers: in 8 bits level + 128, of 0 to 255; in 16 bits as they are, twice.
struct LevelTable {
  alignas(16) uint8_t level[16];
  alignas(64) int16_t wide[32];
  float unit, wide_unit;

  LevelTable(const float* levels, int bits) {
    const int codes = 1 << bits;
    float factor = level_factor(levels, bits);
    if (factor == 0) factor = nearest_factor(levels, bits);
    wide_unit = 1.0f / factor;
    // 8 bits lack +128: a unit between shares the error among all levels.
    unit = factor == 128 ? 1 / 127.5f : wide_unit;
    for (int c = 0; c < 32; ++c) {
      const float known = c % 16 < codes && levels[c % 16] == levels[c % 16] ? levels[c % 16] : 0;
      wide[c] = static_cast<int16_t>(std::nearbyint(known * factor));
      if (c < 16) level[c] = static_cast<uint8_t>(std::min<int>(wide[c], 127) + 128);
    }
  }
};

}  // namespace blaq
