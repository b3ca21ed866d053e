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

// A launch's shape and attributes as the runtime takes them.
struct Config {
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {};

  Config(const void* kernel, const Grid& grid, Stream stream, bool overlaps) {
    if (grid.shared > 48 << 10) {  // more than every architecture grants unasked
      check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(grid.shared)));
    }
    config.gridDim = grid.blocks;
    config.blockDim = grid.threads;
    config.dynamicSmemBytes = grid.shared;
    config.stream = stream;
    config.attrs = attributes;
    if (overlaps) {
      attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (grid.cluster > 1) {
      attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
      attributes[config.numAttrs++].val.clusterDim = {grid.cluster, 1, 1};
    }
  }
};

template <typename... Parameters>
void start(void (*kernel)(Parameters...), const Grid& grid, Stream stream, bool overlaps,
           Parameters... arguments) {
  const Config made(reinterpret_cast<const void*>(kernel), grid, stream, overlaps);
  check_cuda(cudaLaunchKernelEx(&made.config, kernel, arguments...));
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

// How many clusters of `kernel` the device runs at once.
template <typename... Parameters>
unsigned clusters_at_once(void (*kernel)(Parameters...), const Grid& grid) {
  const auto* function = reinterpret_cast<const void*>(kernel);
  const detail::Config made(function, grid, nullptr, false);
  int clusters = 0;
  check_cuda(cudaOccupancyMaxActiveClusters(&clusters, function, &made.config));
  return static_cast<unsigned>(clusters);
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
