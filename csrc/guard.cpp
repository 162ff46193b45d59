#include "guard.h"

#include <atomic>
#include <cstring>
#include <mutex>
#include <vector>

namespace fastac {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBand = 256;           // bytes on either side
constexpr unsigned char kPoison = 0xff;  // every floating-point type reads it as NaN

struct Guarded {
  Tensor buffer;
  int64_t bytes;
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
  const int64_t element = dtype == ScalarType::Double  ? 8
                          : dtype == ScalarType::Float ? 4
                                                       : 2,
                band = kBand / element;
  const int64_t total = count + 2 * band;
  Tensor buffer = plain(&total, 1, dtype);
  std::memset(buffer.mutable_data_ptr(), kPoison, total * element);
  Tensor inner = torch::stable::narrow(buffer, 0, band, count);
  {
    std::lock_guard<std::mutex> lock(mutex);
    guarded.push_back({buffer, total * element});
  }
  return torch::stable::view(inner, torch::headeronly::IntHeaderOnlyArrayRef(sizes, dim));
}

int64_t guard(bool on) {
  std::lock_guard<std::mutex> lock(mutex);
  guarding.store(on, std::memory_order_relaxed);
  int64_t damaged = 0;
  for (const Guarded& g : guarded) {
    const unsigned char* p = static_cast<const unsigned char*>(g.buffer.const_data_ptr());
    for (int64_t i = 0; i < kBand; ++i) damaged += (p[i] != kPoison) + (p[g.bytes - 1 - i] != kPoison);
  }
  guarded.clear();
  return damaged;
}

}  // namespace fastac
