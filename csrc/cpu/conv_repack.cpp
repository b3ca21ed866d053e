// torch.ops.blaq.conv_repack: a convolution's packed weight in the order that packed_conv_int8.cpp
// reads.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>

#include "cpu/packed_conv_int8.h"
#include "cpu/tap_splitter.h"
#include "packed_checks.h"

namespace blaq {
namespace {

// Bytes that are worth waking a thread for.
constexpr int64_t kWorth = 1 << 16;

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
  const uint8_t* planes = qweight.const_data_ptr<uint8_t>();
  uint32_t* to = reinterpret_cast<uint32_t*>(out.mutable_data_ptr<uint8_t>());
  const auto store = bits == 1   ? BLAQ_VARIANT(store_taps<1>)
                     : bits == 2 ? BLAQ_VARIANT(store_taps<2>)
                     : bits == 3 ? BLAQ_VARIANT(store_taps<3>)
                                 : BLAQ_VARIANT(store_taps<4>);
  const int64_t grain = 1 + kWorth / layout.tile_bytes();
  torch::stable::parallel_for(0, groups * layout.tiles, grain, [&](int64_t begin, int64_t end) {
    TapSplitter splitter(taps, in_features);
    std::vector<TapWords> words(bits * taps);
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile % layout.tiles * 16, row = tile / layout.tiles * of_group + first;
      for (int64_t block = 0; block * 64 < channels; ++block) {
        for (int b = 0; b < bits; ++b) {
          splitter.split(planes + (b * n + row) * bytes, of_group - first, block, &words[b * taps]);
        }
        store(words.data(), taps, block * 64, channels, layout.words, to + tile * layout.tile_bytes() / 4);
      }
    }
  });
  return out;
}

}  // namespace
}  // namespace blaq

STABLE_TORCH_LIBRARY_IMPL(blaq, CPU, m) { m.impl("conv_repack", TORCH_BOX(&blaq::conv_repack)); }
