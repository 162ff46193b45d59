// The interface between the operators (attention_cluster.cpp) and the kernels of one device (cpu/, later
// cuda/). Notation as in the paper: B sets, L positions, M features, N attention units.
#pragma once

#include <cstdint>

namespace fastac {

enum class DType : int { kFloat64 = 0, kFloat32 = 1, kBFloat16 = 2, kFloat16 = 3 };

// Which gradients a backward call computes.
enum Needs : int64_t {
  kNeedX = 1,
  kNeedWeight = 2,
  kNeedScores = 4,
  kNeedPositionBias = 8,
  kNeedAlpha = 16,
  kNeedBeta = 32,
};

// The sets of a batch. Valid position i of set b, i < length[b], is its position `position ?
// position[begin[b] + i] : i`; positions that take no part never appear.
struct Sets {
  int64_t count;             // B
  const int64_t* length;     // (B,) valid positions of each set
  const int64_t* position;   // valid positions of all sets in order, or null when they are 0 ... length - 1
  const int64_t* begin;      // (B,) where a set's entries of `position` start; null with `position`
  const int64_t* first_row;  // (B,) row of position 0 in arrays with one row per position: weights, packed x
  const int64_t* extent;     // (B,) positions of each set, valid or not
  int64_t rows;              // rows of such an array in all: B * L padded, T packed
};

// Strides count elements. `acc` is float, or double for kFloat64.
struct Problem {
  DType dtype;         // of x, weight, y and their gradients
  int64_t units;       // N
  int64_t features;    // M
  int64_t max_length;  // columns of position_bias
  double eps;
  bool shift;       // alpha and beta are given
  bool has_scores;  // fc1, or scores given; false for the average
  bool packed;      // (T, M) with offsets, not (B, L, M)
  Sets sets;

  // inputs
  const void* x;  // position l of set b at x + x_begin(b) + l * x_row_stride, features contiguous
  int64_t x_set_stride;
  int64_t x_row_stride;
  const void* weight;  // (N, M), contiguous, or null
  const void*
      scores;  // acc, or null; unit n, position l of set b at scores_begin(b) + n * unit + l * position
  int64_t scores_set_stride;
  int64_t scores_unit_stride;
  int64_t scores_position_stride;
  const void* position_bias;  // (N, max_length), acc, contiguous, or null
  const void* alpha;          // (N,), acc, or null
  const void* beta;           // (N,), acc, or null

  int64_t x_begin(int64_t set) const {
    return packed ? sets.first_row[set] * x_row_stride : set * x_set_stride;
  }

  // Multiply-adds of one product of all positions, valid or not, with all units; and elements of y.
  int64_t products() const { return sets.rows * units * features; }
  int64_t outputs() const { return sets.count * units * features; }
  int64_t scores_begin(int64_t set) const {
    return packed ? sets.first_row[set] * scores_position_stride : set * scores_set_stride;
  }
};

struct ForwardOutputs {
  void* y;             // (B, N, M)
  void* stats;         // (3, B, N), acc: max_l s, sum_l exp(s - max), ||u||; or null
  void* saved_scores;  // (rows, N), acc: scores of valid positions; or null
};

struct BackwardArguments {
  // inputs
  const void* dy;            // (B, N, M), contiguous
  const void* y;             // (B, N, M), contiguous
  const void* stats;         // (3, B, N), acc
  const void* saved_scores;  // (rows, N), acc, or null: recompute
  int64_t needs;             // of Needs
  // outputs, null where not needed
  void* dx;  // contiguous; position l of set b at (first_row[b] + l) * M; excluded positions of a set are
             // zeroed
  void* dweight;  // (N, M)
  void* dscores;  // acc, (B, N, L) or (N, T), contiguous; the caller zeroed it
  int64_t dscores_unit_stride;
  void* dposition_bias;  // (N, max_length), acc
  void* dalpha;          // (N,), acc
  void* dbeta;           // (N,), acc
};

// Calls body(context, begin, end) over a partition of [0, n) on the thread pool of the host library.
using ParallelFor = void (*)(int64_t n, void (*body)(void*, int64_t, int64_t), void* context);

struct SoftmaxWeightProblem;  // softmax_weight.h
struct SoftmaxWeightForward;
struct SoftmaxWeightBackward;

struct CpuKernels {
  const char* name;
  void (*forward)(const Problem&, const ForwardOutputs&, ParallelFor);
  void (*backward)(const Problem&, const BackwardArguments&, ParallelFor);
  void (*softmax_weight_forward)(const SoftmaxWeightProblem&, const SoftmaxWeightForward&, ParallelFor);
  void (*softmax_weight_backward)(const SoftmaxWeightProblem&, const SoftmaxWeightBackward&, ParallelFor);
};

}  // namespace fastac
