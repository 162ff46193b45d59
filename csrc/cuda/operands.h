// What the kernels are given. Plain data, read by host and device. Notation as in the paper: B sets, L
// positions, M features, N attention units; a row is a position of any set, b L + l or the packed row.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FASTAC_HOST_DEVICE __host__ __device__
#else
#define FASTAC_HOST_DEVICE
#endif

namespace fastac::cuda {

enum class Layout : int { kPadded = 0, kLengths = 1, kMask = 2, kPacked = 3 };

enum class Weighting : int {
  kAverage = 0,  // Eq. 3: every score is 0
  kScores = 1,   // the caller's scores
  kLinear = 2,   // Eq. 4: s = W x (+ position bias)
};

// A small operand, in the dtype of x or in float32, whatever x is.
struct Small {
  const void* data;
  bool single;  // float32 although x is not
};

// The operands of a call. Strides count elements and may be 0. T is the dtype of x, acc its accumulation
// type: float, or double for double.
struct Operands {
  const void* x;              // (B, L, M) T, or packed (T, M)
  const void* weight;         // (N, M) T, or null
  Small scores;               // (B, N, L), or packed (N, T); data null unless given
  Small position_bias;        // (N, bias_length), or null
  Small alpha, beta;          // (N,) contiguous, or null
  const int64_t* lengths;     // (B,), or null
  const unsigned char* mask;  // (B, L) of 0 and 1, or null
  const int64_t* offsets;     // (B + 1,), or null
  int64_t batch;              // B
  int64_t length;             // L, or T when packed
  int64_t rows;               // B L, or T
  int64_t features;           // M
  int64_t units;              // N
  int64_t bias_length;
  int64_t x_b, x_l, x_m;  // x_b is 0 when packed
  int64_t weight_n, weight_m;
  int64_t scores_b, scores_n, scores_l;
  int64_t bias_n, bias_l;
  int64_t mask_b, mask_l;
  double eps;
  Layout layout;
  Weighting weighting;
  bool shift;      // alpha and beta are given
  bool x_vectors;  // 16 bytes at a time: x_m = 1, and base and other strides are multiples of 16 bytes
  bool weight_vectors;
};

// How a call is cut into blocks of positions of one set. A packed set has the blocks from
// offsets[b] / positions + b on: at least what it needs, whatever its length, so the host need not know any.
struct Blocks {
  int64_t positions;  // of a block, at most
  int64_t per_set;    // blocks of a padded set; packed: unused
  int64_t all;        // of all sets
  bool split;         // whether a set may have several
};

struct ForwardArguments {
  Operands in;
  Blocks blocks;
  void* y;              // (B, N, M) T
  void* stats;          // (3, B, N) acc: greatest score, sum of exponentials, ||u||; or null
  void* saved;          // (rows, N) acc: scores; or null
  void* partial;        // (blocks.all, N, M) acc: shares of z, not yet divided by the sum; null unless split
  void* partial_stats;  // (3, blocks.all, N) acc: greatest score, sum of exponentials, pivot of the set
  int64_t unit_blocks;  // programs for the units of one block of positions
  bool resident;        // whether the block's part of x stays in shared memory
};

struct BackwardArguments {
  Operands in;
  Blocks blocks;
  const void* dy;  // (B, N, M) T
  int64_t dy_b, dy_n, dy_m;
  bool dy_vectors;
  const void* y;      // (B, N, M) T, contiguous
  const void* stats;  // (3, B, N) acc
  const void* saved;  // (rows, N) acc, or null: the scores are computed again
  void* dx;           // (B, L, M) or (T, M) T, contiguous; or null
  void* dscores;      // T or float32 as scores, (B, N, L) or (N, T), contiguous; or null
  bool dscores_single;
  void* mix;      // scratch (2, rows, N) acc: A; and dS, or e between the launches
  void* pivots;   // scratch (2, rows) acc: rho; and rho less the pivot of the set
  void* means;    // scratch (4, B, N) acc: coefficient of y in dU / c, dU 1 / c, rowsum(a e), pivot
  void* sums;     // scratch (blocks.all, N) acc: the block's part of rowsum(a e); null unless split
  void* dshift;   // scratch (2, B, N) acc: dalpha and dbeta of every set; null without shift
  int* counters;  // scratch (tiles,): set to 0 for BackwardReduce; null with one split of dW
  int64_t tiles;  // of dW
  bool resident;  // whether the block's part of x stays in shared memory
};

struct ReduceArguments {
  Operands in;
  const void* mix;
  const void* pivots;
  const void* dshift;
  void* partial;         // scratch (splits, N, M) acc; null with one split
  int* counters;         // scratch (tiles of dW,), 0 before; null with one split
  void* dweight;         // (N, M) T, contiguous; or null
  Small dposition_bias;  // (N, bias_length) contiguous; data null if not needed (written through)
  Small dalpha, dbeta;   // (N,); data null if not needed
  int64_t splits;        // parts of the rows in dW
  int64_t rows_per_split;
  int64_t weight_blocks;  // of the grid, in this order
  int64_t shift_blocks;
  int64_t bias_blocks;
};

}  // namespace fastac::cuda
