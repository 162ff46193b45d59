// Which rows a block handles and which of them take part. Offsets and lengths are clamped to what there is,
// so that no value of theirs leads out of a tensor.
#pragma once

#include "operands.h"
#include "tile.cuh"

namespace fastac::cuda {

FASTAC_DEVICE int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}
FASTAC_DEVICE int64_t larger(int64_t a, int64_t b) {
  return a > b ? a : b;
}

// offsets[i], the first of which is 0 whatever the tensor says.
FASTAC_DEVICE int64_t offset_at(const Operands& in, int64_t i) {
  return i > 0 ? smaller(larger(in.offsets[i], 0), in.length) : 0;
}

FASTAC_DEVICE int64_t first_block(const Operands& in, const Blocks& blocks, int64_t set, int64_t positions) {
  return in.layout == Layout::kPacked ? offset_at(in, set) / positions + set : set * blocks.per_set;
}

// A set: the row of its position 0, its positions, and how many of the leading ones may be valid. Packed rows
// behind the last set count as a set of their own, number B, none of whose positions is valid.
struct Set {
  int64_t index, row, positions, count;
};

FASTAC_DEVICE Set set_at(const Operands& in, int64_t index) {
  Set set{index, index * in.length, in.length, in.length};
  if (in.layout == Layout::kPacked) {
    set.row = offset_at(in, index);
    const int64_t end = index < in.batch ? offset_at(in, index + 1) : in.length;
    set.positions = larger(end - set.row, 0);
    set.count = index < in.batch ? set.positions : 0;
  } else if (in.layout == Layout::kLengths) {
    set.count = smaller(larger(in.lengths[index], 0), in.length);
  }
  return set;
}

// Block `id` of all: its set, and its number in the set.
struct Place {
  Set set;
  int64_t block;
};

FASTAC_DEVICE Place locate(const Operands& in, const Blocks& blocks, int64_t id, int64_t positions) {
  if (in.layout != Layout::kPacked) return {set_at(in, id / blocks.per_set), id % blocks.per_set};
  int64_t low = 0, high = in.batch;
  while (low < high) {  // the last set that begins at or before this block
    const int64_t middle = (low + high + 1) / 2;
    if (first_block(in, blocks, middle, positions) <= id)
      low = middle;
    else
      high = middle - 1;
  }
  return {set_at(in, low), id - first_block(in, blocks, low, positions)};
}

FASTAC_DEVICE bool takes_part(const Operands& in, const Set& set, int64_t position) {
  if (position >= set.count) return false;
  return in.layout != Layout::kMask || in.mask[set.index * in.mask_b + position * in.mask_l] != 0;
}

template <class T>
FASTAC_DEVICE const T* x_of(const Operands& in, const Set& set, int64_t position) {
  const int64_t begin = in.layout == Layout::kPacked ? set.row * in.x_l : set.index * in.x_b;
  return static_cast<const T*>(in.x) + begin + position * in.x_l;
}

template <class T>
FASTAC_DEVICE Accumulator<T> load(const Small& operand, int64_t index) {
  if (operand.single) return static_cast<const float*>(operand.data)[index];
  return widen(static_cast<const T*>(operand.data)[index]);
}

template <class T>
FASTAC_DEVICE void store(const Small& operand, int64_t index, Accumulator<T> value) {
  void* data = const_cast<void*>(operand.data);
  if (operand.single)
    static_cast<float*>(data)[index] = float(value);
  else
    static_cast<T*>(data)[index] = T(value);
}

// The score of a unit at a valid position, but for W x.
template <class T>
FASTAC_DEVICE Accumulator<T> given_score(const Operands& in, const Set& set, int64_t unit, int64_t position) {
  if (in.weighting == Weighting::kScores) {
    const int64_t begin = in.layout == Layout::kPacked ? set.row * in.scores_l : set.index * in.scores_b;
    return load<T>(in.scores, begin + unit * in.scores_n + position * in.scores_l);
  }
  if (in.position_bias.data != nullptr && position < in.bias_length)
    return load<T>(in.position_bias, unit * in.bias_n + position * in.bias_l);
  return 0;
}

// Pivots. Features often share a large component along the all-ones direction, which beta or the softmax's
// gradient cancels. The kernels therefore work on d_l = x_l - rho_l, rho_l near the mean of x_l: rounding
// then concerns d, and the all-ones part is added in the accumulation type. Half types enter products as they
// are, and rho corrects for the rounding of the other factor; but in the Gram form x xᵀ has rho squared in
// it, and a float32 sum would lose d beside that.

// rho from the sums of the first `count` features and of their squares: their mean; if it is `subtracted`
// from x in the dtype of x, then only where it is at least twice their deviation, else 0, and rounded to that
// dtype. x - rho is then exact for nearly all features.
template <class T>
FASTAC_DEVICE Accumulator<T> pivot_of(Accumulator<T> sum, Accumulator<T> squares, int count,
                                      bool subtracted) {
  const Accumulator<T> mean = sum / Accumulator<T>(count);
  if (!subtracted) return mean;
  return 5 * mean * mean > 4 * (squares / Accumulator<T>(count)) ? widen(T(mean)) : Accumulator<T>(0);
}

// The pivots of `rows` rows from a tile of their first features; excluded rows have 0. Ends without a sync.
template <class T, int WARPS>
FASTAC_DEVICE void find_pivots(Accumulator<T>* rho, const T* tile, int rows, int64_t M, bool subtracted) {
  using Acc = Accumulator<T>;
  const int count = int(smaller(M, kFeatures<T>));
  for (int r = ptx::warp(); r < rows; r += WARPS) {
    Acc sum = 0, squares = 0;
    for (int c = ptx::lane(); c < count; c += 32) {
      const Acc x = widen(tile[r * kStride<T> + c]);
      sum += x;
      squares += x * x;
    }
    sum = sum_of_warp(sum);
    squares = sum_of_warp(squares);
    if (ptx::lane() == 0) rho[r] = pivot_of<T>(sum, squares, count, subtracted);
  }
}

// One pivot for the whole set, that of its first valid position; 0 if none is among the first 1024. The same
// in every thread of the warp.
template <class T>
FASTAC_DEVICE Accumulator<T> set_pivot(const Operands& in, const Set& set, bool subtracted) {
  using Acc = Accumulator<T>;
  int64_t first = 0;
  if (in.layout == Layout::kMask) {
    first = set.count;
    for (int64_t start = 0; start < smaller(set.count, 1024); start += 32) {
      const unsigned valid = ptx::ballot(takes_part(in, set, start + ptx::lane()));
      if (valid != 0) {
        int bit = 0;
        while ((valid >> bit & 1) == 0) ++bit;
        first = start + bit;
        break;
      }
    }
  }
  if (first >= set.count) return 0;
  const int count = int(smaller(in.features, kFeatures<T>));
  const T* x = x_of<T>(in, set, first);
  Acc sum = 0, squares = 0;
  for (int c = ptx::lane(); c < count; c += 32) {
    const Acc value = widen(x[c * in.x_m]);
    sum += value;
    squares += value * value;
  }
  return pivot_of<T>(sum_of_warp(sum), sum_of_warp(squares), count, subtracted);
}

// Subtracts rho from the rows of a tile, features beyond M excepted. Ends without a sync.
template <class T, int THREADS>
FASTAC_DEVICE void centre(T* tile, const Accumulator<T>* rho, int rows, int64_t first, int64_t M) {
  for (int i = ptx::thread(); i < rows * kFeatures<T>; i += THREADS) {
    const int r = i / kFeatures<T>, c = i % kFeatures<T>;
    if (first + c < M) {
      T& x = tile[r * kStride<T> + c];
      x = T(widen(x) - rho[r]);
    }
  }
}

// c = 1 / (sqrt(N) max(||u||, eps)) of Eq. 7; 1 without shift.
template <class Acc>
FASTAC_DEVICE Acc scale_of(const Operands& in, Acc norm) {
  if (!in.shift) return 1;
  const Acc least = Acc(in.eps);
  return ptx::divide(Acc(1), ptx::square_root(Acc(in.units)) * (norm > least ? norm : least));
}

// Whether ||u|| >= eps; below it y is linear in u.
template <class Acc>
FASTAC_DEVICE bool is_normalised(const Operands& in, Acc norm) {
  return norm >= Acc(in.eps);
}

}  // namespace fastac::cuda
