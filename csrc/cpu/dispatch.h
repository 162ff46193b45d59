// Which kernels run on this processor.
#pragma once

#include <cstdint>

#include "../attention_cluster.h"

namespace fastac::cpu {

// The kernels in use: the most capable the processor has, or the ones FASTAC_CPU_ISA names.
// Throws std::runtime_error if that names none, or one the processor cannot run.
const CpuKernels& kernels();

int64_t current_isa();
int64_t supported_isas();  // bit i: instruction set i of isa.h
int64_t set_isa(int64_t isa);

}  // namespace fastac::cpu
