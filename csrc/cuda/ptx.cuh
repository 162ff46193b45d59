// Every instruction that a CPU lacks, under its PTX name. The only header that tests/cuda_emulation replaces:
// kernels take nothing of CUDA from anywhere else. Grids, clusters and blocks have the x dimension only.
//
// "Collective" operations are called by all 32 threads of a warp, or by all threads of the block or the
// cluster, with the same arguments where those say nothing else. Pointers named `shared` point into the
// dynamic shared memory of the calling block.
#pragma once

#ifdef FASTAC_EMULATED
#include "emulated_ptx.h"
#else

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#define FASTAC_DEVICE __device__ __forceinline__

// What sm_90 brought. Kernels that use it are never launched on an older GPU, and trap if they are.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define FASTAC_ASM_90(...) __trap()
#else
#define FASTAC_ASM_90(...) asm volatile(__VA_ARGS__)
#endif

namespace fastac::cuda::ptx {

// Where we are.

FASTAC_DEVICE int thread() {
  return static_cast<int>(threadIdx.x);
}
FASTAC_DEVICE int lane() {
  return static_cast<int>(threadIdx.x % 32);
}
FASTAC_DEVICE int warp() {
  return static_cast<int>(threadIdx.x / 32);
}
FASTAC_DEVICE int64_t block() {
  return blockIdx.x;
}
FASTAC_DEVICE int64_t blocks() {
  return gridDim.x;
}

// The dynamic shared memory of the block, 128-byte aligned. What it holds at first is undefined.
FASTAC_DEVICE unsigned char* shared() {
  extern __shared__ __align__(128) unsigned char fastac_shared[];
  return fastac_shared;
}

// The address of a generic pointer in its own space.
FASTAC_DEVICE uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}
FASTAC_DEVICE uint64_t global_address(const void* global) {
  return __cvta_generic_to_global(global);
}

// Block and warp.

// barrier.sync 0, collective in the block. What a thread did before it, all see after it.
FASTAC_DEVICE void sync() {
  __syncthreads();
}

// barrier.red.or: sync(), and whether any thread of the block gave true.
FASTAC_DEVICE bool sync_or(bool value) {
  return __syncthreads_or(value) != 0;
}

// bar.warp.sync: sync() of a warp.
FASTAC_DEVICE void sync_warp() {
  __syncwarp();
}

// shfl.sync.idx: the value of lane `from`, 0 <= from < 32, which every lane chooses for itself. Collective in
// the warp, as are all that follow up to the copies. T: int, uint32_t, int64_t, float, double.
template <class T>
FASTAC_DEVICE T shuffle(T value, int from) {
  return __shfl_sync(0xffffffffu, value, from);
}

// shfl.sync.bfly: the value of lane ^ mask.
template <class T>
FASTAC_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// vote.sync.ballot: bit i is what lane i gave.
FASTAC_DEVICE unsigned ballot(bool value) {
  return __ballot_sync(0xffffffffu, value);
}

// Matrices.
//
// g = lane / 4 and t = lane % 4. A register of two 16-bit elements has the first in its low half.

// ldmatrix.sync.aligned.m8n8.x4.shared.b16: four 8x8 matrices of 16-bit elements. Lane i gives the address of
// row i % 8 of matrix i / 8: 16 bytes, 16-byte aligned, in shared memory. r[j] is row g, columns 2t and 2t +
// 1 of matrix j.
FASTAC_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// ldmatrix...trans: the same of the transposed matrices. r[j] is rows 2t and 2t + 1, column g of matrix j.
FASTAC_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// mma.sync.aligned.m16n8k16.row.col.f32.T.T.f32: c += a b, T float16 or bfloat16, a 16x16, b 16x8, c 16x8.
//   a[0]: row g,     columns 2t,     2t + 1        b[0]: rows 2t,     2t + 1, column g
//   a[1]: row g + 8, columns 2t,     2t + 1        b[1]: rows 2t + 8, 2t + 9, column g
//   a[2]: row g,     columns 2t + 8, 2t + 9        c[0], c[1]: row g,     columns 2t, 2t + 1
//   a[3]: row g + 8, columns 2t + 8, 2t + 9        c[2], c[3]: row g + 8, columns 2t, 2t + 1
template <class T>
FASTAC_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, c10::Half> || std::is_same_v<T, c10::BFloat16>, "a half type");
  if constexpr (std::is_same_v<T, c10::Half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// Copies to shared memory, thread by thread.

// cp.async.cg.shared.global, around L1: `bytes` of 0 ... 16 from global, the rest of the 16 is zero. Both
// addresses are 16-byte aligned, also where 0 bytes mean that global is not read. Until the wait, shared
// holds anything.
FASTAC_DEVICE void copy_async_16(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global_address(global)), "r"(bytes)
               : "memory");
}

// cp.async.ca.shared.global, through L1: the same with 8 and with 4 bytes.
FASTAC_DEVICE void copy_async_8(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(shared)),
               "l"(global_address(global)), "r"(bytes)
               : "memory");
}
FASTAC_DEVICE void copy_async_4(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)),
               "l"(global_address(global)), "r"(bytes)
               : "memory");
}

// cp.async.commit_group: the thread's copies since the last commit become a group, which may be empty.
FASTAC_DEVICE void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// cp.async.wait_group N: all but the last N groups of this thread have arrived, for this thread to see;
// others see them after a sync().
template <int N>
FASTAC_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Global memory shared by blocks.

// fence.acq_rel.gpu (__threadfence): what this thread wrote before it, others see before what it writes
// after.
FASTAC_DEVICE void fence() {
  __threadfence();
}

// atom.global.add: adds to global memory and returns what was there before.
FASTAC_DEVICE int add(int* address, int value) {
  return atomicAdd(address, value);
}

// ld.global.cg: reads around L1, which another block's writes do not reach. V has 4, 8 or 16 bytes and is
// aligned to them.
template <class V>
FASTAC_DEVICE V load_around_cache(const V* global) {
  static_assert(sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16, "4, 8 or 16 bytes");
  static_assert(std::is_trivially_copyable_v<V>, "plain data");
  const uint64_t address = global_address(global);
  uint32_t words[sizeof(V) / 4];
  if constexpr (sizeof(V) == 4) {
    asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(words[0]) : "l"(address) : "memory");
  } else if constexpr (sizeof(V) == 8) {
    asm volatile("ld.global.cg.v2.u32 {%0, %1}, [%2];"
                 : "=r"(words[0]), "=r"(words[1])
                 : "l"(address)
                 : "memory");
  } else {
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "l"(address)
                 : "memory");
  }
  V value;
  memcpy(&value, words, sizeof(V));
  return value;
}

// Arithmetic.

// exp with at most one unit in the last place of error, as long as nobody compiles with -use_fast_math.
FASTAC_DEVICE float exponential(float x) {
  return ::expf(x);
}
FASTAC_DEVICE double exponential(double x) {
  return ::exp(x);
}

// sqrt.rn and div.rn: correctly rounded.
FASTAC_DEVICE float square_root(float x) {
  return __fsqrt_rn(x);
}
FASTAC_DEVICE double square_root(double x) {
  return __dsqrt_rn(x);
}
FASTAC_DEVICE float divide(float a, float b) {
  return __fdiv_rn(a, b);
}
FASTAC_DEVICE double divide(double a, double b) {
  return __ddiv_rn(a, b);
}

// Clusters (sm_90).

// %cluster_ctarank, %cluster_nctarank.
FASTAC_DEVICE int cluster_rank() {
  uint32_t rank = 0;
  FASTAC_ASM_90("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
FASTAC_DEVICE int cluster_size() {
  uint32_t size = 1;
  FASTAC_ASM_90("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return static_cast<int>(size);
}

// barrier.cluster.arrive.release and barrier.cluster.wait.acquire, collective in the cluster, in turn. What a
// thread did before it arrived, distributed shared memory included, all see after they waited.
FASTAC_DEVICE void cluster_arrive() {
  FASTAC_ASM_90("barrier.cluster.arrive.release;" :: : "memory");
}
FASTAC_DEVICE void cluster_wait() {
  FASTAC_ASM_90("barrier.cluster.wait.acquire;" :: : "memory");
}
FASTAC_DEVICE void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// mapa: a generic pointer to the same place in the shared memory of another block of the cluster, for loads
// and stores. That block must neither have yet to start (cluster_sync first) nor return before the last
// access.
template <class V>
FASTAC_DEVICE V* map(V* shared, int rank) {
  uint64_t address = 0;
  FASTAC_ASM_90("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(shared), "r"(rank));
  return reinterpret_cast<V*>(address);
}

// Mbarrier (sm_90).
//
// 8 bytes of shared memory, 8-byte aligned. A phase is complete when the arrivals it expects have come and as
// many bytes as were announced; the next begins at once. Phases count from 0; a wait names the parity of one.

// mbarrier.init: by one thread, then barrier_fence() by it and sync() or cluster_sync() by all.
FASTAC_DEVICE void barrier_init(uint64_t* shared, int arrivals) {
  FASTAC_ASM_90("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(shared)),
                "r"(arrivals) : "memory");
}

// fence.mbarrier_init.release.cluster: other blocks and bulk copies see the init.
FASTAC_DEVICE void barrier_fence() {
  FASTAC_ASM_90("fence.mbarrier_init.release.cluster;" :: : "memory");
}

// mbarrier.arrive.expect_tx: the phase waits for that many bytes more; and arrives.
FASTAC_DEVICE void barrier_expect(uint64_t* shared, int bytes) {
  FASTAC_ASM_90("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(shared)),
                "r"(bytes) : "memory");
}

// mbarrier.arrive (release): what this thread did before, a thread sees that waited for the phase.
FASTAC_DEVICE void barrier_arrive(uint64_t* shared) {
  FASTAC_ASM_90("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(shared)) : "memory");
}

// mbarrier.arrive.release.cluster at the same place in another block (or this one) of the cluster.
FASTAC_DEVICE void barrier_arrive_remote(uint64_t* shared, int rank) {
  FASTAC_ASM_90(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(shared_address(shared)),
      "r"(rank) : "memory");
}

// mbarrier.try_wait.parity (acquire.cta) until true: returns once the current phase has the other parity,
// that is when the phase with this one is complete. At most one phase may have passed since.
FASTAC_DEVICE void barrier_wait(uint64_t* shared, int parity) {
  uint32_t complete = 0;
  while (complete == 0) {
    FASTAC_ASM_90(
        "{\n"
        ".reg .pred complete;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 complete, [%1], %2;\n"
        "selp.u32 %0, 1, 0, complete;\n"
        "}" : "=r"(complete) : "r"(shared_address(shared)),
        "r"(parity) : "memory");
  }
}

// mbarrier.try_wait.parity.acquire.cluster: the same where what another block of the cluster wrote before it
// arrived is read after the wait. It empties L1: for data that bulk copies brought, barrier_wait is enough.
FASTAC_DEVICE void barrier_wait_cluster(uint64_t* shared, int parity) {
  uint32_t complete = 0;
  while (complete == 0) {
    FASTAC_ASM_90(
        "{\n"
        ".reg .pred complete;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 complete, [%1], %2;\n"
        "selp.u32 %0, 1, 0, complete;\n"
        "}" : "=r"(complete) : "r"(shared_address(shared)),
        "r"(parity) : "memory");
  }
}

// Bulk copies (sm_90).
//
// By one thread each; addresses and bytes are multiples of 16. They use the async proxy: see proxy_fence.

// cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes: gives the barrier its bytes on arrival;
// who waited for that phase sees the data.
FASTAC_DEVICE void bulk_load(void* shared, const void* global, int bytes, uint64_t* barrier) {
  FASTAC_ASM_90(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(shared)),
      "l"(global_address(global)), "r"(bytes), "r"(shared_address(barrier)) : "memory");
}

// cp.async.bulk.global.shared::cta.bulk_group: before it, whoever wrote the source has called proxy_fence().
FASTAC_DEVICE void bulk_store(void* global, const void* shared, int bytes) {
  FASTAC_ASM_90("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global_address(global)),
                "r"(shared_address(shared)), "r"(bytes) : "memory");
}

// cp.async.bulk.commit_group: the thread's stores since the last commit become a group.
FASTAC_DEVICE void commit_stores() {
  FASTAC_ASM_90("cp.async.bulk.commit_group;" :: : "memory");
}

// cp.async.bulk.wait_group.read N: all but the last N groups of this thread have read their source, which may
// be written again. No thread may return before it with N = 0.
template <int N>
FASTAC_DEVICE void wait_stores_read() {
  FASTAC_ASM_90("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}

// cp.async.bulk.wait_group N: all but the last N groups of this thread are in global memory.
template <int N>
FASTAC_DEVICE void wait_stores() {
  FASTAC_ASM_90("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
}

// fence.proxy.async.shared::cta: bulk copies after it see what this thread wrote to shared memory before it.
FASTAC_DEVICE void proxy_fence() {
  FASTAC_ASM_90("fence.proxy.async.shared::cta;" :: : "memory");
}

}  // namespace fastac::cuda::ptx

#undef FASTAC_ASM_90

#endif  // FASTAC_EMULATED
