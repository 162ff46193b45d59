// The forward kernel for sm_90 and later, half types: a cluster of CTAS blocks for one set after the other.
//
// Every block keeps its slice of W for the whole launch, x is read once and y written once. A set has two
// cluster barriers. Before barrier X the blocks add their shares of s = W x to those of the others, in the
// shared memory of the block that owns the unit; before barrier P that block makes the weights of its units
// and writes them to all. ||u|| takes barrier X of the next set, whose scores are multiplied while u waits in
// the registers:
//
//     [X] weights of set i | arrive P, y of set i - 1, wait P | u of set i, copies of set i + kStages,
//     scores of set i + 1 [X]
//
// What is written to other blocks has one buffer where it is read before the next barrier, which lies before
// the next write, and two where not (norms).
#pragma once

#include "cluster.cuh"

namespace fastac::cuda {

template <class T, int CTAS, int BN = 64>
struct ForwardCluster {
  static_assert(kHalf<T> && (CTAS == 4 || CTAS == 8) && (BN == 32 || BN == 64));
  using Arguments = ForwardArguments;
  static constexpr int kWarps = BN / 8;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kBlocksPerSm = 128 / BN;
  static constexpr int kStages = 3;

 private:
  static constexpr int kPositions = kClusterPositions;
  static constexpr int kOwned = BN / CTAS;               // units whose weights a block makes
  static constexpr int kEach = kOwned / kWarps;          // and a warp of it
  static constexpr int kWeights = kPositions + kPad<T>;  // stride of the weights
  static constexpr bool kEarly = kEach == 1;  // given scores are loaded as u is: else too many registers
  using Scores = Product<T, BN, kPositions, kWarps>;
  using Output = Product<T, BN, 64, kWarps>;
  static constexpr int kRows = Output::kRowsOfThread;
  static_assert(kRows == 4, "each lane of four finds the norm of one row");

  // Shared memory, in this order: what has a fixed place first, so that no register holds it.
  struct Memory {
    T* p;                // [BN][kWeights], from the owners
    float* shares;       // [CTAS][kOwned][kPositions]: of the scores of this block's units, from all
    float* given;        // [kOwned][kPositions]: scores but for W x
    FloatPair* shift;    // [kOwned]: alpha and beta
    FloatPair* gains;    // [BN]: gain and tau of u = gain core + tau, from the owners
    float* norms;        // [2][BN][CTAS]: shares of ||u||², from all
    float* squares;      // [Output::kAcross][BN]
    float* rho;          // [kPositions], from all
    uint64_t* barriers;  // [2 kStages], of which half are used: a multiple of 16 bytes
    Arrival* arrivals;   // [kStages]
    T* x;                // [kStages][kPositions][stride]
    T* weight;           // [BN][stride]
  };
  static FASTAC_HOST_DEVICE size_t lay_out(Memory& m, unsigned char* begin, int64_t features) {
    const size_t stride = size_t(slice_stride<T>(features, CTAS));
    unsigned char* next = begin;
    const auto take = [&next](auto*& part, size_t count) {
      part = reinterpret_cast<std::remove_reference_t<decltype(part)>>(next);
      next += count * sizeof(*part);
    };
    take(m.p, BN * kWeights);
    take(m.shares, BN * kPositions);
    take(m.given, kOwned * kPositions);
    take(m.shift, kOwned);
    take(m.gains, BN);
    take(m.norms, 2 * BN * CTAS);
    take(m.squares, Output::kAcross * BN);
    take(m.rho, kPositions);
    take(m.barriers, 2 * kStages);
    take(m.arrivals, kStages);
    take(m.x, kStages * kPositions * stride);
    take(m.weight, BN * stride);
    return size_t(next - begin);
  }

 public:
  // Bytes of shared memory of a launch.
  static FASTAC_HOST_DEVICE size_t shared_bytes(int64_t features) {
    Memory m;
    return lay_out(m, nullptr, features);
  }
  // Whether the kernel can take the call; y is 16-byte aligned besides. The grid is any multiple of CTAS.
  static bool fits(const Arguments& a) { return cluster_fits(a.in, CTAS, BN); }

  static FASTAC_DEVICE void run([[maybe_unused]] const Arguments& a) {
    if constexpr (kHasClusters) {
      if (ptx::block() / CTAS < a.in.batch) ForwardCluster(a).compute();
    } else {
      ptx::cluster_sync();  // traps
    }
  }

 private:
  FASTAC_DEVICE explicit ForwardCluster(const Arguments& arguments)
      : a(arguments),
        in(arguments.in),
        rank(ptx::cluster_rank()),
        slice(arguments.in.features, CTAS, rank),
        stride(int(slice_stride<T>(arguments.in.features, CTAS))),
        clusters(ptx::blocks() / CTAS) {
    lay_out(m, ptx::shared(), in.features);
  }

  const Arguments& a;
  const Operands& in;
  const int rank;
  const Slice slice;
  const int stride;
  const int64_t clusters;
  Memory m;
  Output u[kChunks];
  float given;  // at this lane's position, for the set to come

  FASTAC_DEVICE T* tile(int stage) { return m.x + stage * kPositions * stride; }
  // The warp's k-th unit, and its number among those of the block.
  FASTAC_DEVICE int owned(int k) const { return ptx::warp() + k * kWarps; }
  FASTAC_DEVICE int unit(int k) const { return rank * kOwned + owned(k); }
  // Whether this warp's part of a chunk of 64 features lies in the slice.
  FASTAC_DEVICE bool inside(int chunk) const { return chunk * 64 + Output::left() < slice.columns; }

  FASTAC_DEVICE void compute() {
    prepare();
    const int64_t first = ptx::block() / CTAS;
    Upcoming coming(in, first);
    const auto load_next = [&](int stage, int64_t index) {
      if (ptx::warp() != 0 || index >= in.batch) return;
      load_rows(tile(stage), stride, slice, in, index, coming, m.arrivals + stage, m.barriers + stage, 0);
      coming = Upcoming(in, index + clusters);
    };
    for (int stage = 0; stage < kStages; ++stage) load_next(stage, first + stage * clusters);
    ptx::sync();

    int stage = 0, parity = 0;  // of the set to come
    int side = 0;               // of norms
    const auto find_scores = [&] {
      ptx::barrier_wait(m.barriers + stage, parity);
      multiply_scores(stage);
    };
    if (kEarly) given = given_at(stage, 0);
    find_scores();
    ptx::cluster_sync();
    for (int64_t index = first; index < in.batch; index += clusters) {
      weigh(m.arrivals[stage]);
      ptx::cluster_arrive();
      if (index > first) store_output(index - clusters, side ^ 1);
      if (kEarly && index + clusters < in.batch) given = given_at((stage + 1) % kStages, 0);
      ptx::cluster_wait();
      multiply_output(stage, side);
      load_next(stage, index + kStages * clusters);
      if (++stage == kStages) {
        stage = 0;
        parity ^= 1;
      }
      if (index + clusters < in.batch) find_scores();
      ptx::cluster_sync();
      if (index + clusters >= in.batch) store_output(index, side);
      side ^= 1;
    }
  }

  FASTAC_DEVICE void prepare() {
    if (ptx::thread() < kStages) {
      ptx::barrier_init(m.barriers + ptx::thread(), 1);
      m.arrivals[ptx::thread()].valid = 0;
      ptx::barrier_fence();
    }
    clear_shared<kThreads>(m.x, kStages * kPositions * stride * int(sizeof(T)), ptx::thread());
    ptx::proxy_fence();
    if (in.weighting == Weighting::kLinear)
      load_slice<T, BN, kThreads>(m.weight, stride, slice, in.weight, in.weight_n, in.units);
    ptx::commit_copies();
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const bool shifted = in.shift && unit(k) < in.units;
      m.shift[owned(k)] = {shifted ? load<T>(in.alpha, unit(k)) : 1, shifted ? load<T>(in.beta, unit(k)) : 0};
    }
    ptx::wait_copies<0>();
    ptx::cluster_sync();  // all blocks have started, too
  }

  // The score of a unit at this lane's position, but for W x.
  FASTAC_DEVICE float given_at(int stage, int k) {
    const Arrival& arrival = m.arrivals[stage];
    const bool valid = (arrival.valid >> ptx::lane() & 1) != 0 && unit(k) < in.units;
    return valid ? given_score<T>(in, arrival.set, unit(k), ptx::lane()) : 0.0f;
  }

  // This block's share of s = W x goes to the owners of the units, and rho to all.
  FASTAC_DEVICE void multiply_scores(int stage) {
    const T* x = tile(stage);
    // rho of a position is the mean of up to 64 features of the blocks in turn.
    const int count = slice.width < 64 ? slice.width : 64;
    if (count > 0)
      for (int l = rank + ptx::warp() * slice.active; l < kPositions; l += kWarps * slice.active) {
        float sum = 0;
        for (int c = ptx::lane(); c < count; c += 32) sum += widen(x[l * stride + c]);
        sum = sum_of_warp(sum);
        if (ptx::lane() < CTAS) *ptx::map(m.rho + l, ptx::lane()) = sum / float(count);
      }
#pragma unroll
    for (int k = 0; k < kEach; ++k)
      m.given[owned(k) * kPositions + ptx::lane()] = kEarly ? given : given_at(stage, k);
    if (in.weighting != Weighting::kLinear) return;
    Scores s;
    s.clear();
    s.template add<Factor::kRows>(m.weight, stride, x, stride, slice.columns);
#pragma unroll
    for (int r = 0; r < Scores::kRowsOfThread; ++r) {
      const int row = Scores::row(r);
      float* target = ptx::map(m.shares + (rank * kOwned + row % kOwned) * kPositions, row / kOwned);
#pragma unroll
      for (int j = 0; j < Scores::kWide; ++j)
        *reinterpret_cast<FloatPair*>(target + Scores::column(j, 0)) = {s.at(r, j, 0), s.at(r, j, 1)};
    }
  }

  // As in ForwardBlocks, for the units of this block: p, gain and tau go to all blocks.
  FASTAC_DEVICE void weigh(const Arrival& arrival) {
    const int lane = ptx::lane();
#pragma unroll 1
    for (int k = 0; k < kEach; ++k) {
      const int n = unit(k);
      float s = -INFINITY;
      if ((arrival.valid >> lane & 1) != 0 && n < in.units) {
        s = 0;
        if (in.weighting == Weighting::kLinear) {
#pragma unroll
          for (int from = 0; from < CTAS; ++from)
            s += m.shares[(from * kOwned + owned(k)) * kPositions + lane];
        }
        s += m.given[owned(k) * kPositions + lane];
        if (a.saved != nullptr) static_cast<float*>(a.saved)[(arrival.set.row + lane) * in.units + n] = s;
      }
      const float greatest = greatest_of_warp(s), peak = greatest == -INFINITY ? 0 : greatest;
      const float p = s == -INFINITY ? 0 : ptx::exponential(s - peak);
      const T rounded = T(p);
      T* row = m.p + n * kWeights;
      row[lane] = rounded;
      const float total = sum_of_warp(p), rest = sum_of_warp((p - widen(rounded)) * m.rho[lane]);
      ptx::sync_warp();
      const int to = lane / 4, piece = lane % 4 * 8;
      if (to < CTAS && to != rank)
        *reinterpret_cast<Words*>(ptx::map(row + piece, to)) = *reinterpret_cast<const Words*>(row + piece);
      const float inverse = ptx::divide(1.0f, total > 0 ? total : 1.0f);
      const FloatPair shift = m.shift[owned(k)];  // alpha, beta
      if (lane < CTAS)
        *ptx::map(m.gains + n, lane) = {shift.a * inverse, shift.a * (rest * inverse) + shift.b};
      if (a.stats != nullptr && n < in.units && lane == 0) {
        float* stats = static_cast<float*>(a.stats) + arrival.set.index * in.units + n;
        stats[0] = greatest;
        stats[in.batch * in.units] = total;
        if (!in.shift) stats[2 * in.batch * in.units] = 0;
      }
    }
  }

  // u = gain p x + tau, which stays in the registers, and this block's share of ||u||², which goes to all.
  FASTAC_DEVICE void multiply_output(int stage, int side) {
    multiply_chunks<T, kPositions>(u, m.p, kWeights, tile(stage), stride, [&](int c) { return inside(c); });
    float squares[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const FloatPair gain = m.gains[Output::row(r)];
      squares[r] = 0;
#pragma unroll
      for (int c = 0; c < kChunks; ++c)
#pragma unroll
        for (int j = 0; j < Output::kWide; ++j) {
          const bool there = c * 64 + Output::left() + j * 8 < slice.width;
#pragma unroll
          for (int q = 0; q < 2; ++q) {
            float& value = u[c].at(r, j, q);
            value = gain.a * value + gain.b;
            if (there) squares[r] += value * value;
          }
        }
    }
    if (!in.shift) {
      ptx::sync();  // before the tile's next copies
      return;
    }
    Output::sum_rows(squares, m.squares);
    const int to = ptx::warp() % Output::kAcross * 4 + ptx::lane() % 4;
    if (to < CTAS) {
      float* norms = ptx::map(m.norms + side * BN * CTAS + rank, to);
#pragma unroll
      for (int r = 0; r < kRows; ++r) norms[Output::row(r) * CTAS] = squares[r];
    }
  }

  // y = factor u, once the shares of ||u||² are there.
  FASTAC_DEVICE void store_output(int64_t index, int side) {
    float factor[kRows];
    if (in.shift) {
      const int row = Output::row(ptx::lane() % 4);
      const float* shares = m.norms + (side * BN + row) * CTAS;
      float squares = 0;
#pragma unroll
      for (int from = 0; from < CTAS; ++from) squares += shares[from];
      const float norm = ptx::square_root(squares), scale = scale_of(in, norm);
      if (a.stats != nullptr && rank == 0 && ptx::warp() % Output::kAcross == 0 && row < in.units)
        static_cast<float*>(a.stats)[(2 * in.batch + index) * in.units + row] = norm;
#pragma unroll
      for (int r = 0; r < kRows; ++r) factor[r] = ptx::shuffle(scale, ptx::lane() / 4 * 4 + r);
    } else {
#pragma unroll
      for (int r = 0; r < kRows; ++r) factor[r] = 1;
    }
    T* y = static_cast<T*>(a.y) + index * in.units * in.features;
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
      if (inside(c))
        store_chunk<T, Output>(y, in.features, int(in.units), slice, c * 64,
                               [&](int r, int j, int q) { return u[c].at(r, j, q) * factor[r]; });
  }
};

}  // namespace fastac::cuda
