// What the instructions do that are more than waiting: matrices, copies, mbarriers.
#include "emulation.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#ifdef FASTAC_ADDRESS_SANITIZER
#include <sanitizer/asan_interface.h>
#endif

namespace fastac::cuda::emulation {
namespace {

// Copies.

// Reads global memory now for AddressSanitizer to see, not when the copy is delivered.
void check_readable([[maybe_unused]] const void* from, [[maybe_unused]] int bytes) {
#ifdef FASTAC_ADDRESS_SANITIZER
  void* bad = __asan_region_is_poisoned(const_cast<void*>(from), static_cast<size_t>(bytes));
  if (bad != nullptr) static_cast<void>(*static_cast<volatile unsigned char*>(bad));
#endif
}

// mbarrier: its state is the 64 bits themselves.

constexpr int kArrivals = (1 << 20) - 1;  // at most; so are bytes

struct Barrier {
  int pending;
  int expected;
  int bytes;  // announced and not yet arrived; negative if the other way round
  int phase;
};

Barrier read_barrier(const uint64_t* address) {
  uint64_t word;
  memcpy(&word, address, sizeof(word));
  if (word >> 63 != 0) fail("an mbarrier that was not initialised");
  return {static_cast<int>(word & 0xfffff), static_cast<int>(word >> 20 & 0xfffff),
          static_cast<int>(word >> 40 & 0x3fffff) - (1 << 21), static_cast<int>(word >> 62 & 1)};
}

void write_barrier(uint64_t* address, const Barrier& barrier) {
  const uint64_t word =
      static_cast<uint64_t>(barrier.pending) | static_cast<uint64_t>(barrier.expected) << 20 |
      static_cast<uint64_t>(barrier.bytes + (1 << 21)) << 40 | static_cast<uint64_t>(barrier.phase) << 62;
  memcpy(address, &word, sizeof(word));
}

// Counts arrivals and bytes; begins the next phase and wakes who waited, if this one is complete.
void count_barrier(uint64_t* address, int arrivals, int bytes) {
  Barrier barrier = read_barrier(address);
  if (arrivals > barrier.pending) fail("an mbarrier gets more arrivals than its phase expects");
  barrier.pending -= arrivals;
  barrier.bytes += bytes;
  if (std::abs(barrier.bytes) > kArrivals) fail("an mbarrier has more than 2^20 - 1 bytes under way");
  const bool complete = barrier.pending == 0 && barrier.bytes == 0;
  if (complete) {
    barrier.phase ^= 1;
    barrier.pending = barrier.expected;
  }
  write_barrier(address, barrier);
  if (!complete) return;
  const auto woken = [&](Fiber* fiber) {
    if (fiber->barrier != address || fiber->parity == barrier.phase) return false;
    make_ready(*fiber);
    return true;
  };
  at_barriers.erase(std::remove_if(at_barriers.begin(), at_barriers.end(), woken), at_barriers.end());
}

// The same place in the shared memory of another block.
unsigned char* in_block(const char* what, const void* shared, int rank) {
  if (rank < 0 || rank >= launched.cluster) {
    fail(std::string(what) + ": rank " + std::to_string(rank) + " of a cluster of " +
         std::to_string(launched.cluster));
  }
  const Block& other = blocks[static_cast<size_t>(rank)];
  if (other.returned == other.threads) fail(std::string(what) + ": " + describe(other) + " has returned");
  return other.shared + (static_cast<const unsigned char*>(shared) - current->block->shared);
}

// Matrices.

typedef float Row __attribute__((vector_size(32)));

void convert_half(const uint32_t* words, float* out, int n) {
  uint16_t in[2 * kLanes];
  memcpy(in, words, static_cast<size_t>(n) * 2);
  for (int i = 0; i < n; ++i) {
    const uint32_t magnitude = in[i] & 0x7fffu;
    const uint32_t wide = magnitude << 13;
    const uint32_t small_bits = wide + (113u << 23);
    float small;  // of a subnormal number
    memcpy(&small, &small_bits, 4);
    small -= 6.103515625e-05f;
    uint32_t bits;
    memcpy(&bits, &small, 4);
    const uint32_t normal = wide + (magnitude >= 0x7c00u ? 224u << 23 : 112u << 23);
    bits = magnitude < 0x400u ? bits : normal;
    bits |= static_cast<uint32_t>(in[i] & 0x8000u) << 16;
    memcpy(out + i, &bits, 4);
  }
}

void convert_bfloat16(const uint32_t* words, float* out, int n) {
  for (int i = 0; i < n / 2; ++i) {
    const uint32_t bits[2] = {words[i] << 16, words[i] & 0xffff0000u};
    memcpy(out + 2 * i, bits, 8);
  }
}

// c (8 rows of 8) += a (8 rows, `K` columns) b (K rows of 8), column after column of a.
template <int K>
void add_product(float* c, const float (&a)[8][K], const float (&b)[K][8]) {
  Row sum[8];
  memcpy(sum, c, sizeof(sum));
  for (int k = 0; k < K; ++k) {
    Row row;
    memcpy(&row, b[k], sizeof(row));
    for (int i = 0; i < 8; ++i) sum[i] += a[i][k] * row;
  }
  memcpy(c, sum, sizeof(sum));
}

template <int K>
void transpose(const float (&in)[8][K], float (*out)[8]) {
  for (int k = 0; k < K; ++k) {
    for (int n = 0; n < 8; ++n) out[k][n] = in[n][k];
  }
}

template <void (*CONVERT)(const uint32_t*, float*, int)>
void multiply_add_16(Warp& warp) {
  float a[4][8][8], columns[2][8][8], b[2][8][8];
  for (int i = 0; i < 4; ++i) CONVERT(warp.a[i], a[i][0], 64);
  for (int i = 0; i < 2; ++i) {
    CONVERT(warp.b[i], columns[i][0], 64);
    transpose(columns[i], b[i]);
  }
  for (int half = 0; half < 2; ++half) {
    add_product(warp.c[half][0], a[half], b[0]);
    add_product(warp.c[half][0], a[half + 2], b[1]);
  }
  ++counts.matrix_products;
}

}  // namespace

void multiply_add_half(Warp& warp) {
  multiply_add_16<convert_half>(warp);
}
void multiply_add_bfloat16(Warp& warp) {
  multiply_add_16<convert_bfloat16>(warp);
}

void load_matrices(Warp& warp, bool transposed) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t out[8][8];
    for (int row = 0; row < 8; ++row) memcpy(out[row], warp.row[8 * matrix + row], 16);
    if (transposed) {
      for (int i = 0; i < 8; ++i) {
        for (int j = 0; j < i; ++j) std::swap(out[i][j], out[j][i]);
      }
    }
    memcpy(warp.a[matrix], out, sizeof(out));
  }
  ++counts.matrix_loads;
}

void check_aligned(const char* what, const void* address, size_t alignment) {
  if (reinterpret_cast<uintptr_t>(address) % alignment != 0) {
    fail(std::string(what) + ": an address that is no multiple of " + std::to_string(alignment));
  }
}

void check_shared(const char* what, const void* shared, size_t bytes, size_t alignment) {
  check_aligned(what, shared, alignment);
  const Block& block = *current->block;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(block.shared), at = reinterpret_cast<uintptr_t>(shared);
  if (at < begin || at + bytes > begin + block.shared_bytes) {
    fail(std::string(what) + ": outside the " + std::to_string(block.shared_bytes) +
         " bytes of the block's shared memory");
  }
}

// Delivers one of the bulk loads that somebody waits for.
bool deliver_load() {
  const size_t first = loads.empty() ? 0 : turn(loads.size());
  for (size_t i = 0; i < loads.size(); ++i) {
    const size_t chosen = (first + i) % loads.size();
    const Load load = loads[chosen];
    const auto waits = [&](const Fiber* fiber) { return fiber->barrier == load.barrier; };
    if (std::none_of(at_barriers.begin(), at_barriers.end(), waits)) continue;
    loads.erase(loads.begin() + static_cast<std::ptrdiff_t>(chosen));
    memcpy(load.copy.to, load.copy.from, static_cast<size_t>(load.copy.bytes));
    count_barrier(load.barrier, 0, -load.copy.bytes);
    return true;
  }
  return false;
}

unsigned char* map(const void* shared, int rank) {
  check_shared("map", shared, 1, 1);
  unsigned char* there = in_block("map", shared, rank);
  if (rank != current->block->rank) current->mapped |= 1u << rank;
  return there;
}

void copy_async(void* shared, const void* global, int bytes, int size) {
  const size_t whole = static_cast<size_t>(size);
  if (bytes < 0 || bytes > size) fail("copy_async of " + std::to_string(bytes) + " bytes");
  check_shared("copy_async", shared, whole, whole);
  check_aligned("copy_async", global, whole);
  if (bytes > 0) check_readable(global, bytes);
  memset(shared, kNaN, whole);
  const auto* from = static_cast<const unsigned char*>(global);
  current->copies.push_back({static_cast<unsigned char*>(shared), from, bytes, size, current->copy_group});
  ++counts.copies;
  counts.copied_bytes += bytes;
}

void wait_copies(int64_t pending) {
  std::vector<Copy>& copies = current->copies;
  size_t done = 0;
  for (; done < copies.size() && copies[done].group < current->copy_group - pending; ++done) {
    const Copy& copy = copies[done];
    if (copy.bytes > 0) memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
    memset(copy.to + copy.bytes, 0, static_cast<size_t>(copy.size - copy.bytes));
  }
  copies.erase(copies.begin(), copies.begin() + static_cast<std::ptrdiff_t>(done));
}

void barrier_init(uint64_t* barrier, int arrivals) {
  check_shared("barrier_init", barrier, 8, 8);
  if (arrivals < 1 || arrivals > kArrivals)
    fail("barrier_init for " + std::to_string(arrivals) + " arrivals");
  write_barrier(barrier, {arrivals, arrivals, 0, 0});
}

void barrier_arrive(uint64_t* barrier, int rank, int bytes) {
  check_shared("barrier_arrive", barrier, 8, 8);
  if (bytes < 0 || bytes > kArrivals) fail("barrier_expect of " + std::to_string(bytes) + " bytes");
  count_barrier(reinterpret_cast<uint64_t*>(in_block("barrier_arrive", barrier, rank)), 1, bytes);
  current->mapped &= ~(1u << rank);
}

void barrier_wait(uint64_t* barrier, int parity) {
  check_shared("barrier_wait", barrier, 8, 8);
  if (parity != 0 && parity != 1) fail("barrier_wait for parity " + std::to_string(parity));
  if (read_barrier(barrier).phase != parity) return;
  current->barrier = barrier;
  current->parity = parity;
  at_barriers.push_back(current);
  suspend(Operation::kBarrierWait);
}

void bulk_load(void* shared, const void* global, int bytes, uint64_t* barrier) {
  if (bytes <= 0 || bytes % 16 != 0) fail("bulk_load of " + std::to_string(bytes) + " bytes");
  check_shared("bulk_load", shared, static_cast<size_t>(bytes), 16);
  check_shared("bulk_load", barrier, 8, 8);
  check_aligned("bulk_load", global, 16);
  check_readable(global, bytes);
  static_cast<void>(read_barrier(barrier));
  memset(shared, kNaN, static_cast<size_t>(bytes));
  auto* to = static_cast<unsigned char*>(shared);
  loads.push_back(
      {{to, static_cast<const unsigned char*>(global), bytes, bytes, 0}, barrier, current->block->rank});
  ++counts.bulk_loads;
  counts.bulk_loaded_bytes += bytes;
}

void bulk_store(void* global, const void* shared, int bytes) {
  if (bytes <= 0 || bytes % 16 != 0) fail("bulk_store of " + std::to_string(bytes) + " bytes");
  check_shared("bulk_store", shared, static_cast<size_t>(bytes), 16);
  check_aligned("bulk_store", global, 16);
  memset(global, kNaN, static_cast<size_t>(bytes));
  const auto* from = static_cast<const unsigned char*>(shared);
  current->stores.push_back(
      {{static_cast<unsigned char*>(global), from, bytes, bytes, current->store_group}, {}});
  ++counts.bulk_stores;
  counts.bulk_stored_bytes += bytes;
}

void wait_stores(int64_t pending, bool written) {
  std::vector<Store>& stores = current->stores;
  size_t done = 0;
  for (; done < stores.size() && stores[done].copy.group < current->store_group - pending; ++done) {
    Store& store = stores[done];
    if (store.read.empty()) store.read.assign(store.copy.from, store.copy.from + store.copy.bytes);
    if (written) memcpy(store.copy.to, store.read.data(), store.read.size());
  }
  if (written) stores.erase(stores.begin(), stores.begin() + static_cast<std::ptrdiff_t>(done));
}

}  // namespace fastac::cuda::emulation
