// The instruction sets built into the library, from the least to the most capable.
#pragma once

#include "../attention_cluster.h"

namespace fastac::cpu {

enum Isa : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAvx512Bf16Dot = 4 };
constexpr int kIsaCount = 5;

extern const CpuKernels kBaselineKernels;
#if defined(__x86_64__)
extern const CpuKernels kAvx2Kernels;
extern const CpuKernels kAvx512Kernels;
extern const CpuKernels kAvx512Bf16Kernels;
extern const CpuKernels kAvx512Bf16DotKernels;
#endif

}  // namespace fastac::cpu
