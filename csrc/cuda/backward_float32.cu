#include "backward_dispatch.cuh"

const fastac::cuda::BackwardKernels& fastac::cuda::backward_float32() {
  return BackwardDispatch<float>::kernels();
}
