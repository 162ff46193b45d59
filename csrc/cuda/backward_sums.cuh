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

// rowsum(a e) of one set and 128 units, and from it what the set adds to dalpha and dbeta.
template <class T, int BL>
struct BackwardSums {
  using Arguments = BackwardArguments;
  using Acc = Accumulator<T>;
  static constexpr int kThreads = 128;
  static constexpr int kBlocksPerSm = 1;

  static FASTAC_HOST_DEVICE int64_t grid(const Operands& in) {
    return in.batch * ((in.units + kThreads - 1) / kThreads);
  }

  static FASTAC_DEVICE void run(const Arguments& a) {
    const Operands& in = a.in;
    const int64_t N = in.units, unit_blocks = (N + kThreads - 1) / kThreads;
    const int64_t b = ptx::block() / unit_blocks, n = ptx::block() % unit_blocks * kThreads + ptx::thread();
    if (n >= N) return;
    const int64_t parts = larger((set_at(in, b).count + BL - 1) / BL, 1);
    const Acc* sums = static_cast<const Acc*>(a.sums) + first_block(in, a.blocks, b, BL) * N + n;
    Acc mean = 0;
    for (int64_t i = 0; i < parts; ++i) mean += sums[i * N];
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
