// Signs of inputs times signs of weights: what binary_linear and binary_conv2d share.
//
// A product of signs is a xor of bits, a sum of K products is K - 2 · (bits that differ). Sums are
// integers, so every variant, thread count and batch gives the same ones. The idea is XNOR-Net's
// (Rastegari et al., 2016).
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <type_traits>

#include "cpu/float_types.h"

namespace blaq {

// A weight in the order that kernels read: words[group][block][tap][word][8], a block being 8
// outputs of one group, whose n outputs are padded to whole blocks; `word` holds 64 input channels.
// A linear layer has one group and one tap.
struct BinaryMatrix {
  const uint64_t* words;
  int64_t groups, n, taps, channels;
  int64_t blocks() const { return (n + 7) / 8; }
  int64_t tap_words() const { return (channels + 63) / 64; }
  int64_t row_words() const { return taps * tap_words(); }
  int64_t k() const { return taps * channels; }
};

// The bits of qweight [1, groups · n, ceil(k / 8)] in that order; padding bits become 0.
torch::stable::Tensor binary_words(const torch::stable::Tensor& qweight, int64_t in_features,
                                   int64_t taps, int64_t groups);

constexpr int kBinaryRows = 32;      // of inputs that are multiplied at a time
constexpr int64_t kBinaryWidth = 64;  // outputs

// counts[r][j], kBinaryWidth apart: bits in which row r and output 8 · block + j differ, among
// `words` words from `word` on; outputs up to a whole number of blocks.
void count_differences(const BinaryMatrix& weight, int64_t group, int64_t block, int64_t outputs,
                       int64_t word, int64_t words, const uint64_t* rows, int64_t stride, int count,
                       int32_t* counts);

// Inputs of a dtype are added up in float, those of float64 in double.
template <typename T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Scale of output `row` for the group of inputs `part`, rounded as training rounded the weight.
template <typename T>
struct BinaryScale {
  const Sum<T>* data;
  int64_t parts, group_size;
  Sum<T> operator()(int64_t row, int64_t part) const {
    const Sum<T> scale = data[group_size == 0 ? 0 : row * parts + part];
    if constexpr (sizeof(T) == 2) return static_cast<float>(static_cast<T>(scale));
    return scale;
  }
};

}  // namespace blaq
