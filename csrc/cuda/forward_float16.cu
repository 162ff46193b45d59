#include "forward_dispatch.cuh"

const fastac::cuda::ForwardKernels& fastac::cuda::forward_float16() {
  return ForwardDispatch<c10::Half>::kernels();
}
