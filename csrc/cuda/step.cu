// torch.ops.blaq_cuda.step_call: a call of the training kernels, whose fields blaq_kernels/cuda/call.py
// fills in; `like` is a tensor on their device.
#include "op.h"
#include "step_entry.h"

namespace blaq {
namespace {

void step_call(const Tensor& like, std::vector<int64_t> integers, std::vector<double> numbers) {
  const OnDevice device(like);
  STD_TORCH_CHECK(integers.size() == CallInteger::count &&
                      numbers.size() == CallNumber::count + integers[CallInteger::levels],
                  "blaq_cuda.step_call: called with other fields");
  run_call(integers.data(), numbers.data(), device.stream());
}

}  // namespace
}  // namespace blaq

STABLE_TORCH_LIBRARY_IMPL(blaq_cuda, CUDA, m) { m.impl("step_call", TORCH_BOX(&blaq::step_call)); }
