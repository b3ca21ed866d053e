// A convolution with one input and one output channel a group, channels last, in float; see
// foreach_isa.h. After lanes.h.

// N registers of channels from `first` on, at one place.
template <int N>
inline void depthwise_place(const Depthwise& d, const float* image, int64_t top, int64_t left,
                            int64_t first, float* out) {
  const Conv& conv = d.conv;
  Floats sum[N] = {};
  for (int64_t i = 0; i < conv.kernel[0]; ++i) {
    const int64_t line = top + i * conv.dilation[0];
    if (line < 0 || line >= conv.height) continue;
    for (int64_t j = 0; j < conv.kernel[1]; ++j) {
      const int64_t column = left + j * conv.dilation[1];
      if (column < 0 || column >= conv.width) continue;
      const float* from = image + (line * conv.width + column) * conv.channels + first;
      const float* weight = d.weight + (i * conv.kernel[1] + j) * conv.channels + first;
#pragma GCC unroll 4
      for (int v = 0; v < N; ++v) sum[v] += load(weight + v * kLanes) * load(from + v * kLanes);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < N; ++v) store(out + first + v * kLanes, sum[v]);
}

// One line of the output of one image: a lane is a channel.
inline void depthwise_line(const Depthwise& d, int64_t image, int64_t y) {
  const Conv& conv = d.conv;
  const int64_t top = y * conv.stride[0] - conv.padding[0], channels = conv.channels;
  const float* from = d.input + image * conv.height * conv.width * channels;
  float* out = d.output + (image * conv.out_height + y) * conv.out_width * channels;
  for (int64_t x = 0; x < conv.out_width; ++x, out += channels) {
    const int64_t left = x * conv.stride[1] - conv.padding[1];
    int64_t c = 0;
    for (; c + 4 * kLanes <= channels; c += 4 * kLanes)
      depthwise_place<4>(d, from, top, left, c, out);
    for (; c + kLanes <= channels; c += kLanes) depthwise_place<1>(d, from, top, left, c, out);
    for (; c < channels; ++c) {
      float sum = 0;
      for (int64_t i = 0; i < conv.kernel[0]; ++i) {
        const int64_t line = top + i * conv.dilation[0];
        for (int64_t j = 0; j < conv.kernel[1]; ++j) {
          const int64_t column = left + j * conv.dilation[1];
          if (line < 0 || line >= conv.height || column < 0 || column >= conv.width) continue;
          sum += d.weight[(i * conv.kernel[1] + j) * channels + c] *
                 from[(line * conv.width + column) * channels + c];
        }
      }
      out[c] = sum;
    }
    for (int64_t i = 0; d.bias && i < channels; ++i) out[i] += d.bias[i];
    for (int64_t i = 0; d.relu && i < channels; ++i) out[i] = out[i] < 0 ? 0 : out[i];
  }
}
