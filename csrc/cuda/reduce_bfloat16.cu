#include "reduce_dispatch.cuh"

const fastac::cuda::ReduceKernels& fastac::cuda::reduce_bfloat16() {
  return ReduceDispatch<c10::BFloat16>::kernels();
}
