// The kernels of every dtype behind function pointers, so that the operators compile without them.
#pragma once

#include "plan.h"

#ifndef FASTAC_EMULATED
#include <cuda_runtime_api.h>
#endif

namespace fastac::cuda {

#ifdef FASTAC_EMULATED
using Stream = void*;
extern int64_t emulated_clusters;  // that there is room for at a time
#else
using Stream = cudaStream_t;
#endif

struct ForwardKernels {
  int stages;          // tiles of x and W in flight
  int cluster_stages;  // sets of which a cluster has x; 0 where the dtype has no such kernel
  ForwardBytes shared_bytes;
  ClusterBytes cluster_bytes;
  // The capability that all kernels are compiled for, as the current device runs them.
  int (*compiled_for)();
  // The launch of plan.kernel.
  void (*blocks)(const ForwardPlan&, const ForwardArguments&, Stream);
  void (*combine)(const ForwardArguments&, Stream);
};

struct BackwardKernels {
  int stages;
  int cluster_stages;
  BackwardBytes shared_bytes;  // of the launch that needs the most
  ClusterBytes cluster_bytes;
  // All launches of a form.
  void (*run)(const BackwardPlan&, const BackwardArguments&, Stream);
};

struct ReduceKernels {
  ReduceTile tile;
  // Fills in the parts of the grid: of dW if dweight is not null, and so on.
  void (*run)(const BackwardPlan&, ReduceArguments, Stream);
};

const ForwardKernels& forward_float16();
const ForwardKernels& forward_bfloat16();
const ForwardKernels& forward_float32();
const ForwardKernels& forward_float64();
const BackwardKernels& backward_float16();
const BackwardKernels& backward_bfloat16();
const BackwardKernels& backward_float32();
const BackwardKernels& backward_float64();
const ReduceKernels& reduce_float16();
const ReduceKernels& reduce_bfloat16();
const ReduceKernels& reduce_float32();
const ReduceKernels& reduce_float64();

}  // namespace fastac::cuda
