// Argument rules that the ops on packed weights share, beside the general ones of checks.h.
#pragma once

#include <bit>

#include "checks.h"

namespace blaq {

// A weight without planes, [bits, N, 0], which a repacked one stands for.
inline bool has_planes(const Tensor& qweight, int64_t in_features) { return qweight.size(2) > 0 || in_features == 0; }

// Width of a code for this many magnitudes: one sign bit and an index.
inline int bits_of(size_t levels) { return 1 + static_cast<int>(std::bit_width(levels - 1)); }

inline void check_qweight(const char* op, const Tensor& qweight, const Tensor& scale,
                          const std::vector<double>& levels, int64_t group_size,
                          int64_t in_features, std::initializer_list<ScalarType> scale_dtypes,
                          bool may_lack_planes = false) {
  check_levels(op, levels);
  check_group_size(op, group_size);
  check_dtype(op, "qweight", qweight, {ScalarType::Byte});
  BLAQ_REQUIRE(qweight.dim() == 3, op, "qweight", "have 3 dimensions [bits, N, ceil(K/8)]",
               list_text(qweight.sizes()));
  check_contiguous(op, "qweight", qweight);
  const int64_t bits = bits_of(levels.size());
  BLAQ_REQUIRE(qweight.size(0) == bits, op, "qweight",
               "have " + text(bits) + " planes for " + text(levels.size()) + " levels",
               qweight.size(0));
  BLAQ_REQUIRE(in_features >= 0, op, "in_features", "be at least 0", in_features);
  const int64_t bytes = in_features / 8 + (in_features % 8 != 0);
  BLAQ_REQUIRE(qweight.size(2) == bytes || (may_lack_planes && qweight.size(2) == 0), op, "qweight",
               "have " + text(bytes) + " bytes a row for K = " + text(in_features),
               qweight.size(2));
  check_scale(op, "scale", scale, {qweight.size(1), in_features}, group_size, scale_dtypes);
}

// After check_qweight: `input` and `bias` beside a packed weight.
inline void check_packed_input(const char* op, const Tensor& input, const Tensor& qweight,
                               const std::optional<Tensor>& bias) {
  BLAQ_REQUIRE(input.is_cpu(), op, "input", "be on qweight's device cpu", "another device");
  BLAQ_REQUIRE(qweight.is_cpu(), op, "qweight", "be on device cpu", "another device");
  if (!bias) return;
  check_dtype(op, "bias", *bias, {input.scalar_type()});
  const int64_t n = qweight.size(1);
  BLAQ_REQUIRE(has_shape(*bias, {n}), op, "bias", "have shape [" + text(n) + "]",
               list_text(bias->sizes()));
  BLAQ_REQUIRE(bias->is_cpu(), op, "bias", "be on qweight's device cpu", "another device");
  check_contiguous(op, "bias", *bias);
}

// Arguments of the ops that bring a convolution's weight of at most `most_bits` into another order.
inline void check_repack_by_tap(const char* op, const Tensor& qweight, int64_t most_bits,
                                int64_t in_features, int64_t taps, int64_t groups) {
  check_dtype(op, "qweight", qweight, {ScalarType::Byte});
  check_contiguous(op, "qweight", qweight);
  BLAQ_REQUIRE(in_features >= 0, op, "in_features", "be at least 0", in_features);
  BLAQ_REQUIRE(taps >= 1 && in_features % taps == 0, op, "taps",
               "divide in_features = " + text(in_features), taps);
  const int64_t bytes = in_features / 8 + (in_features % 8 != 0);
  BLAQ_REQUIRE(qweight.dim() == 3 && qweight.size(0) >= 1 && qweight.size(0) <= most_bits &&
                   qweight.size(2) == bytes,
               op, "qweight",
               "have shape [" + std::string(most_bits == 1 ? "1" : "bits") + ", N, " + text(bytes) + "]",
               list_text(qweight.sizes()));
  BLAQ_REQUIRE(groups >= 1 && qweight.size(1) % groups == 0, op, "groups",
               "divide the rows of qweight = " + text(qweight.size(1)), groups);
}

}  // namespace blaq
