#include "forward_dispatch.cuh"

const fastac::cuda::ForwardKernels& fastac::cuda::forward_bfloat16() {
  return ForwardDispatch<c10::BFloat16>::kernels();
}
