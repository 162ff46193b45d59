#include "forward_dispatch.cuh"

const fastac::cuda::ForwardKernels& fastac::cuda::forward_float64() {
  return ForwardDispatch<double>::kernels();
}
