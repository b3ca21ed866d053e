// torch.ops.blaq.repack without torch, for packed_int8.cpp.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/float_types.h"

#define BLAQ_KERNEL_FILE "cpu/repack_kernel.h"
#include "cpu/foreach_isa.h"

namespace blaq {

void repack(int bits, const uint8_t* planes, int64_t n, int64_t bytes, uint8_t* out) {
  const auto run = bits == 1   ? BLAQ_VARIANT(repack_groups<1>)
                   : bits == 2 ? BLAQ_VARIANT(repack_groups<2>)
                   : bits == 3 ? BLAQ_VARIANT(repack_groups<3>)
                               : BLAQ_VARIANT(repack_groups<4>);
  run(planes, n, bytes, 0, (n + 15) / 16, out);
}

}  // namespace blaq
