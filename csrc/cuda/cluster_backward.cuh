// The backward kernel for sm_90 and later, half types: a cluster of CTAS blocks for one set after the other,
// in the Gram form of backward.cuh, which does not read y.
//
// Every block keeps its slice of W for the whole launch; x and dY are read once and dX is written once. dW is
// left to BackwardReduce. A set has three cluster barriers, before each of which blocks write to others:
//
//     [shares]  of s, P = dY dᵀ, dY 1 to the owners of the units, of G = d dᵀ, d 1 to those of the positions
//     [gram]    G and d 1, now summed, to all; and the weights a
//     [factors] dS and what K takes, to all
//
// Then every block makes its slice of dX, begins the copies of a later set and goes on with the next one's
// shares. Each buffer that others write to is read before the last barrier but one of its next use, so one of
// each is enough.
#pragma once

#include "backward_sums.cuh"
#include "cluster_backward_memory.cuh"

namespace fastac::cuda {

template <class T, int CTAS, int BN = 64>
struct BackwardCluster {
  static_assert(kHalf<T> && (CTAS == 4 || CTAS == 8) && (BN == 32 || BN == 64));
  using Arguments = BackwardArguments;
  static constexpr int kWarps = BN / 8;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kBlocksPerSm = 1;
  static constexpr int kStages = BackwardClusterMemory<T, CTAS, BN>::kStages;

 private:
  using Memory = BackwardClusterMemory<T, CTAS, BN>;
  using Factors = typename Memory::Factors;
  static constexpr int kPositions = Memory::kPositions, kOwned = Memory::kOwned;
  static constexpr int kGramRows = Memory::kGramRows, kHead = Memory::kHead;
  static constexpr int kMix = Memory::kMix, kNarrow = Memory::kNarrow, kRow = Memory::kRow;
  static constexpr int kEach = kOwned / kWarps;  // units that a warp owns
  using Scores = Product<T, BN, kPositions, kWarps>;
  using Output = Product<T, kPositions, 64, kWarps>;

 public:
  // Bytes of shared memory of a launch.
  static FASTAC_HOST_DEVICE size_t shared_bytes(int64_t features) {
    Memory m;
    return m.lay_out(nullptr, features);
  }
  // Whether the kernel can take the call; dX is 16-byte aligned besides. The grid is any multiple of CTAS.
  static bool fits(const Arguments& a) { return cluster_fits(a.in, CTAS, BN) && a.dy_vectors; }

  static FASTAC_DEVICE void run([[maybe_unused]] const Arguments& a) {
    if constexpr (kHasClusters) {
      BackwardCluster cluster(a);
      cluster.clear();
      if (ptx::block() / CTAS < a.in.batch) cluster.compute();
    } else {
      ptx::cluster_sync();  // traps
    }
  }

 private:
  FASTAC_DEVICE explicit BackwardCluster(const Arguments& arguments)
      : a(arguments),
        in(arguments.in),
        rank(ptx::cluster_rank()),
        slice(arguments.in.features, CTAS, rank),
        stride(int(slice_stride<T>(arguments.in.features, CTAS))),
        clusters(ptx::blocks() / CTAS),
        all_sets(arguments.in.batch * arguments.in.units),
        linear(arguments.in.weighting == Weighting::kLinear),
        recompute(linear && arguments.saved == nullptr) {
    m.lay_out(ptx::shared(), in.features);
  }

  const Arguments& a;
  const Operands& in;
  const int rank;
  const Slice slice;
  const int stride;
  const int64_t clusters, all_sets;
  const bool linear, recompute;
  Memory m;
  // Of the warp's units, loaded long before they are of use: their scores at this lane's position, but for a
  // recomputed W x; and in lanes 0, 1 and 2 their stats.
  float given[kEach], stats[kEach];
  // Their weight and row of P at this lane's position, and dY 1.
  float weight[kEach], p[kEach], ones[kEach];

  FASTAC_DEVICE T* x_tile(int stage) { return m.x + stage * kPositions * stride; }
  FASTAC_DEVICE T* dy_tile(int stage) { return m.dy + stage * BN * stride; }
  FASTAC_DEVICE T* head_tile(int stage) { return m.head + stage * kPositions * kHead; }
  FASTAC_DEVICE int owned(int k) const { return ptx::warp() + k * kWarps; }
  FASTAC_DEVICE int unit(int k) const { return rank * kOwned + owned(k); }
  FASTAC_DEVICE bool inside(int chunk) const { return chunk * 64 + Output::left() < slice.columns; }
  static FASTAC_DEVICE bool is_valid(const Arrival& arrival, int l) { return (arrival.valid >> l & 1) != 0; }
  FASTAC_DEVICE int head_features() const { return int(smaller(in.features, kHead)); }
  // rho less the pivot of the set, which is rho of its first valid position.
  FASTAC_DEVICE float pivot_of_set(const Arrival& arrival) const {
    int first = 0;
    while (first < kPositions - 1 && !is_valid(arrival, first)) ++first;
    return arrival.valid != 0 ? m.rho[first] : 0.0f;
  }
  FASTAC_DEVICE float rest(const Arrival& arrival, float pivot) const {
    return is_valid(arrival, ptx::lane()) ? m.rho[ptx::lane()] - pivot : 0.0f;
  }

  FASTAC_DEVICE void compute() {
    prepare();
    const int64_t first = ptx::block() / CTAS;
    Upcoming coming(in, first);
    const auto load_next = [&](int stage, int64_t index) {
      if (ptx::warp() != 0 || index >= in.batch) return;
      load_set(stage, index, coming);
      coming = Upcoming(in, index + clusters);
    };
    for (int stage = 0; stage < kStages; ++stage) load_next(stage, first + stage * clusters);
    ptx::sync();

    int stage = 0, parity = 0;  // of the set to come
    find_shares(stage, parity);
    ptx::cluster_sync();
    for (int64_t index = first; index < in.batch; index += clusters) {
      const Arrival& arrival = m.arrivals[stage];
      share_gram();
      ptx::cluster_arrive();
      weigh(arrival);
      ptx::cluster_wait();
      project(arrival);
      ptx::cluster_sync();
      find_factors(arrival);
      if (a.dx != nullptr) find_x(arrival, stage);
      if (arrival.set.positions > kPositions)
        clear_rows(arrival.set.row + kPositions, arrival.set.row + arrival.set.positions);
      ptx::proxy_fence();  // the tile of x was centred
      ptx::sync();
      load_next(stage, index + kStages * clusters);
      stage = (stage + 1) % kStages;
      if (stage == 0) parity ^= 1;
      if (index + clusters < in.batch) {
        find_shares(stage, parity);
        ptx::cluster_sync();
      }
    }
  }

  // What no set of the main loop does: BackwardReduce's counters, and the packed rows behind the last set.
  FASTAC_DEVICE void clear() {
    if (a.counters != nullptr && ptx::block() == 0)
      for (int64_t i = ptx::thread(); i < a.tiles; i += kThreads) a.counters[i] = 0;
    if (in.layout == Layout::kPacked && ptx::block() / CTAS == 0)
      clear_rows(offset_at(in, in.batch), in.length);
  }

  // Gradients of packed rows that belong to no set or are more than a tile holds.
  FASTAC_DEVICE void clear_rows(int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (a.dx != nullptr)
        for (int c = ptx::thread(); c < slice.width; c += kThreads)
          static_cast<T*>(a.dx)[row * in.features + slice.first + c] = T(0.0f);
      if (a.dscores != nullptr)
        for (int n = rank + ptx::thread() * CTAS; n < in.units; n += kThreads * CTAS)
          store<T>(Small{a.dscores, a.dscores_single}, n * in.rows + row, 0.0f);
    }
  }

  FASTAC_DEVICE void prepare() {
    if (ptx::thread() < kStages) {
      ptx::barrier_init(m.barriers + ptx::thread(), 1);
      m.arrivals[ptx::thread()].valid = 0;
      ptx::barrier_fence();
    }
    const int row = stride * int(sizeof(T));
    clear_shared<kThreads>(m.x, kStages * kPositions * row, ptx::thread());
    clear_shared<kThreads>(m.dy, kStages * BN * row, ptx::thread());
    ptx::proxy_fence();
    if (recompute || (linear && a.dx != nullptr))
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

  // Starts the copies of a set: this block's part of x and dY, and the first features of x.
  FASTAC_DEVICE void load_set(int stage, int64_t index, const Upcoming& coming) {
    uint64_t* barrier = m.barriers + stage;
    const int lane = ptx::lane(), bytes = slice.width * int(sizeof(T));
    const int head = head_features() * int(sizeof(T)), rows = sum_of_warp(int(coming.valid));
    load_rows(x_tile(stage), stride, slice, in, index, coming, m.arrivals + stage, barrier,
              rows * head + int(in.units) * bytes);
    if (coming.valid)
      ptx::bulk_load(head_tile(stage) + lane * kHead, x_of<T>(in, {index, coming.row, 0, 0}, lane), head,
                     barrier);
    const T* dy = static_cast<const T*>(a.dy) + index * a.dy_b + slice.first;
    if (bytes > 0)
      for (int n = lane; n < in.units; n += 32)
        ptx::bulk_load(dy_tile(stage) + n * stride, dy + n * a.dy_n, bytes, barrier);
  }

  // Sums of rows of a tile, SHARE neighbouring threads to a row; change(value, row) comes first. The result
  // is the same in all of them.
  template <int SHARE, class Change>
  FASTAC_DEVICE float sum_row(T* row, Change change) {
    struct alignas(16) Piece {
      T v[8];
    };
    float sum = 0;
    for (int c = ptx::thread() % SHARE * 8; c < slice.width; c += SHARE * 8) {
      Piece& piece = *reinterpret_cast<Piece*>(row + c);
#pragma unroll
      for (int d = 0; d < 8; ++d) sum += widen(change(piece.v[d]));
    }
#pragma unroll
    for (int mask = SHARE / 2; mask > 0; mask /= 2) sum += ptx::shuffle_xor(sum, mask);
    return sum;
  }

  // This block's shares of the products with x and d.
  FASTAC_DEVICE void find_shares(int stage, int parity) {
    const Arrival& arrival = m.arrivals[stage];
    load_given(arrival);
    ptx::barrier_wait(m.barriers + stage, parity);
    T *x = x_tile(stage), *dy = dy_tile(stage);
    find_rho(arrival, head_tile(stage));
    if (recompute) {
      Scores s;
      s.clear();
      s.template add<Factor::kRows>(m.weight, stride, x, stride, slice.columns);
      send(s, m.s_shares);
    }
    {
      constexpr int kShare = kThreads / BN;
      const int n = ptx::thread() / kShare;
      const float sum = sum_row<kShare>(dy + n * stride, [](T& value) { return value; });
      if (ptx::thread() % kShare == 0) *ptx::map(m.dy_shares + rank * kOwned + n % kOwned, n / kOwned) = sum;
    }
    ptx::sync();
    {
      constexpr int kShare = kThreads / kPositions;
      const int l = ptx::thread() / kShare;
      const float rho = m.rho[l];
      const float sum =
          sum_row<kShare>(x + l * stride, [&](T& value) { return value = T(widen(value) - rho); });
      if (ptx::thread() % kShare == 0) *ptx::map(gram_share(l) + kPositions, l / kGramRows) = sum;
    }
    ptx::sync();
    Scores product;
    product.clear();
    product.template add<Factor::kRows>(dy, stride, x, stride, slice.columns);
    send(product, m.p_shares);
    if (in.shift) multiply_gram(x);
  }

  // Where in the shared memory of its owner this block's share of row l of G is.
  FASTAC_DEVICE float* gram_share(int l) { return m.gram_shares + (rank * kGramRows + l % kGramRows) * kRow; }

  FASTAC_DEVICE void send(Scores& product, float* shares) {
#pragma unroll
    for (int r = 0; r < Scores::kRowsOfThread; ++r) {
      const int row = Scores::row(r);
      float* target = ptx::map(shares + (rank * kOwned + row % kOwned) * kPositions, row / kOwned);
#pragma unroll
      for (int j = 0; j < Scores::kWide; ++j)
        *reinterpret_cast<FloatPair*>(target + Scores::column(j, 0)) = {product.at(r, j, 0),
                                                                        product.at(r, j, 1)};
    }
  }

  FASTAC_DEVICE void load_given(const Arrival& arrival) {
    const int lane = ptx::lane();
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const int n = unit(k);
      given[k] = stats[k] = 0;
      if (n >= in.units) continue;
      if (is_valid(arrival, lane))
        given[k] = a.saved != nullptr
                       ? static_cast<const float*>(a.saved)[(arrival.set.row + lane) * in.units + n]
                       : given_score<T>(in, arrival.set, n, lane);
      if (lane < 3)
        stats[k] = static_cast<const float*>(a.stats)[lane * all_sets + arrival.set.index * in.units + n];
    }
  }

  // rho as find_pivots has it, from the same features in all blocks.
  FASTAC_DEVICE void find_rho(const Arrival& arrival, const T* head) {
    const int count = head_features();
    for (int l = ptx::warp(); l < kPositions; l += kWarps) {
      float sum = 0, squares = 0;
      if (is_valid(arrival, l))
        for (int c = ptx::lane(); c < count; c += 32) {
          const float x = widen(head[l * kHead + c]);
          sum += x;
          squares += x * x;
        }
      sum = sum_of_warp(sum);
      squares = sum_of_warp(squares);
      if (ptx::lane() == 0) m.rho[l] = pivot_of<T>(sum, squares, count, true);
    }
  }

  // This block's share of G = d dᵀ: tiles of 16 x 8, one or two to a warp.
  FASTAC_DEVICE void multiply_gram(const T* d) {
    const int lane = ptx::lane();
    for (int tile = ptx::warp(); tile < 8; tile += kWarps) {
      const int top = tile / 4 * 16, left = tile % 4 * 8;
      const T* a_at = d + (top + lane % 16) * stride + lane / 16 * 8;
      // The other two of four matrices are the same two again.
      const T* b_at = d + (left + lane % 8) * stride + lane / 8 % 2 * 8;
      float c[4] = {};
#pragma unroll 4
      for (int k = 0; k < slice.columns; k += 16) {
        uint32_t first[4], second[4];
        ptx::load_matrices(first, a_at + k);
        ptx::load_matrices(second, b_at + k);
        const uint32_t b[2] = {second[0], second[1]};
        ptx::multiply_add<T>(c, first, b);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int l = top + half * 8 + lane / 4;
        float* target = ptx::map(gram_share(l), l / kGramRows);
        *reinterpret_cast<FloatPair*>(target + left + lane % 4 * 2) = {c[2 * half], c[2 * half + 1]};
      }
    }
  }

  // Sums this block's rows of G and of d 1, for all.
  FASTAC_DEVICE void share_gram() {
    if (!in.shift) return;
    constexpr int kPieces = kRow / 4, kAll = kGramRows * kPieces;
    struct alignas(16) Piece {
      float v[4];
    };
    for (int i = ptx::thread(); i < kAll * CTAS; i += kThreads) {
      const int to = i / kAll, row = i % kAll / kPieces, column = i % kPieces * 4;
      Piece sum{};
#pragma unroll
      for (int from = 0; from < CTAS; ++from) {
        const Piece share =
            *reinterpret_cast<const Piece*>(m.gram_shares + (from * kGramRows + row) * kRow + column);
#pragma unroll
        for (int d = 0; d < 4; ++d) sum.v[d] += share.v[d];
      }
      *reinterpret_cast<Piece*>(ptx::map(m.gram + (rank * kGramRows + row) * kRow + column, to)) = sum;
    }
  }

  // Sends a row of positions, of which this warp has written its own block's copy, to the other blocks.
  FASTAC_DEVICE void send_row(float* row) {
    ptx::sync_warp();
    for (int i = ptx::lane(); i < CTAS * 8; i += 32) {
      const int to = i / 8, piece = i % 8 * 4;
      if (to != rank)
        *reinterpret_cast<Words*>(ptx::map(row + piece, to)) = *reinterpret_cast<const Words*>(row + piece);
    }
  }

  // The weights a of this block's units, for all; and what else comes from the shares.
  FASTAC_DEVICE void weigh(const Arrival& arrival) {
    const int lane = ptx::lane();
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const int n = unit(k);
      float s = given[k];
      p[k] = ones[k] = 0;
#pragma unroll
      for (int from = 0; from < CTAS; ++from) {
        const int at = from * kOwned + owned(k);
        if (recompute) s += m.s_shares[at * kPositions + lane];
        p[k] += m.p_shares[at * kPositions + lane];
        ones[k] += m.dy_shares[at];
      }
      const float greatest = ptx::shuffle(stats[k], 0), total = ptx::shuffle(stats[k], 1);
      const float peak = greatest == -INFINITY ? 0 : greatest;
      const float inverse = ptx::divide(1.0f, total > 0 ? total : 1.0f);
      weight[k] = 0;
      if (is_valid(arrival, lane) && n < in.units && s != -INFINITY)
        weight[k] = ptx::exponential(s - peak) * inverse;
      m.weights[n * kRow + lane] = weight[k];
      send_row(m.weights + n * kRow);
    }
  }

  // As in BackwardBlocks, for the units of this block: takes û (û·dY) off e and dU·1, and from e dS.
  FASTAC_DEVICE void project(const Arrival& arrival) {
    const int lane = ptx::lane();
    const float pivot = pivot_of_set(arrival), from_pivot = rest(arrival, pivot);
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const int n = unit(k);
      const bool there = n < in.units;
      const float total = ptx::shuffle(stats[k], 1), norm = there ? ptx::shuffle(stats[k], 2) : 1.0f;
      const FloatPair shift = m.shift[owned(k)];
      const float alpha = shift.a, beta = shift.b, offset = total > 0 ? pivot : 0, c = scale_of(in, norm);
      Factors factors{alpha * c, 0, 0, 0};
      if (in.shift) {
        const float x_sum = m.gram[lane * kRow + kPositions], dy_sum = ones[k];
        const float a_rest = sum_of_warp(weight[k] * from_pivot), a_p = sum_of_warp(weight[k] * p[k]),
                    a_x = sum_of_warp(weight[k] * x_sum);
        float a_gram = 0;
        for (int l = 0; l < kPositions; ++l) a_gram += m.weights[n * kRow + l] * m.gram[l * kRow + lane];
        const float inverse = is_normalised(in, norm) ? ptx::divide(1.0f, norm) : 0.0f;
        const float tau = alpha * a_rest + (alpha * offset + beta);
        const float along = (alpha * a_p + tau * dy_sum) * inverse;  // û·dY
        ones[k] -= along * inverse * (alpha * a_x + tau * float(in.features));
        p[k] -= along * inverse * (alpha * a_gram + tau * x_sum);
        const float by = there ? alpha * c * along * inverse : 0.0f;
        factors.gram = by * alpha;
        factors.tau = by * tau;
      }
      const float e = p[k] + ones[k] * from_pivot, mean = sum_of_warp(weight[k] * e);
      const float ds = there ? weight[k] * factors.a * (e - mean) : 0.0f;
      if (there && a.dscores != nullptr && lane < arrival.set.positions)
        store<T>(Small{a.dscores, a.dscores_single},
                 in.layout == Layout::kPacked ? n * in.rows + arrival.set.row + lane
                                              : (arrival.set.index * in.units + n) * in.length + lane,
                 is_valid(arrival, lane) ? ds : 0.0f);
      if (there && in.shift && lane == 0) {
        float dalpha, dbeta;
        shift_gradients(in, mean, ones[k], offset, alpha, beta, norm, dalpha, dbeta);
        float* dshift = static_cast<float*>(a.dshift) + arrival.set.index * in.units + n;
        dshift[0] = dalpha;
        dshift[all_sets] = dbeta;
      }
      m.ds[n * kRow + lane] = ds;
      send_row(m.ds + n * kRow);
      if (lane < CTAS) *ptx::map(m.factors + n, lane) = factors;
    }
  }

  // A row of units rounded to T after division by its largest value.
  FASTAC_DEVICE void narrow(T* row, float* scale, const float (&value)[BN / 32]) {
    float largest = 0;
#pragma unroll
    for (int i = 0; i < BN / 32; ++i) {
      const float size = value[i] < 0 ? -value[i] : value[i];
      largest = size > largest ? size : largest;
    }
    largest = greatest_of_warp(largest);
    if (!(largest > 0)) largest = 1;
#pragma unroll
    for (int i = 0; i < BN / 32; ++i) row[i * 32 + ptx::lane()] = T(value[i] / largest);
    if (ptx::lane() == 0) *scale = largest;
  }

  // What dY, W and d are multiplied by in dX; and what BackwardReduce needs, each block its positions.
  FASTAC_DEVICE void find_factors(const Arrival& arrival) {
    const int lane = ptx::lane();
    float* mix = static_cast<float*>(a.mix);
    for (int l = ptx::warp(); l < kPositions; l += kWarps) {
      float weighted[BN / 32], ds[BN / 32], tau = 0;
#pragma unroll
      for (int i = 0; i < BN / 32; ++i) {
        const int n = i * 32 + lane;
        const Factors factors = m.factors[n];
        const float weight_n = m.weights[n * kRow + l];
        weighted[i] = weight_n * factors.a;
        ds[i] = m.ds[n * kRow + l];
        tau += weight_n * factors.tau;
        if (l / kGramRows == rank && is_valid(arrival, l) && n < in.units) {
          const int64_t at = (arrival.set.row + l) * in.units + n;
          mix[at] = weighted[i];
          mix[in.rows * in.units + at] = ds[i];
        }
      }
      if (a.dx == nullptr) continue;
      narrow(m.a + l * kMix, m.a_scale + l, weighted);
      narrow(m.narrow_ds + l * kMix, m.ds_scale + l, ds);
      tau = sum_of_warp(tau);
      if (lane == 0) m.ones[l] = tau;
    }
    if (rank == 0 && ptx::warp() == 0 && is_valid(arrival, lane)) {
      float* pivots = static_cast<float*>(a.pivots) + arrival.set.row + lane;
      pivots[0] = m.rho[lane];
      pivots[in.rows] = rest(arrival, pivot_of_set(arrival));
    }
    if (a.dx != nullptr && in.shift) weigh_gram();
  }

  // K = sum over units of a gram a: a warp has four rows at a time, a lane four columns of them for every
  // fourth unit.
  FASTAC_DEVICE void weigh_gram() {
    struct alignas(16) Piece {
      float v[4];
    };
    const int lane = ptx::lane(), column = lane % 8 * 4;
    for (int top = ptx::warp() * 4; top < kPositions; top += kWarps * 4) {
      float k[4][4] = {};
#pragma unroll 4
      for (int n = lane / 8; n < BN; n += 4) {
        const Piece rows = *reinterpret_cast<const Piece*>(m.weights + n * kRow + top);
        const Piece columns = *reinterpret_cast<const Piece*>(m.weights + n * kRow + column);
        const float by = m.factors[n].gram;
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j) k[i][j] += rows.v[i] * by * columns.v[j];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float largest = 0;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          k[i][j] += ptx::shuffle_xor(k[i][j], 8);
          k[i][j] += ptx::shuffle_xor(k[i][j], 16);
          const float size = k[i][j] < 0 ? -k[i][j] : k[i][j];
          largest = size > largest ? size : largest;
        }
        largest = greatest_of_warp(largest);
        if (!(largest > 0)) largest = 1;
        if (lane < 8)
#pragma unroll
          for (int j = 0; j < 4; ++j) m.k[(top + i) * kNarrow + column + j] = T(k[i][j] / largest);
        if (lane == 0) m.k_scale[top + i] = largest;
      }
    }
  }

  // dX = Aᵀ dY + dSᵀ W - K d - the all-ones part
  FASTAC_DEVICE void find_x(const Arrival& arrival, int stage) {
    ptx::sync();
    Output total[kChunks];
#pragma unroll
    for (int c = 0; c < kChunks; ++c) total[c].clear();
    add<BN>(total, m.a, kMix, dy_tile(stage), m.a_scale, 1);
    if (linear) add<BN>(total, m.narrow_ds, kMix, m.weight, m.ds_scale, 1);
    if (in.shift) add<kPositions>(total, m.k, kNarrow, x_tile(stage), m.k_scale, -1);
    float ones_of[Output::kRowsOfThread];
    bool there[Output::kRowsOfThread];
#pragma unroll
    for (int r = 0; r < Output::kRowsOfThread; ++r) {
      ones_of[r] = in.shift ? m.ones[Output::row(r)] : 0.0f;
      there[r] = is_valid(arrival, Output::row(r));
    }
    T* dx = static_cast<T*>(a.dx) + arrival.set.row * in.features;
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
      if (inside(c))
        store_chunk<T, Output>(
            dx, in.features, int(arrival.set.positions), slice, c * 64,
            [&](int r, int j, int q) { return there[r] ? total[c].at(r, j, q) - ones_of[r] : 0.0f; });
  }

  // total += sign scale (factor times tile), the factor [kPositions, K] having rows of that scale.
  template <int K>
  FASTAC_DEVICE void add(Output (&total)[kChunks], const T* factor, int factor_stride, const T* tile,
                         const float* scale, float sign) {
    Output part[kChunks];
    multiply_chunks<T, K>(part, factor, factor_stride, tile, stride, [&](int c) { return inside(c); });
#pragma unroll
    for (int r = 0; r < Output::kRowsOfThread; ++r) {
      const float by = sign * scale[Output::row(r)];
#pragma unroll
      for (int c = 0; c < kChunks; ++c)
#pragma unroll
        for (int j = 0; j < Output::kWide; ++j)
#pragma unroll
          for (int q = 0; q < 2; ++q) total[c].at(r, j, q) += by * part[c].at(r, j, q);
    }
  }
};

}  // namespace fastac::cuda
