// What convolutions share: the rules of their geometry, and the layout of an image.
#pragma once

#include <algorithm>

#include "checks.h"

namespace blaq {

using Extent = std::vector<int64_t>;  // height, width

// Whether memory runs batch, height, width, channels: torch's rule, which overlooks sizes of 1.
inline bool is_channels_last(const Tensor& x) {
  const auto sizes = x.sizes(), strides = x.strides();
  int64_t expected = 1;
  for (const int d : {1, 3, 2, 0}) {
    if (sizes[d] == 1) continue;
    if (strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return true;
}

inline void check_geometry(const char* op, const Tensor& input, const Extent& kernel_size,
                           const Extent& stride, const Extent& padding, const Extent& dilation,
                           int64_t groups) {
  BLAQ_REQUIRE(input.dim() == 4, op, "input", "have 4 dimensions [batch, channels, height, width]",
               list_text(input.sizes()));
  check_dtype(op, "input", input, kFloatDtypes);
  const auto check_pair = [op](const char* name, const Extent& pair, int64_t least) {
    BLAQ_REQUIRE(pair.size() == 2 && std::min(pair[0], pair[1]) >= least, op, name,
                 "be two integers of at least " + text(least), list_text(pair));
  };
  check_pair("kernel_size", kernel_size, 1);
  check_pair("stride", stride, 1);
  check_pair("padding", padding, 0);
  check_pair("dilation", dilation, 1);
  BLAQ_REQUIRE(groups >= 1, op, "groups", "be at least 1", groups);
  BLAQ_REQUIRE(input.size(1) >= 1, op, "input", "have at least 1 channel", input.size(1));
  BLAQ_REQUIRE(input.size(1) % groups == 0, op, "input",
               "have channels divisible by groups = " + text(groups), input.size(1));
}

// Height and width of the output; after check_geometry.
inline Extent check_output_size(const char* op, const Tensor& input, const Extent& kernel_size,
                                const Extent& stride, const Extent& padding, const Extent& dilation) {
  Extent size(2);
  for (int i = 0; i < 2; ++i) {
    const int64_t reach = input.size(2 + i) + 2 * padding[i] - dilation[i] * (kernel_size[i] - 1) - 1;
    size[i] = reach < 0 ? 0 : reach / stride[i] + 1;
  }
  BLAQ_REQUIRE(size[0] >= 1 && size[1] >= 1, op, "input", "be at least as large as the kernel",
               list_text(std::vector<int64_t>{input.size(2), input.size(3)}));
  return size;
}

}  // namespace blaq
