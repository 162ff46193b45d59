#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "isa.h"

namespace fastac::cpu {
namespace {

const CpuKernels* find(int64_t isa) {
  switch (isa) {
    case kBaseline: return &kBaselineKernels;
#if defined(__x86_64__)
    case kAvx2: return &kAvx2Kernels;
    case kAvx512: return &kAvx512Kernels;
    case kAvx512Bf16: return &kAvx512Bf16Kernels;
    case kAvx512Bf16Dot: return &kAvx512Bf16DotKernels;
#endif
    default: return nullptr;
  }
}

bool runs(int64_t isa) {
#if defined(__x86_64__)
  switch (isa) {
    case kAvx2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case kAvx512:
      return runs(kAvx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    case kAvx512Bf16:
    case kAvx512Bf16Dot: return runs(kAvx512) && __builtin_cpu_supports("avx512bf16");
  }
#endif
  return isa == kBaseline;
}

// Whether an instruction set that runs is the better choice than the ones below it. By maker, not by a
// measurement: the choice decides which bits come out.
bool pays(int64_t isa) {
#if defined(__x86_64__)
  if (isa == kAvx512Bf16Dot) return __builtin_cpu_is("amd");
#endif
  return true;
}

int64_t check(int64_t isa, const std::string& asked) {
  if (isa >= 0 && isa < kIsaCount && runs(isa)) return isa;
  std::string names;
  for (int64_t i = 0; i < kIsaCount; ++i)
    if (runs(i)) names += (names.empty() ? "" : ", ") + std::string(find(i)->name);
  throw std::runtime_error("FASTAC_CPU_ISA must name an instruction set that this processor runs (" + names +
                           "), got " + asked);
}

int64_t choose() {
  const char* name = std::getenv("FASTAC_CPU_ISA");
  if (name != nullptr && *name != '\0') {
    for (int64_t i = 0; i < kIsaCount; ++i)
      if (find(i) != nullptr && name == std::string(find(i)->name)) return check(i, name);
    return check(-1, name);
  }
  int64_t best = kBaseline;
  for (int64_t i = 0; i < kIsaCount; ++i)
    if (runs(i) && pays(i)) best = i;
  return best;
}

std::atomic<int64_t> current{-1};

}  // namespace

int64_t current_isa() {
  int64_t isa = current.load(std::memory_order_relaxed);
  if (isa < 0) current.store(isa = choose(), std::memory_order_relaxed);
  return isa;
}

const CpuKernels& kernels() {
  return *find(current_isa());
}

int64_t supported_isas() {
  int64_t mask = 0;
  for (int64_t i = 0; i < kIsaCount; ++i)
    if (runs(i)) mask |= int64_t{1} << i;
  return mask;
}

int64_t set_isa(int64_t isa) {
  const int64_t previous = current_isa();
  current.store(check(isa, std::to_string(isa)), std::memory_order_relaxed);
  return previous;
}

}  // namespace fastac::cpu
