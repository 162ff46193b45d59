// The shared memory of BackwardCluster: what a block keeps, and what others write into it.
#pragma once

#include "cluster.cuh"

namespace fastac::cuda {

template <class T, int CTAS, int BN>
struct BackwardClusterMemory {
  static constexpr int kPositions = kClusterPositions;
  static constexpr int kOwned = BN / CTAS;              // units whose scores' gradients a block makes
  static constexpr int kGramRows = kPositions / CTAS;   // rows of G that a block sums
  static constexpr int kHead = 64;                      // features that rho comes from
  static constexpr int kStages = 2;                     // sets whose x and dY have room
  static constexpr int kMix = BN + kPad<T>;             // stride of A and dS in T
  static constexpr int kNarrow = kPositions + kPad<T>;  // of K in T
  static constexpr int kRow = kPositions + 4;           // of rows of positions in float

  struct alignas(16) Factors {  // of a unit
    float a;                    // A = this times a
    float gram, tau;            // K = sum of a gram a; and the same of tau, the all-ones part
    float unused;
  };

  // In this order: what has a fixed place first, so that no register holds it.
  float* s_shares;     // [CTAS][kOwned][kPositions], from all
  float* p_shares;     // the same of P
  float* dy_shares;    // [CTAS][kOwned]: of dY 1, from all
  float* gram_shares;  // [CTAS][kGramRows][kRow]: of G; column kPositions is d 1
  float* gram;         // [kPositions][kRow], from the owners
  float* weights;      // a [BN][kRow], from the owners
  float* ds;           // [BN][kRow], from the owners
  Factors* factors;    // [BN], from the owners
  FloatPair* shift;    // [kOwned]: alpha and beta
  float* rho;          // [kPositions]
  float* a_scale;      // [kPositions]: what rows of the following are to be multiplied by
  float* ds_scale;     // [kPositions]
  float* k_scale;      // [kPositions]
  float* ones;         // [kPositions]: all-ones part of K
  T* a;                // A [kPositions][kMix]
  T* narrow_ds;        // [kPositions][kMix]
  T* k;                // [kPositions][kNarrow]
  T* head;             // [kStages][kPositions][kHead]: the first features of x
  uint64_t* barriers;  // [kStages]
  Arrival* arrivals;   // [kStages]
  T* x;                // [kStages][kPositions][stride]
  T* dy;               // [kStages][BN][stride]
  T* weight;           // [BN][stride]

  // Gives every part its place from `begin` on; returns the bytes of all.
  FASTAC_HOST_DEVICE size_t lay_out(unsigned char* begin, int64_t features) {
    const size_t stride = size_t(slice_stride<T>(features, CTAS));
    unsigned char* next = begin;
    const auto take = [&next](auto*& part, size_t count) {
      part = reinterpret_cast<std::remove_reference_t<decltype(part)>>(next);
      next += (count * sizeof(*part) + 15) / 16 * 16;
    };
    take(s_shares, BN * kPositions);
    take(p_shares, BN * kPositions);
    take(dy_shares, BN);
    take(gram_shares, kPositions * kRow);
    take(gram, kPositions * kRow);
    take(weights, BN * kRow);
    take(ds, BN * kRow);
    take(factors, BN);
    take(shift, kOwned);
    for (float** part : {&rho, &a_scale, &ds_scale, &k_scale, &ones}) take(*part, kPositions);
    take(a, kPositions * kMix);
    take(narrow_ds, kPositions * kMix);
    take(k, kPositions * kNarrow);
    take(head, kStages * kPositions * kHead);
    take(barriers, kStages);
    take(arrivals, kStages);
    take(x, kStages * kPositions * stride);
    take(dy, kStages * BN * stride);
    take(weight, BN * stride);
    return size_t(next - begin);
  }
};

}  // namespace fastac::cuda
