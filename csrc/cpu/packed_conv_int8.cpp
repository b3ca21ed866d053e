#include "cpu/packed_conv_int8.h"

#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "cpu/capability.h"
#include "cpu/level_table.h"
#include "cpu/packed_int8_block.h"
#include "cpu/runs.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(                                                                \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,fma"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target( \
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,fma,prefer-vector-width=512")
#endif

namespace blaq {
namespace {

constexpr int kPlaces = 4;        // of the output that a tile computes
constexpr int kSegmentWords = 8;  // of 32 channels that share a unit, at most
constexpr float kLeast = 1e-30f;  // inputs below which a unit would be subnormal

#include "cpu/packed_conv_int8_kernel.h"

// What a call is, apart from the way.
struct Call {
  const PackedMatrix& weight;
  const uint8_t* repacked;
  const Conv& conv;
  bool relu;
  const ConvTensors& tensors;
  ConvRepacked layout;
  int64_t words;                   // of a group's channels
  int64_t segments;                // of a group
  std::vector<float> scale, bias;  // of every output
};

// Lines of an image whose pixels are prepared: the thread's last few, kept in a ring.
template <typename Way>
class Band {
 public:
  Band(const Call& call, const Way& way)
      : call_(call),
        way_(way),
        group_bytes_(call.words * 32 * Way::kChannelBytes),
        group_segments_(call.segments) {
    const Conv& conv = call.conv;
    const int64_t lines_of_tile = (kPlaces - 2) / conv.out_width + 2;
    const int64_t reach = (conv.kernel[0] - 1) * conv.dilation[0] + 1;
    lines_ = std::min(conv.height, (lines_of_tile - 1) * conv.stride[0] + reach);
    held_.assign(lines_, -1);
    for (int64_t y = 0; y < conv.height; ++y) places_.push_back(y % lines_);
    const int64_t pixels = lines_ * conv.width + 1;
    thread_local Buffer data, units, corrections, line;
    data_ = reinterpret_cast<uint8_t*>(data.take(pixels * pixel_bytes() / 4));
    units_ = units.take(pixels * pixel_segments());
    corrections_ = reinterpret_cast<int32_t*>(corrections.take(pixels * pixel_segments()));
    floats_ = call.words * 32 * conv.groups;
    line_ = line.take(conv.width * floats_);
    if (conv.group_channels() % 32) std::memset(line_, 0, conv.width * floats_ * sizeof(float));
    bad_.assign(pixels, false);
    padding_ = pixels - 1;
    std::memset(data_ + padding_ * pixel_bytes(), 0, pixel_bytes());
    std::memset(units_ + padding_ * pixel_segments(), 0, pixel_segments() * sizeof(float));
    std::memset(corrections_ + padding_ * pixel_segments(), 0, pixel_segments() * sizeof(int32_t));
    for (int64_t x = 0; x < conv.width; ++x) {
      for (int64_t j = 0; j < conv.kernel[1]; ++j) {
        const int64_t from = x + conv.padding[1] - j * conv.dilation[1];
        if (from < 0 || from % conv.stride[1] || from / conv.stride[1] >= conv.out_width) continue;
        columns_.push_back(x);
        break;
      }
    }
  }

  int64_t padding() const { return padding_; }
  bool bad(int64_t pixel) const { return bad_[pixel]; }
  const uint8_t* data(int64_t pixel, int64_t group) const {
    return data_ + pixel * pixel_bytes() + group * group_bytes_;
  }
  const float* units(int64_t pixel, int64_t group) const {
    return units_ + pixel * pixel_segments() + group * group_segments_;
  }
  const int32_t* corrections(int64_t pixel, int64_t group) const {
    return corrections_ + pixel * pixel_segments() + group * group_segments_;
  }

  // Makes line y of the image ready, unless it is. Returns its first pixel.
  int64_t hold(int64_t image, int64_t y) {
    const Conv& conv = call_.conv;
    const int64_t place = places_[y], first = place * conv.width;
    if (held_[place] == image * conv.height + y) return first;
    held_[place] = image * conv.height + y;
    call_.tensors.load(image, y, 0, conv.width, line_);
    for (const int64_t x : columns_) {
      const int64_t at = first + x;
      bad_[at] = false;
      for (int64_t group = 0; group < conv.groups; ++group) {
        for (int64_t s = 0; s < group_segments_; ++s) {
          const int64_t word = s * kSegmentWords, index = group * group_segments_ + s;
          const int count = static_cast<int>(std::min<int64_t>(kSegmentWords, call_.words - word));
          const bool good = way_.prepare(
              line_ + x * floats_ + (group * call_.words + word) * 32, count,
              data_ + at * pixel_bytes() + group * group_bytes_ + word * 32 * Way::kChannelBytes,
              units_ + at * pixel_segments() + index, corrections_ + at * pixel_segments() + index);
          if (!good) bad_[at] = true;
        }
      }
    }
    return first;
  }

 private:
  int64_t pixel_bytes() const { return group_bytes_ * call_.conv.groups; }
  int64_t pixel_segments() const { return group_segments_ * call_.conv.groups; }

  const Call& call_;
  const Way& way_;
  const int64_t group_bytes_, group_segments_;
  int64_t lines_, padding_, floats_;
  std::vector<int64_t> places_;   // in the ring, by line
  std::vector<int64_t> held_;     // image and line, by place in the ring
  std::vector<int64_t> columns_;  // that a tap ever reads
  std::vector<uint8_t> bad_;
  uint8_t* data_;
  float *units_, *line_;
  int32_t* corrections_;
};

// The prepared pixels under one tap.
struct Tap {
  int64_t index;
  const uint8_t* data[kPlaces];
  const float* units[kPlaces];
  const int32_t* corrections[kPlaces];
};

// totals[r][16 v + lane] = Σ over taps of the products, without scale.
template <typename Way, int MR, int NV>
[[gnu::noinline]] void add_taps(const Way& way, const Call& call, const uint8_t* weights,
                                const std::vector<Tap>& taps, float* totals, int64_t stride) {
  for (int r = 0; r < MR; ++r) std::memset(totals + r * stride, 0, NV * 64);
  const int64_t step = call.layout.tile_bytes(), plane_words = call.layout.words / way.planes;
  const int64_t word_bytes = plane_words / call.words * 64;
  for (const Tap& tap : taps) {
    for (int p = 0; p < way.planes; ++p) {
      const uint8_t* from = weights + (tap.index * call.layout.words + p * plane_words) * 64;
      for (int64_t s = 0; s < call.segments; ++s) {
        const int64_t word = s * kSegmentWords;
        const int count = static_cast<int>(std::min<int64_t>(kSegmentWords, call.words - word));
        const uint8_t* pixels[MR];
        int32_t correction[MR];
        for (int r = 0; r < MR; ++r) {
          pixels[r] = tap.data[r] + word * 32 * Way::kChannelBytes;
          correction[r] = tap.corrections[r][s];
        }
        __m512i sums[MR][NV];
        way.template add<MR, NV>(from + word * word_bytes, step, pixels, count, correction, sums);
        each<MR>([&](auto r) __attribute__((always_inline)) {
          const __m512 unit = _mm512_set1_ps(tap.units[r][s] * way.coefficient[p]);
          each<NV>([&](auto v) __attribute__((always_inline)) {
            float* total = totals + r * stride + 16 * v;
            _mm512_store_ps(total, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[r][v]), unit,
                                                   _mm512_load_ps(total)));
          });
        });
      }
    }
  }
}

template <typename Way>
class Tile {
 public:
  Tile(const Call& call, const Way& way, Band<Way>& band) : call_(call), way_(way), band_(band) {
    taps_.reserve(call.conv.taps());
    pixels_.resize(call.conv.taps() * kPlaces);
    indices_.resize(call.conv.taps());
  }

  // Places [place, place + count) of an image, tiles [begin, end) of 16 outputs of every group.
  void run(int64_t image, int64_t place, int count, int64_t begin, int64_t end, float* results) {
    const Conv& conv = call_.conv;
    const int64_t n = call_.weight.n / conv.groups, first = begin * 16;
    const int64_t width = std::min(n, end * 16) - first;
    find(image, place, count);
    for (int64_t group = 0; group < conv.groups; ++group) {
      const int64_t output = group * n + first;
      point(group, count);
      if (count == 4)
        products<4>(group, begin, end, results);
      else if (count == 3)
        products<3>(group, begin, end, results);
      else if (count == 2)
        products<2>(group, begin, end, results);
      else
        products<1>(group, begin, end, results);
      finish(output, count, width, (end - begin) * 16, results);
      for (int r = 0; r < count; ++r) {
        if (bad_[r]) exactly(image, place + r, group, output, width, results + r * width);
      }
      call_.tensors.store(results, image, place, count, output, width);
    }
  }

 private:
  // The pixels under every tap, but for taps that lie in the padding for all places.
  void find(int64_t image, int64_t place, int count) {
    const Conv& conv = call_.conv;
    int64_t top[kPlaces], left[kPlaces];
    for (int r = 0; r < count; ++r) {
      top[r] = (place + r) / conv.out_width * conv.stride[0] - conv.padding[0];
      left[r] = (place + r) % conv.out_width * conv.stride[1] - conv.padding[1];
      bad_[r] = false;
    }
    live_ = 0;
    for (int64_t i = 0, tap = 0; i < conv.kernel[0]; ++i) {
      int64_t line[kPlaces];
      for (int r = 0; r < count; ++r) {
        const int64_t y = top[r] + i * conv.dilation[0];
        const bool inside = y >= 0 && y < conv.height;
        line[r] = inside ? band_.hold(image, y) : -1;
      }
      for (int64_t j = 0; j < conv.kernel[1]; ++j, ++tap) {
        int64_t* pixels = pixels_.data() + live_ * kPlaces;
        bool any = false;
        for (int r = 0; r < count; ++r) {
          const int64_t x = left[r] + j * conv.dilation[1];
          const bool inside = line[r] >= 0 && x >= 0 && x < conv.width;
          pixels[r] = inside ? line[r] + x : band_.padding();
          any |= inside;
          bad_[r] |= band_.bad(pixels[r]);
        }
        if (any) indices_[live_++] = tap;
      }
    }
  }

  void point(int64_t group, int count) {
    taps_.resize(live_);
    for (int64_t t = 0; t < live_; ++t) {
      taps_[t].index = indices_[t];
      for (int r = 0; r < count; ++r) {
        const int64_t pixel = pixels_[t * kPlaces + r];
        taps_[t].data[r] = band_.data(pixel, group);
        taps_[t].units[r] = band_.units(pixel, group);
        taps_[t].corrections[r] = band_.corrections(pixel, group);
      }
    }
  }

  template <int MR>
  void products(int64_t group, int64_t begin, int64_t end, float* totals) {
    constexpr int kVectors = Way::kVectors;
    const int64_t stride = (end - begin) * 16, bytes = call_.layout.tile_bytes();
    const uint8_t* weights = call_.repacked + (group * call_.layout.tiles + begin) * bytes;
    while (begin + kVectors <= end) {
      add_taps<Way, MR, kVectors>(way_, call_, weights, taps_, totals, stride);
      begin += kVectors, weights += kVectors * bytes, totals += kVectors * 16;
    }
    for (; begin < end; ++begin, weights += bytes, totals += 16) {
      add_taps<Way, MR, 1>(way_, call_, weights, taps_, totals, stride);
    }
  }

  // Totals [count][stride] become results [count][width]; those past width are never read.
  void finish(int64_t output, int count, int64_t width, int64_t stride, float* results) const {
    const __m512 least = _mm512_set1_ps(call_.relu ? 0 : -INFINITY);
    for (int64_t i = 0; i < width; i += 16) {
      const __m512 scale = _mm512_loadu_ps(call_.scale.data() + output + i);
      const __m512 bias = _mm512_loadu_ps(call_.bias.data() + output + i);
      for (int r = 0; r < count; ++r) {
        float* x = results + r * stride + i;
        const __m512 y = _mm512_add_ps(_mm512_mul_ps(_mm512_load_ps(x), scale), bias);
        _mm512_store_ps(x, _mm512_max_ps(least, y));  // y where it is no number
      }
    }
    for (int r = 1; width < stride && r < count; ++r) {
      std::memmove(results + r * width, results + r * stride, width * sizeof(float));
    }
  }

  // A place that a pixel without a unit reaches: in float.
  void exactly(int64_t image, int64_t place, int64_t group, int64_t output, int64_t width,
               float* result) const {
    if (call_.weight.wants_planes) {
      *call_.weight.wants_planes = true;
      return;
    }
    const Conv& conv = call_.conv;
    const int64_t channels = conv.group_channels(), stride = padded(call_.weight.k),
                  taps = conv.taps();
    std::vector<float> row(stride), pixel(call_.words * 32 * conv.groups);
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t y = place / conv.out_width * conv.stride[0] - conv.padding[0] +
                        tap / conv.kernel[1] * conv.dilation[0];
      const int64_t x = place % conv.out_width * conv.stride[1] - conv.padding[1] +
                        tap % conv.kernel[1] * conv.dilation[1];
      if (y < 0 || y >= conv.height || x < 0 || x >= conv.width) continue;
      call_.tensors.load(image, y, x, x + 1, pixel.data());
      for (int64_t c = 0; c < channels; ++c)
        row[c * taps + tap] = pixel[group * call_.words * 32 + c];
    }
    multiply_rows(call_.weight, {row.data(), stride, 1, output, output + width, result, width});
    for (int64_t i = 0; call_.relu && i < width; ++i) result[i] = result[i] < 0 ? 0 : result[i];
  }

  const Call& call_;
  const Way& way_;
  Band<Way>& band_;
  std::vector<Tap> taps_;
  std::vector<int64_t> pixels_, indices_;  // of the live taps
  int64_t live_ = 0;
  bool bad_[kPlaces];
};

// Shares places and, where there are few, outputs among threads.
template <typename Way>
void run(const Call& call) {
  const Conv& conv = call.conv;
  const Way way(call.weight);
  constexpr int64_t kFewPlaces = 8, kProducts = 1 << 20;  // that a thread is worth waking for
  const int64_t places = conv.batch * conv.places(), tiles = call.layout.tiles;
  const int64_t worth = places * call.weight.n * call.weight.k / kProducts;
  const int64_t threads =
      std::min<int64_t>(torch::stable::get_num_threads(), std::max<int64_t>(worth, 1));
  const int64_t by_place = std::max<int64_t>(1, std::min(threads, places / kFewPlaces));
  const int64_t by_output =
      std::max<int64_t>(1, std::min(threads / by_place, tiles / Way::kVectors));
  torch::stable::parallel_for(0, by_place * by_output, 1, [&](int64_t from, int64_t to) {
    thread_local Buffer buffer;
    for (int64_t part = from; part < to; ++part) {
      const int64_t row = part / by_output, column = part % by_output;
      const int64_t first = places * row / by_place, last = places * (row + 1) / by_place;
      const int64_t begin = tiles * column / by_output, end = tiles * (column + 1) / by_output;
      float* results = buffer.take(kPlaces * (end - begin) * 16);
      Band<Way> band(call, way);
      Tile<Way> tile(call, way, band);
      for_each_run(first, last, conv.places(), [&](int64_t image, int64_t at, int64_t stop) {
        for (int64_t left = (stop - at + kPlaces - 1) / kPlaces; left > 0; --left) {
          const int count = static_cast<int>((stop - at + left - 1) / left);
          tile.run(image, at, count, begin, end, results);
          at += count;
        }
      });
    }
  });
}

}  // namespace
}  // namespace blaq

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace blaq {

void convolve_int8(const PackedMatrix& weight, const uint8_t* repacked, Accuracy accuracy,
                   const Conv& conv, bool relu, const ConvTensors& tensors) {
  const int64_t words = padded(conv.group_channels()) / 32;
  Call call{weight,  repacked,
            conv,    relu,
            tensors, ConvRepacked(weight.bits, weight.n, weight.k, conv.taps(), conv.groups),
            words,   (words + kSegmentWords - 1) / kSegmentWords,
            {},      {}};
  call.scale.resize(weight.n + 15);  // a register more than there are
  call.bias.resize(weight.n + 15);
  for (int64_t i = 0; i < weight.n; ++i) {
    call.scale[i] = rounded(weight.scale[weight.group_size == 0 ? 0 : i], weight.round_scale);
    if (weight.bias) call.bias[i] = weight.bias[i];
  }
  const bool high = accuracy == Accuracy::high;
  if (weight.bits <= 2) {
    high ? run<TableWay<2>>(call) : run<TableWay<1>>(call);
  } else {
    high ? run<LevelWay<true>>(call) : run<LevelWay<false>>(call);
  }
}

bool has_conv_int8(const PackedMatrix& weight, Accuracy accuracy, const Conv& conv) {
  constexpr int64_t kFewChannels = 16, kFewOutputs = 16;  // most lanes would idle
  return has_vnni() && has_int8(weight, accuracy) && weight.group_size <= 0 &&
         conv.group_channels() >= kFewChannels && weight.n / conv.groups >= kFewOutputs;
}

}  // namespace blaq

#else

namespace blaq {

bool has_conv_int8(const PackedMatrix&, Accuracy, const Conv&) { return false; }
void convolve_int8(const PackedMatrix&, const uint8_t*, Accuracy, const Conv&, bool,
                   const ConvTensors&) {}

}  // namespace blaq

#endif
