// packed_linear's kernels for fp16: files of their own, since they take most of the compiler's
// time.
#include "packed_linear_kernel.h"

namespace blaq {

template void packed_linear<Fp16>(PackedLinear, int, bool, int, Stream);

}  // namespace blaq
