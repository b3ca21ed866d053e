// What binary_linear and binary_conv2d do around the counting of bits; see foreach_isa.h.
#include "cpu/lanes.h"

#include "cpu/convert_kernel.h"

#include "cpu/binary_bits_kernel.h"

#include "cpu/conv_tensors_kernel.h"

// out[r][j] = (inputs - 2 · counts[r][j] + correction[r][j]) · scales[j] + add[r][j]. The first factor is
// an integer, exact up to 2^24 inputs. A correction is for a row, null for none; `add` may be `out`.
template <typename S>
void scale_counts(const int32_t* counts, int64_t counts_stride, int rows, int64_t width, int32_t inputs,
                  const int32_t* const* correction, const S* scales, const S* add, int64_t add_stride,
                  S* out, int64_t out_stride) {
  for (int r = 0; r < rows; ++r) {
    const int32_t *differ = counts + r * counts_stride, *more = correction ? correction[r] : nullptr;
    const S* to_add = add + r * add_stride;
    S* to = out + r * out_stride;
    if (more) {
#pragma GCC ivdep
      for (int64_t j = 0; j < width; ++j) {
        to[j] = static_cast<S>(inputs - 2 * differ[j] + more[j]) * scales[j] + to_add[j];
      }
    } else {
#pragma GCC ivdep
      for (int64_t j = 0; j < width; ++j) {
        to[j] = static_cast<S>(inputs - 2 * differ[j]) * scales[j] + to_add[j];
      }
    }
  }
}
