#include "backward_dispatch.cuh"

const fastac::cuda::BackwardKernels& fastac::cuda::backward_bfloat16() {
  return BackwardDispatch<c10::BFloat16>::kernels();
}
