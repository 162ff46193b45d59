// Launches a kernel: a struct with Arguments, kThreads, kBlocksPerSm and a static run(const Arguments&).
#pragma once

#include "ptx.cuh"

#include <cstddef>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <string_view>

#ifndef FASTAC_EMULATED
#include <cuda_runtime.h>

#include <atomic>
#endif

namespace fastac::cuda {

// The name of a kernel with its template arguments, for messages.
template <class Kernel>
std::string_view kernel_name() {
  const std::string_view signature = __PRETTY_FUNCTION__;
  const std::string_view before = "Kernel = ";
  const size_t begin = signature.find(before) + before.size();
  return signature.substr(begin, signature.find_first_of(";]", begin) - begin);
}

#ifdef FASTAC_EMULATED

using Stream = void*;

// The emulation has every instruction.
template <class Kernel>
int compiled_for() {
  return std::numeric_limits<int>::max();
}

// Runs the grid in the emulation before it returns.
template <class Kernel>
void launch(int64_t grid, int cluster, size_t shared_bytes, const typename Kernel::Arguments& arguments,
            Stream) {
  static_assert(Kernel::kBlocksPerSm >= 1, "part of a kernel");
  emulation::run({std::string(kernel_name<Kernel>()), grid, cluster, Kernel::kThreads, shared_bytes,
                  [](const void* a) { Kernel::run(*static_cast<const typename Kernel::Arguments*>(a)); },
                  &arguments});
}

#else

using Stream = cudaStream_t;

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kBlocksPerSm)
    entry(const __grid_constant__ typename Kernel::Arguments arguments) {
  Kernel::run(arguments);
}

inline void check(cudaError_t status, std::string_view kernel) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // so that the next call does not report it again
  throw std::runtime_error(std::string("fastac: ") + cudaGetErrorString(status) + " in " +
                           std::string(kernel));
}

// Capability that the kernel is compiled for in the form that the current device runs, which is less than the
// device's where that runs the PTX of an older one. Throws if there is no such form.
template <class Kernel>
int compiled_for() {
  constexpr int kDevices = 64;  // devices above are asked every time
  static std::atomic<int> known[kDevices];
  int device = 0;
  check(cudaGetDevice(&device), kernel_name<Kernel>());
  const int found = device < kDevices ? known[device].load(std::memory_order_relaxed) : 0;
  if (found != 0) return found;
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(&entry<Kernel>)),
        kernel_name<Kernel>());
  if (device < kDevices) known[device].store(attributes.ptxVersion, std::memory_order_relaxed);
  return attributes.ptxVersion;
}

// Lets the kernel use all the shared memory the device has; 48 KB is what it may use otherwise.
template <class Kernel>
void allow_shared_memory() {
  constexpr int kDevices = 64;  // devices above are asked every time
  static std::atomic<bool> allowed[kDevices];
  int device = 0;
  check(cudaGetDevice(&device), kernel_name<Kernel>());
  if (device < kDevices && allowed[device].load(std::memory_order_acquire)) return;
  int bytes = 0;
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        kernel_name<Kernel>());
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(&entry<Kernel>),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
        kernel_name<Kernel>());
  if (device < kDevices) allowed[device].store(true, std::memory_order_release);
}

// Launches on the current device: grid blocks, of which each `cluster` in a row are a cluster. A grid of 0
// launches nothing. Returns before the kernel has run.
template <class Kernel>
void launch(int64_t grid, int cluster, size_t shared_bytes, const typename Kernel::Arguments& arguments,
            Stream stream) {
  if (grid == 0) return;
  if (grid < 0 || grid > 0x7fffffff) {
    throw std::runtime_error("fastac: a grid of " + std::to_string(grid) +
                             " blocks, of at most 2^31 - 1, in " + std::string(kernel_name<Kernel>()));
  }
  if (shared_bytes > 48 * 1024) allow_shared_memory<Kernel>();
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
  attribute.val.clusterDim.y = 1;
  attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid), 1, 1);
  config.blockDim = dim3(Kernel::kThreads, 1, 1);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  void* parameters[] = {const_cast<typename Kernel::Arguments*>(&arguments)};
  check(cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(&entry<Kernel>), parameters),
        kernel_name<Kernel>());
}

#endif  // FASTAC_EMULATED

}  // namespace fastac::cuda
