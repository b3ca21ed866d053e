// The floating types of tensors, and one branch over them.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <type_traits>

namespace blaq {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;

// What torch's own `.to(dtype)` gives: 16-bit types are rounded from float, also for a double.
template <typename T, typename S>
inline T narrow(S x) {
  if constexpr (sizeof(T) == 2) return static_cast<T>(static_cast<float>(x));
  return static_cast<T>(x);
}

// Calls body.operator()<T>() with the C++ type of a floating dtype.
template <typename Body>
auto with_float_type(ScalarType dtype, const Body& body) {
  switch (dtype) {
    case ScalarType::BFloat16:
      return body.template operator()<BFloat16>();
    case ScalarType::Half:
      return body.template operator()<Half>();
    case ScalarType::Double:
      return body.template operator()<double>();
    default:
      return body.template operator()<float>();
  }
}

}  // namespace blaq
