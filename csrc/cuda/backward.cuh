// Backward kernels for x and the scores, for sm_80 and later.
//
//     BackwardBlocks   one block of threads for BL positions of a set and all units: from dY and x the
//                      weights and e = dU xᵀ, then dX. Sets of one block have both in one launch (kWhole,
//                      kGram), longer sets have two, with BackwardSums between them
//
// With c = 1 / (sqrt(N) ||u||), or 1 / (sqrt(N) eps) below eps, and û = u / ||u||, or 0 below eps:
//
//     dU = c (dY - û (û·dY))        e = dU xᵀ / c        A = c alpha a
//     dS = A (e - rowsum(a e))      dX = Aᵀ dU / c + dSᵀ W
//     dalpha = dU·z                 dbeta = dU·1
//
// û comes from y = û / sqrt(N), or in the Gram form, which then need not read y, from u = alpha a d + tau 1,
// d = x - rho 1, tau = alpha (a·rho) + beta, by way of G = d dᵀ.
#pragma once

#include "backward_memory.cuh"
#include "backward_sums.cuh"

namespace fastac::cuda {

template <class T, int BL, int BN, Pass PASS>
struct BackwardBlocks {
  using Arguments = BackwardArguments;
  using Acc = Accumulator<T>;
  static constexpr int kWarps = BN == 16 ? BL / 16 : BL / 8;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kBlocksPerSm = 1;

 private:
  using Memory = BackwardMemory<T, BL, BN, PASS>;
  static constexpr int kTile = Memory::kTile, kMix = Memory::kMix, kGram = Memory::kGram,
                       kNarrow = Memory::kNarrow;
  static constexpr bool kFindsScores = Memory::kFindsScores, kFindsX = Memory::kFindsX;
  static constexpr bool kIsGram = PASS == Pass::kGram;
  static constexpr bool kSubtracts =
      kIsGram || !kHalf<T>;  // rho from x before products, the scores' excepted
  static_assert(!kIsGram || (BL == 32 && kHalf<T>));
  using Scores = Product<T, BN, BL, kWarps>;
  using Output = Product<T, BL, kFeatures<T>, kWarps>;
  using GramProduct = Product<T, BL, BL, kWarps>;

 public:
  static constexpr int kStages = Memory::kStages;

  // Bytes of shared memory of a launch.
  static FASTAC_HOST_DEVICE size_t shared_bytes(bool resident, int64_t features) {
    return Memory().lay_out(nullptr, resident, features);
  }

  static FASTAC_DEVICE void run(const Arguments& a) {
    const Place place = locate(a.in, a.blocks, ptx::block(), BL);
    Set set = place.set;
    if (!a.blocks.split) set.count = smaller(set.count, BL);  // as in the forward
    BackwardBlocks(a, set, place.block).compute();
  }

 private:
  FASTAC_DEVICE BackwardBlocks(const Arguments& arguments, const Set& its_set, int64_t its_block)
      : a(arguments),
        in(arguments.in),
        set(its_set),
        block(its_block),
        begin(its_block * BL),
        chunks(Memory::chunks_of(arguments.in.features)),
        unit_blocks(int((arguments.in.units + BN - 1) / BN)),
        with_y(arguments.in.shift && !kIsGram),
        all_sets(arguments.in.batch * arguments.in.units),
        set_n(its_set.index * arguments.in.units) {
    m.lay_out(ptx::shared(), a.resident, in.features);
  }

  const Arguments& a;
  const Operands& in;
  const Set set;
  const int64_t block, begin;  // number in the set, first position
  const int chunks, unit_blocks;
  const bool with_y;
  const int64_t all_sets, set_n;  // B N, and where the set's units begin in (B, N)
  Memory m;
  bool loaded = false, centred = false;  // whether all of x is in shared memory, for good; less rho

  FASTAC_DEVICE T* x_tile(int i, int chunk) { return m.x + (a.resident ? chunk : i % kStages) * BL * kTile; }
  FASTAC_DEVICE bool valid(int l) const { return takes_part(in, set, begin + l); }
  FASTAC_DEVICE int64_t mix_at(int l, int64_t n) const { return (set.row + begin + l) * in.units + n; }
  FASTAC_DEVICE Acc* mix(int which) const { return static_cast<Acc*>(a.mix) + which * in.rows * in.units; }

  FASTAC_DEVICE void load_x(int i, int chunk) {
    if (loaded) return;
    const auto row = [&](int r) { return valid(r) ? x_of<T>(in, set, begin + r) : nullptr; };
    load_tile<T, kThreads>(x_tile(i, chunk), BL, row, in.x, int64_t(chunk) * kFeatures<T>, in.features,
                           in.x_m, in.x_vectors);
  }
  // A tile [BN] of W, dY or y: `from` has units n0, n0 + 1, ... `stride` apart.
  FASTAC_DEVICE void load_units(T* tile, int i, const void* from, int64_t n0, int chunk, int64_t stride,
                                int64_t column_stride, bool vectors) {
    const auto row = [&](int r) {
      return n0 + r < in.units ? static_cast<const T*>(from) + (n0 + r) * stride : nullptr;
    };
    load_tile<T, kThreads>(tile + i % kStages * BN * kTile, BN, row, from, int64_t(chunk) * kFeatures<T>,
                           in.features, column_stride, vectors);
  }
  FASTAC_DEVICE void load_dy(int i, int64_t n0, int chunk) {
    load_units(m.dy, i, static_cast<const T*>(a.dy) + set.index * a.dy_b, n0, chunk, a.dy_n, a.dy_m,
               a.dy_vectors);
  }
  FASTAC_DEVICE void load_y(int i, int64_t n0, int chunk) {
    const T* y = static_cast<const T*>(a.y) + set_n * in.features;
    load_units(m.y, i, y, n0, chunk, in.features, 1, in.features % kPad<T> == 0);
  }
  FASTAC_DEVICE void load_weight(int i, int64_t n0, int chunk) {
    load_units(m.weight, i, in.weight, n0, chunk, in.weight_n, in.weight_m, in.weight_vectors);
  }
  FASTAC_DEVICE T* tile(T* tiles, int i) const { return tiles + i % kStages * BN * kTile; }

  FASTAC_DEVICE void centre_x(int i, int chunk) {
    if (centred) return;
    centre<T, kThreads>(x_tile(i, chunk), m.rho, BL, int64_t(chunk) * kFeatures<T>, in.features);
    ptx::sync();
  }

  FASTAC_DEVICE void compute() {
    const bool work = set.index < in.batch && begin < set.count;
    if (kFindsScores && a.counters != nullptr && ptx::block() == 0)
      for (int64_t i = ptx::thread(); i < a.tiles; i += kThreads) a.counters[i] = 0;
    if constexpr (kFindsScores)
      if (set.index < in.batch && (block == 0 || work)) {
        const Acc pivot = set_pivot<T>(in, set, kSubtracts);
        for (int nb = 0; nb < unit_blocks; ++nb) find_scores(nb, pivot);
      }
    if constexpr (kFindsX) {
      if (!work)
        clear();
      else {
        if constexpr (PASS == Pass::kSecond) finish_scores();
        if (a.dx != nullptr) find_x();
      }
    }
  }

  // Gradients of positions none of which is valid.
  FASTAC_DEVICE void clear() {
    const int rows = int(larger(smaller(BL, set.positions - begin), 0));
    if (a.dscores != nullptr)
      for (int64_t i = ptx::thread(); i < rows * in.units; i += kThreads)
        store_dscore(int(i % rows), i / rows, 0);
    if (a.dx != nullptr) {
      T* dx = static_cast<T*>(a.dx) + (set.row + begin) * in.features;
      for (int64_t i = ptx::thread(); i < rows * in.features; i += kThreads) dx[i] = T(Acc(0));
    }
  }

  FASTAC_DEVICE void store_dscore(int l, int64_t n, Acc value) {
    const int64_t at = in.layout == Layout::kPacked ? n * in.rows + set.row + begin + l
                                                    : (set.index * in.units + n) * in.length + begin + l;
    store<T>(Small{a.dscores, a.dscores_single}, at, value);
  }

  // Sums of a thread's part of a row of tiles of ROWS rows, kThreads / ROWS threads to a row.
  template <int ROWS>
  struct RowSums {
    static constexpr int kShare = kThreads / ROWS;
    Acc value[3] = {};

    // Adds the sums of s, of t, and of s t.
    FASTAC_DEVICE void add(const T* s, const T* t) {
      constexpr int kVector = 16 / sizeof(T);
      struct alignas(16) Piece {
        T v[kVector];
      };
      const int at = ptx::thread() / kShare * kTile;
      for (int c = ptx::thread() % kShare * kVector; c < kFeatures<T>; c += kShare * kVector) {
        const Piece first = *reinterpret_cast<const Piece*>(s + at + c);
        if (t == nullptr) {
#pragma unroll
          for (int d = 0; d < kVector; ++d) value[0] += widen(first.v[d]);
          continue;
        }
        const Piece second = *reinterpret_cast<const Piece*>(t + at + c);
#pragma unroll
        for (int d = 0; d < kVector; ++d) {
          value[0] += widen(first.v[d]);
          value[1] += widen(second.v[d]);
          value[2] += widen(first.v[d]) * widen(second.v[d]);
        }
      }
    }
    FASTAC_DEVICE void store(int which, Acc* sums) {
#pragma unroll
      for (int mask = kShare / 2; mask > 0; mask /= 2) value[which] += ptx::shuffle_xor(value[which], mask);
      if (ptx::thread() % kShare == 0) sums[ptx::thread() / kShare] = value[which];
    }
  };

  // One sweep over the features: every product with x, and the sums of dY and y; from them the weights and e.
  FASTAC_DEVICE void find_scores(int nb, Acc pivot) {
    const int64_t n0 = int64_t(nb) * BN;
    const bool recompute = in.weighting == Weighting::kLinear && a.saved == nullptr;
    Scores s, p, y_x;
    GramProduct gram;
    RowSums<BN> unit_sums;
    RowSums<BL> x_sums;
    s.clear();
    p.clear();
    y_x.clear();
    gram.clear();
    stream<kStages>(
        chunks,
        [&](int c) {
          load_x(c, c);
          load_dy(c, n0, c);
          if (recompute) load_weight(c, n0, c);
          if (with_y) load_y(c, n0, c);
        },
        [&](int c) {
          T *x = x_tile(c, c), *dy = tile(m.dy, c), *y = with_y ? tile(m.y, c) : nullptr;
          if (c == 0 && nb == 0) find_pivots<T, kWarps>(m.rho, x, BL, in.features, kSubtracts);
          if (recompute) s.template add<Factor::kRows>(tile(m.weight, c), kTile, x, kTile, kFeatures<T>);
          if constexpr (kSubtracts) {
            ptx::sync();
            centre_x(c, c);
          }
          p.template add<Factor::kRows>(dy, kTile, x, kTile, kFeatures<T>);
          if (with_y) y_x.template add<Factor::kRows>(y, kTile, x, kTile, kFeatures<T>);
          unit_sums.add(dy, y);
          if constexpr (kIsGram) {
            gram.template add<Factor::kRows>(x, kTile, x, kTile, kFeatures<T>);
            x_sums.add(x, nullptr);
          }
        });
    loaded = a.resident;
    centred = kSubtracts && a.resident;

    unit_sums.store(0, m.dy_sum);
    unit_sums.store(1, m.y_sum);
    unit_sums.store(2, m.y_dy);
    if constexpr (kIsGram) {
      x_sums.store(0, m.x_sum);
#pragma unroll
      for (int r = 0; r < GramProduct::kRowsOfThread; ++r)
#pragma unroll
        for (int j = 0; j < GramProduct::kWide; ++j)
#pragma unroll
          for (int q = 0; q < 2; ++q)
            m.gram[GramProduct::row(r) * kGram + GramProduct::column(j, q)] = gram.at(r, j, q);
    }
    Acc* pivots = static_cast<Acc*>(a.pivots);
    for (int l = ptx::thread(); l < BL; l += kThreads) {
      m.rest[l] = valid(l) ? m.rho[l] - pivot : Acc(0);
      if (nb == 0 && valid(l)) {
        pivots[set.row + begin + l] = m.rho[l];
        pivots[in.rows + set.row + begin + l] = m.rest[l];
      }
    }
    ptx::sync();
    weigh(n0, pivot, s, p, y_x, recompute);
    ptx::sync();
  }

  // From the products: s to the weights a, p to e.
  FASTAC_DEVICE void weigh(int64_t n0, Acc pivot, Scores& s, Scores& p, Scores& y_x, bool recompute) {
    constexpr int kRows = Scores::kRowsOfThread;
    const Acc* stats = static_cast<const Acc*>(a.stats) + set_n;
    Acc total[kRows], norm[kRows], alpha[kRows], beta[kRows], ones[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int row = Scores::row(r);
      const int64_t n = n0 + row;
      const bool unit = n < in.units;
      const Acc greatest = unit ? stats[n] : Acc(0);
      total[r] = unit ? stats[all_sets + n] : Acc(0);
      norm[r] = unit ? stats[2 * all_sets + n] : Acc(1);
      alpha[r] = in.shift && unit ? load<T>(in.alpha, n) : Acc(1);
      beta[r] = in.shift && unit ? load<T>(in.beta, n) : Acc(0);
      const Acc peak = greatest == Acc(-INFINITY) ? Acc(0) : greatest;
      const Acc inverse = ptx::divide(Acc(1), total[r] > 0 ? total[r] : Acc(1));
      const bool normalised = in.shift && is_normalised(in, norm[r]);
      // û (û·dY) = N y (y·dY)
      const Acc coefficient = with_y && normalised ? Acc(in.units) * m.y_dy[row] : Acc(0);
      ones[r] = m.dy_sum[row] - (with_y ? coefficient * m.y_sum[row] : Acc(0));
#pragma unroll
      for (int j = 0; j < Scores::kWide; ++j)
#pragma unroll
        for (int q = 0; q < 2; ++q) {
          const int l = Scores::column(j, q);
          Acc weight = 0;
          if (unit && valid(l)) {
            Acc score = a.saved != nullptr ? static_cast<const Acc*>(a.saved)[mix_at(l, n)]
                                           : given_score<T>(in, set, n, begin + l);
            if (recompute) score += s.at(r, j, q);
            weight = score == Acc(-INFINITY) ? Acc(0) : ptx::exponential(score - peak) * inverse;
          }
          s.at(r, j, q) = weight;
          Acc& e = p.at(r, j, q);
          if (!kSubtracts) {  // the products were with x itself
            e -= m.dy_sum[row] * m.rho[l];
            if (with_y) y_x.at(r, j, q) -= m.y_sum[row] * m.rho[l];
          }
          if (with_y) e -= coefficient * y_x.at(r, j, q);
        }
      if (with_y && Scores::leads() && unit && block == 0)
        static_cast<Acc*>(a.means)[set_n + n] = coefficient;
    }
    if constexpr (kIsGram)
      if (in.shift) project(n0, pivot, s, p, total, norm, alpha, beta, ones);
    store_scores(n0, pivot, s, p, total, norm, alpha, beta, ones);
  }

  // The Gram form: takes û (û·dY) off e and dU·1, and prepares its part of dX.
  FASTAC_DEVICE void project(int64_t n0, Acc pivot, Scores& s, Scores& p,
                             const Acc (&total)[Scores::kRowsOfThread],
                             const Acc (&norm)[Scores::kRowsOfThread],
                             const Acc (&alpha)[Scores::kRowsOfThread],
                             const Acc (&beta)[Scores::kRowsOfThread], Acc (&ones)[Scores::kRowsOfThread]) {
    constexpr int kRows = Scores::kRowsOfThread;
    Acc a_rest[kRows] = {}, a_p[kRows] = {}, a_x[kRows] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int j = 0; j < Scores::kWide; ++j)
#pragma unroll
        for (int q = 0; q < 2; ++q) {
          const int l = Scores::column(j, q);
          const Acc weight = s.at(r, j, q);
          m.weights[Scores::row(r) * kGram + l] = weight;
          a_rest[r] += weight * m.rest[l];
          a_p[r] += weight * p.at(r, j, q);
          a_x[r] += weight * m.x_sum[l];
        }
    Scores::sum_rows(a_rest, m.scratch);
    ptx::sync();
    Scores::sum_rows(a_p, m.scratch);
    ptx::sync();
    Scores::sum_rows(a_x, m.scratch);
    ptx::sync();
    Product<Acc, BN, BL, kWarps> a_gram;  // a G
    a_gram.clear();
    a_gram.template add<Factor::kRows>(m.weights, kGram, m.gram, kGram, BL);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int row = Scores::row(r);
      const Acc inverse = is_normalised(in, norm[r]) ? ptx::divide(Acc(1), norm[r]) : Acc(0);
      const Acc offset = total[r] > 0 ? pivot : Acc(0);
      const Acc tau = alpha[r] * a_rest[r] + (alpha[r] * offset + beta[r]);
      const Acc along = (alpha[r] * a_p[r] + tau * m.dy_sum[row]) * inverse;  // û·dY
      ones[r] -= along * inverse * (alpha[r] * a_x[r] + tau * Acc(in.features));
#pragma unroll
      for (int j = 0; j < Scores::kWide; ++j)
#pragma unroll
        for (int q = 0; q < 2; ++q)
          p.at(r, j, q) -=
              along * inverse * (alpha[r] * a_gram.at(r, j, q) + tau * m.x_sum[Scores::column(j, q)]);
      if (Scores::leads()) {
        const Acc weight = n0 + row < in.units ? alpha[r] * scale_of(in, norm[r]) * along * inverse : Acc(0);
        m.gram_weight[row] = weight * alpha[r];
        m.gram_tau[row] = weight * tau;
      }
    }
    ptx::sync();
    if (a.dx != nullptr) weigh_gram();
  }

  // K = sum over units of A (û·dY) alpha a / ||u||, and the same with tau.
  FASTAC_DEVICE void weigh_gram() {
    for (int l = ptx::warp(); l < BL; l += kWarps) {
      const int other = ptx::lane();
      Acc k = 0, ones = 0;
      if (other < BL)
        for (int n = 0; n < BN; ++n) {
          const Acc weight = m.weights[n * kGram + l];
          k += weight * m.gram_weight[n] * m.weights[n * kGram + other];
          ones += weight * m.gram_tau[n];
        }
      const Acc largest = greatest_of_warp(k < 0 ? -k : k), scale = largest > 0 ? largest : Acc(1);
      if (other < BL) m.k[l * kNarrow + other] = T(k / scale);
      if (other == 0) {
        m.k_scale[l] = scale;
        m.gram_ones[l] = ones;
      }
    }
  }

  // e = dU xᵀ / c, less a part that is the same for all positions; and what follows from it.
  FASTAC_DEVICE void store_scores(int64_t n0, Acc pivot, Scores& s, Scores& p,
                                  const Acc (&total)[Scores::kRowsOfThread],
                                  const Acc (&norm)[Scores::kRowsOfThread],
                                  const Acc (&alpha)[Scores::kRowsOfThread],
                                  const Acc (&beta)[Scores::kRowsOfThread],
                                  const Acc (&ones)[Scores::kRowsOfThread]) {
    constexpr int kRows = Scores::kRowsOfThread;
    Acc mean[kRows] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int j = 0; j < Scores::kWide; ++j)
#pragma unroll
        for (int q = 0; q < 2; ++q) {
          p.at(r, j, q) += ones[r] * m.rest[Scores::column(j, q)];
          mean[r] += s.at(r, j, q) * p.at(r, j, q);
        }
    Scores::sum_rows(mean, m.scratch);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t n = n0 + Scores::row(r);
      if (n >= in.units) continue;
      const Acc c = scale_of(in, norm[r]), offset = total[r] > 0 ? pivot : Acc(0);
#pragma unroll
      for (int j = 0; j < Scores::kWide; ++j)
#pragma unroll
        for (int q = 0; q < 2; ++q) {
          const int l = Scores::column(j, q);
          const Acc weighted = s.at(r, j, q) * (alpha[r] * c);  // A
          Acc e = p.at(r, j, q);
          if constexpr (PASS != Pass::kFirst) {
            e = weighted * (e - mean[r]);  // dS
            if (a.dscores != nullptr && begin + l < set.positions) store_dscore(l, n, valid(l) ? e : Acc(0));
          }
          if (valid(l)) {
            mix(0)[mix_at(l, n)] = weighted;
            mix(1)[mix_at(l, n)] = e;
          }
        }
      if (!Scores::leads()) continue;
      if constexpr (PASS == Pass::kFirst) {
        static_cast<Acc*>(a.sums)[ptx::block() * in.units + n] = mean[r];
        if (block == 0) {
          static_cast<Acc*>(a.means)[all_sets + set_n + n] = ones[r];
          static_cast<Acc*>(a.means)[3 * all_sets + set_n + n] = offset;
        }
      } else if (in.shift) {
        Acc dalpha, dbeta;
        shift_gradients(in, mean[r], ones[r], offset, alpha[r], beta[r], norm[r], dalpha, dbeta);
        static_cast<Acc*>(a.dshift)[set_n + n] = dalpha;
        static_cast<Acc*>(a.dshift)[all_sets + set_n + n] = dbeta;
      }
    }
  }

  // dS = A (e - rowsum(a e)), once the sum over all blocks is known.
  FASTAC_DEVICE void finish_scores() {
    const Acc* means = static_cast<const Acc*>(a.means) + 2 * all_sets + set_n;
    for (int64_t i = ptx::thread(); i < BL * in.units; i += kThreads) {
      const int l = int(i / in.units);
      const int64_t n = i % in.units;
      Acc ds = 0;
      if (valid(l)) {
        ds = mix(0)[mix_at(l, n)] * (mix(1)[mix_at(l, n)] - means[n]);
        mix(1)[mix_at(l, n)] = ds;
      }
      if (a.dscores != nullptr && begin + l < set.positions) store_dscore(l, n, ds);
    }
    ptx::sync();
  }

  // A row of `width` units rounded to T, each of the 32 lanes with the units lane, lane + 32, ... For half
  // types it is divided by its largest value first: so none leaves the range of float16, and weights that are
  // all equal stay exact.
  FASTAC_DEVICE void narrow(T* row, Acc* scale, const Acc (&value)[(BN + 31) / 32]) {
    Acc largest = 0;
    if constexpr (kHalf<T>) {
#pragma unroll
      for (int i = 0; i < (BN + 31) / 32; ++i) {
        const Acc size = value[i] < 0 ? -value[i] : value[i];
        largest = size > largest ? size : largest;
      }
      largest = greatest_of_warp(largest);
      if (!(largest > 0)) largest = 1;
    } else {
      largest = 1;
    }
#pragma unroll
    for (int i = 0; i < (BN + 31) / 32; ++i) {
      const int n = i * 32 + ptx::lane();
      if (n < BN) row[n] = kHalf<T> ? T(value[i] / largest) : T(value[i]);
    }
    if (ptx::lane() == 0) *scale = largest;
  }

  // What dY, W and y are multiplied by in dX.
  FASTAC_DEVICE void load_factors(int64_t n0) {
    constexpr int kEach = (BN + 31) / 32;
    for (int l = ptx::warp(); l < BL; l += kWarps) {
      Acc weight[kEach], ds[kEach], of_y[kEach];
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int64_t n = n0 + i * 32 + ptx::lane();
        const bool there = i * 32 + ptx::lane() < BN && n < in.units && valid(l);
        weight[i] = there ? mix(0)[mix_at(l, n)] : Acc(0);
        ds[i] = there ? mix(1)[mix_at(l, n)] : Acc(0);
        of_y[i] = there && with_y ? weight[i] * static_cast<const Acc*>(a.means)[set_n + n] : Acc(0);
      }
      narrow(m.a + l * kMix, m.a_scale + l, weight);
      narrow(m.ds + l * kMix, m.ds_scale + l, ds);
      if constexpr (kHalf<T> && !kIsGram) narrow(m.of_y + l * kMix, m.of_y_scale + l, of_y);
    }
    if constexpr (!kHalf<T>)
      for (int n = ptx::thread(); n < BN; n += kThreads)
        m.coefficient[n] =
            with_y && n0 + n < in.units ? static_cast<const Acc*>(a.means)[set_n + n0 + n] : Acc(0);
    ptx::sync();
  }

  // dX = Aᵀ dU / c + dSᵀ W
  FASTAC_DEVICE void find_x() {
    if (unit_blocks == 1) load_factors(0);
    const bool linear = in.weighting == Weighting::kLinear;
    const int rows = int(smaller(BL, set.positions - begin));
    T* dx = static_cast<T*>(a.dx) + (set.row + begin) * in.features;
    Output total;
    stream<kStages>(
        chunks * unit_blocks,
        [&](int i) {
          const int64_t n0 = int64_t(i % unit_blocks) * BN;
          const int c = i / unit_blocks;
          if (kIsGram && in.shift) load_x(i, c);
          load_dy(i, n0, c);
          if (linear) load_weight(i, n0, c);
          if (with_y) load_y(i, n0, c);
        },
        [&](int i) {
          const int nb = i % unit_blocks, c = i / unit_blocks;
          if (unit_blocks > 1) load_factors(int64_t(nb) * BN);
          if (nb == 0) total.clear();
          T *dy = tile(m.dy, i), *y = with_y ? tile(m.y, i) : nullptr;
          if constexpr (!kHalf<T>)
            if (with_y) {
              for (int k = ptx::thread(); k < BN * kFeatures<T>; k += kThreads) {
                const int at = k / kFeatures<T> * kTile + k % kFeatures<T>;
                dy[at] -= m.coefficient[k / kFeatures<T>] * y[at];
              }
              ptx::sync();
            }
          add(total, m.a, kMix, dy, m.a_scale, BN, 1);
          if (linear) add(total, m.ds, kMix, tile(m.weight, i), m.ds_scale, BN, 1);
          if constexpr (kHalf<T> && !kIsGram)
            if (with_y) add(total, m.of_y, kMix, y, m.of_y_scale, BN, -1);
          if (nb < unit_blocks - 1) return;
          if constexpr (kIsGram)
            if (in.shift) {
              centre_x(i, c);
              add(total, m.k, kNarrow, x_tile(i, c), m.k_scale, BL, -1);
            }
          store_x(dx, rows, c, total);
        });
  }

  // total += sign scale (factor times tile), the factor [BL, depth] having rows of that scale.
  FASTAC_DEVICE void add(Output& total, const T* factor, int stride, const T* tile, const Acc* scale,
                         int depth, int sign) {
    if constexpr (!kHalf<T>) {
      total.template add<Factor::kColumns>(factor, stride, tile, kTile, depth);
    } else {
      Output part;
      part.clear();
      part.template add<Factor::kColumns>(factor, stride, tile, kTile, depth);
#pragma unroll
      for (int r = 0; r < Output::kRowsOfThread; ++r) {
        const Acc by = Acc(sign) * scale[Output::row(r)];
#pragma unroll
        for (int j = 0; j < Output::kWide; ++j)
#pragma unroll
          for (int q = 0; q < 2; ++q) total.at(r, j, q) += by * part.at(r, j, q);
      }
    }
  }

  FASTAC_DEVICE void store_x(T* dx, int rows, int chunk, Output& total) {
#pragma unroll
    for (int r = 0; r < Output::kRowsOfThread; ++r) {
      const int l = Output::row(r);
      const bool there = valid(l);
      const Acc ones = kIsGram && in.shift ? m.gram_ones[l] : Acc(0);
#pragma unroll
      for (int j = 0; j < Output::kWide; ++j)
#pragma unroll
        for (int q = 0; q < 2; ++q)
          m.staged[l * kTile + Output::column(j, q)] = T(there ? total.at(r, j, q) - ones : Acc(0));
    }
    ptx::sync();
    store_tile<T, kThreads>(dx, in.features, m.staged, rows, int64_t(chunk) * kFeatures<T>);
  }
};

}  // namespace fastac::cuda
