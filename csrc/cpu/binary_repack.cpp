// torch.ops.blaq.binary_repack: a 1-bit weight in the order that its kernels read; see BinaryMatrix.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "binary_checks.h"
#include "cpu/tap_splitter.h"

namespace blaq {

Tensor binary_words(const Tensor& qweight, int64_t in_features, int64_t taps, int64_t groups) {
  BinaryMatrix weight{nullptr, groups, qweight.size(1) / groups, taps, in_features / taps};
  const int64_t words = weight.tap_words(), row_bytes = qweight.size(2), k = weight.k();
  Tensor out = torch::stable::new_empty(qweight, {groups, weight.blocks(), taps, words, 8},
                                        ScalarType::Long);
  if (out.numel() == 0) return out;
  const uint8_t* from = qweight.const_data_ptr<uint8_t>();
  uint64_t* to = reinterpret_cast<uint64_t*>(out.mutable_data_ptr<int64_t>());
  const int64_t pairs = (weight.blocks() + 1) / 2;  // of blocks
  torch::stable::parallel_for(0, groups * pairs, 1 + (1 << 12) / (k + 1), [&](int64_t begin, int64_t end) {
    TapSplitter splitter(taps, k);
    std::vector<TapWords> split(taps);
    for (int64_t pair = begin; pair < end; ++pair) {
      const int64_t group = pair / pairs, first = pair % pairs * 2;
      const int64_t block_words = taps * words * 8, some = std::min<int64_t>(2, weight.blocks() - first);
      uint64_t* target = to + (group * weight.blocks() + first) * block_words;
      for (int64_t word = 0; word < words; ++word) {
        splitter.split(from + (group * weight.n + first * 8) * row_bytes, weight.n - first * 8, word, split.data());
        for (int64_t block = 0; block < some; ++block) {
          for (int64_t tap = 0; tap < taps; ++tap) {
            std::memcpy(target + block * block_words + (tap * words + word) * 8, &split[tap].of_row[block * 8], 64);
          }
        }
      }
    }
  });
  return out;
}

namespace {

Tensor binary_repack(const Tensor& qweight, int64_t in_features, int64_t taps, int64_t groups) {
  const char* op = "binary_repack";
  check_repack_by_tap(op, qweight, 1, in_features, taps, groups);
  return binary_words(qweight, in_features, taps, groups);
}

}  // namespace
}  // namespace blaq

STABLE_TORCH_LIBRARY_IMPL(blaq, CPU, m) { m.impl("binary_repack", TORCH_BOX(&blaq::binary_repack)); }
