#include "cpu/binary_matmul.h"

#include <algorithm>
#include <cstring>

#define BLAQ_KERNEL_FILE "cpu/binary_matmul_kernel.h"
#include "cpu/foreach_isa.h"

namespace blaq {

void count_differences(const BinaryMatrix& weight, int64_t group, int64_t block, int64_t outputs,
                       int64_t word, int64_t words, const uint64_t* rows, int64_t stride, int count,
                       int32_t* counts) {
  const int64_t block_words = weight.row_words() * 8;
  const uint64_t* from =
      weight.words + (group * weight.blocks() + block) * block_words + word * 8;
  auto* run = &base::count_differences;
#if defined(__x86_64__)
  // Processors have AVX-512 without vpopcntq: AVX2 serves those.
  static const bool popcount = __builtin_cpu_supports("avx512vpopcntdq");
  if (capability() != Capability::base) run = &avx2::count_differences;
  if (capability() == Capability::avx512 && popcount) run = &avx512::count_differences;
#endif
  run(from, block_words, (outputs + 7) / 8, rows + word, stride, count, words, counts, kBinaryWidth);
}

}  // namespace blaq
