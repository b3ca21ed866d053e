// torch.ops.blaq.repack: a packed weight in the order that packed_int8.cpp reads.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>

#include "cpu/packed_int8.h"
#include "packed_checks.h"

#define BLAQ_KERNEL_FILE "cpu/repack_kernel.h"
#include "cpu/foreach_isa.h"

namespace blaq {

Accuracy accuracy_of(const char* op, const std::string& name) {
  BLAQ_REQUIRE(name == "exact" || name == "high" || name == "fast", op, "accuracy",
               "be 'exact', 'high' or 'fast'", "'" + name + "'");
  return name == "exact" ? Accuracy::exact : name == "high" ? Accuracy::high : Accuracy::fast;
}

void check_repacked(const char* op, const Tensor& repacked, const Tensor& qweight, int64_t in_features) {
  check_dtype(op, "repacked", repacked, {ScalarType::Byte});
  check_contiguous(op, "repacked", repacked);
  const int64_t bytes =
      repacked_bytes(static_cast<int>(qweight.size(0)), qweight.size(1), in_features);
  BLAQ_REQUIRE(repacked.dim() == 1 && repacked.numel() == bytes, op, "repacked",
               "have shape [" + text(bytes) + "]", list_text(repacked.sizes()));
}

namespace {

Tensor repack_weight(const Tensor& qweight) {
  const char* op = "repack";
  check_dtype(op, "qweight", qweight, {ScalarType::Byte});
  check_contiguous(op, "qweight", qweight);
  BLAQ_REQUIRE(qweight.dim() == 3 && qweight.size(0) >= 1 && qweight.size(0) <= 4, op, "qweight",
               "have shape [bits, N, ceil(K / 8)], bits 1 to 4", list_text(qweight.sizes()));
  const int bits = static_cast<int>(qweight.size(0));
  const int64_t n = qweight.size(1), bytes = qweight.size(2);
  Tensor out = torch::stable::new_empty(qweight, {repacked_bytes(bits, n, bytes * 8)});
  if (out.numel() == 0) return out;
  const auto run = bits == 1   ? BLAQ_VARIANT(repack_groups<1>)
                   : bits == 2 ? BLAQ_VARIANT(repack_groups<2>)
                   : bits == 3 ? BLAQ_VARIANT(repack_groups<3>)
                               : BLAQ_VARIANT(repack_groups<4>);
  const uint8_t* planes = qweight.const_data_ptr<uint8_t>();
  uint8_t* to = out.mutable_data_ptr<uint8_t>();
  torch::stable::parallel_for(0, (n + 15) / 16, 4, [&](int64_t first, int64_t last) {
    run(planes, n, bytes, first, last, to);
  });
  return out;
}

}  // namespace
}  // namespace blaq

STABLE_TORCH_LIBRARY_IMPL(blaq, CPU, m) { m.impl("repack", TORCH_BOX(&blaq::repack_weight)); }
