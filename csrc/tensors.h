// What the operators on CPU tensors share: dtypes, checks, allocation, the thread pool.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "attention_cluster.h"
#include "guard.h"

namespace fastac {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void parallel_for(int64_t n, void (*body)(void*, int64_t, int64_t), void* context) {
  if (n == 1) return body(context, 0, 1);
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

inline Tensor allocate(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return allocate(sizes.begin(), int64_t(sizes.size()), dtype);
}
inline Tensor allocate_like(const Tensor& t) {
  const auto sizes = t.sizes();
  return allocate(sizes.data(), int64_t(sizes.size()), t.scalar_type());
}

// What stands for an output that was not asked for.
inline Tensor empty_output(ScalarType dtype) {
  return torch::stable::empty({0}, dtype);
}

// The pointer of an empty tensor may be null, which memset does not accept.
inline void clear(const Tensor& t) {
  if (t.numel() > 0) std::memset(t.mutable_data_ptr(), 0, size_t(t.numel()) * t.element_size());
}

inline Tensor dense(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline Tensor cast(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

inline DType storage(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double: return DType::kFloat64;
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, "x must be float64, float32, bfloat16 or float16");
      return DType::kFloat32;
  }
}

inline ScalarType accumulator(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_shape(const char* name, const Tensor& t, std::initializer_list<int64_t> sizes) {
  bool same = t.dim() == int64_t(sizes.size());
  int64_t i = 0;
  for (int64_t size : sizes) same = same && t.size(i++) == size;
  STD_TORCH_CHECK(same && t.is_cpu(), "fastac: ", name, " must be a CPU tensor of another shape");
}

}  // namespace fastac
