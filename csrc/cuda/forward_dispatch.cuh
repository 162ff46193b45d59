#pragma once

#include "cluster_dispatch.cuh"
#include "cluster_forward.cuh"
#include "forward.cuh"

namespace fastac::cuda {

template <class T>
struct ForwardDispatch {
  template <class Use>
  static void with(const Tile& tile, Use use) {
    if constexpr (sizeof(T) == 2)
      with_tile<kForwardHalf>(tile, use);
    else
      with_tile<kForwardFull>(tile, use);
  }
  template <class Tile>
  using Blocks = ForwardBlocks<T, Tile::kPositions, Tile::kUnits>;

  static size_t shared_bytes(Tile tile, bool resident, int64_t features, int64_t positions) {
    size_t bytes = 0;
    with(tile, [&](auto compiled) {
      bytes = Blocks<decltype(compiled)>::shared_bytes(resident, features, positions);
    });
    return bytes;
  }
  static void blocks(const ForwardPlan& plan, const ForwardArguments& a, Stream stream) {
    if (plan.kernel == Kernel::kCluster) {
      if constexpr (kHalf<T>) ClusterDispatch<T, ForwardCluster>::run(plan, a, stream);
      return;
    }
    with(plan.tile, [&](auto compiled) {
      launch<Blocks<decltype(compiled)>>(plan.grid, 1, size_t(plan.shared), a, stream);
    });
  }
  static void combine(const ForwardArguments& a, Stream stream) {
    using Combine = ForwardCombine<T>;
    launch<Combine>(a.in.batch * a.in.units, 1, Combine::shared_bytes(), a, stream);
  }
  static const ForwardKernels& kernels() {
    using First = ForwardBlocks<T, 32, 16>;
    constexpr auto capability = compiled_for<ForwardCombine<T>>;
    if constexpr (kHalf<T>) {
      using Cluster = ClusterDispatch<T, ForwardCluster>;
      static constexpr ForwardKernels table{
          First::kStages, Cluster::kStages, shared_bytes, Cluster::shared_bytes, capability, blocks, combine};
      return table;
    } else {
      static constexpr ForwardKernels table{First::kStages, 0,      shared_bytes, nullptr,
                                            capability,     blocks, combine};
      return table;
    }
  }
};

}  // namespace fastac::cuda
