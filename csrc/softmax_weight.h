// The interface between the softmax_weight operators (softmax_weight.cpp) and the CPU kernels.
//     a = softmax over L of scores        y = a x        dx = a dy        dscores = a (dy x - sum_l a dy x)
// Notation as in attention_cluster.h: B sets, L positions, M features; `acc` is float, or double for
// kFloat64.
#pragma once

#include <cstdint>

#include "attention_cluster.h"

namespace fastac {

// A (B, L, M) operand: position l of set b at base + b * set_stride + l * row_stride, features contiguous.
struct SetRows {
  const void* base;
  int64_t set_stride, row_stride;
};

struct SoftmaxWeightProblem {
  DType dtype;                     // of x, dy and y
  DType scores_dtype;              // dtype, or kFloat32 with a half type
  int64_t sets, length, features;  // B, L, M
  const int64_t* lengths;          // (B,) in 0...L, or null: all of L
  SetRows x, scores;

  int64_t elements() const { return sets * length * features; }
};

struct SoftmaxWeightForward {
  void* y;      // (B, L, M), contiguous
  void* stats;  // (2, B, M), acc: max_l s, -inf where no position takes part, and sum_l exp(s - max)
};

struct SoftmaxWeightBackward {
  SetRows dy;
  const void* stats;  // (2, B, M), contiguous
  void* dx;           // (B, L, M), contiguous, x's dtype; or null
  void* dscores;      // (B, L, M), contiguous, scores' dtype; or null
};

}  // namespace fastac
