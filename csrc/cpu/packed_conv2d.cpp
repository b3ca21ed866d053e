// torch.ops.blaq.packed_conv2d. What packed_conv_int8.h does not do, rows of pixels under the kernel do,
// multiplied as in packed_linear: padding and conversion to float happen once, in a copy of the image, so
// that a row is a plain gather.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

#include "cpu/conv.h"
#include "cpu/float_types.h"
#include "cpu/packed_conv_int8.h"
#include "cpu/runs.h"
#include "cpu/unpack.h"
#include "packed_checks.h"

#define BLAQ_KERNEL_FILE "cpu/conv_image_kernel.h"
#include "cpu/foreach_isa.h"

namespace blaq {
namespace {

// Where a padded image of floats keeps its elements.
struct Image {
  const float* data;
  int64_t image, channel, row, column;  // strides
};

// The input in its own layout, as floats, with zeros around.
template <typename T>
Image padded_image(const Tensor& input, const Conv& conv, std::optional<Tensor>& copy) {
  const int64_t height = conv.height + 2 * conv.padding[0],
                width = conv.width + 2 * conv.padding[1];
  const int64_t inner = conv.channels_last ? conv.channels : 1;  // elements of a pixel in a line
  const int64_t planes = conv.channels_last ? conv.batch : conv.batch * conv.channels;
  const int64_t plane = height * width, line = width * inner;
  const T* from = static_cast<const T*>(input.const_data_ptr());
  Image image{nullptr, conv.channels * plane, conv.channels_last ? 1 : plane, line, inner};
  if (std::is_same_v<T, float> && conv.padding[0] == 0 && conv.padding[1] == 0) {
    image.data = reinterpret_cast<const float*>(from);
    return image;
  }
  copy = torch::stable::new_empty(input, {planes, height, line}, ScalarType::Float);
  float* to = copy->mutable_data_ptr<float>();
  image.data = to;
  const int64_t left = conv.padding[1] * inner, count = conv.width * inner;
  torch::stable::parallel_for(
      0, planes * height, 1 + (1 << 14) / (line + 1), [&](int64_t begin, int64_t end) {
        for_each_run(begin, end, height, [&](int64_t index, int64_t first, int64_t last) {
          for (int64_t y = first; y < last; ++y) {
            float* row = to + (index * height + y) * line;
            const int64_t source = y - conv.padding[0];
            if (source < 0 || source >= conv.height) {
              std::fill(row, row + line, 0.0f);
              continue;
            }
            std::fill(row, row + left, 0.0f);
            BLAQ_VARIANT(widen<T, float>)
            (from + (index * conv.height + source) * count, row + left, count);
            std::fill(row + left + count, row + line, 0.0f);
          }
        });
      });
  return image;
}

// Results [pixels, width] to the outputs from `n` on of `count` pixels, the first of which is
// `pixel`.
template <typename T>
void put(const Conv& conv, const float* result, int64_t pixel, int count, int64_t n, int64_t width,
         int64_t outputs, T* out) {
  const int64_t plane = conv.out_height * conv.out_width;
  if (conv.channels_last) {
    for (int r = 0; r < count; ++r) {
      BLAQ_VARIANT(narrow_run<float, T>)
      (result + r * width, out + (pixel + r) * outputs + n, width);
    }
    return;
  }
  for_each_run(pixel, pixel + count, plane, [&](int64_t image, int64_t first, int64_t last) {
    BLAQ_VARIANT(to_planes<float, T>)
    (result + (image * plane + first - pixel) * width, width, last - first, width,
     out + (image * outputs + n) * plane + first, plane);
  });
}

template <typename T>
ConvTensors conv_tensors(const Tensor& input, const Conv& conv, int64_t outputs, Tensor& output) {
  const int64_t channels = conv.group_channels(), places = conv.places();
  const int64_t pixel_floats = conv.groups * padded(channels);
  const T* from = static_cast<const T*>(input.const_data_ptr());
  T* to = static_cast<T*>(output.mutable_data_ptr());
  return {[=, &conv](int64_t image, int64_t line, int64_t first, int64_t last, float* out) {
            for (int64_t group = 0; group < conv.groups; ++group, out += padded(channels)) {
              const int64_t channel = group * channels;
              if (!conv.channels_last) {
                const int64_t plane = conv.height * conv.width;
                BLAQ_VARIANT(from_planes<T>)
                (from + (image * conv.channels + channel) * plane + line * conv.width + first, plane,
                 channels, last - first, out, pixel_floats);
                continue;
              }
              const T* pixel = from + ((image * conv.height + line) * conv.width + first) * conv.channels;
              for (int64_t i = 0; i < last - first; ++i) {
                BLAQ_VARIANT(widen<T, float>)
                (pixel + i * conv.channels + channel, out + i * pixel_floats, channels);
              }
            }
          },
          [=, &conv](const float* results, int64_t image, int64_t place, int count, int64_t n,
                     int64_t width) {
            if (!conv.channels_last) {
              BLAQ_VARIANT(to_planes<float, T>)
              (results, width, count, width, to + (image * outputs + n) * places + place, places);
              return;
            }
            for (int r = 0; r < count; ++r) {
              BLAQ_VARIANT(narrow_run<float, T>)
              (results + r * width, to + (image * places + place + r) * outputs + n, width);
            }
          }};
}

template <typename T>
void convolve(const Tensor& input, PackedMatrix weight, const std::optional<Tensor>& repacked,
              Accuracy accuracy, const std::optional<Tensor>& bias, const Conv& conv, bool relu,
              Tensor& output) {
  const int64_t k = weight.k, n = weight.sharing, stride = padded(k);
  const int64_t channels = conv.channels / conv.groups;
  std::vector<float> wide_bias(bias ? weight.n : 0);
  if (bias) {
    BLAQ_VARIANT(widen<T, float>)
    (static_cast<const T*>(bias->const_data_ptr()), wide_bias.data(), weight.n);
    weight.bias = wide_bias.data();
  }
  const uint8_t* words = repacked ? repacked->const_data_ptr<uint8_t>() : nullptr;
  if (words && has_conv_int8(weight, accuracy, conv)) {
    return convolve_int8(weight, words, accuracy, conv, relu,
                         conv_tensors<T>(input, conv, weight.n, output));
  }
  // Registers have 16 outputs, which must be of one group.
  const bool int8 = words && weight.group_size > 0 && has_int8(weight, accuracy) &&
                    (conv.groups == 1 || n % 16 == 0);
  if (!int8 && weight.wants_planes) {
    *weight.wants_planes = true;
    return;
  }
  std::optional<Tensor> copy;
  const Image image = padded_image<T>(input, conv, copy);
  std::vector<int64_t> offset;
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t i = 0; i < conv.kernel[0]; ++i) {
      for (int64_t j = 0; j < conv.kernel[1]; ++j) {
        offset.push_back(c * image.channel + i * conv.dilation[0] * image.row +
                         j * conv.dilation[1] * image.column);
      }
    }
  }
  T* out = static_cast<T*>(output.mutable_data_ptr());
  const int64_t pixels = conv.batch * conv.out_height * conv.out_width;
  share_matrix(pixels, n, k, [&](int64_t first, int64_t last, int64_t begin, int64_t end) {
    thread_local Buffer row_buffer, result_buffer;
    float* rows = row_buffer.take(kRows * stride);
    float* result = result_buffer.take(kRows * (end - begin));
    for (int64_t pixel = first; pixel < last; pixel += kRows) {
      const int count = static_cast<int>(std::min<int64_t>(kRows, last - pixel));
      for (int64_t group = 0; group < conv.groups; ++group) {
        for (int r = 0; r < count; ++r) {
          const int64_t x = (pixel + r) % conv.out_width, line = (pixel + r) / conv.out_width;
          const int64_t y = line % conv.out_height;
          const float* from = image.data + line / conv.out_height * image.image +
                              group * channels * image.channel + y * conv.stride[0] * image.row +
                              x * conv.stride[1] * image.column;
          float* row = rows + r * stride;
          for (int64_t i = 0; i < k; ++i) row[i] = from[offset[i]];
          std::fill(row + k, row + stride, 0.0f);
        }
        const int64_t at = group * n + begin, width = end - begin;
        const Product product{rows, stride, count, at, at + width, result, width};
        if (int8) {
          multiply_int8(weight, words, accuracy, product);
        } else {
          multiply_rows(weight, product);
        }
        for (int64_t i = 0; relu && i < count * width; ++i) result[i] = result[i] < 0 ? 0 : result[i];
        put(conv, result, pixel, count, at, width, weight.n, out);
      }
    }
  });
}

// Torch's own convolution of the unpacked weight: float64, which serves gradcheck, and groups of so
// few outputs that most lanes would idle.
Tensor unpacked_conv2d(const Tensor& input, const Tensor& qweight, const Tensor& scale,
                       const std::optional<Tensor>& bias, const std::vector<double>& levels,
                       int64_t group_size, int64_t in_features, const Conv& conv) {
  using torch::stable::detail::from;
  const Tensor weight = torch::stable::view(
      unpack_weight(qweight, scale, levels, group_size, in_features, input.scalar_type()),
      {qweight.size(1), conv.channels / conv.groups, conv.kernel[0], conv.kernel[1]});
  std::array<StableIValue, 7> stack{from(input),       from(weight),       from(bias),
                                    from(conv.stride), from(conv.padding), from(conv.dilation),
                                    from(conv.groups)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::conv2d", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor call_relu(const Tensor& x) {
  std::array<StableIValue, 1> stack{torch::stable::detail::from(x)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::relu", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// As many groups as channels and outputs, channels last.
void depthwise(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
               const Conv& conv, bool relu, Tensor& output) {
  const int64_t channels = conv.channels, taps = conv.taps();
  std::vector<float> by_tap(taps * channels);
  const float* from = weight.const_data_ptr<float>();
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t tap = 0; tap < taps; ++tap) by_tap[tap * channels + c] = from[c * taps + tap];
  }
  const Depthwise d{conv, input.const_data_ptr<float>(), by_tap.data(),
                    bias ? bias->const_data_ptr<float>() : nullptr, output.mutable_data_ptr<float>(), relu};
  constexpr int64_t kProducts = 1 << 17;  // that a thread is worth waking for
  torch::stable::parallel_for(0, conv.batch * conv.out_height,
                              1 + kProducts / (conv.out_width * channels * taps),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t i = begin; i < end; ++i) {
                                  BLAQ_VARIANT(depthwise_line)(d, i / conv.out_height, i % conv.out_height);
                                }
                              });
}

// The weight by taps; with groups of inputs, which cross taps, by inputs.
void check_conv_repacked(const char* op, const Tensor& repacked, const Tensor& qweight,
                         int64_t in_features, const Extent& kernel, int64_t group_size, int64_t groups) {
  if (group_size > 0) return check_repacked(op, repacked, qweight, in_features);
  check_dtype(op, "repacked", repacked, {ScalarType::Byte});
  check_contiguous(op, "repacked", repacked);
  const auto shape = ConvRepacked(static_cast<int>(qweight.size(0)), qweight.size(1), in_features,
                                  kernel[0] * kernel[1], groups)
                         .shape();
  const auto sizes = repacked.sizes();
  BLAQ_REQUIRE(std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end()), op, "repacked",
               "have shape " + list_text(shape), list_text(sizes));
}

Tensor packed_conv2d(const Tensor& input, const Tensor& qweight, const Tensor& scale,
                     const std::optional<Tensor>& bias, std::vector<double> levels, int64_t group_size,
                     Extent kernel_size, Extent stride, Extent padding, Extent dilation, int64_t groups,
                     const std::optional<Tensor>& repacked, std::string accuracy_name, bool relu) {
  const char* op = "packed_conv2d";
  const Accuracy accuracy = accuracy_of(op, accuracy_name);
  check_geometry(op, input, kernel_size, stride, padding, dilation, groups);
  const int64_t channels = input.size(1);
  const int64_t in_features = channels / groups * kernel_size[0] * kernel_size[1];
  const bool wide = input.scalar_type() == ScalarType::Double;
  check_qweight(op, qweight, scale, levels, group_size, in_features,
                {wide ? ScalarType::Double : ScalarType::Float}, repacked.has_value());
  const int64_t outputs = qweight.size(1);
  BLAQ_REQUIRE(outputs % groups == 0, op, "qweight",
               "have rows divisible by groups = " + text(groups), outputs);
  check_packed_input(op, input, qweight, bias);
  if (repacked) check_conv_repacked(op, *repacked, qweight, in_features, kernel_size, group_size, groups);
  const Extent out_size = check_output_size(op, input, kernel_size, stride, padding, dilation);

  const Tensor dense =
      input.is_contiguous() || is_channels_last(input) ? input : torch::stable::contiguous(input);
  const Conv conv{
      kernel_size,   stride,   padding,       dilation,      groups,      !dense.is_contiguous(),
      input.size(0), channels, input.size(2), input.size(3), out_size[0], out_size[1]};
  constexpr auto kLast = torch::headeronly::MemoryFormat::ChannelsLast;
  constexpr auto kFirst = torch::headeronly::MemoryFormat::Contiguous;
  const auto layout = conv.channels_last ? kLast : kFirst;
  const bool empty = conv.batch == 0 || outputs == 0;
  const bool single = conv.channels_last && channels == groups && outputs == groups &&
                      input.scalar_type() == ScalarType::Float;
  // Few channels leave lanes idle, few outputs have nothing to share tables among. The batch has no part
  // in the choice, so that it has none in a result.
  constexpr int64_t kFewOutputs = 8, kFewChannels = 8, kManyProducts = 1 << 24;
  const bool few = outputs / groups < kFewOutputs ||
                   (conv.group_channels() < kFewChannels &&
                    conv.places() * outputs * in_features >= kManyProducts);
  const bool whole = has_planes(qweight, in_features), decodes = wide || few || single;
  const auto with_planes = [&] {
    return packed_conv2d(input, unrepack(*repacked, qweight.size(0), outputs, in_features), scale, bias, levels,
                         group_size, kernel_size, stride, padding, dilation, groups, repacked, accuracy_name,
                         relu);
  };
  if (!empty && !whole && decodes) return with_planes();
  if (!empty && (wide || (few && !single))) {
    Tensor output = torch::stable::contiguous(
        unpacked_conv2d(dense, qweight, scale, bias, levels, group_size, in_features, conv), layout);
    return relu ? call_relu(output) : output;
  }
  Tensor output =
      torch::stable::empty({conv.batch, outputs, conv.out_height, conv.out_width},
                           input.scalar_type(), std::nullopt, std::nullopt, std::nullopt, layout);
  if (empty) return output;
  if (single) {
    depthwise(dense, unpack_weight(qweight, scale, levels, group_size, in_features, ScalarType::Float), bias,
              conv, relu, output);
    return output;
  }
  PackedMatrix weight =
      packed_matrix(qweight, scale, levels, group_size, in_features, input.scalar_type(), groups);
  std::atomic<bool> wants_planes = false;
  if (!whole) weight.wants_planes = &wants_planes;
  with_float_type(input.scalar_type(), [&]<typename T>() {
    if constexpr (sizeof(T) <= 4) convolve<T>(dense, weight, repacked, accuracy, bias, conv, relu, output);
  });
  return wants_planes ? with_planes() : output;
}

}  // namespace
}  // namespace blaq

STABLE_TORCH_LIBRARY_IMPL(blaq, CPU, m) {
  m.impl("packed_conv2d", TORCH_BOX(&blaq::packed_conv2d));
}
