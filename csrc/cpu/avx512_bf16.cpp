// AVX-512 with its bfloat16 extension: Cooper Lake, Sapphire Rapids, Zen 4 and later. Here it serves to round
// float32 to bfloat16; avx512_bf16_dot.cpp multiplies with it where that is faster.
#include "kernels_begin.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,avx512bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,avx512bf16")
#endif

namespace fastac {

#define FASTAC_VECTOR_BYTES 64
#define FASTAC_BFLOAT16_ROUNDING 1
#define FASTAC_TILE_ROWS 12
#define FASTAC_TILE_VECTORS 2
#define FASTAC_DOT_TILE 5
#include "kernels.h"

const CpuKernels cpu::kAvx512Bf16Kernels = {"avx512_bf16", run_forward, run_backward,
                                            run_softmax_weight_forward, run_softmax_weight_backward};

}  // namespace fastac
#endif
