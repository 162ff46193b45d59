// Sums over all sets: dW = sum of dSᵀ x, and dalpha, dbeta and the position bias's gradient, in one launch.
// Every result is a sum in an order that depends on shapes only, so repeats agree bitwise.
#pragma once

#include "rows.cuh"

namespace fastac::cuda {

template <class T>
struct BackwardReduce {
  using Arguments = ReduceArguments;
  using Acc = Accumulator<T>;
  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kBlocksPerSm = 1;
  static constexpr int kStages = 2;
  static constexpr int kUnits = 64;                 // of a tile of dW
  static constexpr int kRows = kHalf<T> ? 64 : 32;  // of a step
  static constexpr int kShiftUnits = 32, kBiasUnits = 32, kBiasPositions = kWarps;

 private:
  static constexpr int kTile = kStride<T>;
  static constexpr int kNarrow = kRows + kPad<T>;
  static constexpr int kWide = kUnits + 1;     // odd: narrow reads down a column
  static constexpr int kOwn = kRows / kWarps;  // rows of a step whose dS a warp loads
  using Output = Product<T, kUnits, kFeatures<T>, kWarps>;

  struct Memory {
    T* x;         // [stages][kRows][kTile]
    T* narrowed;  // dSᵀ [kUnits][kNarrow]
    Acc* ds;      // [kRows][kWide]
    Acc* scale;   // [kUnits]
    Acc* rest;    // [kUnits]
    Acc* rho;     // [kRows]
    Acc* around;  // [kRows]
  };
  static FASTAC_HOST_DEVICE size_t lay_out(Memory& m, unsigned char* begin) {
    unsigned char* next = begin;
    const auto take = [&next](auto*& part, size_t count) {
      part = reinterpret_cast<std::remove_reference_t<decltype(part)>>(next);
      next += count * sizeof(*part);
    };
    take(m.x, kStages * kRows * kTile);
    take(m.narrowed, kUnits * kNarrow);
    take(m.ds, kRows * kWide);
    take(m.scale, kUnits);
    take(m.rest, kUnits);
    take(m.rho, kRows);
    take(m.around, kRows);
    return size_t(next - begin);
  }

 public:
  static FASTAC_HOST_DEVICE size_t shared_bytes() {
    Memory m;
    return lay_out(m, nullptr);
  }
  // Tiles of dW, and the rows of a split's step.
  static FASTAC_HOST_DEVICE int64_t tiles(const Operands& in) {
    return (in.units + kUnits - 1) / kUnits * ((in.features + kFeatures<T> - 1) / kFeatures<T>);
  }
  static FASTAC_HOST_DEVICE int64_t shift_blocks(const Operands& in) {
    return (in.units + kShiftUnits - 1) / kShiftUnits;
  }
  static FASTAC_HOST_DEVICE int64_t bias_blocks(const Operands& in) {
    return (in.units + kBiasUnits - 1) / kBiasUnits *
           ((in.bias_length + kBiasPositions - 1) / kBiasPositions);
  }

  static FASTAC_DEVICE void run(const Arguments& a) {
    const int64_t id = ptx::block();
    BackwardReduce reduce(a);
    if (id < a.weight_blocks)
      reduce.weight(id % a.splits, id / a.splits);
    else if (id < a.weight_blocks + a.shift_blocks)
      reduce.shift((id - a.weight_blocks) * kShiftUnits);
    else
      reduce.bias(id - a.weight_blocks - a.shift_blocks);
  }

 private:
  FASTAC_DEVICE explicit BackwardReduce(const Arguments& arguments) : a(arguments), in(arguments.in) {
    lay_out(m, ptx::shared());
  }

  const Arguments& a;
  const Operands& in;
  Memory m;

  // Whether a row takes part, and where its features are.
  FASTAC_DEVICE const T* x_of_row(int64_t row, int64_t end) const {
    if (row >= end) return nullptr;
    if (in.layout == Layout::kPacked) return static_cast<const T*>(in.x) + row * in.x_l;
    const Set set = set_at(in, row / in.length);
    const int64_t position = row % in.length;
    return takes_part(in, set, position) ? x_of<T>(in, set, position) : nullptr;
  }

  // The part of one split in a tile of dW; the last split to arrive sums the parts, in their order.
  FASTAC_DEVICE void weight(int64_t split, int64_t tile) {
    const int64_t unit_blocks = (in.units + kUnits - 1) / kUnits;
    const int64_t n0 = tile % unit_blocks * kUnits, first = tile / unit_blocks * kFeatures<T>;
    const int64_t begin = split * a.rows_per_split;
    int64_t end = smaller(begin + a.rows_per_split, in.rows);
    if (in.layout == Layout::kPacked) end = smaller(end, offset_at(in, in.batch));
    for (int n = ptx::thread(); n < kUnits; n += kThreads) m.rest[n] = 0;
    Output dw;
    dw.clear();
    multiply(dw, n0, first, begin, end);

    const auto each = [&](auto use) {
#pragma unroll
      for (int r = 0; r < Output::kRowsOfThread; ++r)
#pragma unroll
        for (int j = 0; j < Output::kWide; ++j)
#pragma unroll
          for (int q = 0; q < 2; ++q) {
            const int64_t n = n0 + Output::row(r), feature = first + Output::column(j, q);
            if (n < in.units && feature < in.features)
              use(n * in.features + feature, dw.at(r, j, q), m.rest[Output::row(r)]);
          }
    };
    T* dweight = static_cast<T*>(a.dweight);
    if (a.splits == 1) {
      each([&](int64_t at, Acc value, Acc rest) { dweight[at] = T(value + rest); });
      return;
    }
    const int64_t size = in.units * in.features;
    Acc* parts = static_cast<Acc*>(a.partial);
    each([&](int64_t at, Acc value, Acc rest) { parts[split * size + at] = value + rest; });
    ptx::sync();
    bool last = false;
    if (ptx::thread() == 0) {  // for the block: a fence includes what a sync has made visible
      ptx::fence();
      last = ptx::add(a.counters + tile, 1) == int(a.splits) - 1;
      ptx::fence();
    }
    if (!ptx::sync_or(last)) return;
    each([&](int64_t at, Acc, Acc) {
      Acc sum = 0;
      for (int64_t i = 0; i < a.splits; ++i) sum += ptx::load_around_cache(parts + i * size + at);
      dweight[at] = T(sum);
    });
  }

  // dw + rest = dSᵀ x over the rows begin ... end - 1.
  FASTAC_DEVICE void multiply(Output& dw, int64_t n0, int64_t first, int64_t begin, int64_t end) {
    const int steps = int(larger((end - begin + kRows - 1) / kRows, 0));
    const Acc *ds = static_cast<const Acc*>(a.mix) + in.rows * in.units,
              *pivots = static_cast<const Acc*>(a.pivots);
    stream<kStages>(
        steps,
        [&](int i) {
          const auto row = [&](int r) { return x_of_row(begin + int64_t(i) * kRows + r, end); };
          load_tile<T, kThreads>(m.x + i % kStages * kRows * kTile, kRows, row, in.x, first, in.features,
                                 in.x_m, in.x_vectors);
        },
        [&](int i) {
          T* x = m.x + i % kStages * kRows * kTile;
          const int64_t row = begin + int64_t(i) * kRows;
          // The warp has every kWarps-th row; its lane k finds out about the k-th of them.
          const int mine = ptx::lane() * kWarps + ptx::warp();
          const bool found = ptx::lane() < kOwn && x_of_row(row + mine, end) != nullptr;
          if (ptx::lane() < kOwn) {
            m.rho[mine] = found ? pivots[row + mine] : Acc(0);
            m.around[mine] = found ? pivots[in.rows + row + mine] : Acc(0);
          }
          const unsigned valid = ptx::ballot(found);
#pragma unroll
          for (int k = 0; k < kOwn; ++k) {
            const int r = k * kWarps + ptx::warp();
            for (int n = ptx::lane(); n < kUnits; n += 32) {
              const bool there = (valid >> k & 1) != 0 && n0 + n < in.units;
              m.ds[r * kWide + n] = there ? ds[(row + r) * in.units + n0 + n] : Acc(0);
            }
          }
          ptx::sync();
          narrow();
          if constexpr (!kHalf<T>) centre<T, kThreads>(x, m.rho, kRows, first, in.features);
          ptx::sync();
          if constexpr (kHalf<T>) {
            Output part;
            part.clear();
            part.template add<Factor::kColumns>(m.narrowed, kNarrow, x, kTile, kRows);
#pragma unroll
            for (int r = 0; r < Output::kRowsOfThread; ++r)
#pragma unroll
              for (int j = 0; j < Output::kWide; ++j)
#pragma unroll
                for (int q = 0; q < 2; ++q) dw.at(r, j, q) += m.scale[Output::row(r)] * part.at(r, j, q);
          } else {
            dw.template add<Factor::kColumns>(m.narrowed, kNarrow, x, kTile, kRows);
          }
        });
  }

  // dSᵀ in T, half types scaled as in BackwardBlocks; and the all-ones part of x: its common pivot drops out,
  // since dS sums to 0 over every set.
  FASTAC_DEVICE void narrow() {
    constexpr int kEach = kRows / 32;
    for (int n = ptx::warp(); n < kUnits; n += kWarps) {
      Acc value[kEach], largest = 0, rest = 0;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        value[i] = m.ds[(i * 32 + ptx::lane()) * kWide + n];
        const Acc size = value[i] < 0 ? -value[i] : value[i];
        largest = size > largest ? size : largest;
      }
      if constexpr (kHalf<T>) largest = greatest_of_warp(largest);
      if (!kHalf<T> || !(largest > 0)) largest = 1;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int r = i * 32 + ptx::lane();
        const T rounded = kHalf<T> ? T(value[i] / largest) : T(value[i]);
        m.narrowed[n * kNarrow + r] = rounded;
        rest += value[i] * m.around[r];
        if constexpr (kHalf<T>) rest -= widen(rounded) * largest * m.rho[r];
      }
      rest = sum_of_warp(rest);
      if (ptx::lane() == 0) {
        m.scale[n] = largest;
        m.rest[n] += rest;
      }
    }
  }

  // dalpha and dbeta of 32 units: every warp sums each fourth set.
  FASTAC_DEVICE void shift(int64_t n0) {
    const int64_t n = n0 + ptx::lane(), all_sets = in.batch * in.units;
    const Acc* shares = static_cast<const Acc*>(a.dshift);
    Acc dalpha = 0, dbeta = 0;
    if (n < in.units)
      for (int64_t b = ptx::warp(); b < in.batch; b += kWarps) {
        dalpha += shares[b * in.units + n];
        dbeta += shares[all_sets + b * in.units + n];
      }
    Acc* sums = m.ds;  // [2][kWarps][32]
    sums[ptx::thread()] = dalpha;
    sums[kThreads + ptx::thread()] = dbeta;
    ptx::sync();
    if (ptx::warp() > 0 || n >= in.units) return;
    dalpha = dbeta = 0;
    for (int i = 0; i < kWarps; ++i) {
      dalpha += sums[i * 32 + ptx::lane()];
      dbeta += sums[kThreads + i * 32 + ptx::lane()];
    }
    if (a.dalpha.data != nullptr) store<T>(a.dalpha, n, dalpha);
    if (a.dbeta.data != nullptr) store<T>(a.dbeta, n, dbeta);
  }

  // The position bias's gradient for 32 units and a position per warp.
  FASTAC_DEVICE void bias(int64_t id) {
    const int64_t unit_blocks = (in.units + kBiasUnits - 1) / kBiasUnits;
    const int64_t n = id % unit_blocks * kBiasUnits + ptx::lane();
    const int64_t position = id / unit_blocks * kBiasPositions + ptx::warp();
    if (n >= in.units || position >= in.bias_length) return;
    const Acc* ds = static_cast<const Acc*>(a.mix) + in.rows * in.units;
    Acc sum = 0;
    for (int64_t b = 0; b < in.batch; ++b) {
      const Set set = set_at(in, b);
      if (takes_part(in, set, position)) sum += ds[(set.row + position) * in.units + n];
    }
    store<T>(a.dposition_bias, n * in.bias_length + position, sum);
  }
};

}  // namespace fastac::cuda
