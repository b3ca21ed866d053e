#include "cpu/packed_int8.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "cpu/capability.h"
#include "cpu/level_table.h"
#include "cpu/packed_int8_block.h"

namespace blaq {
namespace {

struct Int8Workspace {
  Buffer prepared, totals;
};

}  // namespace
}  // namespace blaq

#define BLAQ_KERNEL_FILE "cpu/packed_int8_body.h"
#include "cpu/foreach_isa.h"

namespace blaq {

bool has_vnni() {
#if defined(__x86_64__)
  static const bool here = __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
  return here && capability() == Capability::avx512;
#else
  return false;
#endif
}

const Int8Kernels* int8_kernels() {
#if defined(__x86_64__)
  if (capability() == Capability::base) return nullptr;
  return has_vnni() ? &avx512::kInt8 : &avx2::kInt8;
#elif defined(__aarch64__)
  return &base::kInt8;
#else
  return nullptr;
#endif
}

bool has_int8(const PackedMatrix& weight, Accuracy accuracy) {
  if (accuracy == Accuracy::exact || weight.round_weight != Rounding::none || !int8_kernels()) return false;
  // A code that no level has is NaN, and a 16-bit level may be Inf, which integers do not know.
  const bool whole_book = std::all_of(weight.levels, weight.levels + (1 << weight.bits),
                                      [](float level) { return std::isfinite(level); });
  const bool whole_words = weight.group_size <= 0 || weight.group_size % 32 == 0;
  return whole_words && whole_book &&
         (weight.bits <= 2 || accuracy == Accuracy::fast || level_factor(weight.levels, weight.bits) != 0);
}

void multiply_int8(const PackedMatrix& weight, const uint8_t* repacked, Accuracy accuracy,
                   const Product& product) {
  const auto multiply = int8_kernels()->multiply;
  if (multiply(weight, repacked, accuracy, product)) return;
  Product one = product;
  one.count = 1;
  for (int r = 0; r < product.count; ++r) {
    if (!multiply(weight, repacked, accuracy, one)) {
      if (weight.wants_planes) {
        *weight.wants_planes = true;
      } else {
        multiply_rows(weight, one);
      }
    }
    one.rows += product.row_stride, one.out += product.out_stride;
  }
}

}  // namespace blaq
