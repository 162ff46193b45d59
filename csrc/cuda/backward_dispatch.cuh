#pragma once

#include "backward.cuh"
#include "cluster_backward.cuh"
#include "cluster_dispatch.cuh"

namespace fastac::cuda {

template <class T>
struct BackwardDispatch {
  template <class Use>
  static void with(const Tile& tile, Use use) {
    if constexpr (sizeof(T) == 2)
      with_tile<kBackwardHalf>(tile, use);
    else
      with_tile<kBackwardFull>(tile, use);
  }
  template <class Tile, Pass PASS>
  using Blocks = BackwardBlocks<T, Tile::kPositions, Tile::kUnits, PASS>;
  template <class Tile>
  static constexpr bool kHasGram = kHalf<T> && Tile::kPositions == kGramPositions;
  // Of half types the longest tiles, which every GPU has room for, are the ones to split sets into.
  template <class Tile>
  static constexpr bool kHasSplit = !kHalf<T> || Tile::kPositions == 64;
  static constexpr size_t kNowhere = size_t(1) << 62;  // more shared memory than there is

  template <class Chosen>
  static size_t split_bytes(bool resident, int64_t features) {
    if constexpr (kHasSplit<Chosen>)
      return std::max(Blocks<Chosen, Pass::kFirst>::shared_bytes(resident, features),
                      Blocks<Chosen, Pass::kSecond>::shared_bytes(false, features));
    else
      return kNowhere;
  }
  static size_t shared_bytes(Tile tile, Form form, bool resident, int64_t features) {
    size_t bytes = 0;
    with(tile, [&](auto compiled) {
      using Chosen = decltype(compiled);
      if (form == Form::kSplit)
        bytes = split_bytes<Chosen>(resident, features);
      else if (form == Form::kWhole)
        bytes = Blocks<Chosen, Pass::kWhole>::shared_bytes(resident, features);
      else if constexpr (kHasGram<Chosen>)
        bytes = Blocks<Chosen, Pass::kGram>::shared_bytes(resident, features);
      else
        bytes = kNowhere;
    });
    return bytes;
  }

  template <class Chosen>
  static void split(const BackwardPlan& plan, const BackwardArguments& a, Stream stream) {
    launch_blocks<Blocks<Chosen, Pass::kFirst>>(plan.grid, a, stream);
    using Sums = BackwardSums<T, Chosen::kPositions>;
    launch<Sums>(Sums::grid(a.in), 1, Sums::shared_bytes(), a, stream);
    BackwardArguments second = a;
    second.resident = false;  // it does not read x
    launch_blocks<Blocks<Chosen, Pass::kSecond>>(plan.grid, second, stream);
  }
  template <class Blocks>
  static void launch_blocks(int64_t grid, const BackwardArguments& a, Stream stream) {
    launch<Blocks>(grid, 1, Blocks::shared_bytes(a.resident, a.in.features), a, stream);
  }
  static void run(const BackwardPlan& plan, const BackwardArguments& a, Stream stream) {
    if (plan.form == Form::kCluster) {
      if constexpr (kHalf<T>) ClusterDispatch<T, BackwardCluster>::run(plan, a, stream);
      return;
    }
    with(plan.tile, [&](auto compiled) {
      using Chosen = decltype(compiled);
      if (plan.form == Form::kSplit) {
        if constexpr (kHasSplit<Chosen>) return split<Chosen>(plan, a, stream);
      } else if (plan.form == Form::kWhole) {
        return launch_blocks<Blocks<Chosen, Pass::kWhole>>(plan.grid, a, stream);
      } else if constexpr (kHasGram<Chosen>) {
        return launch_blocks<Blocks<Chosen, Pass::kGram>>(plan.grid, a, stream);
      }
      throw std::logic_error("fastac: this form is not compiled for this tile");
    });
  }
  static const BackwardKernels& kernels() {
    using First = BackwardBlocks<T, 32, 16, Pass::kWhole>;
    if constexpr (kHalf<T>) {
      using Cluster = ClusterDispatch<T, BackwardCluster>;
      static constexpr BackwardKernels table{First::kStages, Cluster::kStages, shared_bytes,
                                             Cluster::shared_bytes, run};
      return table;
    } else {
      static constexpr BackwardKernels table{First::kStages, 0, shared_bytes, nullptr, run};
      return table;
    }
  }
};

}  // namespace fastac::cuda
