// Argument rules that the ops with 1-bit inputs share, beside those on packed weights.
#pragma once

#include "cpu/binary_matmul.h"
#include "packed_checks.h"

namespace blaq {

// After the checks of qweight: the weight that kernels read, `repacked` or made now.
inline Tensor repacked_or_new(const char* op, const std::optional<Tensor>& repacked, const Tensor& qweight,
                              int64_t in_features, int64_t taps, int64_t groups) {
  if (!repacked) return binary_words(qweight, in_features, taps, groups);
  const BinaryMatrix weight{nullptr, groups, qweight.size(1) / groups, taps, in_features / taps};
  check_dtype(op, "repacked", *repacked, {ScalarType::Long});
  check_contiguous(op, "repacked", *repacked);
  const std::vector<int64_t> shape{groups, weight.blocks(), taps, weight.tap_words(), 8};
  const auto sizes = repacked->sizes();
  BLAQ_REQUIRE(std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end()), op, "repacked",
               "have shape " + list_text(shape), list_text(sizes));
  return *repacked;
}

}  // namespace blaq
