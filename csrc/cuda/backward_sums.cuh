// Between the two backward passes over longer sets: what the softmax's gradient sums over all positions.
#pragma once

#include "rows.cuh"

namespace fastac::cuda {

// What a set adds to dalpha = dU·z and dbeta = dU·1, from rowsum(a e) and dU·1 / c. û·dU = 0 makes dalpha =
// -beta dbeta / alpha, which is the better conditioned of the two where beta is small against u.
template <class Acc>
FASTAC_DEVICE void shift_gradients(const Operands& in, Acc mean, Acc ones, Acc offset, Acc alpha, Acc beta,
                                   Acc norm, Acc& dalpha, Acc& dbeta) {
  const Acc c = scale_of(in, norm);
  dbeta = c * ones;
  const bool through_beta =
      is_normalised(in, norm) && alpha != 0 && norm * norm >= 4 * Acc(in.features) * beta * beta;
  dalpha = through_beta ? -beta * ptx::divide(dbeta, alpha) : c * (mean + ones * offset);
}

// rowsum(a e) of one set and 32 units, and from it what the set adds to dalpha and dbeta.
template <class T, int BL>
struct BackwardSums {
  using Arguments = BackwardArguments;
  using Acc = Accumulator<T>;
  static constexpr int kThreads = 256;
  static constexpr int kBlocksPerSm = 1;
  static constexpr int kUnits = 32;

  static FASTAC_HOST_DEVICE int64_t grid(const Operands& in) {
    return in.batch * ((in.units + kUnits - 1) / kUnits);
  }
  static FASTAC_HOST_DEVICE size_t shared_bytes() { return kThreads * sizeof(Acc); }

  static FASTAC_DEVICE void run(const Arguments& a) {
    const Operands& in = a.in;
    const int64_t N = in.units, unit_blocks = (N + kUnits - 1) / kUnits;
    const int64_t b = ptx::block() / unit_blocks, n0 = ptx::block() % unit_blocks * kUnits;
    // A long set has many parts and often few units: as many parts at a time as there are threads for.
    const int width = int(smaller(N - n0, kUnits)), groups = kThreads / width;
    const int group = ptx::thread() / width;
    const int64_t n = n0 + ptx::thread() % width;
    const int64_t parts = larger((set_at(in, b).count + BL - 1) / BL, 1);
    const Acc* sums = static_cast<const Acc*>(a.sums) + first_block(in, a.blocks, b, BL) * N + n;
    Acc* scratch = reinterpret_cast<Acc*>(ptx::shared());
    Acc mean = 0;
    if (group < groups) {
#pragma unroll 4
      for (int64_t i = group; i < parts; i += groups) mean += sums[i * N];
    }
    scratch[ptx::thread()] = mean;
    ptx::sync();
    if (group > 0) return;
    for (int i = 1; i < groups; ++i) mean += scratch[i * width + ptx::thread()];
    const int64_t at = b * N + n, all_sets = in.batch * N;
    Acc* means = static_cast<Acc*>(a.means);
    means[2 * all_sets + at] = mean;
    if (!in.shift) return;
    Acc dalpha, dbeta;
    shift_gradients(in, mean, means[all_sets + at], means[3 * all_sets + at], load<T>(in.alpha, n),
                    load<T>(in.beta, n), static_cast<const Acc*>(a.stats)[2 * all_sets + at], dalpha, dbeta);
    static_cast<Acc*>(a.dshift)[at] = dalpha;
    static_cast<Acc*>(a.dshift)[all_sets + at] = dbeta;
  }
};

}  // namespace fastac::cuda
