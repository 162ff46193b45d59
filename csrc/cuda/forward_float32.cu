#include "forward_dispatch.cuh"

const fastac::cuda::ForwardKernels& fastac::cuda::forward_float32() {
  return ForwardDispatch<float>::kernels();
}
