// A convolution's geometry, and the way of its pixels between a tensor and kernels that work in
// floats.
#pragma once

#include <cstdint>
#include <functional>

#include "conv_checks.h"

namespace blaq {

struct Conv {
  Extent kernel, stride, padding, dilation;
  int64_t groups;
  bool channels_last;
  int64_t batch, channels, height, width, out_height, out_width;

  int64_t taps() const { return kernel[0] * kernel[1]; }
  int64_t group_channels() const { return channels / groups; }
  int64_t places() const { return out_height * out_width; }  // of one image's output
};

// Reads and writes the tensors of one call, whatever their dtype and layout.
struct ConvTensors {
  // Pixels [first, last) of a line of an image, as [pixel][group][padded(channels of a group)];
  // what pads is left as it is.
  std::function<void(int64_t image, int64_t line, int64_t first, int64_t last, float* out)> load;
  // Results [count][width] of `count` places of an image, the first of which is `place`, to the
  // outputs from n on.
  std::function<void(const float* results, int64_t image, int64_t place, int count, int64_t n,
                     int64_t width)>
      store;
};

// One input and one output channel a group, in float.
struct Depthwise {
  const Conv& conv;
  const float *input, *weight, *bias;  // weight: [tap][channel]; bias may be null
  float* output;
  bool relu;
};

}  // namespace blaq
