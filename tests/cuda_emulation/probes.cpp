// Kernels that test the emulation itself: every instruction, and the mistakes it must report. nvcc compiles
// them too, which shows that the device has every instruction.
#include "launch.cuh"

#include <exception>
#include <map>
#include <string>

namespace fastac::cuda {
namespace {

struct ProbeArguments {
  void* arrays[4];
  int number;

  template <class T>
  FASTAC_DEVICE T* array(int i) const {
    return static_cast<T*>(arrays[i]);
  }
};

template <int THREADS>
struct Probe {
  using Arguments = ProbeArguments;
  static constexpr int kThreads = THREADS;
  static constexpr int kBlocksPerSm = 1;
  template <class T>
  static FASTAC_DEVICE T* shared() {
    return reinterpret_cast<T*>(ptx::shared());
  }
};

// a (32 lanes, 4 registers), b (32, 2), c (32, 4).
template <class T>
struct MultiplyAdd : Probe<32> {
  static FASTAC_DEVICE void run(const Arguments& p) {
    uint32_t a[4], b[2];
    float* c = p.array<float>(2) + ptx::lane() * 4;
    float sum[4] = {c[0], c[1], c[2], c[3]};
    for (int i = 0; i < 4; ++i) a[i] = p.array<uint32_t>(0)[ptx::lane() * 4 + i];
    for (int i = 0; i < 2; ++i) b[i] = p.array<uint32_t>(1)[ptx::lane() * 2 + i];
    for (int i = 0; i < p.number; ++i) ptx::multiply_add<T>(sum, a, b);
    for (int i = 0; i < 4; ++i) c[i] = sum[i];
  }
};

// in (32 rows of 16 bytes), out (2, 32 lanes, 4 registers): as they are and transposed. Row i lies at 3 i
// % 32.
struct LoadMatrices : Probe<32> {
  static FASTAC_DEVICE void run(const Arguments& p) {
    unsigned char* row = ptx::shared() + ptx::lane() * 3 % 32 * 16;
    memcpy(row, p.array<unsigned char>(0) + ptx::lane() * 16, 16);
    ptx::sync_warp();
    uint32_t r[4];
    ptx::load_matrices(r, row);
    memcpy(p.array<uint32_t>(1) + ptx::lane() * 4, r, 16);
    ptx::load_matrices_transposed(r, row);
    memcpy(p.array<uint32_t>(1) + 128 + ptx::lane() * 4, r, 16);
  }
};

// from (32) int, values (32) int64, out (8, 64) int64: the types' shuffles, by xor, ballot, sync_or.
struct Shuffles : Probe<64> {
  static FASTAC_DEVICE void run(const Arguments& p) {
    const int from = p.array<int>(0)[ptx::lane()];
    const int64_t value = p.array<int64_t>(1)[ptx::lane()] + ptx::warp();
    const auto put = [&](int row, int64_t number) { p.array<int64_t>(2)[row * 64 + ptx::thread()] = number; };
    put(0, ptx::shuffle(value, from));
    put(1, ptx::shuffle(static_cast<int>(value), from));
    put(2, ptx::shuffle(static_cast<uint32_t>(value), from));
    put(3, static_cast<int64_t>(ptx::shuffle(static_cast<float>(value), from)));
    put(4, static_cast<int64_t>(ptx::shuffle(static_cast<double>(value), from)));
    put(5, ptx::shuffle_xor(value, p.number));
    put(6, ptx::ballot(value % 3 == 0));
    put(7, ptx::sync_or(value == 5) + 2 * ptx::sync_or(value == -1));
  }
};

// x (4, n) float: exponential, square_root, divide by 3 of the first row; y (3, n) double: the same.
struct Arithmetic : Probe<32> {
  static FASTAC_DEVICE void run(const Arguments& p) {
    for (int i = ptx::thread(); i < p.number; i += kThreads) {
      float* x = p.array<float>(0) + i;
      double* y = p.array<double>(1) + i;
      const float value = x[0];
      x[p.number] = ptx::exponential(value);
      x[2 * p.number] = ptx::square_root(value);
      x[3 * p.number] = ptx::divide(value, 3.0f);
      y[0] = ptx::exponential(static_cast<double>(value));
      y[p.number] = ptx::square_root(static_cast<double>(value));
      y[2 * p.number] = ptx::divide(static_cast<double>(value), 3.0);
    }
  }
};

// counter (1) int, order (blocks) int, in (4) float, out (blocks, 4) float.
struct GlobalMemory : Probe<32> {
  struct alignas(16) Four {
    float x[4];
  };
  static FASTAC_DEVICE void run(const Arguments& p) {
    if (ptx::thread() != 0) return;
    const int64_t block = ptx::block();
    ptx::fence();
    p.array<int>(1)[block] = ptx::add(p.array<int>(0), 1);
    const Four four = ptx::load_around_cache(p.array<const Four>(2));
    float* out = p.array<float>(3) + block * 4;
    out[0] = four.x[0] + static_cast<float>(ptx::blocks());
    out[1] = ptx::load_around_cache(p.array<const float>(2) + 1);
    double two = ptx::load_around_cache(p.array<const double>(2) + 1);
    memcpy(out + 2, &two, 8);
  }
};

// in (32, SIZE bytes), bytes (32) int, out (3, 32, SIZE bytes): before the wait, after the first, after the
// last.
template <int SIZE>
struct CopyAsync : Probe<32> {
  static FASTAC_DEVICE void run(const Arguments& p) {
    unsigned char* in = p.array<unsigned char>(0) + ptx::lane() * SIZE;
    unsigned char* place = ptx::shared() + ptx::lane() * 2 * SIZE;
    const auto copy = [](void* to, const void* from, int bytes) {
      if constexpr (SIZE == 16) {
        ptx::copy_async_16(to, from, bytes);
      } else if constexpr (SIZE == 8) {
        ptx::copy_async_8(to, from, bytes);
      } else {
        ptx::copy_async_4(to, from, bytes);
      }
    };
    const int bytes = p.array<int>(1)[ptx::lane()];
    const auto put = [&](int i, const void* from) {
      memcpy(p.array<unsigned char>(2) + (i * 32 + ptx::lane()) * SIZE, from, SIZE);
    };
    memset(place, 0, SIZE);
    copy(place, bytes == 0 ? nullptr : in, bytes);
    put(0, place);
    ptx::commit_copies();
    copy(place + SIZE, in, SIZE);
    ptx::commit_copies();
    ptx::commit_copies();
    ptx::wait_copies<2>();
    put(1, place);
    put(2, place + SIZE);
    ptx::wait_copies<1>();
    put(3, place + SIZE);
  }
};

// What a block reads of another thread's copy: number 0 after the wait and a barrier, 1 before the wait.
struct ReadOfCopy : Probe<64> {
  static FASTAC_DEVICE void run(const Arguments& p) {
    ptx::copy_async_4(shared<float>() + ptx::thread(), p.array<float>(0) + ptx::thread(), 4);
    ptx::commit_copies();
    const float early = shared<float>()[ptx::thread()];
    ptx::wait_copies<0>();
    ptx::sync();
    const float late = shared<float>()[63 - ptx::thread()];
    p.array<float>(1)[ptx::thread()] = p.number == 0 ? late : early;
  }
};

// in (number, 64) float, out (2, 64) float: sums of rows that bulk copies bring, through two buffers; and
// what the first buffer holds before its first wait.
struct BulkPipeline : Probe<64> {
  static FASTAC_DEVICE void run(const Arguments& p) {
    uint64_t* full = shared<uint64_t>();
    uint64_t* empty = full + 2;
    float* buffers = shared<float>() + 16;
    if (ptx::thread() == 0) {
      for (int i = 0; i < 2; ++i) {
        ptx::barrier_init(full + i, 1);
        ptx::barrier_init(empty + i, kThreads);
      }
      ptx::barrier_fence();
    }
    ptx::sync();
    const auto load = [&](int row) {
      if (ptx::thread() != 0 || row >= p.number) return;
      if (row >= 2) ptx::barrier_wait(empty + row % 2, row / 2 % 2 ^ 1);
      ptx::barrier_expect(full + row % 2, 256);
      const float* from = p.array<float>(0) + row * 64;
      ptx::bulk_load(buffers + row % 2 * 64, from, 128, full + row % 2);
      ptx::bulk_load(buffers + row % 2 * 64 + 32, from + 32, 128, full + row % 2);
    };
    load(0);
    p.array<float>(1)[64 + ptx::thread()] = ptx::thread() == 0 ? buffers[5] : 0;
    float sum = 0;
    for (int row = 0; row < p.number; ++row) {
      load(row + 1);
      ptx::barrier_wait(full + row % 2, row / 2 % 2);
      sum += buffers[row % 2 * 64 + ptx::thread()];
      ptx::barrier_arrive(empty + row % 2);
    }
    p.array<float>(1)[ptx::thread()] = sum;
  }
};

// out (32) float: the lanes' numbers, by a bulk store. number 1: overwritten before the store has read them;
// 2: nobody waits for the writing.
struct BulkStore : Probe<32> {
  static FASTAC_DEVICE void run(const Arguments& p) {
    float* place = shared<float>() + ptx::thread();
    *place = static_cast<float>(ptx::thread());
    ptx::proxy_fence();
    ptx::sync();
    if (ptx::thread() == 0) {
      ptx::bulk_store(p.array<float>(0), ptx::shared(), 128);
      ptx::commit_stores();
      if (p.number == 1) *place = 77;
      ptx::wait_stores_read<0>();
      *place = -1;
      p.array<float>(1)[0] = p.array<float>(0)[0];
      if (p.number != 2) ptx::wait_stores<0>();
      p.array<float>(1)[1] = p.array<float>(0)[0];
    }
  }
};

// out (blocks, 3) int: what another block of the cluster wrote; size and rank; a sum over split barriers.
struct Cluster : Probe<32> {
  static FASTAC_DEVICE void run(const Arguments& p) {
    const int rank = ptx::cluster_rank(), size = ptx::cluster_size();
    if (ptx::thread() == 0) shared<int>()[0] = 100 + rank;
    ptx::cluster_sync();
    int* out = p.array<int>(0) + ptx::block() * 3;
    if (ptx::thread() == 0) {
      out[0] = *ptx::map(shared<int>(), (rank + 1) % size);
      out[1] = 10 * size + rank;
      for (int i = 0; i < size; ++i) ptx::map(shared<int>() + 8, i)[rank] = rank + 1;
    }
    ptx::cluster_arrive();
    if (ptx::thread() == 0) shared<int>()[20] = 0;  // nobody else's
    ptx::cluster_wait();
    if (ptx::thread() == 0) {
      out[2] = 0;
      for (int i = 0; i < size; ++i) out[2] += shared<int>()[8 + i];
    }
  }
};

// in (blocks, 64) float, out (blocks, 64) float: every block loads a row; rank 0 hears from all before it
// writes into their memory that it may be read, and all wait for that.
struct ClusterBarriers : Probe<64> {
  static FASTAC_DEVICE void run(const Arguments& p) {
    uint64_t* barriers = shared<uint64_t>();
    float* place = shared<float>() + 4;
    float* factor = place + 64;
    const int rank = ptx::cluster_rank(), size = ptx::cluster_size();
    if (ptx::thread() == 0) {
      ptx::barrier_init(barriers, 1);
      ptx::barrier_init(barriers + 1, rank == 0 ? size : 1);
      ptx::barrier_fence();
    }
    ptx::cluster_sync();
    if (ptx::thread() == 0) {
      ptx::barrier_expect(barriers, 256);
      ptx::bulk_load(place, p.array<float>(0) + ptx::block() * 64, 256, barriers);
      ptx::barrier_arrive_remote(barriers + 1, 0);
    }
    if (rank == 0 && ptx::thread() == 32) {
      ptx::barrier_wait_cluster(barriers + 1, 0);
      for (int i = 0; i < size; ++i) *ptx::map(factor, i) = static_cast<float>(i + p.number);
      for (int i = 1; i < size; ++i) ptx::barrier_arrive_remote(barriers + 1, i);
    }
    ptx::barrier_wait(barriers, 0);
    if (rank > 0) ptx::barrier_wait_cluster(barriers + 1, 0);
    ptx::cluster_sync();
    p.array<float>(1)[ptx::block() * 64 + ptx::thread()] = place[ptx::thread()] * *factor;
  }
};

// out (128) float: each thread's neighbour's number; number 1 forgets the barrier.
struct Neighbour : Probe<128> {
  static FASTAC_DEVICE void run(const Arguments& p) {
    shared<float>()[ptx::thread()] = static_cast<float>(ptx::thread());
    if (p.number == 0) ptx::sync();
    p.array<float>(0)[ptx::thread()] = shared<float>()[(ptx::thread() + 1) % 128];
  }
};

// The shared memory of a block, as it starts.
struct FirstLook : Probe<32> {
  static FASTAC_DEVICE void run(const Arguments& p) {
    if (ptx::thread() == 0) memcpy(p.array<unsigned char>(0), ptx::shared(), static_cast<size_t>(p.number));
    ptx::sync();
    if (ptx::thread() == 0) memset(ptx::shared(), 0, static_cast<size_t>(p.number));
  }
};

// Waits `number` times for the warp, the block, the cluster.
struct Waiting : Probe<128> {
  static FASTAC_DEVICE void run(const Arguments& p) {
    for (int i = 0; i < p.number; ++i) {
      ptx::sync_warp();
      ptx::sync();
      ptx::cluster_sync();
    }
  }
};

// One mistake, by number. in (64) float.
struct Mistake : Probe<64> {
  static FASTAC_DEVICE void run(const Arguments& p) {
    const int thread = ptx::thread(), rank = ptx::cluster_rank();
    float* global = p.array<float>(0);
    float* place = shared<float>() + 4 * thread;
    uint64_t* barrier = shared<uint64_t>();
    uint32_t r[4];
    switch (p.number) {
      case 0:  // a thread misses the block's barrier
        if (thread == 37) return;
        ptx::sync();
        break;
      case 1:  // a warp waits elsewhere
        if (thread < 32) {
          ptx::sync();
        } else {
          ptx::sync_or(true);
        }
        break;
      case 2:  // a lane calls another operation
        if (thread == 3) {
          ptx::sync_warp();
        } else {
          ptx::shuffle(thread, 0);
        }
        break;
      case 3:  // half a warp shuffles
        if (thread < 16) ptx::shuffle(thread, 0);
        ptx::sync();
        break;
      case 4:  // a block misses the cluster's barrier
        if (rank == 1) return;
        ptx::cluster_sync();
        break;
      case 5:  // an mbarrier that is never complete
        if (thread == 0) ptx::barrier_init(barrier, 2);
        ptx::sync();
        if (thread == 0) ptx::barrier_arrive(barrier);
        ptx::barrier_wait(barrier, 0);
        break;
      case 6:  // bytes that never come
        if (thread == 0) {
          ptx::barrier_init(barrier, 1);
          ptx::barrier_expect(barrier, 64);
          ptx::bulk_load(shared<float>() + 4, global, 32, barrier);
          ptx::barrier_wait(barrier, 0);
        }
        break;
      case 7: ptx::barrier_wait(barrier, 0); break;
      case 8:
        if (thread == 0) ptx::barrier_init(barrier, 1);
        ptx::sync();
        if (thread == 0) ptx::barrier_expect(barrier, 16);
        if (thread == 0) ptx::barrier_arrive(barrier);
        break;
      case 9: ptx::copy_async_16(place, global + 1 + thread, 16); break;
      case 10: ptx::copy_async_8(place + 1, global, 8); break;
      case 11: ptx::load_matrices(r, place + 1); break;
      case 12: ptx::bulk_load(place, global + 1, 16, barrier); break;
      case 13: ptx::bulk_store(global, place, 8); break;
      case 14: ptx::copy_async_16(place + 1024, global, 16); break;
      case 15:
        ptx::load_around_cache(p.array<const double>(0) + thread);
        ptx::load_around_cache(reinterpret_cast<const double*>(global + 1));
        break;
      case 16:  // returns while a copy is under way
        ptx::copy_async_16(place, global, 16);
        ptx::commit_copies();
        ptx::wait_copies<1>();
        break;
      case 17:
        if (thread == 0) {
          ptx::barrier_init(barrier, 1);
          ptx::barrier_expect(barrier, 16);
          ptx::bulk_load(shared<float>() + 4, global, 16, barrier);
        }
        break;
      case 18:
        ptx::bulk_store(global, place, 16);
        ptx::commit_stores();
        break;
      case 19:  // a block returns while another may read its memory
        ptx::cluster_sync();
        if (rank == 1) return;
        *ptx::map(place, 1) = 0;
        ptx::sync();
        break;
      case 20:
        if (rank == 0 && thread == 0) ptx::map(place, 2);
        break;
      case 21: ptx::shuffle(thread, 32 + thread); break;
      case 22: ptx::cluster_wait(); break;
      case 23:
        ptx::cluster_arrive();
        ptx::cluster_arrive();
        break;
      case 24: ptx::copy_async_16(place, global + 1, 0); break;
      case 100:  // for AddressSanitizer: global memory, read past its end
        global[64 + thread] += 1;
        break;
      case 101:  // shared memory, written past its end
        shared<float>()[1024 + thread] = 1;
        break;
      case 102:  // global memory, by a copy
        ptx::copy_async_16(place, global + 64, 16);
        break;
      case 103: ptx::bulk_store(global + 60, place, 32); break;
      case 104: {  // another block's memory, by a pointer from before a barrier
        float* other = ptx::map(place, 1 - rank);
        ptx::cluster_sync();
        if (rank == 1) return;
        ptx::sync();
        ptx::sync();
        *other = 1;
        break;
      }
      default: break;
    }
  }
};

template <class Kernel>
void start(int64_t grid, int cluster, size_t shared_bytes, const ProbeArguments& arguments) {
  launch<Kernel>(grid, cluster, shared_bytes, arguments, nullptr);
}

using Start = void (*)(int64_t, int, size_t, const ProbeArguments&);
const std::map<std::string, Start> kProbes = {
    {"multiply_add_half", start<MultiplyAdd<c10::Half>>},
    {"multiply_add_bfloat16", start<MultiplyAdd<c10::BFloat16>>},
    {"load_matrices", start<LoadMatrices>},
    {"shuffles", start<Shuffles>},
    {"arithmetic", start<Arithmetic>},
    {"global_memory", start<GlobalMemory>},
    {"copy_async_4", start<CopyAsync<4>>},
    {"copy_async_8", start<CopyAsync<8>>},
    {"copy_async_16", start<CopyAsync<16>>},
    {"read_of_copy", start<ReadOfCopy>},
    {"bulk_pipeline", start<BulkPipeline>},
    {"bulk_store", start<BulkStore>},
    {"cluster", start<Cluster>},
    {"cluster_barriers", start<ClusterBarriers>},
    {"neighbour", start<Neighbour>},
    {"first_look", start<FirstLook>},
    {"waiting", start<Waiting>},
    {"mistake", start<Mistake>},
};

std::string message;

}  // namespace
}  // namespace fastac::cuda

// Launches a probe; returns what went wrong, or null.
extern "C" __attribute__((visibility("default"))) const char* fastac_probe(const char* name, int64_t grid,
                                                                           int cluster, int64_t shared_bytes,
                                                                           void* const* arrays, int number) {
  using namespace fastac::cuda;
  try {
    ProbeArguments arguments{{arrays[0], arrays[1], arrays[2], arrays[3]}, number};
    kProbes.at(name)(grid, cluster, static_cast<size_t>(shared_bytes), arguments);
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}
