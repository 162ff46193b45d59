// AVX-512 with dot products of bfloat16 pairs, for processors on which these have twice the rate of the
// float32 multiply-add: Zen 4 and later. Where they have half of it (Cooper Lake, Sapphire Rapids)
// avx512_bf16.cpp is the faster one; dispatch.cpp chooses, benchmarks/NOTES.md has the measurements.
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
#define FASTAC_BFLOAT16_DOT 1
#define FASTAC_TILE_ROWS 12
#define FASTAC_TILE_VECTORS 2
#define FASTAC_DOT_TILE 5
#include "kernels.h"

const CpuKernels cpu::kAvx512Bf16DotKernels = {"avx512_bf16_dot", run_forward, run_backward,
                                               run_softmax_weight_forward, run_softmax_weight_backward};

}  // namespace fastac
#endif
