// Executes kernels written against csrc/cuda/ptx.cuh on the CPU. Every CUDA thread is a fiber with a stack of
// its own; a cluster of blocks at a time. A fiber runs until it has to wait: for the other lanes of its warp,
// for its block, its cluster or an mbarrier. What runs next is chosen in order, or at random from a seed.
//
// A warp's operands lie side by side in `Warp`, a register after the other, so that a register of a matrix
// fragment is a matrix of 8 rows (see ptx.cuh for the layouts). The last lane to arrive does the work of all.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#define FASTAC_ADDRESS_SANITIZER 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define FASTAC_ADDRESS_SANITIZER 1
#endif
#endif

namespace fastac::cuda::emulation {

constexpr int kLanes = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kNaN = 0xff;  // a byte of a NaN of every type

// What a fiber does or waits in. Names for messages are in emulation.cpp, in this order.
enum class Operation : unsigned char {
  kNone,
  kSync,
  kSyncOr,
  kSyncWarp,
  kShuffle,
  kShuffleXor,
  kBallot,
  kLoadMatrices,
  kLoadMatricesTransposed,
  kMultiplyAddHalf,
  kMultiplyAddBFloat16,
  kClusterWait,
  kBarrierWait,
  kReturned,
};

// What a launch did. One lane's operation is a count of one for cp.async and bulk copies; one warp's for the
// others.
struct Counts {
  int64_t matrix_products;  // mma
  int64_t matrix_loads;     // ldmatrix
  int64_t copies;           // cp.async
  int64_t copied_bytes;
  int64_t bulk_loads;
  int64_t bulk_loaded_bytes;
  int64_t bulk_stores;
  int64_t bulk_stored_bytes;
  int64_t syncs;  // of blocks
  int64_t cluster_syncs;
  int64_t switches;  // of fibers
};

struct Launch {
  std::string name;
  int64_t grid;
  int cluster;
  int threads;
  size_t shared_bytes;
  void (*run)(const void* arguments);
  const void* arguments;
};

struct Block;
struct Fiber;

struct alignas(64) Warp {
  uint32_t a[4][kLanes];  // operands and results of the collective operation under way
  uint32_t b[2][kLanes];
  float c[2][kLanes][2];   // c[0]: rows g; c[1]: rows g + 8
  uint64_t value[kLanes];  // shuffles, ballots
  uint64_t result[kLanes];
  int source[kLanes];
  const unsigned char* row[kLanes];  // ldmatrix
  unsigned ready;                    // lanes that can run
  unsigned arrived;                  // lanes that wait in `operation`
  Operation operation;
  int index;  // in the cluster
  Block* block;
  Fiber* fibers;  // of lane 0
};

// A copy on its way.
struct Copy {
  unsigned char* to;
  const unsigned char* from;
  int bytes;
  int size;       // of the destination
  int64_t group;  // counts commits of the thread
};

// A bulk store.
struct Store {
  Copy copy;
  std::vector<unsigned char> read;  // what it read, if it has
};

// A bulk load.
struct Load {
  Copy copy;
  uint64_t* barrier;
  int rank;
};

struct Fiber {
  void* stack_pointer;
  Warp* warp;
  Block* block;
  int lane;
  int thread;
  Operation waits;
  const uint64_t* barrier;  // that it waits for
  int parity;
  bool cluster_arrived;   // and has not waited since
  bool cluster_complete;  // all have arrived
  unsigned mapped;        // ranks mapped since it last arrived at the cluster barrier
  int64_t copy_group;     // commits so far
  int64_t store_group;
  std::vector<Copy> copies;  // in order
  std::vector<Store> stores;
  unsigned char* stack;  // lowest address
  unsigned char* stack_top;
};

struct Block {
  int64_t index;
  int rank;
  unsigned char* shared;
  size_t shared_bytes;
  int threads;
  int arrived;  // at `operation`
  int returned;
  Operation operation;
  bool any, any_result;  // sync_or
};

extern Fiber* current;
extern Launch launched;
extern Counts counts;
extern std::vector<Block> blocks;        // of the cluster that runs
extern std::vector<Fiber*> at_barriers;  // that wait for an mbarrier
extern std::vector<Load> loads;          // bulk loads under way
extern std::vector<Store> late_stores;   // bulk stores that nobody waited for

// Runs a grid to its end. One at a time: a second caller waits.
void run(const Launch& launch);

// Ends the launch with an exception that names the kernel, the block and the thread.
[[noreturn]] void fail(const std::string& what);

// The same, for threads that should call the same operation; this one calls `operation`.
[[noreturn]] void diverged(const char* group, Operation operation);

// Complain in the name of `what`: an address that is no multiple of `alignment`; one outside the block's
// shared memory.
void check_aligned(const char* what, const void* address, size_t alignment);
void check_shared(const char* what, const void* shared, size_t bytes, size_t alignment);

// Scheduling.
uint64_t turn(uint64_t number);  // one of so many: at random, or the first
void make_ready(Fiber& fiber);
void suspend(Operation operation);  // lets others run until this fiber is ready again
void release(Warp& warp);           // all lanes ready; the caller, one of them, goes on
void choose_again();                // a point where a random schedule may go on elsewhere
bool deliver_load();                // one of the bulk loads that somebody waits for, if there is one
std::string describe(const Block& block);

// Instructions.
void block_barrier(Operation operation, bool value);
void cluster_arrive();
void cluster_wait();
unsigned char* map(const void* shared, int rank);
void load_matrices(Warp& warp, bool transposed);
void multiply_add_half(Warp& warp);
void multiply_add_bfloat16(Warp& warp);
void copy_async(void* shared, const void* global, int bytes, int size);
void wait_copies(int64_t pending);
void barrier_init(uint64_t* barrier, int arrivals);
void barrier_arrive(uint64_t* barrier, int rank, int bytes);
void barrier_wait(uint64_t* barrier, int parity);
void bulk_load(void* shared, const void* global, int bytes, uint64_t* barrier);
void bulk_store(void* global, const void* shared, int bytes);
void wait_stores(int64_t pending, bool written);

// Called by every lane with its operands in the warp; `work` runs once, when all have come.
template <class Work>
inline void collective(Operation operation, Work work) {
  Warp& warp = *current->warp;
  if (warp.arrived == 0) {
    warp.operation = operation;
  } else if (warp.operation != operation) {
    diverged("warp", operation);
  }
  warp.arrived |= 1u << current->lane;
  if (warp.arrived == kAllLanes) {
    work(warp);
    release(warp);
  } else {
    suspend(operation);
  }
}

}  // namespace fastac::cuda::emulation
