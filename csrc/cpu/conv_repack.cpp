// torch.ops.blaq.conv_repack: a convolution's packed weight in the order that packed_conv_int8.cpp
// reads.
#include <torch/csrc/stable/library.h>

#include "cpu/packed_conv_int8.h"
#include "packed_checks.h"

namespace blaq {
namespace {

// Codes of a row, one a byte.
void unpack_row(const Tensor& qweight, int64_t n, int64_t k, uint8_t* codes) {
  const int64_t rows = qweight.size(1), bytes = qweight.size(2);
  std::fill_n(codes, k, uint8_t{0});
  for (int64_t b = 0; b < qweight.size(0); ++b) {
    const uint8_t* plane = qweight.const_data_ptr<uint8_t>() + (b * rows + n) * bytes;
    for (int64_t i = 0; i < k; ++i) codes[i] |= (plane[i / 8] >> (i % 8) & 1) << b;
  }
}

// The dwords of one row: of output n % 16 in each register. Channels of a tap are in the order that
// packed_int8.h has inputs in.
void repack_row(const uint8_t* codes, int bits, int64_t channels, const ConvRepacked& layout,
                uint32_t* out) {
  const int64_t words = padded(channels) / 32;
  for (int64_t tap = 0; tap < layout.taps; ++tap, out += layout.words * 16) {
    for (int64_t c = 0; c < channels; ++c) {
      const uint32_t code = codes[c * layout.taps + tap], sign = code >> (bits - 1);
      if (bits <= 2) {
        uint32_t* word = out + c / 32 * 16;
        word[0] |= sign << c % 32;
        // The second sign of a 2-bit weight is the other one where the magnitude is the lower.
        if (bits == 2) word[words * 16] |= (sign ^ (~code & 1)) << c % 32;
      } else {
        out[(c / 32 * 4 + c % 4) * 16] |= code << c % 32 / 4 * 4;
      }
    }
  }
}

Tensor conv_repack(const Tensor& qweight, int64_t in_features, int64_t taps, int64_t groups) {
  const char* op = "conv_repack";
  check_repack_by_tap(op, qweight, 4, in_features, taps, groups);
  const int bits = static_cast<int>(qweight.size(0));
  const int64_t n = qweight.size(1), of_group = n / groups;
  const ConvRepacked layout(bits, n, in_features, taps, groups);
  Tensor out = torch::stable::new_empty(qweight, layout.shape());
  torch::stable::zero_(out);
  uint32_t* to = reinterpret_cast<uint32_t*>(out.mutable_data_ptr<uint8_t>());
  torch::stable::parallel_for(0, groups * layout.tiles, 1, [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> codes(in_features);
    for (int64_t tile = begin; tile < end; ++tile) {
      for (int64_t lane = 0; lane < 16; ++lane) {
        const int64_t row = std::min(tile % layout.tiles * 16 + lane, of_group - 1);
        unpack_row(qweight, tile / layout.tiles * of_group + row, in_features, codes.data());
        repack_row(codes.data(), bits, in_features / taps, layout,
                   to + tile * layout.tile_bytes() / 4 + lane);
      }
    }
  });
  return out;
}

}  // namespace
}  // namespace blaq

STABLE_TORCH_LIBRARY_IMPL(blaq, CPU, m) { m.impl("conv_repack", TORCH_BOX(&blaq::conv_repack)); }
