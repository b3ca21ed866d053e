// What every op on CUDA tensors begins with: its device made current, and its stream.
//
// The ops here are torch.ops.blaq_cuda, with the schemas of torch.ops.blaq; blaq_kernels/cuda calls
// them with arguments that have passed the rules of blaq_kernels, and for what they cover only.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "launch.h"

namespace blaq {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Makes a tensor's device current for as long as it lives.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor)
      : index_(tensor.get_device_index()), guard_(index_) {}

  Stream stream() const {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return static_cast<Stream>(stream);
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};

inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }

}  // namespace blaq
