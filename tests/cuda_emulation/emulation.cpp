#include "emulation.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <utility>

#ifdef FASTAC_ADDRESS_SANITIZER
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Saves what a call preserves and the stack pointer in *from, and continues where `to` was saved. Every fiber
// but a new one waits in the same call, so the processor predicts the return.
extern "C" void fastac_switch_fiber(void** from, void* to) __attribute__((visibility("hidden")));

#if defined(__x86_64__)
asm(R"(
.text
.hidden fastac_switch_fiber
.globl fastac_switch_fiber
.type fastac_switch_fiber, @function
fastac_switch_fiber:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fastac_switch_fiber, .-fastac_switch_fiber
)");
#elif defined(__aarch64__)
asm(R"(
.text
.hidden fastac_switch_fiber
.globl fastac_switch_fiber
.type fastac_switch_fiber, %function
fastac_switch_fiber:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x2, sp
  str x2, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size fastac_switch_fiber, .-fastac_switch_fiber
)");
#else
#error "fibers are written for x86-64 and aarch64"
#endif

namespace fastac::cuda::emulation {

Fiber* current = nullptr;
Launch launched;
Counts counts;
std::vector<Block> blocks;
std::vector<Fiber*> at_barriers;
std::vector<Load> loads;
std::vector<Store> late_stores;

namespace {

constexpr size_t kStack = 256 * 1024;
constexpr size_t kGuard = 64 * 1024;  // below a stack; at least a page
constexpr int kWarps = 256;           // of a cluster: 8 blocks of 1024 threads
constexpr size_t kRemembered = 4096;

const char* const kNames[] = {"code",
                              "sync",
                              "sync_or",
                              "sync_warp",
                              "shuffle",
                              "shuffle_xor",
                              "ballot",
                              "load_matrices",
                              "load_matrices_transposed",
                              "multiply_add<Half>",
                              "multiply_add<BFloat16>",
                              "cluster_wait",
                              "barrier_wait",
                              "no code"};

// A warp, and the fibers of its lanes, which are used again by every launch.
struct Unit {
  Warp warp{};
  Fiber fibers[kLanes]{};
};

struct Record {
  Launch launch;
  Counts counts;
};

std::mutex running;
std::vector<std::unique_ptr<Unit>> units;
int warps = 0;  // of the cluster that runs
uint64_t ready_warps[kWarps / 64];
Fiber outside;  // who called run()
std::string failure;
bool failed = false;
int finished = 0;  // threads of the cluster
int cluster_arrived = 0;
std::deque<Record> records;

uint64_t environment_seed() {
  const char* text = std::getenv("FASTAC_EMULATION_SEED");
  return text == nullptr ? 0 : std::strtoull(text, nullptr, 10);
}
uint64_t seed = environment_seed();  // 0: everything in order
uint64_t random_state = 0;

uint64_t random() {  // splitmix64
  uint64_t z = (random_state += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// By its number in the cluster.
Fiber& fiber_at(int index) {
  return units[static_cast<size_t>(index / kLanes)]->fibers[index % kLanes];
}

// Of the cluster.
int threads() {
  return warps * kLanes;
}

// Fibers.

__attribute__((noinline)) void transfer(Fiber* to) {
  Fiber* from = current;
  current = to;
  ++counts.switches;
#ifdef FASTAC_ADDRESS_SANITIZER
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, to->stack, static_cast<size_t>(to->stack_top - to->stack));
#endif
  fastac_switch_fiber(&from->stack_pointer, to->stack_pointer);
#ifdef FASTAC_ADDRESS_SANITIZER
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

int first_bit(uint64_t bits) {
  return __builtin_ctzll(bits);
}

// A ready warp: the next in order from `from` on, or null.
Warp* ready_warp(int from) {
  for (int i = 0; i <= kWarps / 64; ++i) {
    const int word = (from / 64 + i) % (kWarps / 64);
    uint64_t bits = ready_warps[word];
    if (i == 0) bits &= ~uint64_t{0} << (from % 64);
    if (bits != 0) return &units[static_cast<size_t>(word * 64 + first_bit(bits))]->warp;
  }
  return nullptr;
}

// Who runs next, or null. `last` is the warp that ran, which goes on while it can.
Fiber* choose(Warp* last) {
  if (seed == 0) {
    Warp* warp = last->ready != 0 ? last : ready_warp((last->index + 1) % kWarps);
    return warp == nullptr ? nullptr : warp->fibers + first_bit(warp->ready);
  }
  const uint64_t number = random();
  Warp* warp = last;
  if (last->ready == 0 || number % 16 == 0) {
    warp = ready_warp(static_cast<int>((number >> 8) % static_cast<uint64_t>(warps)));
    if (warp == nullptr) return nullptr;
  }
  const unsigned turn = static_cast<unsigned>(number >> 32) % kLanes;
  const unsigned turned = warp->ready >> turn | warp->ready << ((kLanes - turn) % kLanes);
  return warp->fibers + (static_cast<unsigned>(first_bit(turned)) + turn) % kLanes;
}

Fiber& fiber_of(const Block& block, int thread) {
  return fiber_at(block.rank * block.threads + thread);
}

void make_waiting(Fiber& fiber, Operation operation) {
  fiber.waits = operation;
  fiber.warp->ready &= ~(1u << fiber.lane);
  if (fiber.warp->ready != 0) return;
  ready_warps[fiber.warp->index / 64] &= ~(uint64_t{1} << (fiber.warp->index % 64));
}

// What the fiber waits in: kNone if it can run.
Operation where(const Fiber& fiber) {
  return (fiber.warp->ready >> fiber.lane & 1) != 0 ? Operation::kNone : fiber.waits;
}

// Which threads of the cluster are where.
std::string whereabouts() {
  std::string text;
  for (const Block& block : blocks) {
    text += "\n  " + describe(block) + ":";
    for (int first = 0, last; first < block.threads; first = last) {
      const Operation waits = where(fiber_of(block, first));
      for (last = first + 1; last < block.threads && where(fiber_of(block, last)) == waits; ++last) {
      }
      text += first == 0 ? " " : ", ";
      text += last == first + 1 ? "thread " + std::to_string(first)
                                : "threads " + std::to_string(first) + " to " + std::to_string(last - 1);
      const char* name = kNames[static_cast<int>(waits)];
      text += waits == Operation::kReturned ? " returned" : std::string(" in ") + name;
    }
  }
  return text;
}

// Leaves a fiber that cannot go on, for one that can.
void leave(Fiber& fiber) {
  Fiber* next = choose(fiber.warp);
  while (next == nullptr && deliver_load()) next = choose(fiber.warp);
  if (next != nullptr) {
    if (next != &fiber) transfer(next);
  } else if (finished == threads()) {
    transfer(&outside);
  } else {
    throw std::runtime_error(launched.name + ": threads wait for others that do not come" + whereabouts());
  }
}

void finish(Fiber& fiber);

void fiber_main() {
#ifdef FASTAC_ADDRESS_SANITIZER
  const void* stack = nullptr;
  size_t size = 0;
  __sanitizer_finish_switch_fiber(nullptr, &stack, &size);
  if (outside.stack == nullptr) {  // the first fiber comes from there
    outside.stack = static_cast<unsigned char*>(const_cast<void*>(stack));
    outside.stack_top = outside.stack + size;
  }
#endif
  try {
    launched.run(launched.arguments);
    finish(*current);
  } catch (const std::exception& error) {
    failure = error.what();
    failed = true;
  }
  transfer(&outside);  // with a failure: the other fibers are left where they are
}

// A fiber that will start in fiber_main.
void prepare(Fiber& fiber) {
  if (fiber.stack == nullptr) {
    void* memory = mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kGuard, PROT_NONE) != 0) throw std::bad_alloc();
    fiber.stack = static_cast<unsigned char*>(memory) + kGuard;
    fiber.stack_top = fiber.stack + kStack;
  }
#ifdef FASTAC_ADDRESS_SANITIZER
  if (fiber.stack_pointer != nullptr) {  // the frames in which it was left still have their red zones
    const auto* left = static_cast<const unsigned char*>(fiber.stack_pointer);
    __asan_unpoison_memory_region(left, static_cast<size_t>(fiber.stack_top - left));
  }
#endif
  // Stacks start at different places of a page, or they would share few lines of the cache.
  const size_t shift = static_cast<size_t>(fiber.warp->index * kLanes + fiber.lane) * 1088 % 4096;
  void** top = reinterpret_cast<void**>(fiber.stack_top - shift);
  void (*const entry)() = fiber_main;
#if defined(__x86_64__)
  top -= 8 + 2;  // the frame that is popped; the return address; and fiber_main's, which is none
  memset(top, 0, 10 * sizeof(void*));
  memcpy(top + 6, &entry, sizeof(entry));
#else
  top -= 20;
  memset(top, 0, 20 * sizeof(void*));
  memcpy(top + 11, &entry, sizeof(entry));
#endif
  fiber.stack_pointer = top;
}

void finish(Fiber& fiber) {
  Block& block = *fiber.block;
  if (!fiber.copies.empty()) fail("returned while copies of it were under way");
  for (Store& store : fiber.stores) {
    if (store.read.empty()) fail("returned before its bulk stores had read shared memory");
    late_stores.push_back(std::move(store));
  }
  fiber.stores.clear();
  ++finished;
  make_waiting(fiber, Operation::kReturned);
  if (++block.returned == block.threads) {
    for (const Load& load : loads) {
      if (load.rank == block.rank) fail("the block returned while bulk loads to it were under way");
    }
    for (int i = 0; i < threads(); ++i) {
      const Fiber& other = fiber_at(i);
      if (where(other) != Operation::kReturned && (other.mapped >> block.rank & 1) != 0) {
        fail("the block returned although thread " + std::to_string(other.thread) + " of " +
             describe(*other.block) + " had mapped its shared memory and has not arrived at a barrier since");
      }
    }
    memset(block.shared, kNaN, block.shared_bytes);
#ifdef FASTAC_ADDRESS_SANITIZER
    __asan_poison_memory_region(block.shared, block.shared_bytes);
#endif
  }
  leave(fiber);
}

}  // namespace

uint64_t turn(uint64_t number) {
  return seed == 0 ? 0 : random() % number;
}

void make_ready(Fiber& fiber) {
  fiber.warp->ready |= 1u << fiber.lane;
  ready_warps[fiber.warp->index / 64] |= uint64_t{1} << (fiber.warp->index % 64);
}

std::string describe(const Block& block) {
  std::string text = "block " + std::to_string(block.index);
  if (launched.cluster > 1) text += " (rank " + std::to_string(block.rank) + " of its cluster)";
  return text;
}

void fail(const std::string& what) {
  throw std::runtime_error(launched.name + ", " + describe(*current->block) + ", thread " +
                           std::to_string(current->thread) + ": " + what);
}

void diverged(const char* group, Operation operation) {
  make_waiting(*current, operation);
  fail(std::string("the ") + group + " diverged: its threads call different operations" + whereabouts());
}

void suspend(Operation operation) {
  make_waiting(*current, operation);
  leave(*current);
}

void choose_again() {
  if (seed == 0) return;
  Fiber* next = choose(current->warp);
  if (next != current) transfer(next);
}

void release(Warp& warp) {
  warp.arrived = 0;
  warp.ready = kAllLanes;
  choose_again();
}

void block_barrier(Operation operation, bool value) {
  Block& block = *current->block;
  if (block.arrived == 0) {
    block.operation = operation;
    block.any = false;
  } else if (block.operation != operation) {
    diverged("block", operation);
  }
  block.any = block.any || value;
  if (++block.arrived < block.threads) {
    suspend(operation);
    return;
  }
  block.arrived = 0;
  block.any_result = block.any;
  for (int i = 0; i < block.threads; i += kLanes) {
    Warp& warp = *fiber_of(block, i).warp;
    warp.ready = kAllLanes;
    ready_warps[warp.index / 64] |= uint64_t{1} << (warp.index % 64);
  }
  ++counts.syncs;
  choose_again();
}

void cluster_arrive() {
  if (current->cluster_arrived) fail("cluster_arrive twice without cluster_wait");
  current->cluster_arrived = true;
  current->cluster_complete = false;
  current->mapped = 0;
  if (++cluster_arrived < threads()) return;
  cluster_arrived = 0;
  for (int i = 0; i < threads(); ++i) {
    Fiber& fiber = fiber_at(i);
    fiber.cluster_complete = true;
    if (where(fiber) == Operation::kClusterWait) make_ready(fiber);
  }
  ++counts.cluster_syncs;
}

void cluster_wait() {
  if (!current->cluster_arrived) fail("cluster_wait without cluster_arrive");
  if (!current->cluster_complete) suspend(Operation::kClusterWait);
  current->cluster_arrived = false;
}

// The launch.

namespace {

// The shared memory of the blocks of a cluster, each exactly as large as asked for.
class SharedMemory {
 public:
  SharedMemory(int blocks, size_t bytes) : bytes_(bytes) {
    for (int i = 0; i < blocks; ++i) {
      void* memory = nullptr;
      if (posix_memalign(&memory, 128, bytes) != 0) throw std::bad_alloc();
      memory_.push_back(static_cast<unsigned char*>(memory));
    }
  }
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;
  ~SharedMemory() {
    for (unsigned char* memory : memory_) {
      allow(memory);
      std::free(memory);
    }
  }

  unsigned char* fresh(int rank) {
    unsigned char* memory = memory_[static_cast<size_t>(rank)];
    allow(memory);
    memset(memory, kNaN, bytes_);
    return memory;
  }

 private:
  void allow([[maybe_unused]] unsigned char* memory) {
#ifdef FASTAC_ADDRESS_SANITIZER
    __asan_unpoison_memory_region(memory, bytes_);
#endif
  }

  size_t bytes_;
  std::vector<unsigned char*> memory_;
};

void run_cluster(int64_t cluster, SharedMemory& memory) {
  blocks.clear();
  for (int rank = 0; rank < launched.cluster; ++rank) {
    blocks.push_back({cluster * launched.cluster + rank, rank, memory.fresh(rank), launched.shared_bytes,
                      launched.threads, 0, 0, Operation::kNone, false, false});
  }
  finished = cluster_arrived = 0;
  failed = false;
  at_barriers.clear();
  loads.clear();
  late_stores.clear();
  std::fill(std::begin(ready_warps), std::end(ready_warps), uint64_t{0});
  const int warps_per_block = launched.threads / kLanes;
  for (int i = 0; i < warps; ++i) {
    Unit& unit = *units[static_cast<size_t>(i)];
    unit.warp.index = i;
    unit.warp.block = &blocks[static_cast<size_t>(i / warps_per_block)];
    unit.warp.fibers = unit.fibers;
    unit.warp.arrived = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      Fiber& fiber = unit.fibers[lane];
      fiber.warp = &unit.warp;
      fiber.block = unit.warp.block;
      fiber.lane = lane;
      fiber.thread = i % warps_per_block * kLanes + lane;
      fiber.cluster_arrived = false;
      fiber.mapped = 0;
      fiber.copy_group = fiber.store_group = 0;
      fiber.copies.clear();
      fiber.stores.clear();
      prepare(fiber);
      make_ready(fiber);
    }
  }
  current = &outside;
  outside.stack = nullptr;  // the thread that calls may be another one each time
  transfer(choose(&units[0]->warp));
  if (failed) throw std::runtime_error(failure);
  for (const Store& store : late_stores) memcpy(store.copy.to, store.read.data(), store.read.size());
}

}  // namespace

void run(const Launch& launch) {
  if (launch.grid == 0) return;
  const auto require = [&](bool holds, const char* what) {
    if (!holds) throw std::runtime_error(launch.name + ": " + what);
  };
  require(launch.grid > 0 && launch.grid <= 0x7fffffff, "a grid of at most 2^31 - 1 blocks");
  require(launch.cluster >= 1 && launch.cluster <= 8, "a cluster of 1 to 8 blocks");
  require(launch.grid % launch.cluster == 0, "a grid that is a multiple of the cluster");
  require(launch.threads >= kLanes && launch.threads <= 1024 && launch.threads % kLanes == 0,
          "a block of 1 to 32 whole warps");
  require(launch.shared_bytes <= 227 * 1024, "at most 227 KB of shared memory");
  const std::lock_guard<std::mutex> lock(running);
  launched = launch;
  counts = {};
  random_state = seed;
  warps = launch.cluster * launch.threads / kLanes;
  while (units.size() < static_cast<size_t>(warps)) units.push_back(std::make_unique<Unit>());
  SharedMemory memory(launch.cluster, launch.shared_bytes);
  std::vector<int64_t> order(static_cast<size_t>(launch.grid / launch.cluster));
  for (size_t i = 0; i < order.size(); ++i) {
    order[i] = static_cast<int64_t>(i);
    std::swap(order[i], order[i - turn(i + 1)]);
  }
  for (const int64_t cluster : order) run_cluster(cluster, memory);
  if (records.size() == kRemembered) records.pop_front();
  records.push_back({launched, counts});
}

}  // namespace fastac::cuda::emulation

// For tests, through ctypes.

#define FASTAC_EXPORT extern "C" __attribute__((visibility("default")))

namespace emulation = fastac::cuda::emulation;

// Sets the seed of the launches that follow, 0: everything in order; returns the one before.
FASTAC_EXPORT uint64_t fastac_emulation_seed(uint64_t seed) {
  const std::lock_guard<std::mutex> lock(emulation::running);
  return std::exchange(emulation::seed, seed);
}

// How many launches have ended well, at most 4096 of them kept, since this was last called with `forget`.
FASTAC_EXPORT int64_t fastac_emulation_launches(bool forget) {
  const std::lock_guard<std::mutex> lock(emulation::running);
  const int64_t number = static_cast<int64_t>(emulation::records.size());
  if (forget) emulation::records.clear();
  return number;
}

// The name of one; grid, cluster, threads and shared bytes, and what is in Counts, in `numbers`.
FASTAC_EXPORT const char* fastac_emulation_launch(int64_t index, int64_t* numbers) {
  const std::lock_guard<std::mutex> lock(emulation::running);
  const emulation::Record& record = emulation::records.at(static_cast<size_t>(index));
  const int64_t launch[] = {record.launch.grid, record.launch.cluster, record.launch.threads,
                            static_cast<int64_t>(record.launch.shared_bytes)};
  memcpy(numbers, launch, sizeof(launch));
  memcpy(numbers + 4, &record.counts, sizeof(record.counts));
  return record.launch.name.c_str();
}
