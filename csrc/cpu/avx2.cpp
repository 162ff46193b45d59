// AVX2 with FMA: Haswell, Zen and later.
#include "kernels_begin.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

namespace fastac {

#define FASTAC_VECTOR_BYTES 32
#define FASTAC_TILE_ROWS 6
#define FASTAC_TILE_VECTORS 2
#define FASTAC_DOT_TILE 3
#include "kernels.h"

const CpuKernels cpu::kAvx2Kernels = {"avx2", run_forward, run_backward, run_softmax_weight_forward,
                                      run_softmax_weight_backward};

}  // namespace fastac
#endif
