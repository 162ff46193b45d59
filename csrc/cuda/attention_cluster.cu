// The operators on CUDA tensors: checks, allocation, planning, and the launches, on the current stream of x's
// device. Nothing here waits for the device or reads a value from it. The schemas are defined in
// fastac/ops.py; through libtorch's stable ABI this file serves every torch from 2.10 on.
//
// With FASTAC_EMULATED the same operators run on CPU tensors, their kernels in the emulation.

#include "kernels.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <initializer_list>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#ifdef FASTAC_EMULATED
#include "../guard.h"
#else
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#endif

namespace fastac::cuda {

#ifdef FASTAC_EMULATED
int64_t emulated_clusters = 2;
#endif

namespace {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;
using Shape = std::initializer_list<int64_t>;

// ---- where a call runs

#ifdef FASTAC_EMULATED

// The GPU whose plans are followed.
Limits emulated_limits{227 << 10, 90};

bool is_here(const Tensor& t) {
  return t.is_cpu();
}
Tensor allocate(const Tensor&, Shape sizes, ScalarType dtype) {
  return fastac::allocate(sizes.begin(), int64_t(sizes.size()), dtype);
}
class Device {
 public:
  explicit Device(const Tensor&) {}
  Limits limits() const { return emulated_limits; }
  Stream stream() const { return nullptr; }
};

#else

bool is_here(const Tensor& t) {
  return t.is_cuda();
}
Tensor allocate(const Tensor& x, Shape sizes, ScalarType dtype) {
  return torch::stable::new_empty(x, IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), dtype);
}
// Makes the device of a tensor the current one while it lives.
class Device {
 public:
  explicit Device(torch::stable::accelerator::DeviceIndex index) : index_(index), guard_(index) {}
  explicit Device(const Tensor& x) : Device(x.get_device_index()) {}

  // Of a GPU that runs the PTX of an older one, what that older one has.
  Limits limits() const {
    const auto attribute = [&](cudaDeviceAttr name) {
      int value = 0;
      const cudaError_t status = cudaDeviceGetAttribute(&value, name, index_);
      STD_TORCH_CHECK(status == cudaSuccess, "fastac: ", cudaGetErrorString(status));
      return value;
    };
    const int capability =
        10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor);
    STD_TORCH_CHECK(capability >= 80, "fastac: CUDA capability 8.0 or later is needed");
    return {attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
            std::min(capability, forward_float32().compiled_for())};
  }
  Stream stream() const {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return static_cast<Stream>(stream);
  }

 private:
  const torch::stable::accelerator::DeviceIndex index_;
  const torch::stable::accelerator::DeviceGuard guard_;
};

#endif

// ---- operands

struct Family {
  const ForwardKernels& forward;
  const BackwardKernels& backward;
  const ReduceKernels& reduce;
};

Family family(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half: return {forward_float16(), backward_float16(), reduce_float16()};
    case ScalarType::BFloat16: return {forward_bfloat16(), backward_bfloat16(), reduce_bfloat16()};
    case ScalarType::Float: return {forward_float32(), backward_float32(), reduce_float32()};
    case ScalarType::Double: return {forward_float64(), backward_float64(), reduce_float64()};
    default: break;
  }
  STD_TORCH_CHECK(false, "fastac: x must be float64, float32, bfloat16 or float16");
  return {forward_float32(), backward_float32(), reduce_float32()};
}

Tensor dense(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}
Optional dense(const Optional& t) {
  return t ? Optional(dense(*t)) : t;
}

bool has_shape(const Tensor& t, Shape sizes) {
  bool same = t.dim() == int64_t(sizes.size());
  int64_t i = 0;
  for (int64_t size : sizes) same = same && t.size(i++) == size;
  return same;
}

// A stride that is never used counts as 0.
int64_t stride(const Tensor& t, int64_t dim) {
  return t.size(dim) <= 1 ? 0 : t.stride(dim);
}
int64_t column_stride(const Tensor& t) {
  return t.size(t.dim() - 1) <= 1 ? 1 : t.stride(t.dim() - 1);
}

bool is_aligned(const Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
}

// Whether rows can be read 16 bytes at a time.
bool in_vectors(const Tensor& t) {
  bool good = column_stride(t) == 1 && is_aligned(t);
  for (int64_t i = 0; i + 1 < t.dim(); ++i) good = good && stride(t, i) * int64_t(t.element_size()) % 16 == 0;
  return good;
}

bool is_single(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == ScalarType::Float && dtype != ScalarType::Float;
}
Small small(const Optional& t, ScalarType dtype) {
  return t ? Small{t->const_data_ptr(), is_single(*t, dtype)} : Small{nullptr, false};
}

// One call: its operands checked, so that no kernel leaves its tensors, and kept alive.
class Call {
 public:
  Call(const Tensor& x, const Optional& weight, const Optional& scores, const Optional& position_bias,
       const Optional& alpha, const Optional& beta, const Optional& lengths, const Optional& mask,
       const Optional& offsets, double eps, std::optional<int64_t> max_length)
      : x_(x),
        dtype(x.scalar_type()),
        acc(dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float),
        packed(offsets.has_value()),
        kernels(family(dtype)),
        alpha_(dense(alpha)),
        beta_(dense(beta)),
        lengths_(dense(lengths)),
        offsets_(dense(offsets)) {
    STD_TORCH_CHECK(is_here(x), "fastac: x is on a device that these kernels do not run on");
    STD_TORCH_CHECK(x.dim() == (packed ? 2 : 3), "fastac: x must be (B, L, M), or (T, M) with offsets");
    STD_TORCH_CHECK(!(weight && scores), "fastac: at most one of weight and scores may be given");
    STD_TORCH_CHECK(int(lengths.has_value()) + int(mask.has_value()) + int(packed) <= 1,
                    "fastac: at most one of lengths, mask and offsets may be given");
    STD_TORCH_CHECK(alpha.has_value() == beta.has_value(),
                    "fastac: alpha and beta must both be given or neither");
    STD_TORCH_CHECK(eps > 0 && std::isfinite(eps), "fastac: eps must be positive and finite");
    STD_TORCH_CHECK(!max_length || *max_length >= 0, "fastac: max_length must be at least 0");

    const int64_t last = packed ? 1 : 2;
    if (offsets) check("offsets", *offsets, {std::max<int64_t>(offsets->numel(), 1)}, ScalarType::Long);
    in.x = x.const_data_ptr();
    in.batch = offsets ? offsets->size(0) - 1 : x.size(0);
    in.length = x.size(last - 1);
    in.rows = packed ? in.length : in.batch * in.length;
    in.features = x.size(last);
    in.units = weight   ? (weight->dim() == 2 ? weight->size(0) : 0)
               : scores ? (scores->dim() == last + 1 ? scores->size(last - 1) : 0)
               : alpha  ? alpha->numel()
                        : 1;
    STD_TORCH_CHECK(in.features >= 1 && in.units >= 1,
                    "fastac: M and N must be at least 1, weight (N, M), scores (B, N, L) or packed (N, T)");
    in.x_b = packed ? 0 : stride(x, 0);
    in.x_l = stride(x, last - 1);
    in.x_m = column_stride(x);
    in.x_vectors = in_vectors(x);
    in.shift = alpha.has_value();
    in.eps = acc == ScalarType::Float ? std::max(eps, double(std::numeric_limits<float>::min())) : eps;
    in.weighting = weight ? Weighting::kLinear : scores ? Weighting::kScores : Weighting::kAverage;
    in.layout = lengths   ? Layout::kLengths
                : mask    ? Layout::kMask
                : offsets ? Layout::kPacked
                          : Layout::kPadded;
    longest = packed && max_length ? std::min(*max_length, in.length) : in.length;

    if (weight) {
      check("weight", *weight, {in.units, in.features}, dtype);
      in.weight = weight->const_data_ptr();
      in.weight_n = stride(*weight, 0);
      in.weight_m = column_stride(*weight);
      in.weight_vectors = in_vectors(*weight);
    }
    if (scores) {
      if (packed)
        check_small("scores", *scores, {in.units, in.rows});
      else
        check_small("scores", *scores, {in.batch, in.units, in.length});
      in.scores_b = packed ? 0 : stride(*scores, 0);
      in.scores_n = stride(*scores, last - 1);
      in.scores_l = stride(*scores, last);
    }
    if (position_bias) {
      STD_TORCH_CHECK(weight && position_bias->dim() == 2,
                      "fastac: position_bias must be (N, L_max), and needs weight");
      in.bias_length = position_bias->size(1);
      check_small("position_bias", *position_bias, {in.units, in.bias_length});
      STD_TORCH_CHECK(packed || in.bias_length >= in.length, "fastac: x is longer than position_bias");
      in.bias_n = stride(*position_bias, 0);
      in.bias_l = stride(*position_bias, 1);
    }
    if (alpha) {
      check_small("alpha", *alpha, {in.units});
      check_small("beta", *beta, {in.units});
    }
    if (lengths) check("lengths", *lengths, {in.batch}, ScalarType::Long);
    if (mask) {
      check("mask", *mask, {in.batch, in.length}, ScalarType::Bool);
      in.mask = static_cast<const unsigned char*>(mask->const_data_ptr());
      in.mask_b = stride(*mask, 0);
      in.mask_l = stride(*mask, 1);
    }
    in.scores = small(scores, dtype);
    in.position_bias = small(position_bias, dtype);
    in.alpha = small(alpha_, dtype);
    in.beta = small(beta_, dtype);
    in.lengths = lengths_ ? static_cast<const int64_t*>(lengths_->const_data_ptr()) : nullptr;
    in.offsets = offsets_ ? static_cast<const int64_t*>(offsets_->const_data_ptr()) : nullptr;
  }

  Tensor empty(Shape sizes, ScalarType type) const { return allocate(x_, sizes, type); }
  Tensor empty(Shape sizes) const { return empty(sizes, acc); }
  Tensor empty_like(const Tensor& t) const {
    switch (t.dim()) {
      case 1: return empty({t.size(0)}, t.scalar_type());
      case 2: return empty({t.size(0), t.size(1)}, t.scalar_type());
      default: return empty({t.size(0), t.size(1), t.size(2)}, t.scalar_type());
    }
  }
  // (B, L, N) or (T, N)
  Tensor empty_rows() const {
    return packed ? empty({in.rows, in.units}) : empty({in.batch, in.length, in.units});
  }

  Sizes sizes(bool kept, bool needs_x, bool needs_weight, bool dy_vectors) const {
    return {in.batch,     in.length,         longest,   in.features, in.units, int(x_.element_size()),
            in.layout,    in.weighting,      in.shift,  kept,        needs_x,  needs_weight,
            in.x_vectors, in.weight_vectors, dy_vectors};
  }

  void check(const char* name, const Tensor& t, Shape shape, ScalarType type) const {
    STD_TORCH_CHECK(has_shape(t, shape) && t.scalar_type() == type, "fastac: ", name,
                    " has another shape or dtype than the other operands ask for");
    STD_TORCH_CHECK(is_here(t) && t.get_device_index() == x_.get_device_index(), "fastac: ", name,
                    " must be on the device of x");
  }
  void check_small(const char* name, const Tensor& t, Shape shape) const {
    check(name, t, shape, t.scalar_type() == ScalarType::Float ? ScalarType::Float : dtype);
  }

 private:
  const Tensor x_;

 public:
  const ScalarType dtype, acc;
  const bool packed;
  const Family kernels;
  Operands in{};
  int64_t longest;  // an upper bound of the positions of a set

 private:
  const Optional alpha_, beta_, lengths_, offsets_;
};

void* pointer(const Tensor& t) {
  return t.mutable_data_ptr();
}
void* pointer(const Optional& t) {
  return t ? t->mutable_data_ptr() : nullptr;
}

// ---- the operators

void run_forward(const Call& call, const Device& device, const Tensor& y, const Optional& stats,
                 const Optional& saved) {
  const Operands& in = call.in;
  const ForwardKernels& kernels = call.kernels.forward;
  const ForwardPlan plan = plan_forward(call.sizes(saved.has_value(), false, false, false), device.limits(),
                                        kernels.shared_bytes, kernels.cluster_bytes);
  Optional partial, partial_stats;
  if (plan.blocks.split) {
    partial = call.empty({plan.blocks.all, in.units, in.features});
    partial_stats = call.empty({3, plan.blocks.all, in.units});
  }
  ForwardArguments a{};
  a.in = in;
  a.blocks = plan.blocks;
  a.y = pointer(y);
  a.stats = pointer(stats);
  a.saved = pointer(saved);
  a.partial = pointer(partial);
  a.partial_stats = pointer(partial_stats);
  a.unit_blocks = plan.unit_blocks;
  a.resident = plan.resident;
  const Stream stream = device.stream();
  kernels.blocks(plan, a, stream);
  if (plan.blocks.split) kernels.combine(a, stream);
}

Tensor inference(const Tensor& x, const Optional& weight, const Optional& scores,
                 const Optional& position_bias, const Optional& alpha, const Optional& beta,
                 const Optional& lengths, const Optional& mask, const Optional& offsets, double eps,
                 std::optional<int64_t> max_length) {
  const Call call(x, weight, scores, position_bias, alpha, beta, lengths, mask, offsets, eps, max_length);
  const Device device(x);
  const Tensor y = call.empty({call.in.batch, call.in.units, call.in.features}, call.dtype);
  if (call.in.batch > 0) run_forward(call, device, y, std::nullopt, std::nullopt);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Optional& weight, const Optional& scores,
                                           const Optional& position_bias, const Optional& alpha,
                                           const Optional& beta, const Optional& lengths,
                                           const Optional& mask, const Optional& offsets, double eps,
                                           bool save_scores, std::optional<int64_t> max_length) {
  const Call call(x, weight, scores, position_bias, alpha, beta, lengths, mask, offsets, eps, max_length);
  const Device device(x);
  const Operands& in = call.in;
  const bool saves = save_scores && weight;
  const Tensor y = call.empty({in.batch, in.units, in.features}, call.dtype);
  const Tensor stats = call.empty({3, in.batch, in.units});
  const Tensor saved = saves ? call.empty_rows() : call.empty({0});
  if (in.batch > 0) run_forward(call, device, y, stats, saves ? Optional(saved) : std::nullopt);
  return {y, stats, saved};
}

// What is read 16 bytes at a time whatever its base.
Tensor dense_and_aligned(const Tensor& t) {
  const Tensor found = dense(t);
  return is_aligned(found) ? found : torch::stable::clone(found);
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients backward(const Tensor& dy, const Tensor& x, const Optional& weight, const Optional& scores,
                   const Optional& position_bias, const Optional& alpha, const Optional& beta,
                   const Optional& lengths, const Optional& mask, const Optional& offsets, double eps,
                   const Tensor& y, const Tensor& stats, const Tensor& saved_scores, int64_t needs,
                   std::optional<int64_t> max_length) {
  const Call call(x, weight, scores, position_bias, alpha, beta, lengths, mask, offsets, eps, max_length);
  const Device device(x);
  const Operands& in = call.in;
  const int64_t B = in.batch, N = in.units, M = in.features;
  call.check("dy", dy, {B, N, M}, call.dtype);
  call.check("y", y, {B, N, M}, call.dtype);
  call.check("stats", stats, {3, B, N}, call.acc);
  const bool kept = saved_scores.numel() > 0;
  if (kept) {
    STD_TORCH_CHECK(weight, "fastac: saved_scores belong to a weight");
    if (call.packed)
      call.check("saved_scores", saved_scores, {in.rows, N}, call.acc);
    else
      call.check("saved_scores", saved_scores, {B, in.length, N}, call.acc);
  }

  const Optional operands[] = {x, weight, scores, position_bias, alpha, beta};
  Optional wanted[6];
  std::vector<Tensor> found;  // what is returned
  bool any = false;
  for (int i = 0; i < 6; ++i) {
    const bool wants = operands[i] && (needs >> i & 1) != 0;
    found.push_back(wants ? call.empty_like(*operands[i])
                          : call.empty({0}, (operands[i] ? *operands[i] : dy).scalar_type()));
    if (wants) wanted[i] = found.back();
    any = any || wants;
  }
  const auto results = [&] { return Gradients{found[0], found[1], found[2], found[3], found[4], found[5]}; };
  if (!any) return results();
  if (B == 0) {
    for (Tensor& t : found)
      if (t.numel() > 0) torch::stable::zero_(t);
    return results();
  }

  const BackwardKernels& kernels = call.kernels.backward;
  const ReduceKernels& reduce = call.kernels.reduce;
  const Sizes sizes = call.sizes(kept, wanted[0].has_value(), wanted[1].has_value(), in_vectors(dy));
  const BackwardPlan plan =
      plan_backward(sizes, device.limits(), kernels.shared_bytes, kernels.cluster_bytes, reduce.tile);
  const Tensor its_y = dense_and_aligned(y), its_stats = dense(stats), its_saved = dense(saved_scores);
  const Tensor mix = call.empty({2, in.rows, N}), pivots = call.empty({2, in.rows});
  Optional means, sums, dshift, partial, counters;
  if (plan.form != Form::kCluster) means = call.empty({4, B, N});
  if (plan.blocks.split) sums = call.empty({plan.blocks.all, N});
  if (in.shift) dshift = call.empty({2, B, N});
  if (plan.splits > 1) {
    partial = call.empty({plan.splits, N, M});
    counters = call.empty({plan.tiles}, ScalarType::Int);
  }

  BackwardArguments a{};
  a.in = in;
  a.blocks = plan.blocks;
  a.dy = dy.const_data_ptr();
  a.dy_b = stride(dy, 0);
  a.dy_n = stride(dy, 1);
  a.dy_m = column_stride(dy);
  a.dy_vectors = sizes.dy_vectors;
  a.y = its_y.const_data_ptr();
  a.stats = its_stats.const_data_ptr();
  a.saved = kept ? its_saved.const_data_ptr() : nullptr;
  a.dx = pointer(wanted[0]);
  a.dscores = pointer(wanted[2]);
  a.dscores_single = scores && is_single(*scores, call.dtype);
  a.mix = pointer(mix);
  a.pivots = pointer(pivots);
  a.means = pointer(means);
  a.sums = pointer(sums);
  a.dshift = pointer(dshift);
  a.counters = static_cast<int*>(pointer(counters));
  a.tiles = plan.tiles;
  a.resident = plan.resident;
  const Stream stream = device.stream();
  kernels.run(plan, a, stream);

  if (wanted[1] || wanted[3] || wanted[4] || wanted[5]) {
    ReduceArguments r{};
    r.in = in;
    r.mix = a.mix;
    r.pivots = a.pivots;
    r.dshift = a.dshift;
    r.partial = pointer(partial);
    r.counters = a.counters;
    r.dweight = pointer(wanted[1]);
    r.dposition_bias = small(wanted[3], call.dtype);
    r.dalpha = small(wanted[4], call.dtype);
    r.dbeta = small(wanted[5], call.dtype);
    r.splits = plan.splits;
    r.rows_per_split = plan.rows_per_split;
    reduce.run(plan, r, stream);
  }
  return results();
}

// The plans of both passes, for fastac.explain and the tests: the fields of fastac/_cuda.py, in its order.
std::vector<int64_t> plan(int64_t batch, int64_t length, int64_t longest, int64_t features, int64_t units,
                          int64_t itemsize, int64_t layout, int64_t weighting, bool shift, bool kept,
                          bool needs_x, bool needs_weight, bool x_vectors, bool weight_vectors,
                          bool dy_vectors, int64_t shared, int64_t capability) {
  STD_TORCH_CHECK(batch >= 0 && length >= 0 && longest >= 0 && features >= 1 && units >= 1,
                  "fastac: B and L must be at least 0, M and N at least 1");
  STD_TORCH_CHECK(itemsize == 2 || itemsize == 4 || itemsize == 8, "fastac: itemsize must be 2, 4 or 8");
  STD_TORCH_CHECK(layout >= 0 && layout <= 3 && weighting >= 0 && weighting <= 2,
                  "fastac: no such layout or weighting");
  const Sizes s{
      batch, length, longest, features,     units,     int(itemsize),  Layout(layout), Weighting(weighting),
      shift, kept,   needs_x, needs_weight, x_vectors, weight_vectors, dy_vectors};
  const Limits limits{shared, int(capability)};
  const Family kernels = family(itemsize == 2   ? ScalarType::Half
                                : itemsize == 4 ? ScalarType::Float
                                                : ScalarType::Double);
  const ForwardPlan f = plan_forward(s, limits, kernels.forward.shared_bytes, kernels.forward.cluster_bytes);
  const BackwardPlan b = plan_backward(s, limits, kernels.backward.shared_bytes,
                                       kernels.backward.cluster_bytes, kernels.reduce.tile);
  const bool clustered = f.kernel == Kernel::kCluster, clustered_back = b.form == Form::kCluster;
  return {int64_t(f.kernel),
          f.tile.block_l,
          f.tile.block_n,
          f.cluster,
          f.resident,
          clustered ? kernels.forward.cluster_stages : kernels.forward.stages,
          f.shared,
          f.blocks.split,
          f.blocks.positions,
          f.blocks.all,
          f.unit_blocks,
          f.grid,
          f.launches,
          f.scratch,
          f.bytes,
          f.operations,
          int64_t(b.form),
          b.tile.block_l,
          b.tile.block_n,
          b.cluster,
          b.resident,
          clustered_back ? kernels.backward.cluster_stages : kernels.backward.stages,
          b.shared,
          b.blocks.all,
          b.grid,
          b.launches,
          b.scratch,
          b.tiles,
          b.splits,
          b.rows_per_split,
          b.bytes,
          b.operations};
}

#ifdef FASTAC_EMULATED
// What the GPU has: bytes of shared memory for a block, its capability, and room for so many clusters.
void set_device(int64_t shared, int64_t capability, int64_t clusters) {
  STD_TORCH_CHECK(clusters >= 1, "fastac: there must be room for a cluster");
  emulated_limits = {shared, int(capability)};
  emulated_clusters = clusters;
}
#else
// Shared memory of a block in bytes, and capability: what plans for a device are made for.
std::vector<int64_t> limits_of(int64_t index) {
  const Limits found = Device(torch::stable::accelerator::DeviceIndex(index)).limits();
  return {found.shared, found.capability};
}
#endif

}  // namespace
}  // namespace fastac::cuda

#define FASTAC_PLAN_ARGUMENTS                                                                               \
  "(int batch, int length, int longest, int features, int units, int itemsize, int layout, int weighting, " \
  "bool shift, bool kept, bool needs_x, bool needs_weight, bool x_vectors, bool weight_vectors, "           \
  "bool dy_vectors, int shared, int capability) -> int[]"

// Both libraries may be loaded in one process, so their own operators have different names.
#ifdef FASTAC_EMULATED
STABLE_TORCH_LIBRARY_FRAGMENT(fastac, m) {
  m.def("emulated_plan" FASTAC_PLAN_ARGUMENTS);
  m.def("emulated_device(int shared, int capability, int clusters=2) -> ()");
  m.def("emulated_guard(bool on) -> int");
}
STABLE_TORCH_LIBRARY_IMPL(fastac, CompositeExplicitAutograd, m) {
  m.impl("emulated_plan", TORCH_BOX(&fastac::cuda::plan));
  m.impl("emulated_device", TORCH_BOX(&fastac::cuda::set_device));
  m.impl("emulated_guard", TORCH_BOX(&fastac::guard));
}
STABLE_TORCH_LIBRARY_IMPL(fastac, CPU, m) {
#else
STABLE_TORCH_LIBRARY_FRAGMENT(fastac, m) {
  m.def("cuda_plan" FASTAC_PLAN_ARGUMENTS);
  m.def("cuda_limits(int device) -> int[]");
}
STABLE_TORCH_LIBRARY_IMPL(fastac, CompositeExplicitAutograd, m) {
  m.impl("cuda_plan", TORCH_BOX(&fastac::cuda::plan));
  m.impl("cuda_limits", TORCH_BOX(&fastac::cuda::limits_of));
}
STABLE_TORCH_LIBRARY_IMPL(fastac, CUDA, m) {
#endif
  m.impl("cuda_inference", TORCH_BOX(&fastac::cuda::inference));
  m.impl("cuda_forward", TORCH_BOX(&fastac::cuda::forward));
  m.impl("cuda_backward", TORCH_BOX(&fastac::cuda::backward));
}
