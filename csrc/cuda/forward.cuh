// Forward kernels for sm_80 and later.
//
//     ForwardBlocks    one block of threads for some positions of a set, in tiles of BL, and BN units: y,
//                      or its share of z
//     ForwardCombine   y from the shares of all blocks of a set
//
// A block reads its part of x once where that fits into shared memory (`resident`), else once for the scores,
// once for ||u|| and once for y, the second and third time from the cache.
#pragma once

#include "rows.cuh"

namespace fastac::cuda {

template <class T, int BL, int BN>
struct ForwardBlocks {
  using Arguments = ForwardArguments;
  using Acc = Accumulator<T>;
  static constexpr int kWarps = BN == 16 ? BL / 16 : BL / 8;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kBlocksPerSm = 1;
  static constexpr int kStages = kHalf<T> ? 3 : 2;

 private:
  static constexpr int kTile = kStride<T>;
  using Scores = Product<T, BN, BL, kWarps>;
  using Output = Product<T, BN, kFeatures<T>, kWarps>;

  // Shared memory, in this order; every part is a multiple of 16 bytes. A row of scores makes room for the
  // row of p that comes of it.
  struct Memory {
    T* x;          // [chunks or stages][BL][kTile]
    T* weight;     // [stages][BN][kTile]; later y [BN][kTile]
    Acc* scores;   // [BN][positions + 4]
    Acc* gain;     // [BN]: u = gain core + tau
    Acc* tau;      // [BN]
    Acc* factor;   // [BN]: y = factor u
    Acc* squares;  // [Output::kAcross][BN]
    Acc* rho;      // [positions]
  };
  static FASTAC_HOST_DEVICE int chunks_of(int64_t features) {
    return int((features + kFeatures<T> - 1) / kFeatures<T>);
  }
  // Walks through the parts of shared memory; returns their bytes.
  static FASTAC_HOST_DEVICE size_t lay_out(Memory& m, unsigned char* begin, bool resident, int64_t features,
                                           int64_t positions) {
    unsigned char* next = begin;
    const auto take = [&next](auto*& part, size_t count) {
      part = reinterpret_cast<std::remove_reference_t<decltype(part)>>(next);
      next += count * sizeof(*part);
    };
    take(m.x, size_t(resident ? chunks_of(features) : kStages) * BL * kTile);
    take(m.weight, kStages * BN * kTile);
    take(m.scores, BN * (positions + 4));
    take(m.gain, BN);
    take(m.tau, BN);
    take(m.factor, BN);
    take(m.squares, Output::kAcross * BN);
    take(m.rho, positions);
    return size_t(next - begin);
  }

 public:
  // Bytes of shared memory of a launch with `positions` to a block, a multiple of BL; `resident` asks for BL.
  static FASTAC_HOST_DEVICE size_t shared_bytes(bool resident, int64_t features, int64_t positions) {
    Memory m;
    return lay_out(m, nullptr, resident, features, positions);
  }

  static FASTAC_DEVICE void run(const Arguments& a) {
    const Operands& in = a.in;
    const Place place = locate(in, a.blocks, ptx::block() / a.unit_blocks, a.blocks.positions);
    Set set = place.set;
    // One block is all there is, even where a set is longer than the caller's max_length.
    if (!a.blocks.split) set.count = smaller(set.count, a.blocks.positions);
    // The blocks of a set that hold none of its positions, the first one excepted, have nothing to do.
    const int64_t begin = place.block * a.blocks.positions;
    if (set.index >= in.batch || (place.block > 0 && begin >= set.count)) return;
    ForwardBlocks(a, set, begin).compute();
  }

 private:
  FASTAC_DEVICE ForwardBlocks(const Arguments& arguments, const Set& its_set, int64_t its_begin)
      : a(arguments),
        in(arguments.in),
        set(its_set),
        begin(its_begin),
        n0(ptx::block() % arguments.unit_blocks * BN),
        chunks(chunks_of(arguments.in.features)),
        tiles(int(larger((smaller(its_set.count - its_begin, arguments.blocks.positions) + BL - 1) / BL, 1))),
        stride(int(arguments.blocks.positions) + 4) {
    lay_out(m, ptx::shared(), a.resident, in.features, a.blocks.positions);
  }

  const Arguments& a;
  const Operands& in;
  const Set set;
  const int64_t begin;  // first position of the block
  const int64_t n0;     // first unit
  const int chunks;     // of features
  const int tiles;      // of positions
  const int stride;     // of the scores
  Memory m;
  bool loaded = false;   // whether all of x is in shared memory, for good
  bool centred = false;  // and less rho

  // i counts tiles in the order in which they are streamed.
  FASTAC_DEVICE T* x_tile(int i, int chunk) { return m.x + (a.resident ? chunk : i % kStages) * BL * kTile; }
  FASTAC_DEVICE T* weight_tile(int i) { return m.weight + i % kStages * BN * kTile; }
  // Row r of p, over its scores.
  FASTAC_DEVICE T* p_row(int r) { return reinterpret_cast<T*>(m.scores + r * stride); }
  FASTAC_DEVICE int p_stride() const { return stride * int(sizeof(Acc) / sizeof(T)); }
  FASTAC_DEVICE bool valid(int l) const { return takes_part(in, set, begin + l); }

  FASTAC_DEVICE void load_x(int i, int tile, int chunk) {
    const auto row = [&](int r) {
      return valid(tile * BL + r) ? x_of<T>(in, set, begin + tile * BL + r) : nullptr;
    };
    load_tile<T, kThreads>(x_tile(i, chunk), BL, row, in.x, int64_t(chunk) * kFeatures<T>, in.features,
                           in.x_m, in.x_vectors);
  }

  FASTAC_DEVICE void load_weight(int i, int chunk) {
    const T* weight = static_cast<const T*>(in.weight);
    const auto row = [&](int r) { return n0 + r < in.units ? weight + (n0 + r) * in.weight_n : nullptr; };
    load_tile<T, kThreads>(weight_tile(i), BN, row, in.weight, int64_t(chunk) * kFeatures<T>, in.features,
                           in.weight_m, in.weight_vectors);
  }

  FASTAC_DEVICE void find_rho(int i, int tile) {
    find_pivots<T, kWarps>(m.rho + tile * BL, x_tile(i, 0), BL, in.features, !kHalf<T>);
  }

  FASTAC_DEVICE void compute() {
    if (in.weighting == Weighting::kLinear)
      multiply_scores();
    else
      stream<kStages>(tiles, [&](int t) { load_x(t, t, 0); }, [&](int t) { find_rho(t, t); });
    weigh();
    if (a.blocks.split)
      store_share();
    else
      store_output();
  }

  // Eq. 4: s = W x, and rho.
  FASTAC_DEVICE void multiply_scores() {
    Scores s;
    stream<kStages>(
        tiles * chunks,
        [&](int i) {
          load_x(i, i / chunks, i % chunks);
          load_weight(i, i % chunks);
        },
        [&](int i) {
          const int tile = i / chunks, c = i % chunks;
          if (c == 0) {
            find_rho(i, tile);
            s.clear();
          }
          s.template add<Factor::kRows>(weight_tile(i), kTile, x_tile(i, c), kTile, kFeatures<T>);
          if (c < chunks - 1) return;
#pragma unroll
          for (int r = 0; r < Scores::kRowsOfThread; ++r)
#pragma unroll
            for (int j = 0; j < Scores::kWide; ++j)
#pragma unroll
              for (int q = 0; q < 2; ++q)
                m.scores[Scores::row(r) * stride + tile * BL + Scores::column(j, q)] = s.at(r, j, q);
        });
    loaded = a.resident;
  }

  // Softmax over L. Eq. 2: z = a x with a = p / total, p <= 1 (equal scores have p = 1, which every dtype
  // holds), as a product `core` of p in T and what is left over, the same for all features.
  FASTAC_DEVICE void weigh() {
    const Acc pivot = kHalf<T> ? Acc(0) : set_pivot<T>(in, set, true);
    const int end = tiles * BL;
    for (int r = ptx::warp(); r < BN; r += kWarps) {
      const int64_t n = n0 + r;
      Acc* scores = m.scores + r * stride;
      Acc greatest = -INFINITY, total = 0, rest = 0;
      for (int l = ptx::lane(); l < end; l += 32) {
        Acc s = -INFINITY;
        if (n < in.units && valid(l)) {
          s = given_score<T>(in, set, n, begin + l);
          if (in.weighting == Weighting::kLinear) s += scores[l];
          if (a.saved != nullptr) static_cast<Acc*>(a.saved)[(set.row + begin + l) * in.units + n] = s;
        }
        scores[l] = s;
        greatest = s > greatest ? s : greatest;
      }
      greatest = greatest_of_warp(greatest);
      const Acc peak = greatest == Acc(-INFINITY) ? Acc(0) : greatest;
      T* weights = p_row(r);
      for (int l = ptx::lane(); l < end; l += 32) {
        const Acc s = scores[l];
        const Acc p = s == Acc(-INFINITY) ? Acc(0) : ptx::exponential(s - peak);
        const T rounded = T(p);
        ptx::sync_warp();  // p is shorter than the score: it lies over those of earlier lanes
        weights[l] = rounded;
        total += p;
        // core = p_h x, rest = (p - p_h) rho; or core = p d, rest = p (rho - pivot), and the pivot
        rest += kHalf<T> ? (p - widen(rounded)) * m.rho[l] : p * (m.rho[l] - pivot);
      }
      total = sum_of_warp(total);
      rest = sum_of_warp(rest);
      if (ptx::lane() == 0) keep(r, n, greatest, total, rest, pivot);
    }
    ptx::sync();
  }

  // What one unit's row of weights comes to.
  FASTAC_DEVICE void keep(int r, int64_t n, Acc greatest, Acc total, Acc rest, Acc pivot) {
    if (a.blocks.split) {
      m.gain[r] = 1;
      m.tau[r] = rest;
      if (n >= in.units) return;
      Acc* stats = static_cast<Acc*>(a.partial_stats);
      const int64_t at = ptx::block() / a.unit_blocks * in.units + n, all = a.blocks.all * in.units;
      stats[at] = greatest;
      stats[all + at] = total;
      stats[2 * all + at] = pivot;
      return;
    }
    const Acc inverse = ptx::divide(Acc(1), total > 0 ? total : Acc(1));
    const Acc offset = total > 0 ? pivot : Acc(0);
    Acc alpha = 1, beta = 0;
    if (in.shift && n < in.units) {
      alpha = load<T>(in.alpha, n);
      beta = load<T>(in.beta, n);
    }
    // u = alpha z + beta = gain core + tau
    m.gain[r] = alpha * inverse;
    m.tau[r] = alpha * (rest * inverse) + (alpha * offset + beta);
    if (a.stats != nullptr && n < in.units) {
      Acc* stats = static_cast<Acc*>(a.stats);
      stats[set.index * in.units + n] = greatest;
      stats[(in.batch + set.index) * in.units + n] = total;
      if (!in.shift) stats[(2 * in.batch + set.index) * in.units + n] = 0;
    }
  }

  // Calls use(product, c) with core = p x or p d of every chunk of features.
  template <class Use>
  FASTAC_DEVICE void multiply_output(Use use) {
    Output core;
    stream<kStages>(
        chunks * tiles,
        [&](int i) {
          if (!loaded) load_x(i, i % tiles, i / tiles);
        },
        [&](int i) {
          const int tile = i % tiles, c = i / tiles;
          if (!kHalf<T> && !centred) {
            centre<T, kThreads>(x_tile(i, c), m.rho + tile * BL, BL, int64_t(c) * kFeatures<T>, in.features);
            ptx::sync();
          }
          if (tile == 0) core.clear();
          core.template add<Factor::kColumns>(p_row(0) + tile * BL, p_stride(), x_tile(i, c), kTile, BL);
          if (tile == tiles - 1) use(core, c);
        });
    loaded = centred = a.resident;
  }

  FASTAC_DEVICE void store_share() {
    Acc* share = static_cast<Acc*>(a.partial) + ptx::block() / a.unit_blocks * in.units * in.features;
    multiply_output([&](Output& core, int c) {
#pragma unroll
      for (int r = 0; r < Output::kRowsOfThread; ++r) {
        const int64_t n = n0 + Output::row(r);
        if (n >= in.units) continue;
        const Acc tau = m.tau[Output::row(r)];
#pragma unroll
        for (int j = 0; j < Output::kWide; ++j)
#pragma unroll
          for (int q = 0; q < 2; ++q) {
            const int64_t feature = int64_t(c) * kFeatures<T> + Output::column(j, q);
            if (feature < in.features) share[n * in.features + feature] = core.at(r, j, q) + tau;
          }
      }
    });
  }

  FASTAC_DEVICE void store_output() {
    if (in.shift) find_norms();
    T* y = static_cast<T*>(a.y) + (set.index * in.units + n0) * in.features;
    const int rows = int(smaller(BN, in.units - n0));
    T* staged = m.weight;
    multiply_output([&](Output& core, int c) {
#pragma unroll
      for (int r = 0; r < Output::kRowsOfThread; ++r) {
        const int row = Output::row(r);
        const Acc gain = m.gain[row], tau = m.tau[row], factor = in.shift ? m.factor[row] : Acc(1);
#pragma unroll
        for (int j = 0; j < Output::kWide; ++j)
#pragma unroll
          for (int q = 0; q < 2; ++q)
            staged[row * kTile + Output::column(j, q)] = T((gain * core.at(r, j, q) + tau) * factor);
      }
      ptx::sync();
      store_tile<T, kThreads>(y, in.features, staged, rows, int64_t(c) * kFeatures<T>);
    });
  }

  // ||u|| from u itself, and from it the factor of Eq. 7.
  FASTAC_DEVICE void find_norms() {
    Acc squares[Output::kRowsOfThread] = {};
    multiply_output([&](Output& core, int c) {
#pragma unroll
      for (int r = 0; r < Output::kRowsOfThread; ++r) {
        const Acc gain = m.gain[Output::row(r)], tau = m.tau[Output::row(r)];
#pragma unroll
        for (int j = 0; j < Output::kWide; ++j)
#pragma unroll
          for (int q = 0; q < 2; ++q) {
            const Acc u = gain * core.at(r, j, q) + tau;
            if (int64_t(c) * kFeatures<T> + Output::column(j, q) < in.features) squares[r] += u * u;
          }
      }
    });
    Output::sum_rows(squares, m.squares);
#pragma unroll
    for (int r = 0; r < Output::kRowsOfThread; ++r) {
      const int row = Output::row(r);
      const Acc norm = ptx::square_root(squares[r]);
      if (!Output::leads()) continue;
      m.factor[row] = scale_of(in, norm);
      if (a.stats != nullptr && n0 + row < in.units)
        static_cast<Acc*>(a.stats)[(2 * in.batch + set.index) * in.units + n0 + row] = norm;
    }
    ptx::sync();
  }
};

// y of one unit of one set from the shares of its blocks.
template <class T>
struct ForwardCombine {
  using Arguments = ForwardArguments;
  using Acc = Accumulator<T>;
  static constexpr int kThreads = 512;
  static constexpr int kBlocksPerSm = 1;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kShares = 64;  // whose weights are in shared memory at a time

  static FASTAC_HOST_DEVICE size_t shared_bytes() { return (kWarps + kShares) * sizeof(Acc); }

  static FASTAC_DEVICE void run(const Arguments& a) {
    const Operands& in = a.in;
    const int64_t N = in.units, M = in.features, b = ptx::block() / N, n = ptx::block() % N;
    const int64_t first = first_block(in, a.blocks, b, a.blocks.positions);
    const int64_t parts = larger((set_at(in, b).count + a.blocks.positions - 1) / a.blocks.positions, 1);
    const Acc* peaks = static_cast<const Acc*>(a.partial_stats) + first * N + n;
    const Acc* totals = peaks + a.blocks.all * N;
    const Acc pivot = totals[a.blocks.all * N];
    Acc* shares = static_cast<Acc*>(a.partial) + (first * N + n) * M;
    T* y = static_cast<T*>(a.y) + (b * N + n) * M;
    Acc* scratch = reinterpret_cast<Acc*>(ptx::shared());
    Acc* weights = scratch + kWarps;  // [kShares]

    // The greatest score and the sum of exponentials over all blocks
    Acc greatest = -INFINITY;
    for (int64_t i = ptx::thread(); i < parts; i += kThreads)
      greatest = peaks[i * N] > greatest ? peaks[i * N] : greatest;
    greatest = of_block(scratch, greatest_of_warp(greatest), [](Acc s, Acc t) { return s > t ? s : t; });
    const Acc level = greatest == Acc(-INFINITY) ? Acc(0) : greatest;
    Acc total = 0;
    for (int64_t i = ptx::thread(); i < parts; i += kThreads)
      total += totals[i * N] * ptx::exponential(peaks[i * N] - level);
    total = of_block(scratch, sum_of_warp(total), [](Acc s, Acc t) { return s + t; });

    const Acc inverse = ptx::divide(Acc(1), total > 0 ? total : Acc(1));
    Acc gain = inverse, tau = total > 0 ? pivot : Acc(0);
    if (in.shift) {
      const Acc alpha = load<T>(in.alpha, n);
      gain *= alpha;
      tau = alpha * tau + load<T>(in.beta, n);
    }
    Acc squares = 0;
    for (int64_t f0 = 0; f0 < M; f0 += kThreads) {
      const int64_t f = f0 + ptx::thread();
      Acc core = 0;
      for (int64_t first_share = 0; first_share < parts; first_share += kShares) {
        const int present = int(smaller(parts - first_share, kShares));
        ptx::sync();
        if (ptx::thread() < present)
          weights[ptx::thread()] = ptx::exponential(peaks[(first_share + ptx::thread()) * N] - level);
        ptx::sync();
        const int count = f < M ? present : 0;
#pragma unroll 8
        for (int i = 0; i < count; ++i) core += shares[(first_share + i) * N * M + f] * weights[i];
      }
      if (f >= M) continue;
      const Acc u = gain * core + tau;
      squares += u * u;
      if (in.shift)
        shares[f] = u;  // in the place of the first share, which nobody reads any more
      else
        y[f] = T(u);
    }
    Acc norm = 0;
    if (in.shift) {
      norm = ptx::square_root(of_block(scratch, sum_of_warp(squares), [](Acc s, Acc t) { return s + t; }));
      const Acc factor = scale_of(in, norm);
      for (int64_t f = ptx::thread(); f < M; f += kThreads) y[f] = T(shares[f] * factor);
    }
    if (a.stats != nullptr && ptx::thread() == 0) {
      Acc* stats = static_cast<Acc*>(a.stats);
      stats[b * N + n] = greatest;
      stats[(in.batch + b) * N + n] = total;
      stats[(2 * in.batch + b) * N + n] = norm;
    }
  }

 private:
  // One value per warp joined to one for the block.
  template <class Join>
  static FASTAC_DEVICE Acc of_block(Acc* scratch, Acc value, Join join) {
    if (ptx::lane() == 0) scratch[ptx::warp()] = value;
    ptx::sync();
    value = scratch[0];
    for (int i = 1; i < kWarps; ++i) value = join(value, scratch[i]);
    ptx::sync();
    return value;
  }
};

}  // namespace fastac::cuda
