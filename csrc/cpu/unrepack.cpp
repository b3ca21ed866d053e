// torch.ops.blaq.unrepack: the bit planes that repack or conv_repack brought into another order. Seldom needed,
// so plain: bits move word by word, or one by one where taps lie between them.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "cpu/packed_conv_int8.h"
#include "packed_checks.h"

namespace blaq {
namespace {

using Planes = std::array<uint32_t, 4>;

// 32 inputs of one output: plane b's bits from the digits of packed_int8.h, whose registers are 16 dwords apart.
Planes from_digits(const uint32_t* digits, int words) {
  if (words == 1) return {digits[0]};
  const uint32_t low = words == 2 ? 0x55555555 : 0x11111111;
  Planes planes{};
  for (int b = 0; b < words; ++b) {
    for (int p = 0; p < words; ++p) planes[b] |= (digits[p * 16] >> b & low) << p;
  }
  return planes;
}

// 32 channels of one output at a tap, as conv_repack_kernel.h made them.
Planes from_tap(const uint32_t* tap, int bits, int64_t word, int64_t words) {
  if (bits > 2) return from_digits(tap + word * 4 * 16, 4);
  const uint32_t sign = tap[word * 16];
  if (bits == 1) return {sign};
  return {sign ^ ~tap[(words + word) * 16], sign};
}

void restore_rows(const uint32_t* from, int bits, int64_t n, int64_t in_features, uint8_t* planes) {
  const int words = words_of(bits);
  const int64_t bytes = (in_features + 7) / 8, steps = (in_features + 31) / 32;
  torch::stable::parallel_for(0, n, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t step = 0; step < steps; ++step) {
        const Planes words_of_row = from_digits(from + (row / 16 * steps + step) * words * 16 + row % 16, words);
        for (int b = 0; b < bits; ++b) {
          std::memcpy(planes + (b * n + row) * bytes + step * 4, &words_of_row[b],
                      std::min<int64_t>(4, bytes - step * 4));
        }
      }
    }
  });
}

void restore_taps(const uint32_t* from, int bits, int64_t n, int64_t in_features, const ConvRepacked& layout,
                  uint8_t* planes) {
  const int64_t bytes = (in_features + 7) / 8, channels = in_features / layout.taps;
  const int64_t words = (channels + 31) / 32, of_group = n / layout.groups;
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int b = 0; b < bits; ++b) std::memset(planes + (b * n + row) * bytes, 0, bytes);
      const int64_t tile = row / of_group * layout.tiles + row % of_group / 16;
      for (int64_t tap = 0; tap < layout.taps; ++tap) {
        const uint32_t* at =
            from + (tile * layout.taps + tap) * layout.words * 16 + row % of_group % 16;
        for (int64_t c = 0; c < channels; ++c) {
          const Planes word = from_tap(at, bits, c / 32, words);
          const int64_t input = c * layout.taps + tap;
          for (int b = 0; b < bits; ++b) {
            planes[(b * n + row) * bytes + input / 8] |= (word[b] >> c % 32 & 1) << input % 8;
          }
        }
      }
    }
  });
}

}  // namespace

Tensor unrepack(const Tensor& repacked, int64_t bits, int64_t n, int64_t in_features) {
  const char* op = "unrepack";
  check_dtype(op, "repacked", repacked, {ScalarType::Byte});
  check_contiguous(op, "repacked", repacked);
  BLAQ_REQUIRE(bits >= 1 && bits <= 4, op, "bits", "be 1, 2, 3 or 4", bits);
  BLAQ_REQUIRE(n >= 0, op, "n", "be at least 0", n);
  BLAQ_REQUIRE(in_features >= 0, op, "in_features", "be at least 0", in_features);
  BLAQ_REQUIRE(repacked.dim() == 1 || repacked.dim() == 5, op, "repacked", "have 1 dimension or 5",
               list_text(repacked.sizes()));
  const int width = static_cast<int>(bits);
  std::vector<int64_t> shape{repacked_bytes(width, n, in_features)};
  if (repacked.dim() == 5) {
    const int64_t groups = repacked.size(0), taps = repacked.size(2);
    BLAQ_REQUIRE(groups > 0 && n % groups == 0 && taps > 0 && in_features % taps == 0, op, "repacked",
                 "have groups that divide n and taps that divide in_features", list_text(repacked.sizes()));
    shape = ConvRepacked(width, n, in_features, taps, groups).shape();
  }
  const auto sizes = repacked.sizes();
  BLAQ_REQUIRE(std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end()), op, "repacked",
               "have shape " + list_text(shape), list_text(sizes));
  Tensor planes = torch::stable::new_empty(repacked, {bits, n, (in_features + 7) / 8});
  if (planes.numel() == 0) return planes;
  const auto* from = reinterpret_cast<const uint32_t*>(repacked.const_data_ptr<uint8_t>());
  uint8_t* to = planes.mutable_data_ptr<uint8_t>();
  if (repacked.dim() == 1) {
    restore_rows(from, width, n, in_features, to);
  } else {
    restore_taps(from, width, n, in_features, ConvRepacked(width, n, in_features, shape[2], shape[0]), to);
  }
  return planes;
}

}  // namespace blaq

STABLE_TORCH_LIBRARY_IMPL(blaq, CPU, m) { m.impl("unrepack", TORCH_BOX(&blaq::unrepack)); }
