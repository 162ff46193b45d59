#include "backward_dispatch.cuh"

const fastac::cuda::BackwardKernels& fastac::cuda::backward_float16() {
  return BackwardDispatch<c10::Half>::kernels();
}
