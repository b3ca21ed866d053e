// The codebook at one scale: codes, magnitudes and values, as blaq_kernels/reference.py has them,
// of any codebook of at most 8 levels. A NaN is on the lowest level.
#pragma once

#include <algorithm>

#include "codebook.h"
#include "cuda/device.h"

namespace blaq {

struct Book {
  int count, sign_shift;
  float level[kMaxLevels];
  float mid[kMaxLevels];

  // `levels` ascend to 1.
  static Book of(const double* levels, int count) {
    const Codebook known(std::vector<double>(levels, levels + count));
    Book book = {known.count, known.sign_shift, {}, {}};
    std::copy(known.level, known.level + kMaxLevels, book.level);
    std::copy(known.mid, known.mid + kMaxLevels, book.mid);
    return book;
  }
};

BLAQ_DEVICE float magnitude_of(float w) { return bits_float(float_bits(w) & 0x7fffffff); }
BLAQ_DEVICE float floored(float d) { return d > kCurvatureFloor ? d : kCurvatureFloor; }
// A scale as it is kept: positive, whatever the weights were; NaN too becomes the smallest.
BLAQ_DEVICE float usable(float scale) { return scale > kScaleTiny ? scale : kScaleTiny; }

// Eight weights at once, threshold by threshold: as many as the codebook has, whatever the compiler
// knows.
struct ScaledBook {
  const Book& book;
  float scale;

  // at(k, j) for every weight k whose magnitude reaches threshold j, j ascending.
  template <typename At>
  BLAQ_DEVICE void reached(const float (&w)[8], const At& at) const {
#pragma unroll
    for (int j = 0; j + 1 < kMaxLevels; ++j) {
      if (j + 1 >= book.count) break;
      const float threshold = book.mid[j] * scale;
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        if (magnitude_of(w[k]) >= threshold) at(k, j);
      }
    }
  }
  // The nearest of what stands for the levels.
  BLAQ_DEVICE void choose(const float (&w)[8], const float (&of_level)[kMaxLevels],
                          float (&chosen)[8]) const {
#pragma unroll
    for (int k = 0; k < 8; ++k) chosen[k] = of_level[0];
    reached(w, [&](int k, int j) { chosen[k] = of_level[j + 1]; });
  }
  // Sign << sign_shift | index; a zero level has one code, the positive one.
  BLAQ_DEVICE void codes(const float (&w)[8], uint32_t (&code)[8]) const {
#pragma unroll
    for (int k = 0; k < 8; ++k) code[k] = 0;
    reached(w, [&](int k, int j) { code[k] = j + 1; });
    const bool has_zero = book.level[0] == 0.0f;
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      if (w[k] < 0.0f && !(has_zero && code[k] == 0)) code[k] |= 1u << book.sign_shift;
    }
  }
  // The same of one weight: index of its level, its code, its value.
  BLAQ_DEVICE int index(float w) const {
    int found = 0;
    for (int j = 0; j + 1 < book.count; ++j) found += magnitude_of(w) >= book.mid[j] * scale;
    return found;
  }
  BLAQ_DEVICE uint32_t code(int index, bool negative) const {
    return negative && book.level[index] != 0.0f ? 1u << book.sign_shift | index : index;
  }
  BLAQ_DEVICE float value(int index, bool negative) const {
    const float found = book.level[index] * scale;
    return negative && book.level[index] != 0.0f ? -found : found;
  }
  // level × scale with the sign of w, rounded once; a zero level has no sign: -0 + 0 is +0.
  BLAQ_DEVICE void values(const float (&w)[8], float (&value)[8]) const {
#pragma unroll
    for (int k = 0; k < 8; ++k) value[k] = book.level[0] * scale;
    reached(w, [&](int k, int j) { value[k] = book.level[j + 1] * scale; });
    const float zero = book.level[0] == 0.0f ? 0.0f : -0.0f;
#pragma unroll
    for (int k = 0; k < 8; ++k) value[k] = (w[k] < 0.0f ? -value[k] : value[k]) + zero;
  }
};

}  // namespace blaq
