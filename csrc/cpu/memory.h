// Working memory of a thread and of a call.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

namespace fastac::cpu {

constexpr int64_t kAlignment = 64;
constexpr int64_t kKeepBytes = 8 << 20;  // what a thread keeps between calls at the most

struct AlignedDelete {
  void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<void, AlignedDelete>;

// A NaN in every type: under the sanitizers what is read before it was written shows in the result.
inline void poison([[maybe_unused]] void* p, [[maybe_unused]] int64_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  std::memset(p, 0xff, size_t(bytes));
#endif
}

inline Buffer allocate(int64_t bytes) {
  const size_t rounded = size_t((bytes + kAlignment) / kAlignment * kAlignment);
  void* p = std::aligned_alloc(kAlignment, rounded);
  if (p == nullptr) throw std::bad_alloc();
  poison(p, int64_t(rounded));
  return Buffer(p);
}

// Hands out aligned pieces of one buffer: first measured with a null base, then carved.
class Arena {
 public:
  explicit Arena(void* base = nullptr) : base_(static_cast<char*>(base)) {}
  template <typename A>
  A* take(int64_t count) {
    const int64_t at = used_;
    used_ += (count * int64_t(sizeof(A)) + kAlignment - 1) / kAlignment * kAlignment;
    return base_ ? reinterpret_cast<A*>(base_ + at) : nullptr;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// Scratch of the calling thread, at least `bytes` large and kept for its next call unless it is unusually
// large.
class ThreadScratch {
 public:
  explicit ThreadScratch(int64_t bytes) {
    if (bytes > kKeepBytes) {
      own_ = allocate(bytes);
      data_ = own_.get();
      return;
    }
    thread_local Buffer kept;
    thread_local int64_t size = 0;
    if (size < bytes) {
      kept.reset();
      size = 0;
      kept = allocate(bytes);
      size = bytes;
    }
    data_ = kept.get();
    poison(data_, bytes);
  }
  void* data() const { return data_; }

 private:
  Buffer own_;
  void* data_ = nullptr;
};

// Work is counted in multiply-adds of a matrix product. Less than this is over before the other threads of a
// pool would have begun and been waited for.
constexpr int64_t kSerialOperations = 512 * 1024;
constexpr int64_t kMoving = 8;        // of reading a number and writing it
constexpr int64_t kTransposing = 16;  // ... in the transpose
constexpr int64_t kExponential = 32;  // ... or its exponential

// Calls body(begin, end) over a partition of [0, n).
template <typename F>
inline void parallel(void (*parallel_for)(int64_t, void (*)(void*, int64_t, int64_t), void*), int64_t n,
                     int64_t operations, F&& body) {
  if (n <= 0) return;
  if (operations < kSerialOperations) return body(0, n);
  auto call = [](void* context, int64_t begin, int64_t end) {
    (*static_cast<std::remove_reference_t<F>*>(context))(begin, end);
  };
  parallel_for(n, call, &body);
}

}  // namespace fastac::cpu
