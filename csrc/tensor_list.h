// A list of tensors as the dispatcher hands it over, with the facts that kernels need and no more: a
// torch::stable::Tensor costs two allocations, and a step of a large model passes thousands.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <string>
#include <vector>

#include "checks.h"

namespace blaq {

struct ListedTensor {
  AtenTensorHandle handle;
  void* data;
  int64_t numel, dim;
  const int64_t* sizes;
  ScalarType dtype;

  bool same_shape(const ListedTensor& other) const {
    return dim == other.dim && std::equal(sizes, sizes + dim, other.sizes);
  }
  std::vector<int64_t> shape() const { return {sizes, sizes + dim}; }
  bool is_contiguous() const {
    bool result;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_is_contiguous(handle, &result));
    return result;
  }
  std::vector<int64_t> strides() const {
    int64_t* strides;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &strides));
    return {strides, strides + dim};
  }
};

// Owns the list and its tensors.
class TensorList {
 public:
  TensorList(const char* name, StableIValue value) : name_(name) {
    const auto list = torch::stable::detail::to<StableListHandle>(value);
    size_t size = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_list_size(list, &size));
    tensors_.reserve(size);
    int32_t known_dtype = -1;  // converting one takes a dozen calls, and a list has one
    ScalarType dtype{};
    for (size_t i = 0; i < size; ++i) {
      StableIValue element;
      STABLE_TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, i, &element));
      ListedTensor x = facts(torch::stable::detail::to<AtenTensorHandle>(element));
      int32_t raw;
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.handle, &raw));
      if (raw != known_dtype) {
        dtype = torch::stable::detail::to<ScalarType>(torch::stable::detail::from(raw));
        known_dtype = raw;
      }
      x.dtype = dtype;
      tensors_.push_back(x);
    }
    STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_list(list));
  }
  ~TensorList() { clear(); }
  TensorList(const TensorList&) = delete;
  TensorList& operator=(const TensorList&) = delete;

  void clear() {
    for (const ListedTensor& x : tensors_) aoti_torch_delete_tensor_object(x.handle);
    tensors_.clear();
  }

  const char* name() const { return name_; }
  std::string name(size_t i) const { return std::string(name_) + "[" + std::to_string(i) + "]"; }
  size_t size() const { return tensors_.size(); }
  const ListedTensor& operator[](size_t i) const { return tensors_[i]; }

 private:
  static ListedTensor facts(AtenTensorHandle handle) {
    ListedTensor x{};
    x.handle = handle;
    int64_t* sizes;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handle, &x.data));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &x.dim));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &sizes));
    x.sizes = sizes;
    x.numel = 1;
    for (int64_t i = 0; i < x.dim; ++i) x.numel *= sizes[i];
    return x;
  }

  const char* name_;
  std::vector<ListedTensor> tensors_;
};

}  // namespace blaq
