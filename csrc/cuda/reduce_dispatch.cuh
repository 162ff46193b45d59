#pragma once

#include "dispatch.cuh"
#include "reduce.cuh"

namespace fastac::cuda {

template <class T>
struct ReduceDispatch {
  using Reduce = BackwardReduce<T>;

  static void run(const BackwardPlan& plan, ReduceArguments a, Stream stream) {
    const bool shift = a.dalpha.data != nullptr || a.dbeta.data != nullptr;
    a.weight_blocks = a.dweight != nullptr ? plan.tiles * a.splits : 0;
    a.shift_blocks = shift ? Reduce::shift_blocks(a.in) : 0;
    a.bias_blocks = a.dposition_bias.data != nullptr ? Reduce::bias_blocks(a.in) : 0;
    const int64_t grid = a.weight_blocks + a.shift_blocks + a.bias_blocks;
    launch<Reduce>(grid, 1, Reduce::shared_bytes(), a, stream);
  }
  static const ReduceKernels& kernels() {
    static constexpr ReduceKernels table{{Reduce::kUnits, kFeatures<T>, Reduce::kRows}, run};
    return table;
  }
};

}  // namespace fastac::cuda
