// Allocation of outputs, with a test mode in which they are poisoned and stand between guard bands.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace fastac {

torch::stable::Tensor allocate(const int64_t* sizes, int64_t dim, torch::headeronly::ScalarType dtype);

// Switches the test mode; returns how many guard bytes of earlier allocations were written to and forgets
// them.
int64_t guard(bool on);

}  // namespace fastac
