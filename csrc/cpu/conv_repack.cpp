// torch.ops.blaq.conv_repack: a convolution's packed weight in the order that packed_conv_int8.cpp
// reads.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <bit>
#include <cstring>

#include "cpu/packed_conv_int8.h"
#include "packed_checks.h"

namespace blaq {
namespace {

// Of 64 channels, which are `taps` words: the bits of a tap in each word, and of which channel the first is.
struct Gathering {
  struct Part {
    uint64_t mask = 0;
    int64_t channel = 0;
  };
  int64_t taps;
  std::vector<Part> parts;  // [tap][word]

  explicit Gathering(int64_t taps_) : taps(taps_), parts(taps * taps) {
    for (int64_t input = 64 * taps - 1; input >= 0; --input) {
      Part& part = parts[input % taps * taps + input / 64];
      part.mask |= uint64_t{1} << input % 64;
      part.channel = input / taps;
    }
  }
};

// Four planes of 32 inputs to digits of 4 bits: the i-th of word p is the code of input 4i + p.
inline void interleave_planes(uint32_t (&plane)[4]) {
  const auto mix = [](uint32_t& a, uint32_t& b, int by, uint32_t low) {
    const uint32_t first = (a & low) | ((b & low) << by);
    b = ((a >> by) & low) | (b & ~low);
    a = first;
  };
  mix(plane[0], plane[1], 1, 0x55555555);
  mix(plane[2], plane[3], 1, 0x55555555);
  mix(plane[0], plane[2], 2, 0x33333333);
  mix(plane[1], plane[3], 2, 0x33333333);
}

}  // namespace
}  // namespace blaq

#define BLAQ_KERNEL_FILE "cpu/conv_repack_kernel.h"
#include "cpu/foreach_isa.h"

namespace blaq {
namespace {

Tensor conv_repack(const Tensor& qweight, int64_t in_features, int64_t taps, int64_t groups) {
  const char* op = "conv_repack";
  check_repack_by_tap(op, qweight, 4, in_features, taps, groups);
  const int bits = static_cast<int>(qweight.size(0));
  const int64_t n = qweight.size(1), of_group = n / groups;
  const ConvRepacked layout(bits, n, in_features, taps, groups);
  Tensor out = torch::stable::new_empty(qweight, layout.shape());
  if (out.numel() == 0) return out;
  const int64_t channels = in_features / taps, bytes = qweight.size(2);
  const int64_t words = (channels + 63) / 64 * taps;
  const Gathering gathering(taps);
  const uint8_t* planes = qweight.const_data_ptr<uint8_t>();
  uint32_t* to = reinterpret_cast<uint32_t*>(out.mutable_data_ptr<uint8_t>());
  torch::stable::parallel_for(0, groups * layout.tiles, 1, [&](int64_t begin, int64_t end) {
    std::vector<uint64_t> row(bits * words);
    for (int64_t i = begin * 16; i < end * 16; ++i) {
      const int64_t tile = i / 16, lane = std::min(tile % layout.tiles * 16 + i % 16, of_group - 1);
      for (int b = 0; b < bits; ++b) {
        const int64_t at = b * n + tile / layout.tiles * of_group + lane;
        std::memcpy(&row[b * words], planes + at * bytes, bytes);
        if (in_features % 64) row[b * words + in_features / 64] &= (uint64_t{1} << in_features % 64) - 1;
      }
      BLAQ_VARIANT(repack_taps)(row.data(), bits, channels, gathering, layout.words,
                                to + tile * layout.tile_bytes() / 4 + i % 16);
    }
  });
  return out;
}

}  // namespace
}  // namespace blaq

STABLE_TORCH_LIBRARY_IMPL(blaq, CPU, m) { m.impl("conv_repack", TORCH_BOX(&blaq::conv_repack)); }
