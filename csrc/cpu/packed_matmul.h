// Rows of floats times a packed weight: what packed_linear and packed_conv2d share.
//
// A group of kLanes outputs is a register. Its bits are read straight from the planes and
// transposed, so that a lane has 32 inputs of one output. Two ways on from there:
// - tables (1 and 2 bits): a digit of 4 bits covers 4 or 2 inputs; all 16 sums that they can make
//   stand in a table, built once for a row of inputs and looked up by every output;
// - levels (3 and 4 bits, few outputs, groups that are no multiple of 32): a digit is a code, which
//   is looked up in the codebook and multiplied.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "cpu/float_types.h"

namespace blaq {

// Memory that one thread keeps from call to call, for a matrix of any size is multiplied in pieces.
class Buffer {
 public:
  float* take(int64_t count) {
    if (count > size_) {
      data_.reset(static_cast<float*>(::operator new(count * sizeof(float), kAlign)));
      size_ = count;
    }
    return data_.get();
  }

 private:
  static constexpr std::align_val_t kAlign{64};
  struct Free {
    void operator()(float* p) const { ::operator delete(p, kAlign); }
  };
  std::unique_ptr<float, Free> data_;
  int64_t size_ = 0;
};

// A weight is what training had: level × scale rounded to the input's dtype.
enum class Rounding { none, bf16, half };

inline float rounded(float x, Rounding to) {
  if (to == Rounding::bf16) return static_cast<float>(static_cast<BFloat16>(x));
  return to == Rounding::half ? static_cast<float>(static_cast<Half>(x)) : x;
}

struct PackedMatrix {
  const uint8_t* qweight;  // [bits, n, ceil(k / 8)]
  int bits;
  int64_t n, k;
  int64_t sharing;     // outputs that one row of inputs is for: n, or a convolution's n / groups
  float levels[16];    // signed level of each code
  const float* scale;  // [1], [n, 1] or [n, ceil(k / group_size)]
  int64_t group_size;
  // Powers of two times the rounded scale are the rounded weights; others are rounded one by one.
  Rounding round_scale = Rounding::none, round_weight = Rounding::none;
  const float* bias = nullptr;  // [n]
  // Where qweight has no planes, for a repacked weight stands for them: set once they are wanted after all.
  std::atomic<bool>* wants_planes = nullptr;
};

PackedMatrix packed_matrix(const torch::stable::Tensor& qweight, const torch::stable::Tensor& scale,
                           const std::vector<double>& levels, int64_t group_size,
                           int64_t in_features, torch::headeronly::ScalarType dtype,
                           int64_t groups = 1);

constexpr int kRows = 32;  // rows of inputs that are multiplied at a time

// Length of a row of inputs, zeros up to a whole number of words included.
inline int64_t padded(int64_t k) { return (k + 31) / 32 * 32; }

// out[r][j] = Σ_k rows[r][k] · weight[begin + j][k] + bias[begin + j]. A result depends on its row
// and its output alone, not on which others are computed with it.
struct Product {
  const float* rows;
  int64_t row_stride;  // padded(k): the rows are
  int count;           // of rows, at most kRows
  int64_t begin, end;  // outputs
  float* out;
  int64_t out_stride;
};

void multiply_rows(const PackedMatrix& weight, const Product& product);

// Shares m rows and n outputs among threads: body(first_row, last_row, begin, end).
template <typename Body>
void share_matrix(int64_t m, int64_t n, int64_t k, const Body& body) {
  constexpr int64_t kOutputs = 64, kFewRows = 8;
  constexpr int64_t kProducts = 1 << 18;  // that a thread is worth waking for
  const int64_t threads = torch::stable::get_num_threads();
  const auto grain = [&](int64_t products) {
    return std::max<int64_t>(1, kProducts / (products + 1));
  };
  if (n >= 4 * kOutputs * threads || m <= kFewRows * threads) {  // the weight is read once
    torch::stable::parallel_for(
        0, (n + kOutputs - 1) / kOutputs, grain(m * k * kOutputs),
        [&](int64_t a, int64_t b) { body(0, m, a * kOutputs, std::min(n, b * kOutputs)); });
  } else {
    torch::stable::parallel_for(
        0, (m + kFewRows - 1) / kFewRows, grain(kFewRows * k * n),
        [&](int64_t a, int64_t b) { body(a * kFewRows, std::min(m, b * kFewRows), 0, n); });
  }
}

}  // namespace blaq
