#include "reduce_dispatch.cuh"

const fastac::cuda::ReduceKernels& fastac::cuda::reduce_float16() {
  return ReduceDispatch<c10::Half>::kernels();
}
