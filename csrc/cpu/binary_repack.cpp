// torch.ops.blaq.binary_repack: a 1-bit weight in the order that its kernels read; see BinaryMatrix.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "binary_checks.h"
#include "cpu/tap_splitter.h"

namespace blaq {
namespace {

// Words of 64 of the k bits of 8 rows; bits past the last are 0.
void copy_words(const uint8_t* const (&row)[8], int64_t k, uint64_t* to) {
  for (int64_t at = 0; at < k / 64; ++at) {
    for (int i = 0; i < 8; ++i) std::memcpy(to++, row[i] + at * 8, 8);
  }
  if (k % 64 == 0) return;
  for (int i = 0; i < 8; ++i) {
    uint64_t last = 0;
    std::memcpy(&last, row[i] + k / 64 * 8, (k % 64 + 7) / 8);
    *to++ = last & ((uint64_t{1} << (k % 64)) - 1);
  }
}

}  // namespace

Tensor binary_words(const Tensor& qweight, int64_t in_features, int64_t taps, int64_t groups) {
  BinaryMatrix weight{nullptr, groups, qweight.size(1) / groups, taps, in_features / taps};
  const int64_t words = weight.tap_words(), row_bytes = qweight.size(2), k = weight.k();
  Tensor out = torch::stable::new_empty(qweight, {groups, weight.blocks(), taps, words, 8},
                                        ScalarType::Long);
  if (out.numel() == 0) return out;
  const uint8_t* from = qweight.const_data_ptr<uint8_t>();
  uint64_t* to = reinterpret_cast<uint64_t*>(out.mutable_data_ptr<int64_t>());
  const int64_t grain = 1 + (1 << 12) / (k + 1);
  if (taps == 1) {
    torch::stable::parallel_for(0, groups * weight.blocks(), grain, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block % weight.blocks() * 8, group = block / weight.blocks();
        const uint8_t* row[8];
        for (int64_t i = 0; i < 8; ++i) {
          row[i] = from + (group * weight.n + std::min(first + i, weight.n - 1)) * row_bytes;
        }
        copy_words(row, k, to + block * words * 8);
      }
    });
    return out;
  }
  const int64_t pairs = (weight.blocks() + 1) / 2;
  torch::stable::parallel_for(0, groups * pairs, grain, [&](int64_t begin, int64_t end) {
    TapSplitter splitter(taps, k);
    std::vector<TapWords> split(taps);
    for (int64_t pair = begin; pair < end; ++pair) {
      const int64_t first = pair % pairs * 2, some = std::min<int64_t>(2, weight.blocks() - first);
      const int64_t row = pair / pairs * weight.n + first * 8, block = pair / pairs * weight.blocks() + first;
      for (int64_t word = 0; word < words; ++word) {
        splitter.split(from + row * row_bytes, weight.n - first * 8, word, split.data());
        for (int64_t i = 0; i < some; ++i) {
          uint64_t* target = to + ((block + i) * taps * words + word) * 8;
          for (int64_t tap = 0; tap < taps; ++tap, target += words * 8) {
            const auto& [low, high] = split[tap].half;
            for (int lane = 0; lane < 8; ++lane) target[lane] = low[i * 8 + lane] | uint64_t{high[i * 8 + lane]} << 32;
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
