// The instruction sets built into the library, from the least to the most capable.
#pragma once

#include "../attention_cluster.h"

namespace fastac::cpu {

enum Isa : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };
constexpr int kIsaCount = 3;

extern const CpuKernels kBaselineKernels;
#if defined(__x86_64__)
extern const CpuKernels kAvx2Kernels;
extern const CpuKernels kAvx512Kernels;
#endif

}  // namespace fastac::cpu
