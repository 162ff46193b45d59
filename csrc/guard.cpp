#include "guard.h"

#include <atomic>
#include <cstring>
#include <mutex>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#define FASTAC_ADDRESS_SANITIZER
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define FASTAC_ADDRESS_SANITIZER
#endif
#endif
#ifdef FASTAC_ADDRESS_SANITIZER
#include <sanitizer/asan_interface.h>
#endif

namespace fastac {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBand = 256;           // bytes on either side
constexpr unsigned char kPoison = 0xff;  // every floating-point type reads it as NaN

struct Guarded {
  Tensor buffer;
  int64_t bytes;

  unsigned char* begin() const { return static_cast<unsigned char*>(buffer.mutable_data_ptr()); }

  // Lets nobody touch the bands, or everybody. Without AddressSanitizer only their bytes tell.
  void forbid([[maybe_unused]] bool forbidden) const {
#ifdef FASTAC_ADDRESS_SANITIZER
    for (unsigned char* band : {begin(), begin() + bytes - kBand}) {
      if (forbidden)
        __asan_poison_memory_region(band, kBand);
      else
        __asan_unpoison_memory_region(band, kBand);
    }
#endif
  }
};

std::atomic<bool> guarding{false};
std::mutex mutex;
std::vector<Guarded> guarded;

Tensor plain(const int64_t* sizes, int64_t dim, ScalarType dtype) {
  return torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(sizes, dim), dtype);
}

}  // namespace

Tensor allocate(const int64_t* sizes, int64_t dim, ScalarType dtype) {
  if (!guarding.load(std::memory_order_relaxed)) return plain(sizes, dim, dtype);
  int64_t count = 1;
  for (int64_t i = 0; i < dim; ++i) count *= sizes[i];
  const bool is_8 = dtype == ScalarType::Double,
             is_4 = dtype == ScalarType::Float || dtype == ScalarType::Int;
  const int64_t element = is_8 ? 8 : is_4 ? 4 : 2, band = kBand / element;
  const int64_t total = count + 2 * band;
  Tensor buffer = plain(&total, 1, dtype);
  std::memset(buffer.mutable_data_ptr(), kPoison, total * element);
  Tensor inner = torch::stable::narrow(buffer, 0, band, count);
  {
    std::lock_guard<std::mutex> lock(mutex);
    guarded.push_back({buffer, total * element});
    guarded.back().forbid(true);
  }
  return torch::stable::view(inner, torch::headeronly::IntHeaderOnlyArrayRef(sizes, dim));
}

int64_t guard(bool on) {
  std::lock_guard<std::mutex> lock(mutex);
  guarding.store(on, std::memory_order_relaxed);
  int64_t damaged = 0;
  for (const Guarded& g : guarded) {
    g.forbid(false);
    const unsigned char* p = g.begin();
    for (int64_t i = 0; i < kBand; ++i) damaged += (p[i] != kPoison) + (p[g.bytes - 1 - i] != kPoison);
  }
  guarded.clear();
  return damaged;
}

}  // namespace fastac
