// Tiles in shared memory and the products of two of them.
//
// A tile has rows of `columns` features, each padded by 16 bytes so that eight rows read at one column fall
// into different banks. A product of tiles is spread over the warps of a block; every type leaves it in the
// registers in one arrangement, that of the matrix instruction of the half types: in an atom of 16 x 8 the
// lane has rows lane / 4 and lane / 4 + 8, columns 2 (lane % 4) and the next.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <type_traits>

#include "ptx.cuh"

namespace fastac::cuda {

template <class T>
inline constexpr bool kHalf = sizeof(T) == 2;

template <class T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
inline constexpr int kPad = 16 / sizeof(T);

// Features that a tile holds.
template <class T>
inline constexpr int kFeatures = kHalf<T> ? 64 : 32;

template <class T>
inline constexpr int kStride = kFeatures<T> + kPad<T>;

template <class T>
FASTAC_DEVICE Accumulator<T> widen(T value) {
  return static_cast<Accumulator<T>>(value);
}

// Fills `rows` rows of a tile with features first, first + 1, ... of the rows of x (or W, dY, y) that
// `row(r)` points to, zeros where it is null or beyond feature M. Asynchronous for the most part: visible
// after commit_copies, wait_copies and sync.
template <class T, int THREADS, class Row>
FASTAC_DEVICE void load_tile(T* tile, int rows, Row row, const void* anywhere, int64_t first, int64_t M,
                             int64_t column_stride, bool vectors) {
  constexpr int kVector = 16 / sizeof(T), kPieces = kFeatures<T> / kVector;
  if (vectors) {
    for (int i = ptx::thread(); i < rows * kPieces; i += THREADS) {
      const int r = i / kPieces, c = i % kPieces * kVector;
      const T* source = row(r);
      const int64_t left = (M - first - c) * int64_t(sizeof(T));
      const int bytes = source == nullptr || left <= 0 ? 0 : left < 16 ? int(left) : 16;
      ptx::copy_async_16(tile + r * kStride<T> + c, bytes > 0 ? source + first + c : anywhere, bytes);
    }
    return;
  }
#pragma unroll 4
  for (int i = ptx::thread(); i < rows * kFeatures<T>; i += THREADS) {
    const int r = i / kFeatures<T>, c = i % kFeatures<T>;
    const T* source = row(r);
    const bool there = source != nullptr && first + c < M;
    T* target = tile + r * kStride<T> + c;
    if constexpr (sizeof(T) == 8)
      ptx::copy_async_8(target, there ? source + (first + c) * column_stride : anywhere, there ? 8 : 0);
    else if constexpr (sizeof(T) == 4)
      ptx::copy_async_4(target, there ? source + (first + c) * column_stride : anywhere, there ? 4 : 0);
    else
      *target = there ? source[(first + c) * column_stride] : T(0.0f);
  }
}

// Writes `rows` rows of a tile to features first, first + 1, ... of rows of M features each.
template <class T, int THREADS>
FASTAC_DEVICE void store_tile(T* target, int64_t M, const T* tile, int rows, int64_t first) {
  constexpr int kVector = 16 / sizeof(T), kPieces = kFeatures<T> / kVector;
  struct alignas(16) Piece {
    T v[kVector];
  };
  if (M % kVector == 0 && reinterpret_cast<uintptr_t>(target) % 16 == 0) {
    for (int i = ptx::thread(); i < rows * kPieces; i += THREADS) {
      const int r = i / kPieces, c = i % kPieces * kVector;
      if (first + c < M)
        *reinterpret_cast<Piece*>(target + r * M + first + c) =
            *reinterpret_cast<const Piece*>(tile + r * kStride<T> + c);
    }
    return;
  }
#pragma unroll 4
  for (int i = ptx::thread(); i < rows * kFeatures<T>; i += THREADS) {
    const int r = i / kFeatures<T>, c = i % kFeatures<T>;
    if (first + c < M) target[r * M + first + c] = tile[r * kStride<T> + c];
  }
}

// Calls load(c) for every chunk c of features STAGES - 1 chunks ahead of use(c). Between the two lies a sync,
// and another one before load(c + STAGES), so the two may share a buffer.
template <int STAGES, class Load, class Use>
FASTAC_DEVICE void stream(int chunks, Load load, Use use) {
  // One loop for the first chunks too, since load and use are compiled wherever they are called.
#pragma unroll 1
  for (int c = 1 - STAGES; c < chunks; ++c) {
    if (c >= 0) {
      ptx::wait_copies<STAGES - 2>();
      ptx::sync();
    }
    if (c + STAGES - 1 < chunks) load(c + STAGES - 1);
    ptx::commit_copies();
    if (c >= 0) use(c);
  }
  ptx::wait_copies<0>();
  ptx::sync();
}

// How the second factor of a product lies in shared memory.
enum class Factor {
  kRows,     // [columns of the product][K]
  kColumns,  // [K][columns of the product]
};

// A product [ROWS, COLUMNS] spread over WARPS warps.
template <class T, int ROWS, int COLUMNS, int WARPS>
struct Product {
  using Acc = Accumulator<T>;

  // Warps along the rows: what loads the fewest fragments of 16, a warp having `least` columns at least.
  static constexpr int warps_down(int least) {
    int best = 0, fewest = 1 << 30;
    for (int down = 1; down <= WARPS && down <= ROWS / 16; down *= 2) {
      const int across = WARPS / down, loads = ROWS / 16 / down + (COLUMNS / across + 15) / 16;
      if (COLUMNS / across >= least && loads < fewest) {
        fewest = loads;
        best = down;
      }
    }
    return best;
  }
  static constexpr int kDown = warps_down(16) > 0 || kHalf<T> ? warps_down(16) : warps_down(8);
  static_assert(kDown > 0, "the product is too small for so many warps");
  static constexpr int kAcross = WARPS / kDown;
  static constexpr int kHigh = ROWS / 16 / kDown;  // atoms of a warp
  static constexpr int kWide = COLUMNS / 8 / kAcross;
  static_assert(kHigh * 16 * kDown == ROWS && kWide * 8 * kAcross == COLUMNS);
  static_assert(!kHalf<T> || kWide % 2 == 0);
  static constexpr int kRowsOfThread = 2 * kHigh;

  Acc value[kHigh][kWide][4];

  FASTAC_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < kHigh; ++i)
#pragma unroll
      for (int j = 0; j < kWide; ++j)
#pragma unroll
        for (int q = 0; q < 4; ++q) value[i][j][q] = 0;
  }

  // First row and column of the warp.
  static FASTAC_DEVICE int top() { return ptx::warp() / kAcross * (ROWS / kDown); }
  static FASTAC_DEVICE int left() { return ptx::warp() % kAcross * (COLUMNS / kAcross); }
  // Row of this thread's r-th one, r < kRowsOfThread, and its q-th column of atom j, q < 2.
  static FASTAC_DEVICE int row(int r) { return top() + r / 2 * 16 + r % 2 * 8 + ptx::lane() / 4; }
  static FASTAC_DEVICE int column(int j, int q) { return left() + j * 8 + ptx::lane() % 4 * 2 + q; }
  // Whether the warp is the first of those that share its rows, and the lane that of those of its warp.
  static FASTAC_DEVICE bool leads() { return ptx::warp() % kAcross == 0 && ptx::lane() % 4 == 0; }
  FASTAC_DEVICE Acc& at(int r, int j, int q) { return value[r / 2][j][r % 2 * 2 + q]; }

  // Sums value[r], a thread's part of its r-th row, over the row. `scratch` holds kAcross ROWS numbers, and
  // may be used again after the next sync.
  static FASTAC_DEVICE void sum_rows(Acc (&part)[kRowsOfThread], Acc* scratch) {
#pragma unroll
    for (int r = 0; r < kRowsOfThread; ++r) {
      part[r] += ptx::shuffle_xor(part[r], 1);
      part[r] += ptx::shuffle_xor(part[r], 2);
      if (kAcross > 1 && ptx::lane() % 4 == 0) scratch[ptx::warp() % kAcross * ROWS + row(r)] = part[r];
    }
    if constexpr (kAcross > 1) {
      ptx::sync();
#pragma unroll
      for (int r = 0; r < kRowsOfThread; ++r) {
        part[r] = 0;
        for (int i = 0; i < kAcross; ++i) part[r] += scratch[i * ROWS + row(r)];
      }
    }
  }

  // Adds first [ROWS, depth] times the second factor. Both are padded with zeros to a multiple of 16 in
  // depth.
  template <Factor FACTOR>
  FASTAC_DEVICE void add(const T* first, int first_stride, const T* second, int second_stride, int depth) {
    if constexpr (kHalf<T>)
      add_matrices<FACTOR>(first, first_stride, second, second_stride, depth);
    else
      add_scalars<FACTOR>(first, first_stride, second, second_stride, depth);
  }

 private:
  template <Factor FACTOR>
  FASTAC_DEVICE void add_matrices(const T* first, int first_stride, const T* second, int second_stride,
                                  int depth) {
    const int lane = ptx::lane();
    const T* a_at = first + (top() + lane % 16) * first_stride + lane / 16 * 8;
    const T* b_at = FACTOR == Factor::kRows
                        ? second + (left() + lane / 16 * 8 + lane % 8) * second_stride + lane / 8 % 2 * 8
                        : second + lane % 16 * second_stride + left() + lane / 16 * 8;
#pragma unroll 2
    for (int k = 0; k < depth; k += 16) {
      uint32_t a[kHigh][4];
#pragma unroll
      for (int i = 0; i < kHigh; ++i) ptx::load_matrices(a[i], a_at + i * 16 * first_stride + k);
#pragma unroll
      for (int j = 0; j < kWide; j += 2) {
        uint32_t b[4];
        if constexpr (FACTOR == Factor::kRows)
          ptx::load_matrices(b, b_at + j * 8 * second_stride + k);
        else
          ptx::load_matrices_transposed(b, b_at + k * second_stride + j * 8);
        const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
        for (int i = 0; i < kHigh; ++i) {
          ptx::multiply_add<T>(value[i][j], a[i], low);
          ptx::multiply_add<T>(value[i][j + 1], a[i], high);
        }
      }
    }
  }

  template <Factor FACTOR>
  FASTAC_DEVICE void add_scalars(const T* first, int first_stride, const T* second, int second_stride,
                                 int depth) {
    constexpr int kStep = 16 / sizeof(T);  // of the depth, read at once
    struct alignas(16) Piece {
      T v[kStep];
    };
    const T* a_at = first + (top() + ptx::lane() / 4) * first_stride;
    const int column = left() + ptx::lane() % 4 * 2;
#pragma unroll 1
    for (int k = 0; k < depth; k += kStep) {
      Piece a[kRowsOfThread];
#pragma unroll
      for (int r = 0; r < kRowsOfThread; ++r)
        a[r] = *reinterpret_cast<const Piece*>(a_at + (r / 2 * 16 + r % 2 * 8) * first_stride + k);
#pragma unroll
      for (int j = 0; j < kWide; ++j)
#pragma unroll
        for (int q = 0; q < 2; ++q) {
          T b[kStep];
          if constexpr (FACTOR == Factor::kRows) {
            const Piece piece =
                *reinterpret_cast<const Piece*>(second + (column + j * 8 + q) * second_stride + k);
#pragma unroll
            for (int d = 0; d < kStep; ++d) b[d] = piece.v[d];
          } else {
#pragma unroll
            for (int d = 0; d < kStep; ++d) b[d] = second[(k + d) * second_stride + column + j * 8 + q];
          }
#pragma unroll
          for (int r = 0; r < kRowsOfThread; ++r)
#pragma unroll
            for (int d = 0; d < kStep; ++d) at(r, j, q) += a[r].v[d] * b[d];
        }
    }
  }
};

template <class V>
FASTAC_DEVICE V sum_of_warp(V value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value += ptx::shuffle_xor(value, mask);
  return value;
}

template <class V>
FASTAC_DEVICE V greatest_of_warp(V value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    const V other = ptx::shuffle_xor(value, mask);
    value = other > value ? other : value;
  }
  return value;
}

}  // namespace fastac::cuda
