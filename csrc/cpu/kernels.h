// The kernels of one instruction set. A source file includes kernels_begin.h, opens its target pragma, sets
//   FASTAC_VECTOR_BYTES   bytes of a vector register
//   FASTAC_TILE_ROWS      rows of a register tile
//   FASTAC_TILE_VECTORS   vectors of a row of a tile: rows * vectors + vectors + 1 registers are in use
//   FASTAC_DOT_TILE       side of a dot tile
// and, where it has them, FASTAC_BFLOAT16_ROUNDING and FASTAC_BFLOAT16_DOT for instructions that round to
// bfloat16 and that sum products of pairs of bfloat16,
// and includes this file inside namespace fastac. All of it has internal linkage, so that code for one
// instruction set can never stand in for another's.

namespace {

#include "vec.h"
#include "tile.h"
#include "pack.h"
#include "operands.h"
#include "softmax.h"
#include "forward.h"
#include "output_gradient.h"
#include "parameter_sums.h"
#include "backward.h"
#include "softmax_weight.h"
#include "softmax_weight_forward.h"
#include "softmax_weight_backward.h"

template <typename F>
inline void with_storage(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat64: return f(double{});
    case DType::kFloat32: return f(float{});
    case DType::kBFloat16: return f(BFloat16{});
    case DType::kFloat16: return f(Float16{});
  }
}

#if defined(FASTAC_BFLOAT16_DOT)
// Only what differs from the instruction set below: bfloat16, beyond the short rows that keep units in lanes.
inline bool takes_pairs(const Problem& problem) {
  return problem.dtype == DType::kBFloat16 && problem.features > cpu::kShortRow;
}
void run_forward(const Problem& problem, const ForwardOutputs& out, ParallelFor parallel_for) {
  if (!takes_pairs(problem)) return cpu::kAvx512Bf16Kernels.forward(problem, out, parallel_for);
  Forward<BFloat16, Pair>(problem, out, parallel_for).run();
}

void run_backward(const Problem& problem, const BackwardArguments& args, ParallelFor parallel_for) {
  if (!takes_pairs(problem)) return cpu::kAvx512Bf16Kernels.backward(problem, args, parallel_for);
  Backward<BFloat16, Pair>(problem, args, parallel_for).run();
}

void run_softmax_weight_forward(const SoftmaxWeightProblem& problem, const SoftmaxWeightForward& out,
                                ParallelFor parallel_for) {
  cpu::kAvx512Bf16Kernels.softmax_weight_forward(problem, out, parallel_for);
}

void run_softmax_weight_backward(const SoftmaxWeightProblem& problem, const SoftmaxWeightBackward& args,
                                 ParallelFor parallel_for) {
  cpu::kAvx512Bf16Kernels.softmax_weight_backward(problem, args, parallel_for);
}
#else
void run_forward(const Problem& problem, const ForwardOutputs& out, ParallelFor parallel_for) {
  with_storage(problem.dtype, [&](auto t) { Forward<decltype(t)>(problem, out, parallel_for).run(); });
}

void run_backward(const Problem& problem, const BackwardArguments& args, ParallelFor parallel_for) {
  with_storage(problem.dtype, [&](auto t) { Backward<decltype(t)>(problem, args, parallel_for).run(); });
}

// Calls f with the storage types of x and of the scores.
template <typename F>
inline void with_both_storages(const SoftmaxWeightProblem& problem, F&& f) {
  const bool same = problem.scores_dtype == problem.dtype;
  switch (problem.dtype) {
    case DType::kFloat64: return f(double{}, double{});
    case DType::kFloat32: return f(float{}, float{});
    case DType::kBFloat16: return same ? f(BFloat16{}, BFloat16{}) : f(BFloat16{}, float{});
    case DType::kFloat16: return same ? f(Float16{}, Float16{}) : f(Float16{}, float{});
  }
}

void run_softmax_weight_forward(const SoftmaxWeightProblem& problem, const SoftmaxWeightForward& out,
                                ParallelFor parallel_for) {
  with_both_storages(problem, [&](auto t, auto s) {
    SoftmaxWeightForwardKernel<decltype(t), decltype(s)>(problem, out).run(parallel_for);
  });
}

void run_softmax_weight_backward(const SoftmaxWeightProblem& problem, const SoftmaxWeightBackward& args,
                                 ParallelFor parallel_for) {
  with_both_storages(problem, [&](auto t, auto s) {
    SoftmaxWeightBackwardKernel<decltype(t), decltype(s)>(problem, args).run(parallel_for);
  });
}

#endif

}  // namespace
