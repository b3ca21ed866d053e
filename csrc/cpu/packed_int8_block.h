// What the inner loops of 8-bit arithmetic work on, in every variant; see packed_int8_driver.h.
#pragma once

#include <cstdint>

namespace blaq {

constexpr int64_t kMostSegments = 32;  // of a chunk

// A register block: MR rows times 16 NV outputs, over the segments of a chunk.
struct Block {
  const uint8_t* weights;  // of outputs 16 v at v * step
  int64_t step;
  const uint8_t* data;  // tables or digits of row r at r * stride
  int64_t stride;
  int words, segment_words;
  const float* unit;      // [row][segments]
  const int32_t* offset;  // [row][segments]; levels alone
  int64_t segments;
  const float* scale;  // [segment][16 NV]; null where a scale is no segment's
  float* totals;       // of row r at r * totals_stride
  int64_t totals_stride;
};

}  // namespace blaq
