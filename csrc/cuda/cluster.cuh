// What the cluster kernels share. Blocks r = 0 ... CTAS - 1 of a cluster own the features [r F, (r + 1) F) of
// every row and work through the same sets together; tiles hold all features of a block, and rows come by
// bulk copies.
#pragma once

#include "rows.cuh"

namespace fastac::cuda {

// For older GPUs the kernels are compiled to a trap.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
inline constexpr bool kHasClusters = false;
#else
inline constexpr bool kHasClusters = true;
#endif

inline constexpr int kClusterPositions = 32;  // of a set, at most: a position for each lane
inline constexpr int kChunks = 4;             // of 64 features, in the registers of a block

// Features F of a block, and the stride of its tiles.
inline FASTAC_HOST_DEVICE int64_t slice_features(int64_t features, int ctas) {
  return ((features + ctas - 1) / ctas + 15) / 16 * 16;
}
template <class T>
inline FASTAC_HOST_DEVICE int64_t slice_stride(int64_t features, int ctas) {
  return slice_features(features, ctas) + kPad<T>;
}

// Whether the registers of a cluster's blocks have room for as many features.
inline bool cluster_holds(int64_t features, int ctas) {
  return slice_features(features, ctas) <= kChunks * 64;
}
// Whether a cluster can take a call. Of longer packed sets it takes the first positions.
inline bool cluster_fits(const Operands& in, int ctas, int units) {
  return (in.layout == Layout::kPacked || in.length <= kClusterPositions) && in.units <= units &&
         in.features % 8 == 0 && cluster_holds(in.features, ctas) && in.x_vectors &&
         (in.weighting != Weighting::kLinear || in.weight_vectors);
}

// The features of this block: `width` of them exist, the rest of its `columns` is 0 in every tile.
struct Slice {
  int64_t first;
  int columns, width;
  int active;  // blocks that have any

  FASTAC_DEVICE Slice(int64_t features, int ctas, int rank)
      : columns(int(slice_features(features, ctas))), active(int((features + columns - 1) / columns)) {
    first = int64_t(rank) * columns;
    width = int(smaller(larger(features - first, 0), columns));
  }
};

struct alignas(8) FloatPair {
  float a, b;
};
struct alignas(16) Words {
  uint32_t v[4];
};

// Zeros in `bytes` bytes of shared memory, a multiple of 16, by THREADS threads of which this is number
// `thread`.
template <int THREADS>
FASTAC_DEVICE void clear_shared(void* shared, int bytes, int thread) {
  Words* words = static_cast<Words*>(shared);
  for (int i = thread; i < bytes / int(sizeof(Words)); i += THREADS) words[i] = Words{};
}

// Fills a tile [BN][stride] with the slice's features of the rows of `from`, zeros elsewhere. Visible after
// commit_copies, wait_copies and sync.
template <class T, int BN, int THREADS>
FASTAC_DEVICE void load_slice(T* tile, int stride, const Slice& slice, const void* from, int64_t row_stride,
                              int64_t rows) {
  const int pieces = slice.columns / 8;
  for (int i = ptx::thread(); i < BN * pieces; i += THREADS) {
    const int r = i / pieces, c = i % pieces * 8;
    const bool there = r < rows && c < slice.width;
    const T* source = static_cast<const T*>(from);
    if (there) source += r * row_stride + slice.first + c;
    ptx::copy_async_16(tile + r * stride + c, source, there ? 16 : 0);
  }
}

// A set whose rows are in a tile or on their way there. Its count is of no use any more.
struct alignas(16) Arrival {
  Set set;
  unsigned valid;  // bit l: position l takes part
};

// The next set whose rows are to be copied: what a lane of warp 0 knows about its position.
struct Upcoming {
  int64_t row;
  int positions;  // of the set; more than fit into a tile have gradient 0
  bool valid;

  FASTAC_DEVICE Upcoming(const Operands& in, int64_t index) : row(0), positions(0), valid(false) {
    if (index >= in.batch) return;
    Set set = set_at(in, index);
    set.count = smaller(set.count, kClusterPositions);
    row = set.row;
    positions = int(smaller(set.positions, 0x7fffffff));
    valid = takes_part(in, set, ptx::lane());
  }
};

// Starts the copies of a set's valid rows to a tile; by warp 0. Others have stopped reading the tile before.
// Rows that are not valid are 0: at first all are, and those which the last set had and this one has not are
// cleared. `more` is what else will arrive at the barrier, in bytes.
template <class T>
FASTAC_DEVICE void load_rows(T* tile, int stride, const Slice& slice, const Operands& in, int64_t index,
                             const Upcoming& coming, Arrival* arrival, uint64_t* barrier, int more) {
  const int lane = ptx::lane(), bytes = slice.width * int(sizeof(T));
  const unsigned valid = ptx::ballot(coming.valid), stale = arrival->valid & ~valid;
  if (stale != 0) {
    for (int l = 0; l < kClusterPositions; ++l)
      if ((stale >> l & 1) != 0) clear_shared<32>(tile + l * stride, slice.columns * int(sizeof(T)), lane);
    ptx::proxy_fence();
  }
  const int rows = sum_of_warp(int(coming.valid));
  ptx::sync_warp();
  if (lane == 0) {
    *arrival = {{index, coming.row, coming.positions, 0}, valid};
    ptx::barrier_expect(barrier, rows * bytes + more);
  }
  ptx::sync_warp();
  if (coming.valid && bytes > 0)
    ptx::bulk_load(tile + lane * stride, x_of<T>(in, {index, coming.row, 0, 0}, lane) + slice.first, bytes,
                   barrier);
}

// out = a factor [rows, K] times chunks of 64 columns of a tile [K], those for which inside(chunk).
template <class T, int K, class Output, class Inside>
FASTAC_DEVICE void multiply_chunks(Output (&out)[kChunks], const T* factor, int factor_stride, const T* tile,
                                   int stride, Inside inside) {
  static_assert(Output::kWide == 2, "two atoms: one ldmatrix");
  const int lane = ptx::lane();
  const T* a_at = factor + (Output::top() + lane % 16) * factor_stride + lane / 16 * 8;
  const T* b_at = tile + lane % 16 * stride + Output::left() + lane / 16 * 8;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) out[c].clear();
#pragma unroll
  for (int k = 0; k < K; k += 16) {
    uint32_t a[Output::kHigh][4];
#pragma unroll
    for (int i = 0; i < Output::kHigh; ++i) ptx::load_matrices(a[i], a_at + i * 16 * factor_stride + k);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (!inside(c)) continue;
      uint32_t b[4];
      ptx::load_matrices_transposed(b, b_at + k * stride + c * 64);
      const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
      for (int i = 0; i < Output::kHigh; ++i) {
        ptx::multiply_add<T>(out[c].value[i][0], a[i], low);
        ptx::multiply_add<T>(out[c].value[i][1], a[i], high);
      }
    }
  }
}

template <class T>
FASTAC_DEVICE uint32_t pack(float low, float high) {
  const T pair[2] = {T(low), T(high)};
  uint32_t word;
  memcpy(&word, pair, sizeof(word));
  return word;
}

// Lane t of every four has word t of four pieces; then it has piece t.
FASTAC_DEVICE void transpose_quad(uint32_t (&w)[4]) {
  const bool odd = ptx::lane() % 2 != 0, upper = ptx::lane() % 4 >= 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t got = ptx::shuffle_xor(odd ? w[i] : w[i + 1], 1);
    (odd ? w[i] : w[i + 1]) = got;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t got = ptx::shuffle_xor(upper ? w[i] : w[i + 2], 2);
    (upper ? w[i] : w[i + 2]) = got;
  }
}

// Writes value(r, j, q) of every row of a product, columns `column` ... `column` + 63 of the slice, to the
// rows of `target`, `row_stride` apart; 16 bytes at a time, of which a warp writes whole sectors. Collective
// in the warp.
template <class T, class Output, class Value>
FASTAC_DEVICE void store_chunk(T* target, int64_t row_stride, int rows, const Slice& slice, int column,
                               Value value) {
  static_assert(Output::kWide == 2, "a row's two atoms are a sector");
  const int quad = ptx::lane() % 4, c = column + Output::left() + quad % 2 * 8;
#pragma unroll
  for (int i = 0; i < Output::kHigh; ++i) {
    uint32_t w[4];
#pragma unroll
    for (int piece = 0; piece < 4; ++piece) {
      const int r = 2 * i + piece / 2, j = piece % 2;
      w[piece] = pack<T>(value(r, j, 0), value(r, j, 1));
    }
    transpose_quad(w);
    const int row = Output::top() + i * 16 + quad / 2 * 8 + ptx::lane() / 4;
    if (row < rows && c < slice.width)
      *reinterpret_cast<Words*>(target + row * row_stride + slice.first + c) = {{w[0], w[1], w[2], w[3]}};
  }
}

}  // namespace fastac::cuda
