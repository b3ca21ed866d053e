// torch.ops.blaq.binary_repack: a 1-bit weight in the order that its kernels read; see BinaryMatrix.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "binary_checks.h"

namespace blaq {

Tensor binary_words(const Tensor& qweight, int64_t in_features, int64_t taps, int64_t groups) {
  BinaryMatrix weight{nullptr, groups, qweight.size(1) / groups, taps, in_features / taps};
  const int64_t words = weight.tap_words(), row_bytes = qweight.size(2), k = weight.k();
  Tensor out = torch::stable::new_empty(qweight, {groups, weight.blocks(), taps, words, 8},
                                        ScalarType::Long);
  if (out.numel() == 0) return out;
  const uint8_t* from = qweight.const_data_ptr<uint8_t>();
  uint64_t* to = reinterpret_cast<uint64_t*>(out.mutable_data_ptr<int64_t>());
  const int64_t source_words = (k + 63) / 64;
  torch::stable::parallel_for(
      0, groups * weight.blocks(), 1 + (1 << 12) / (k + 1), [&](int64_t begin, int64_t end) {
        using Block = uint64_t[8];  // that word of 8 outputs
        std::vector<uint64_t> source(source_words * 8);
        for (int64_t block = begin; block < end; ++block) {
          const int64_t group = block / weight.blocks(), first = block % weight.blocks() * 8;
          Block* rows = reinterpret_cast<Block*>(source.data());
          for (int i = 0; i < 8; ++i) {
            const int64_t n = std::min<int64_t>(first + i, weight.n - 1);
            const uint8_t* row = from + (group * weight.n + n) * row_bytes;
            for (int64_t w = 0; w < k / 64; ++w) std::memcpy(&rows[w][i], row + w * 8, 8);
            if (k % 64 != 0) {
              uint64_t last = 0;
              std::memcpy(&last, row + k / 64 * 8, row_bytes - k / 64 * 8);
              rows[k / 64][i] = last & ((uint64_t{1} << (k % 64)) - 1);
            }
          }
          Block* target = reinterpret_cast<Block*>(to + block * taps * words * 8);
          if (taps == 1) {
            std::memcpy(target, rows, source_words * sizeof(Block));
            continue;
          }
          std::fill_n(target[0], taps * words * 8, uint64_t{0});
          for (int64_t c = 0; c < weight.channels; ++c) {
            for (int64_t t = 0; t < taps; ++t) {
              const int64_t at = c * taps + t;
              const Block& bits = rows[at / 64];
              Block& word = target[t * words + c / 64];
              for (int i = 0; i < 8; ++i) word[i] |= (bits[i] >> (at % 64) & 1) << (c % 64);
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
