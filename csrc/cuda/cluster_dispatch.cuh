// From a plan to a cluster kernel: what the dispatch of both directions shares.
#pragma once

#include "cluster.cuh"
#include "dispatch.cuh"

#include <algorithm>

namespace fastac::cuda {

static_assert(kClusterLongest == kClusterPositions, "the planner and the kernels must agree");

#ifdef FASTAC_EMULATED

template <class Kernel>
int64_t resident_clusters(int, size_t) {
  return emulated_clusters;
}

#else

// Clusters of a kernel that the current device has room for at a time.
template <class Kernel>
int64_t resident_clusters(int cluster, size_t shared_bytes) {
  constexpr int kDevices = 64;  // devices above are asked every time
  // Of the last size asked for on a device: its bytes above, the clusters below.
  static std::atomic<uint64_t> known[kDevices];
  int device = 0;
  check(cudaGetDevice(&device), kernel_name<Kernel>());
  const uint64_t found = device < kDevices ? known[device].load(std::memory_order_relaxed) : 0;
  if (found != 0 && found >> 32 == shared_bytes) return int64_t(found & 0xffffffff);

  if (shared_bytes > 48 * 1024) allow_shared_memory<Kernel>();
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(cluster), 1, 1);
  config.blockDim = dim3(Kernel::kThreads, 1, 1);
  config.dynamicSmemBytes = shared_bytes;
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters = 0;
  check(cudaOccupancyMaxActiveClusters(&clusters, reinterpret_cast<const void*>(&entry<Kernel>), &config),
        kernel_name<Kernel>());
  clusters = std::max(clusters, 1);  // the launch says what is wrong
  if (device < kDevices)
    known[device].store(uint64_t(shared_bytes) << 32 | uint64_t(clusters), std::memory_order_relaxed);
  return clusters;
}

#endif  // FASTAC_EMULATED

// The kernels KERNEL<T, blocks of a cluster, units>.
template <class T, template <class, int, int> class KERNEL>
struct ClusterDispatch {
  using Arguments = typename KERNEL<T, 8, 64>::Arguments;
  static constexpr int kStages = KERNEL<T, 8, 64>::kStages;

  // Calls use(a kernel) for the one of this shape.
  template <class Use, size_t... I>
  static void with(const ClusterShape& shape, Use use, std::index_sequence<I...>) {
    const auto is = [&](const ClusterShape& candidate, auto kernel) {
      if (candidate.blocks != shape.blocks || candidate.units != shape.units) return false;
      use(kernel);
      return true;
    };
    if (!(is(kClusterShapes[I], Named<KERNEL<T, kClusterShapes[I].blocks, kClusterShapes[I].units>>()) ||
          ...))
      throw std::logic_error("fastac: this cluster is not compiled");
  }
  template <class Use>
  static void with(const ClusterShape& shape, Use use) {
    with(shape, use, std::make_index_sequence<std::extent_v<decltype(kClusterShapes)>>());
  }
  template <class Kernel>
  struct Named {
    using Type = Kernel;
  };

  static size_t shared_bytes(ClusterShape shape, int64_t features) {
    if (!cluster_holds(features, shape.blocks)) return size_t(1) << 62;  // fits nowhere
    size_t bytes = 0;
    with(shape, [&](auto kernel) { bytes = decltype(kernel)::Type::shared_bytes(features); });
    return bytes;
  }
  // Launches as many clusters as there is room for, each of which takes one set after the other.
  template <class Plan>
  static void run(const Plan& plan, const Arguments& a, Stream stream) {
    with({plan.cluster, plan.tile.block_n}, [&](auto kernel) {
      using Kernel = typename decltype(kernel)::Type;
      if (!Kernel::fits(a))
        throw std::logic_error("fastac: the call does not fit the kernel that was planned");
      const size_t bytes = size_t(plan.shared);
      const int64_t clusters = std::min(a.in.batch, resident_clusters<Kernel>(plan.cluster, bytes));
      launch<Kernel>(clusters * plan.cluster, plan.cluster, bytes, a, stream);
    });
  }
};

}  // namespace fastac::cuda
