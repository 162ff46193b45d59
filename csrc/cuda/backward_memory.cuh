// The shared memory of the backward kernels.
#pragma once

#include "operands.h"
#include "tile.cuh"

namespace fastac::cuda {

enum class Pass {
  kWhole,   // sets of one block
  kGram,    // the same in the Gram form
  kFirst,   // longer sets, before BackwardSums
  kSecond,  // and after
};

template <class T, int BL, int BN, Pass PASS>
struct BackwardMemory {
  using Acc = Accumulator<T>;
  static constexpr int kStages = 2;
  static constexpr bool kFindsScores = PASS != Pass::kSecond, kFindsX = PASS != Pass::kFirst;
  static constexpr bool kIsGram = PASS == Pass::kGram;
  static constexpr int kTile = kStride<T>;
  static constexpr int kMix = BN + kPad<T>;     // stride of A and dS in T
  static constexpr int kGram = BL + 4;          // of a and G
  static constexpr int kNarrow = BL + kPad<T>;  // of K in T

  // In this order; every part is a multiple of 16 bytes.
  T *x, *dy, *weight, *y;                          // tiles, of every stage: [BL], [BN], [BN], [BN]
  T* staged;                                       // dX [BL][kTile]
  T *a, *ds, *of_y;                                // factors of dY, W and y in dX [BL][kMix]
  T* k;                                            // K [BL][kNarrow]
  Acc *weights, *gram;                             // a [BN][kGram] and G [BL][kGram]
  Acc *a_scale, *ds_scale, *of_y_scale, *k_scale;  // [BL], what rows of the factors are to be multiplied by
  Acc *rho, *rest, *x_sum, *gram_ones;             // [BL]
  Acc *dy_sum, *y_sum, *y_dy, *coefficient;        // [BN]
  Acc *gram_weight, *gram_tau;                     // [BN]
  Acc* scratch;                                    // [4][BN]

  static FASTAC_HOST_DEVICE int chunks_of(int64_t features) {
    return int((features + kFeatures<T> - 1) / kFeatures<T>);
  }

  // Where the parts are in what starts at `begin`; returns their bytes.
  FASTAC_HOST_DEVICE size_t lay_out(unsigned char* begin, bool resident, int64_t features) {
    unsigned char* next = begin;
    const auto take = [&next](auto*& part, size_t count) {
      part = reinterpret_cast<std::remove_reference_t<decltype(part)>>(next);
      next += count * sizeof(*part);
    };
    const size_t tiles = resident ? size_t(chunks_of(features)) : kStages;
    take(x, kFindsScores ? tiles * BL * kTile : 0);
    take(dy, kStages * BN * kTile);
    take(weight, kStages * BN * kTile);
    take(y, kIsGram ? 0 : kStages * BN * kTile);
    take(staged, kFindsX ? BL * kTile : 0);
    take(a, kFindsX ? BL * kMix : 0);
    take(ds, kFindsX ? BL * kMix : 0);
    take(of_y, kFindsX && kHalf<T> && !kIsGram ? BL * kMix : 0);
    take(k, kIsGram ? BL * kNarrow : 0);
    take(weights, kIsGram ? BN * kGram : 0);
    take(gram, kIsGram ? BL * kGram : 0);
    for (Acc** part : {&a_scale, &ds_scale, &of_y_scale, &k_scale, &rho, &rest, &x_sum, &gram_ones})
      take(*part, BL);
    for (Acc** part : {&dy_sum, &y_sum, &y_dy, &coefficient, &gram_weight, &gram_tau}) take(*part, BN);
    take(scratch, 4 * BN);
    return size_t(next - begin);
  }
};

}  // namespace fastac::cuda
