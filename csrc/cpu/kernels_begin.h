// Everything kernels.h needs from outside, included before the target pragma so that no shared inline
// function is compiled for an instruction set that the processor may lack.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../attention_cluster.h"
#include "../softmax_weight.h"
#include "isa.h"
#include "memory.h"
#include "plan.h"
#include "softmax_weight_plan.h"
