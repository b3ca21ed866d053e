// The weight behind the bit planes, without the op's argument rules.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <vector>

namespace blaq {

torch::stable::Tensor unpack_weight(const torch::stable::Tensor& qweight,
                                    const torch::stable::Tensor& scale,
                                    const std::vector<double>& levels, int64_t group_size,
                                    int64_t in_features, torch::headeronly::ScalarType dtype);

}  // namespace blaq
