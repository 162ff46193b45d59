#include "reduce_dispatch.cuh"

const fastac::cuda::ReduceKernels& fastac::cuda::reduce_float64() {
  return ReduceDispatch<double>::kernels();
}
