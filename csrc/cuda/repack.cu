// torch.ops.blaq.repack on a CUDA device: bit planes into the order that packed_linear.cu reads.
#include "op.h"
#include "repack_kernel.h"

namespace blaq {
namespace {

Tensor repack_weight(const Tensor& qweight) {
  const OnDevice device(qweight);
  const int bits = static_cast<int>(qweight.size(0));
  const int64_t n = qweight.size(1), row_bytes = qweight.size(2);
  Tensor out = torch::stable::new_empty(qweight, {repacked_bytes(bits, n, 8 * row_bytes)});
  if (out.numel() == 0) return out;
  repack(qweight.const_data_ptr<uint8_t>(), bits, n, row_bytes,
         reinterpret_cast<uint32_t*>(out.mutable_data_ptr<uint8_t>()), device.stream());
  return out;
}

}  // namespace
}  // namespace blaq

STABLE_TORCH_LIBRARY_IMPL(blaq_cuda, CUDA, m) { m.impl("repack", TORCH_BOX(&blaq::repack_weight)); }
