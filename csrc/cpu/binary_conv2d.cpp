// torch.ops.blaq.binary_conv2d: the signs of the pixels under the kernel become a row of words,
// multiplied as in binary_linear. Padding counts as 0, which no bit can say: those words are 0, and what
// they add to a sum is taken off again.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <bit>
#include <cstring>

#include "binary_checks.h"
#include "conv_checks.h"
#include "cpu/packed_matmul.h"
#include "cpu/runs.h"

#define BLAQ_KERNEL_FILE "cpu/binary_kernel.h"
#include "cpu/foreach_isa.h"

namespace blaq {
namespace {

struct Conv {
  const Extent &kernel, &stride, &padding, &dilation;
  bool channels_last;
  int64_t batch, height, width, out_height, out_width;
};

// Signs of the input: [batch, height, width, group, tap_words].
template <typename T>
void pixel_bits(const T* x, const Conv& conv, const BinaryMatrix& weight, uint64_t* bits) {
  const int64_t plane = conv.height * conv.width, words = weight.tap_words();
  const int64_t pixel_words = weight.groups * words, channels = weight.groups * weight.channels;
  constexpr int64_t kPlaces = 64;
  const int64_t pieces = (plane + kPlaces - 1) / kPlaces;
  const int64_t grain = 1 + (1 << 16) / (channels * kPlaces);
  torch::stable::parallel_for(0, conv.batch * pieces, grain, [&](int64_t begin, int64_t end) {
    for_each_run(begin, end, pieces, [&](int64_t image, int64_t first, int64_t last) {
      for (int64_t at = first * kPlaces; at < std::min(plane, last * kPlaces); at += kPlaces) {
        const int64_t count = std::min(kPlaces, plane - at);
        uint64_t* to = bits + (image * plane + at) * pixel_words;
        if (conv.channels_last && weight.channels % 64 == 0) {
          BLAQ_VARIANT(sign_bits<T>)(x + (image * plane + at) * channels, count * channels, to);
          continue;
        }
        for (int64_t group = 0; group < weight.groups; ++group) {
          const int64_t channel = group * weight.channels;
          if (conv.channels_last) {
            for (int64_t i = 0; i < count; ++i) {
              BLAQ_VARIANT(sign_bits<T>)(x + (image * plane + at + i) * channels + channel,
                                         weight.channels, to + i * pixel_words + group * words);
            }
            continue;
          }
          for (int64_t c = 0; c < weight.channels; c += 64) {
            BLAQ_VARIANT(channel_bits<T>)
            (x + (image * channels + channel + c) * plane + at, std::min<int64_t>(64, weight.channels - c),
             plane, count, to + group * words + c / 64, pixel_words);
          }
        }
      }
    });
  });
}

// What a tap that lies in the padding must add to K - 2 · count, so that it adds nothing:
// [group, tap, 8 · blocks].
std::vector<int32_t> tap_corrections(const BinaryMatrix& weight) {
  const int64_t outputs = weight.blocks() * 8, words = weight.tap_words();
  std::vector<int32_t> corrections(weight.groups * weight.taps * outputs);
  const std::vector<uint64_t> zeros(weight.row_words());
  int32_t ones[kBinaryWidth];
  for (int64_t group = 0; group < weight.groups; ++group) {
    for (int64_t tap = 0; tap < weight.taps; ++tap) {
      int32_t* to = corrections.data() + (group * weight.taps + tap) * outputs;
      for (int64_t at = 0; at < outputs; at += kBinaryWidth) {
        const int64_t width = std::min(kBinaryWidth, outputs - at);
        count_differences(weight, group, at / 8, width, tap * words, words, zeros.data(), 0, 1, ones);
        for (int64_t j = 0; j < width; ++j) to[at + j] = 2 * ones[j] - static_cast<int32_t>(weight.channels);
      }
    }
  }
  return corrections;
}

// Copies a few words, and up to kSlack - 1 after them: a call of memcpy would take longer.
constexpr int64_t kSlack = 4;
inline uint64_t* copy_words(const uint64_t* from, int64_t count, uint64_t* to) {
  for (int64_t i = 0; i < count; i += kSlack) std::memcpy(to + i, from + i, kSlack * sizeof(uint64_t));
  return to + count;
}

// A place of the output; the next one costs no division.
struct Place {
  int64_t image, y, x;
  Place(const Conv& conv, int64_t at)
      : image(at / (conv.out_height * conv.out_width)),
        y(at / conv.out_width % conv.out_height),
        x(at % conv.out_width) {}
  void advance(const Conv& conv) {
    if (++x < conv.out_width) return;
    x = 0;
    if (++y < conv.out_height) return;
    y = 0, ++image;
  }
};

// The words under the kernel at one place of the output; `padded` gets the taps that lie outside.
void gather(const Conv& conv, const BinaryMatrix& weight, const uint64_t* bits, int64_t group,
            const Place& place, uint64_t* row, std::vector<int32_t>& padded) {
  const int64_t words = weight.tap_words(), image = place.image;
  const int64_t top = place.y * conv.stride[0] - conv.padding[0];
  const int64_t left = place.x * conv.stride[1] - conv.padding[1];
  const bool inside = left >= 0 && left + conv.kernel[1] <= conv.width;
  const bool in_one_run = inside && conv.dilation[1] == 1 && weight.groups == 1;
  int32_t tap = 0;
  padded.clear();
  for (int64_t i = 0; i < conv.kernel[0]; ++i) {
    const int64_t y = top + i * conv.dilation[0];
    if (in_one_run && y >= 0 && y < conv.height) {
      const int64_t run = conv.kernel[1] * words;
      row = copy_words(bits + ((image * conv.height + y) * conv.width + left) * words, run, row);
      tap += static_cast<int32_t>(conv.kernel[1]);
      continue;
    }
    for (int64_t j = 0; j < conv.kernel[1]; ++j, ++tap, row += words) {
      const int64_t x = left + j * conv.dilation[1];
      if (y < 0 || y >= conv.height || x < 0 || x >= conv.width) {
        std::fill_n(row, words, uint64_t{0});
        padded.push_back(tap);
      } else {
        copy_words(bits + (((image * conv.height + y) * conv.width + x) * weight.groups + group) * words,
                   words, row);
      }
    }
  }
}

// Sums [places, width] to the outputs from `n` on of `count` places, the first of which is `place`.
template <typename T>
void put(const Conv& conv, const Sum<T>* sums, int64_t place, int count, int64_t n, int64_t width,
         int64_t outputs, T* out) {
  if (conv.channels_last) {
    for (int r = 0; r < count; ++r) {
      BLAQ_VARIANT(narrow_run<Sum<T>, T>)
      (sums + r * kBinaryWidth, out + (place + r) * outputs + n, width);
    }
    return;
  }
  const int64_t plane = conv.out_height * conv.out_width;
  for_each_run(place, place + count, plane, [&](int64_t image, int64_t first, int64_t last) {
    BLAQ_VARIANT(to_planes<Sum<T>, T>)
    (sums + (image * plane + first - place) * kBinaryWidth, kBinaryWidth, last - first, width,
     out + (image * outputs + n) * plane + first, plane);
  });
}

template <typename T>
void convolve(const Tensor& input, const BinaryMatrix& weight, const BinaryScale<T>& scale,
              const std::optional<Tensor>& bias, const Conv& conv, Tensor& output) {
  using S = Sum<T>;
  const int64_t k = weight.k(), n = weight.n, words = weight.row_words(), padded_n = weight.blocks() * 8;
  const T* b = bias ? static_cast<const T*>(bias->const_data_ptr()) : nullptr;
  T* out = static_cast<T*>(output.mutable_data_ptr());
  const Tensor pixels = torch::stable::new_empty(
      input, {conv.batch * conv.height * conv.width * weight.groups * weight.tap_words() + kSlack},
      ScalarType::Long);
  uint64_t* bits = reinterpret_cast<uint64_t*>(pixels.mutable_data_ptr<int64_t>());
  pixel_bits(static_cast<const T*>(input.const_data_ptr()), conv, weight, bits);
  const bool pads = conv.padding[0] > 0 || conv.padding[1] > 0;
  const std::vector<int32_t> of_tap = pads ? tap_corrections(weight) : std::vector<int32_t>{};

  const int64_t places = conv.batch * conv.out_height * conv.out_width;
  constexpr int64_t kCheaper = 16;  // than the products that share_matrix counts
  share_matrix(places, n, k / kCheaper, [&](int64_t first, int64_t last, int64_t begin, int64_t end) {
    std::vector<uint64_t> rows(kBinaryRows * words + kSlack);
    std::vector<int32_t> padded[kBinaryRows];
    int32_t counts[kBinaryRows * kBinaryWidth], corrections[kBinaryRows][kBinaryWidth];
    const int32_t* correction[kBinaryRows];
    S sums[kBinaryRows * kBinaryWidth], scales[kBinaryWidth], biases[kBinaryWidth] = {};
    for (int64_t place = first; place < last; place += kBinaryRows) {
      const int count = static_cast<int>(std::min<int64_t>(kBinaryRows, last - place));
      for (int64_t group = 0; group < weight.groups; ++group) {
        Place at_place(conv, place);
        for (int r = 0; r < count; ++r, at_place.advance(conv)) {
          gather(conv, weight, bits, group, at_place, rows.data() + r * words, padded[r]);
        }
        for (int64_t at = begin; at < end; at += kBinaryWidth) {
          const int64_t width = std::min(kBinaryWidth, end - at), output = group * n + at;
          count_differences(weight, group, at / 8, width, 0, words, rows.data(), words, count, counts);
          for (int r = 0; r < count; ++r) {
            correction[r] = padded[r].empty() ? nullptr : corrections[r];
            if (padded[r].empty()) continue;
            std::fill_n(corrections[r], width, 0);
            for (const int32_t tap : padded[r]) {
              const int32_t* from = of_tap.data() + (group * weight.taps + tap) * padded_n + at;
              for (int64_t j = 0; j < width; ++j) corrections[r][j] += from[j];
            }
          }
          for (int64_t j = 0; j < width; ++j) scales[j] = scale(output + j, 0);
          if (b) BLAQ_VARIANT(widen<T, S>)(b + output, biases, width);
          const bool direct = std::is_same_v<S, T> && conv.channels_last;
          S* to = direct ? reinterpret_cast<S*>(out + place * weight.groups * n + output) : sums;
          BLAQ_VARIANT(scale_counts<S>)
          (counts, kBinaryWidth, count, width, static_cast<int32_t>(k), correction, scales, biases, 0, to,
           direct ? weight.groups * n : kBinaryWidth);
          if (!direct) put(conv, sums, place, count, output, width, weight.groups * n, out);
        }
      }
    }
  });
}

Tensor binary_conv2d(const Tensor& input, const Tensor& qweight, const Tensor& scale,
                     const std::optional<Tensor>& bias, int64_t group_size, const Extent& kernel_size,
                     const Extent& stride, const Extent& padding, const Extent& dilation, int64_t groups,
                     const std::optional<Tensor>& repacked) {
  const char* op = "binary_conv2d";
  check_geometry(op, input, kernel_size, stride, padding, dilation, groups);
  const int64_t channels = input.size(1), taps = kernel_size[0] * kernel_size[1];
  BLAQ_REQUIRE(group_size == 0 || group_size == -1, op, "group_size", "be 0 or -1", group_size);
  const int64_t in_features = channels / groups * taps;
  const bool wide = input.scalar_type() == ScalarType::Double;
  check_qweight(op, qweight, scale, {1.0}, group_size, in_features,
                {wide ? ScalarType::Double : ScalarType::Float});
  const int64_t outputs = qweight.size(1);
  BLAQ_REQUIRE(outputs % groups == 0, op, "qweight",
               "have rows divisible by groups = " + text(groups), outputs);
  check_packed_input(op, input, qweight, bias);
  const Extent out_size = check_output_size(op, input, kernel_size, stride, padding, dilation);
  const Tensor words = repacked_or_new(op, repacked, qweight, in_features, taps, groups);

  const Tensor dense =
      input.is_contiguous() || is_channels_last(input) ? input : torch::stable::contiguous(input);
  const Conv conv{kernel_size,   stride,        padding,       dilation,    !dense.is_contiguous(),
                  input.size(0), input.size(2), input.size(3), out_size[0], out_size[1]};
  Tensor output = torch::stable::empty(
      {conv.batch, outputs, conv.out_height, conv.out_width}, input.scalar_type(), std::nullopt,
      std::nullopt, std::nullopt,
      conv.channels_last ? torch::headeronly::MemoryFormat::ChannelsLast
                         : torch::headeronly::MemoryFormat::Contiguous);
  if (output.numel() == 0) return output;
  const BinaryMatrix weight{reinterpret_cast<const uint64_t*>(words.const_data_ptr<int64_t>()), groups,
                            outputs / groups, taps, channels / groups};
  with_float_type(input.scalar_type(), [&]<typename T>() {
    const BinaryScale<T> scales{static_cast<const Sum<T>*>(scale.const_data_ptr()), 1, group_size};
    convolve<T>(dense, weight, scales, bias, conv, output);
  });
  return output;
}

}  // namespace
}  // namespace blaq

STABLE_TORCH_LIBRARY_IMPL(blaq, CPU, m) { m.impl("binary_conv2d", TORCH_BOX(&blaq::binary_conv2d)); }
