#include "reduce_dispatch.cuh"

const fastac::cuda::ReduceKernels& fastac::cuda::reduce_float32() {
  return ReduceDispatch<float>::kernels();
}
