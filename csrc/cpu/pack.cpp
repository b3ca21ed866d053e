// torch.ops.blaq.pack: codes to bit planes, near the speed of memory.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstring>

#include "packed_checks.h"

#define BLAQ_KERNEL_FILE "cpu/pack_kernel.h"
#include "cpu/foreach_isa.h"
#include "cpu/runs.h"

namespace blaq {
namespace {

constexpr int64_t kGrainBytes = 1 << 12;  // of one plane, a thread

Tensor pack(const Tensor& codes, int64_t bits) {
  const char* op = "pack";
  check_dtype(op, "codes", codes, {ScalarType::Byte});
  BLAQ_REQUIRE(codes.dim() >= 1, op, "codes", "have at least 1 dimension", codes.dim());
  check_contiguous(op, "codes", codes);
  BLAQ_REQUIRE(bits >= 1 && bits <= 4, op, "bits", "be 1, 2, 3 or 4", bits);
  const auto [n, k] = matrix_shape(codes);
  const int64_t row_bytes = k / 8 + (k % 8 != 0);
  Tensor qweight = torch::stable::new_empty(codes, {bits, n, row_bytes});
  const uint8_t* from = codes.const_data_ptr<uint8_t>();
  uint8_t* to = qweight.mutable_data_ptr<uint8_t>();
  std::atomic<uint8_t> seen{0};
  torch::stable::parallel_for(
      0, n * row_bytes, kGrainBytes, [&, k = k](int64_t begin, int64_t end) {
        uint8_t any = 0;
        for_each_run(begin, end, row_bytes, [&](int64_t row, int64_t first, int64_t last) {
          any |= BLAQ_VARIANT(pack_row)(from + row * k + first * 8,
                                        std::min(k, last * 8) - first * 8, static_cast<int>(bits),
                                        to + row * row_bytes + first, n * row_bytes);
        });
        seen |= any;
      });
  if (seen >> bits) {
    const int largest = *std::max_element(from, from + codes.numel());
    BLAQ_REQUIRE(false, op, "codes", "be below 2^bits = " + text(1 << bits), largest);
  }
  return qweight;
}

}  // namespace
}  // namespace blaq

STABLE_TORCH_LIBRARY_IMPL(blaq, CPU, m) { m.impl("pack", TORCH_BOX(&blaq::pack)); }
