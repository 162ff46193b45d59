#include "backward_dispatch.cuh"

const fastac::cuda::BackwardKernels& fastac::cuda::backward_float64() {
  return BackwardDispatch<double>::kernels();
}
