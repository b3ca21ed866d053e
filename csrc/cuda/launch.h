// Launches of kernels and their shared memory, for nvcc; emulate.h has the same for the host.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace blaq {

struct Grid {
  dim3 blocks, threads;
  size_t shared = 0;     // bytes of dynamic shared memory
  unsigned cluster = 1;  // blocks that run together, side by side in x; from sm_90 on
};

using Stream = cudaStream_t;

inline void check_cuda(cudaError_t status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // so that the next launch does not see it again
  throw std::runtime_error(std::string("blaq: CUDA says: ") + cudaGetErrorString(status));
}

namespace detail {

template <typename... Parameters>
void start(void (*kernel)(Parameters...), const Grid& grid, Stream stream, bool overlaps,
           Parameters... arguments) {
  if (grid.shared > 48 << 10) {  // more than every architecture grants unasked
    check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                    cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(grid.shared)));
  }
  cudaLaunchAttribute attributes[2] = {};
  unsigned count = 0;
  if (overlaps) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (grid.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {grid.cluster, 1, 1};
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid.blocks;
  config.blockDim = grid.threads;
  config.dynamicSmemBytes = grid.shared;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  check_cuda(cudaLaunchKernelEx(&config, kernel, arguments...));
}

}  // namespace detail

inline int device_attribute(cudaDeviceAttr which) {  // of the current device
  int device = 0, value = 0;
  check_cuda(cudaGetDevice(&device));
  check_cuda(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

// Starts `kernel` and checks that it started. std::runtime_error where it did not.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), const Grid& grid, Stream stream, Arguments... arguments) {
  detail::start<Parameters...>(kernel, grid, stream, false, static_cast<Parameters>(arguments)...);
}

// The same for a kernel that calls wait_for_dependencies: from sm_90 on it may begin before its
// predecessor in the stream has ended.
template <typename... Parameters, typename... Arguments>
void launch_after(void (*kernel)(Parameters...), const Grid& grid, Stream stream,
                  Arguments... arguments) {
  const bool overlaps = device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9;
  detail::start<Parameters...>(kernel, grid, stream, overlaps, static_cast<Parameters>(arguments)...);
}

template <typename T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char blaq_dynamic_shared[];
  return reinterpret_cast<T*>(blaq_dynamic_shared);
}

// One T of shared memory for each kernel that asks for it, without a value at first.
template <typename T>
__device__ __forceinline__ T& shared() {
  __shared__ __align__(16) unsigned char memory[sizeof(T)];
  return *reinterpret_cast<T*>(memory);
}

}  // namespace blaq
