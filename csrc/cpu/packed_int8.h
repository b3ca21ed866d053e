// A packed weight times rows of floats in 8-bit arithmetic: AVX-512 with VBMI and VNNI, AVX2, NEON. Faster
// than packed_matmul.h and less exact; what it cannot do, that does.
//
// Both ways read the weight repacked: [n / 16][k / 32][words] registers, for 16 outputs and 32 inputs, whose lanes
// have 8 digits of 4 bits each, as packed_matmul.h makes them. Integers accumulate over a segment of inputs that
// share a unit, so a result depends on its row and its output alone.
// - tables (1 and 2 bits): all 16 sums that the inputs of a digit can make, as integers; a look-up for 64
//   bytes fetches from four tables at once. High accuracy has larger tables: packed_int16_kernel.h.
// - levels (3 and 4 bits): digits become levels, inputs integers, and they are multiplied.
#pragma once

#include <cstdint>
#include <string>

#include "cpu/packed_matmul.h"

namespace blaq {

// high: numbers of 16 bits, in tables of AVX2 and NEON as two digits of 8; relative error below 4e-4. fast: 8
// bits, below 1e-2.
enum class Accuracy { exact, high, fast };

// Registers for 16 outputs and 32 inputs.
inline int words_of(int bits) { return bits <= 2 ? bits : 4; }
inline int64_t repacked_bytes(int bits, int64_t n, int64_t k) {
  return (n + 15) / 16 * (padded(k) / 32) * words_of(bits) * 64;
}

Accuracy accuracy_of(const char* op, const std::string& name);
void check_repacked(const char* op, const torch::stable::Tensor& repacked,
                    const torch::stable::Tensor& qweight, int64_t in_features);

// Bit planes [bits, n, ceil(in_features / 8)] of a weight that repack or conv_repack made.
torch::stable::Tensor unrepack(const torch::stable::Tensor& repacked, int64_t bits, int64_t n, int64_t in_features);

// The kernels of a variant, which keep the rules of multiply_int8 but for rows that have no unit: there
// `multiply` is false, and what it wrote is nothing.
struct Int8Kernels {
  const char* name;
  bool (*multiply)(const PackedMatrix& weight, const uint8_t* repacked, Accuracy accuracy, const Product& product);
};

// Of the capability in use; null where it has none.
const Int8Kernels* int8_kernels();

// Whether that is AVX-512 with VBMI and VNNI.
bool has_vnni();

// Whether this processor and this weight have the way. High accuracy with 3 and 4 bits asks for levels that
// are multiples of one number (level_table.h).
bool has_int8(const PackedMatrix& weight, Accuracy accuracy);

// As multiply_rows, from a multiple of 16 outputs on. A row whose inputs are not finite, or too small for
// a unit, goes to multiply_rows: so NaN and Inf give what F.linear gives, in their rows alone. Without planes
// it is left as it is, and wants_planes says so.
void multiply_int8(const PackedMatrix& weight, const uint8_t* repacked, Accuracy accuracy,
                   const Product& product);

}  // namespace blaq
