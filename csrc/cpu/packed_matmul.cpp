#include "cpu/packed_matmul.h"

#include <algorithm>
#include <cstring>

#define BLAQ_KERNEL_FILE "cpu/packed_matmul_kernel.h"
#include "cpu/foreach_isa.h"

namespace blaq {
namespace {

// Building a row's tables costs as much as this many outputs look up.
constexpr int64_t kTableOutputs = 48;

}  // namespace

void multiply_rows(const PackedMatrix& weight, const float* rows, int count, int64_t begin,
                   int64_t end, float* out, int64_t out_stride) {
  thread_local Workspace space;
  const bool whole_words = weight.group_size <= 0 || weight.group_size % 32 == 0;
  const bool tables = weight.bits <= 2 && whole_words && weight.n >= kTableOutputs * weight.bits;
  const auto run = !tables            ? BLAQ_VARIANT(multiply<false, 4>)
                   : weight.bits == 1 ? BLAQ_VARIANT(multiply<true, 1>)
                                      : BLAQ_VARIANT(multiply<true, 2>);
  run(weight, rows, padded(weight.k), count, begin, end, out, out_stride, space);
}

}  // namespace blaq
