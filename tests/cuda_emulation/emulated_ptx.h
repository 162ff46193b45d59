// What csrc/cuda/ptx.cuh offers, with the same meaning, in the emulation. See there for what everything does.
#pragma once

#include "emulation.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define FASTAC_DEVICE inline

namespace fastac::cuda::ptx {

using emulation::Operation;
using emulation::Warp;

FASTAC_DEVICE int thread() {
  return emulation::current->thread;
}
FASTAC_DEVICE int lane() {
  return emulation::current->lane;
}
FASTAC_DEVICE int warp() {
  return emulation::current->thread / emulation::kLanes;
}
FASTAC_DEVICE int64_t block() {
  return emulation::current->block->index;
}
FASTAC_DEVICE int64_t blocks() {
  return emulation::launched.grid;
}
FASTAC_DEVICE unsigned char* shared() {
  return emulation::current->block->shared;
}

FASTAC_DEVICE void sync() {
  emulation::block_barrier(Operation::kSync, false);
}
FASTAC_DEVICE bool sync_or(bool value) {
  emulation::block_barrier(Operation::kSyncOr, value);
  return emulation::current->block->any_result;
}
FASTAC_DEVICE void sync_warp() {
  emulation::collective(Operation::kSyncWarp, [](Warp&) {});
}

template <class T>
FASTAC_DEVICE T exchange(Operation operation, T value, int source) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "4 or 8 bytes");
  if (source < 0 || source >= emulation::kLanes)
    emulation::fail("a shuffle from lane " + std::to_string(source));
  Warp& warp = *emulation::current->warp;
  const int lane = emulation::current->lane;
  memcpy(&warp.value[lane], &value, sizeof(T));
  warp.source[lane] = source;
  emulation::collective(operation, [](Warp& w) {
    for (int i = 0; i < emulation::kLanes; ++i) w.result[i] = w.value[w.source[i]];
  });
  memcpy(&value, &warp.result[lane], sizeof(T));
  return value;
}
template <class T>
FASTAC_DEVICE T shuffle(T value, int from) {
  return exchange(Operation::kShuffle, value, from);
}
template <class T>
FASTAC_DEVICE T shuffle_xor(T value, int mask) {
  return exchange(Operation::kShuffleXor, value, emulation::current->lane ^ mask);
}
FASTAC_DEVICE unsigned ballot(bool value) {
  Warp& warp = *emulation::current->warp;
  const int lane = emulation::current->lane;
  warp.value[lane] = value;
  emulation::collective(Operation::kBallot, [](Warp& w) {
    uint64_t bits = 0;
    for (int i = 0; i < emulation::kLanes; ++i) bits |= w.value[i] << i;
    for (uint64_t& r : w.result) r = bits;
  });
  return static_cast<unsigned>(warp.result[lane]);
}

FASTAC_DEVICE void load_rows(Operation operation, uint32_t (&r)[4], const void* row) {
  Warp& warp = *emulation::current->warp;
  const int lane = emulation::current->lane;
  warp.row[lane] = static_cast<const unsigned char*>(row);
  emulation::check_shared("load_matrices", row, 16, 16);
  emulation::collective(operation, [operation](Warp& w) {
    emulation::load_matrices(w, operation == Operation::kLoadMatricesTransposed);
  });
  for (int i = 0; i < 4; ++i) r[i] = warp.a[i][lane];
}
FASTAC_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  load_rows(Operation::kLoadMatrices, r, row);
}
FASTAC_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  load_rows(Operation::kLoadMatricesTransposed, r, row);
}

template <void (*PRODUCT)(Warp&)>
FASTAC_DEVICE void multiply_add(Operation operation, float (&c)[4], const uint32_t (&a)[4],
                                const uint32_t (&b)[2]) {
  Warp& warp = *emulation::current->warp;
  const int lane = emulation::current->lane;
  for (int i = 0; i < 4; ++i) warp.a[i][lane] = a[i];
  for (int i = 0; i < 2; ++i) warp.b[i][lane] = b[i];
  for (int i = 0; i < 4; ++i) warp.c[i / 2][lane][i % 2] = c[i];
  emulation::collective(operation, PRODUCT);
  for (int i = 0; i < 4; ++i) c[i] = warp.c[i / 2][lane][i % 2];
}
template <class T>
FASTAC_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, c10::Half> || std::is_same_v<T, c10::BFloat16>, "a half type");
  if constexpr (std::is_same_v<T, c10::Half>) {
    multiply_add<emulation::multiply_add_half>(Operation::kMultiplyAddHalf, c, a, b);
  } else {
    multiply_add<emulation::multiply_add_bfloat16>(Operation::kMultiplyAddBFloat16, c, a, b);
  }
}

FASTAC_DEVICE void copy_async_16(void* shared, const void* global, int bytes) {
  emulation::copy_async(shared, global, bytes, 16);
}
FASTAC_DEVICE void copy_async_8(void* shared, const void* global, int bytes) {
  emulation::copy_async(shared, global, bytes, 8);
}
FASTAC_DEVICE void copy_async_4(void* shared, const void* global, int bytes) {
  emulation::copy_async(shared, global, bytes, 4);
}
FASTAC_DEVICE void commit_copies() {
  ++emulation::current->copy_group;
}
template <int N>
FASTAC_DEVICE void wait_copies() {
  static_assert(N >= 0, "a number of groups");
  emulation::wait_copies(N);
}

FASTAC_DEVICE void fence() {}
FASTAC_DEVICE int add(int* address, int value) {
  emulation::choose_again();
  const int before = *address;
  *address = before + value;
  return before;
}
template <class V>
FASTAC_DEVICE V load_around_cache(const V* global) {
  static_assert(sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16, "4, 8 or 16 bytes");
  static_assert(std::is_trivially_copyable_v<V>, "plain data");
  emulation::check_aligned("load_around_cache", global, sizeof(V));
  return *global;
}

FASTAC_DEVICE float exponential(float x) {
  return std::exp(x);
}
FASTAC_DEVICE double exponential(double x) {
  return std::exp(x);
}
FASTAC_DEVICE float square_root(float x) {
  return std::sqrt(x);
}
FASTAC_DEVICE double square_root(double x) {
  return std::sqrt(x);
}
FASTAC_DEVICE float divide(float a, float b) {
  return a / b;
}
FASTAC_DEVICE double divide(double a, double b) {
  return a / b;
}

FASTAC_DEVICE int cluster_rank() {
  return emulation::current->block->rank;
}
FASTAC_DEVICE int cluster_size() {
  return emulation::launched.cluster;
}
FASTAC_DEVICE void cluster_arrive() {
  emulation::cluster_arrive();
}
FASTAC_DEVICE void cluster_wait() {
  emulation::cluster_wait();
}
FASTAC_DEVICE void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}
template <class V>
FASTAC_DEVICE V* map(V* shared, int rank) {
  return reinterpret_cast<V*>(emulation::map(shared, rank));
}

FASTAC_DEVICE void barrier_init(uint64_t* shared, int arrivals) {
  emulation::barrier_init(shared, arrivals);
}
FASTAC_DEVICE void barrier_fence() {}
FASTAC_DEVICE void barrier_expect(uint64_t* shared, int bytes) {
  emulation::barrier_arrive(shared, cluster_rank(), bytes);
}
FASTAC_DEVICE void barrier_arrive(uint64_t* shared) {
  emulation::barrier_arrive(shared, cluster_rank(), 0);
}
FASTAC_DEVICE void barrier_arrive_remote(uint64_t* shared, int rank) {
  emulation::barrier_arrive(shared, rank, 0);
}
FASTAC_DEVICE void barrier_wait(uint64_t* shared, int parity) {
  emulation::barrier_wait(shared, parity);
}
FASTAC_DEVICE void barrier_wait_cluster(uint64_t* shared, int parity) {
  emulation::barrier_wait(shared, parity);
}

FASTAC_DEVICE void bulk_load(void* shared, const void* global, int bytes, uint64_t* barrier) {
  emulation::bulk_load(shared, global, bytes, barrier);
}
FASTAC_DEVICE void bulk_store(void* global, const void* shared, int bytes) {
  emulation::bulk_store(global, shared, bytes);
}
FASTAC_DEVICE void commit_stores() {
  ++emulation::current->store_group;
}
template <int N>
FASTAC_DEVICE void wait_stores_read() {
  static_assert(N >= 0, "a number of groups");
  emulation::wait_stores(N, false);
}
template <int N>
FASTAC_DEVICE void wait_stores() {
  static_assert(N >= 0, "a number of groups");
  emulation::wait_stores(N, true);
}
FASTAC_DEVICE void proxy_fence() {}

}  // namespace fastac::cuda::ptx
