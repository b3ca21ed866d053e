// Argument rules of torch.ops.blaq for C++ kernels, in the words of those in blaq_kernels (rules.py):
// `blaq.<op>: <argument> must <rule>, got <value>`, a ValueError in Python. Text is made on failure only.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace blaq {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr std::initializer_list<ScalarType> kFloatDtypes = {ScalarType::Float, ScalarType::BFloat16,
                                                            ScalarType::Half, ScalarType::Double};

// Nothing but `condition` is evaluated unless it is false.
#define BLAQ_REQUIRE(condition, op, argument, rule, value)                         \
  do {                                                                             \
    if (__builtin_expect(!(condition), 0)) ::blaq::fail(op, argument, rule, value); \
  } while (0)

template <typename T>
std::string text(const T& value) {
  std::ostringstream out;
  out << value;
  return out.str();
}

template <typename Range>
std::string list_text(const Range& values) {
  std::ostringstream out;
  out << "[";
  const char* comma = "";
  for (const auto& value : values) {
    out << comma << value;
    comma = ", ";
  }
  out << "]";
  return out.str();
}

template <typename V>
[[noreturn, gnu::cold, gnu::noinline]] void fail(const char* op, const std::string& argument,
                                                 const std::string& rule, const V& value) {
  throw std::invalid_argument("blaq." + std::string(op) + ": " + argument + " must " + rule +
                              ", got " + text(value));
}

inline std::string dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    default: return torch::headeronly::toString(dtype);
  }
}

inline bool is_one_of(ScalarType dtype, std::initializer_list<ScalarType> allowed) {
  for (ScalarType one : allowed) {
    if (dtype == one) return true;
  }
  return false;
}

inline std::string dtype_names(std::initializer_list<ScalarType> allowed) {
  std::string names;
  for (ScalarType one : allowed) names += (names.empty() ? "" : " or ") + dtype_name(one);
  return names;
}

inline void check_dtype(const char* op, const std::string& name, const Tensor& x,
                        std::initializer_list<ScalarType> allowed) {
  const ScalarType dtype = x.scalar_type();
  BLAQ_REQUIRE(is_one_of(dtype, allowed), op, name, "be " + dtype_names(allowed), dtype_name(dtype));
}

inline void check_contiguous(const char* op, const std::string& name, const Tensor& x) {
  BLAQ_REQUIRE(x.is_contiguous(), op, name, "be contiguous", "strides " + list_text(x.strides()));
}

inline bool same_shape(const Tensor& x, const Tensor& y) {
  const auto a = x.sizes(), b = y.sizes();
  return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin());
}

inline bool has_shape(const Tensor& x, std::initializer_list<int64_t> shape) {
  const auto a = x.sizes();
  return a.size() == shape.size() && std::equal(a.begin(), a.end(), shape.begin());
}

// dtype, shape, device and layout of `x`, against `other`.
inline void check_like(const char* op, const std::string& name, const Tensor& x,
                       const char* other_name, const Tensor& other,
                       std::initializer_list<ScalarType> allowed) {
  check_dtype(op, name, x, allowed);
  BLAQ_REQUIRE(same_shape(x, other), op, name,
               std::string("have the shape of ") + other_name + " " + list_text(other.sizes()),
               list_text(x.sizes()));
  BLAQ_REQUIRE(x.is_cpu(), op, name, std::string("be on ") + other_name + "'s device cpu",
               "another device");
  check_contiguous(op, name, x);
}

inline void check_group_size(const char* op, int64_t group_size) {
  BLAQ_REQUIRE(group_size >= -1, op, "group_size", "be 0, -1 or positive", group_size);
}

// A weight counts as a matrix [N, K]: N = shape[0] and K the rest; a vector is one row.
struct MatrixShape {
  int64_t n, k;
};

inline MatrixShape matrix_shape(const Tensor& x) {
  const auto sizes = x.sizes();
  if (sizes.size() < 2) return {1, x.numel()};
  int64_t k = 1;
  for (size_t i = 1; i < sizes.size(); ++i) k *= sizes[i];
  return {sizes[0], k};
}

// How many scales a row of K inputs has: 1 for group_size -1 or 0, ceil(K / g) for groups.
inline int64_t groups_per_row(int64_t k, int64_t group_size) {
  return group_size > 0 ? (k + group_size - 1) / group_size : 1;
}

// `scale` of a weight [n, k]: [1], [n, 1] or [n, ceil(k / group_size)], contiguous, on the CPU.
inline void check_scale(const char* op, const std::string& name, const Tensor& scale, MatrixShape weight,
                        int64_t group_size, std::initializer_list<ScalarType> allowed) {
  check_dtype(op, name, scale, allowed);
  const int64_t groups = groups_per_row(weight.k, group_size);
  const bool ok = group_size == 0 ? has_shape(scale, {1}) : has_shape(scale, {weight.n, groups});
  BLAQ_REQUIRE(ok, op, name,
               "have shape " + (group_size == 0 ? std::string("[1]")
                                                : list_text(std::vector<int64_t>{weight.n, groups})),
               list_text(scale.sizes()));
  BLAQ_REQUIRE(scale.is_cpu(), op, name, "be on device cpu", "another device");
  check_contiguous(op, name, scale);
}

inline void check_levels(const char* op, const std::vector<double>& levels, size_t most = 8) {
  bool ok = !levels.empty() && levels.size() <= most && levels.back() == 1.0 && levels.front() >= 0.0;
  for (size_t i = 0; ok && i + 1 < levels.size(); ++i) ok = levels[i] < levels[i + 1];
  BLAQ_REQUIRE(ok, op, "levels",
               "have 1 to " + std::to_string(most) +
                   " ascending magnitudes in [0, 1], the largest 1.0",
               list_text(levels));
}

}  // namespace blaq
