// The operators on CPU tensors: checks, allocation, and the translation from tensors to fastac::Problem. The
// schemas are defined in fastac/ops.py; through libtorch's stable ABI this file serves every torch from 2.10
// on.

#include "attention_cluster.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/plan.h"
#include "tensors.h"

namespace fastac {
namespace {

using Optional = std::optional<Tensor>;

// Small parameters reach the kernels contiguous and in the accumulator type.
Optional parameter(const Optional& t, ScalarType acc) {
  if (!t) return t;
  return dense(t->scalar_type() == acc ? *t : torch::stable::to(*t, acc));
}

const void* data(const Optional& t) {
  return t ? t->const_data_ptr() : nullptr;
}

// One call: the tensors the kernels read, kept alive, and the problem that points into them.
class Call {
 public:
  Call(const Tensor& x, const Optional& weight, const Optional& scores, const Optional& position_bias,
       const Optional& alpha, const Optional& beta, const Optional& lengths, const Optional& mask,
       const Optional& offsets, double eps)
      : packed_(offsets.has_value()), dtype_(x.scalar_type()), acc_(accumulator(dtype_)) {
    STD_TORCH_CHECK(x.is_cpu() && x.dim() == (packed_ ? 2 : 3),
                    "fastac: x must be a CPU tensor (B, L, M), or (T, M) with offsets");
    STD_TORCH_CHECK(!(weight && scores), "fastac: at most one of weight and scores may be given");
    STD_TORCH_CHECK(int(lengths.has_value()) + int(mask.has_value()) + int(packed_) <= 1,
                    "fastac: at most one of lengths, mask and offsets may be given");
    STD_TORCH_CHECK(alpha.has_value() == beta.has_value(),
                    "fastac: alpha and beta must both be given or neither");
    STD_TORCH_CHECK(eps > 0 && std::isfinite(eps), "fastac: eps must be positive and finite");
    problem.dtype = storage(dtype_);
    problem.features = x.size(packed_ ? 1 : 2);
    problem.eps = acc_ == ScalarType::Float ? std::max(eps, 1.1754943508222875e-38) : eps;
    problem.packed = packed_;
    problem.shift = alpha.has_value();
    problem.has_scores = weight || scores;
    problem.units = weight   ? weight->size(0)
                    : scores ? scores->size(packed_ ? 0 : 1)
                    : alpha  ? alpha->numel()
                             : 1;
    STD_TORCH_CHECK(problem.features >= 1 && problem.units >= 1, "fastac: M and N must be at least 1");
    STD_TORCH_CHECK(!scores || scores->dim() == (packed_ ? 2 : 3),
                    "fastac: scores must have as many dimensions as x");
    if (packed_)
      packed_sets(*offsets, x.size(0));
    else
      padded_sets(lengths, mask, x.size(0), x.size(1));

    const int64_t batch = problem.sets.count, units = problem.units, rows = problem.sets.rows;
    const int64_t length = packed_ ? rows : x.size(1);
    const int last = packed_ ? 1 : 2;
    x_ = x.stride(last) == 1 || problem.features == 1 ? x : torch::stable::contiguous(x);
    problem.x = x_.const_data_ptr();
    problem.x_row_stride = x_.stride(last - 1);
    problem.x_set_stride = packed_ ? 0 : x_.stride(0);
    if (weight) {
      check_shape("weight", *weight, {units, problem.features});
      STD_TORCH_CHECK(weight->scalar_type() == dtype_, "fastac: weight must have the dtype of x");
      weight_ = dense(*weight);
    }
    if (scores) {
      if (packed_)
        check_shape("scores", *scores, {units, rows});
      else
        check_shape("scores", *scores, {batch, units, length});
      scores_ = scores->scalar_type() == acc_ ? *scores : torch::stable::to(*scores, acc_);
      problem.scores_position_stride = scores_->stride(last);
      problem.scores_unit_stride = scores_->stride(last - 1);
      problem.scores_set_stride = packed_ ? 0 : scores_->stride(0);
    }
    if (position_bias) {
      STD_TORCH_CHECK(position_bias->dim() == 2 && position_bias->size(0) == units && position_bias->is_cpu(),
                      "fastac: position_bias must have shape (N, L_max)");
      problem.max_length = position_bias->size(1);
      for (int64_t b = 0; b < batch; ++b)
        STD_TORCH_CHECK(problem.sets.extent[b] <= problem.max_length,
                        "fastac: a set is longer than position_bias");
    }
    if (alpha) {
      check_shape("alpha", *alpha, {units});
      check_shape("beta", *beta, {units});
    }
    position_bias_ = parameter(position_bias, acc_);
    alpha_ = parameter(alpha, acc_);
    beta_ = parameter(beta, acc_);
    problem.weight = data(weight_);
    problem.scores = data(scores_);
    problem.position_bias = data(position_bias_);
    problem.alpha = data(alpha_);
    problem.beta = data(beta_);
  }

  Tensor allocate_output() const {
    return allocate({problem.sets.count, problem.units, problem.features}, dtype_);
  }
  ScalarType acc() const { return acc_; }
  bool packed() const { return packed_; }

  Problem problem{};

 private:
  // Layout of the int64 block: length, first_row, extent, begin; each (B,).
  void make_sets(int64_t batch, int64_t rows) {
    index_.resize(4 * batch);
    problem.sets.count = batch;
    problem.sets.rows = rows;
    problem.sets.length = index_.data();
    problem.sets.first_row = index_.data() + batch;
    problem.sets.extent = index_.data() + 2 * batch;
  }

  void padded_sets(const Optional& lengths, const Optional& mask, int64_t batch, int64_t length) {
    make_sets(batch, batch * length);
    for (int64_t b = 0; b < batch; ++b) {
      index_[b] = length;
      index_[batch + b] = b * length;
      index_[2 * batch + b] = length;
    }
    if (lengths) {
      check_shape("lengths", *lengths, {batch});
      STD_TORCH_CHECK(lengths->scalar_type() == ScalarType::Long, "fastac: lengths must be int64");
      const Tensor values = dense(*lengths);
      const int64_t* p = static_cast<const int64_t*>(values.const_data_ptr());
      for (int64_t b = 0; b < batch; ++b) index_[b] = std::clamp<int64_t>(p[b], 0, length);
    }
    if (mask) {
      check_shape("mask", *mask, {batch, length});
      STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool, "fastac: mask must be bool");
      const Tensor values = dense(*mask);
      const bool* p = static_cast<const bool*>(values.const_data_ptr());
      position_.reserve(batch * length);
      for (int64_t b = 0; b < batch; ++b) {
        const int64_t begin = int64_t(position_.size());
        for (int64_t l = 0; l < length; ++l)
          if (p[b * length + l]) position_.push_back(l);
        index_[3 * batch + b] = begin;
        index_[b] = int64_t(position_.size()) - begin;
      }
      position_.push_back(0);  // never null, even with nothing valid
      problem.sets.position = position_.data();
      problem.sets.begin = index_.data() + 3 * batch;
    }
  }

  void packed_sets(const Tensor& offsets, int64_t rows) {
    STD_TORCH_CHECK(offsets.dim() == 1 && offsets.size(0) >= 1 && offsets.is_cpu() &&
                        offsets.scalar_type() == ScalarType::Long,
                    "fastac: offsets must be an int64 CPU tensor of shape (B + 1,)");
    const int64_t batch = offsets.size(0) - 1;
    make_sets(batch, rows);
    const Tensor values = dense(offsets);
    const int64_t* p = static_cast<const int64_t*>(values.const_data_ptr());
    int64_t at = std::clamp<int64_t>(p[0], 0, rows);
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t end = std::clamp<int64_t>(p[b + 1], at, rows);
      index_[b] = index_[2 * batch + b] = end - at;
      index_[batch + b] = at;
      at = end;
    }
  }

  const bool packed_;
  const ScalarType dtype_, acc_;
  Tensor x_;
  Optional weight_, scores_, position_bias_, alpha_, beta_;
  std::vector<int64_t> index_, position_;
};

// The max_length argument of the operators goes unused here: the lengths themselves are at hand.
using MaxLength = std::optional<int64_t>;

Tensor inference(const Tensor& x, const Optional& weight, const Optional& scores,
                 const Optional& position_bias, const Optional& alpha, const Optional& beta,
                 const Optional& lengths, const Optional& mask, const Optional& offsets, double eps,
                 MaxLength) {
  const Call call(x, weight, scores, position_bias, alpha, beta, lengths, mask, offsets, eps);
  Tensor y = call.allocate_output();
  const ForwardOutputs out{y.mutable_data_ptr(), nullptr, nullptr};
  cpu::kernels().forward(call.problem, out, parallel_for);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Optional& weight, const Optional& scores,
                                           const Optional& position_bias, const Optional& alpha,
                                           const Optional& beta, const Optional& lengths,
                                           const Optional& mask, const Optional& offsets, double eps,
                                           bool save_scores, MaxLength) {
  const Call call(x, weight, scores, position_bias, alpha, beta, lengths, mask, offsets, eps);
  const Problem& problem = call.problem;
  const bool save = save_scores && weight;
  Tensor y = call.allocate_output();
  Tensor stats = allocate({3, problem.sets.count, problem.units}, call.acc());
  Tensor saved = !save           ? empty_output(call.acc())
                 : call.packed() ? allocate({problem.sets.rows, problem.units}, call.acc())
                                 : allocate({x.size(0), x.size(1), problem.units}, call.acc());
  // What the kernels leave alone is defined all the same: norms without a shift, scores of excluded
  // positions.
  if (!problem.shift) clear(stats);
  if (save && (lengths || mask || offsets)) clear(saved);
  const ForwardOutputs out{y.mutable_data_ptr(), stats.mutable_data_ptr(),
                           save ? saved.mutable_data_ptr() : nullptr};
  cpu::kernels().forward(problem, out, parallel_for);
  return {y, stats, saved};
}

// A gradient in the accumulator type, zeroed: what the kernels write before it is cast to its input's dtype.
Tensor zeros(const Tensor& like, ScalarType acc) {
  const auto sizes = like.sizes();
  Tensor t = fastac::allocate(sizes.data(), int64_t(sizes.size()), acc);
  clear(t);
  return t;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients backward(const Tensor& dy, const Tensor& x, const Optional& weight, const Optional& scores,
                   const Optional& position_bias, const Optional& alpha, const Optional& beta,
                   const Optional& lengths, const Optional& mask, const Optional& offsets, double eps,
                   const Tensor& y, const Tensor& stats, const Tensor& saved_scores, int64_t needs,
                   MaxLength) {
  const Call call(x, weight, scores, position_bias, alpha, beta, lengths, mask, offsets, eps);
  const Problem& problem = call.problem;
  const int64_t batch = problem.sets.count, units = problem.units, features = problem.features;
  const ScalarType acc = call.acc(), dtype = x.scalar_type();
  check_shape("dy", dy, {batch, units, features});
  check_shape("y", y, {batch, units, features});
  check_shape("stats", stats, {3, batch, units});
  STD_TORCH_CHECK(dy.scalar_type() == dtype && y.scalar_type() == dtype && stats.scalar_type() == acc,
                  "fastac: dy and y must have the dtype of x, stats that of the accumulator");
  const bool saved = saved_scores.numel() > 0;
  STD_TORCH_CHECK(
      !saved || (saved_scores.numel() == problem.sets.rows * units && saved_scores.scalar_type() == acc),
      "fastac: saved_scores must be what the forward operator returned");

  const Tensor dy_c = dense(dy), y_c = dense(y), stats_c = dense(stats), saved_c = dense(saved_scores);
  auto wants = [&](int64_t bit, bool given) { return (needs & bit) != 0 && given; };
  Tensor dx = wants(kNeedX, true) ? allocate_like(x) : empty_output(dtype);
  Tensor dweight = wants(kNeedWeight, weight.has_value()) ? allocate_like(*weight) : empty_output(dtype);
  Tensor dscores = wants(kNeedScores, scores.has_value()) ? zeros(*scores, acc) : empty_output(acc);
  Tensor dbias =
      wants(kNeedPositionBias, position_bias.has_value()) ? zeros(*position_bias, acc) : empty_output(acc);
  Tensor dalpha = wants(kNeedAlpha, alpha.has_value()) ? zeros(*alpha, acc) : empty_output(acc);
  Tensor dbeta = wants(kNeedBeta, beta.has_value()) ? zeros(*beta, acc) : empty_output(acc);

  BackwardArguments args{};
  args.dy = dy_c.const_data_ptr();
  args.y = y_c.const_data_ptr();
  args.stats = stats_c.const_data_ptr();
  args.saved_scores = saved ? saved_c.const_data_ptr() : nullptr;
  auto give = [&](int64_t bit, bool given, const Tensor& t) -> void* {
    if (!wants(bit, given)) return nullptr;
    args.needs |= bit;
    return t.mutable_data_ptr();
  };
  args.dx = give(kNeedX, true, dx);
  args.dweight = give(kNeedWeight, weight.has_value(), dweight);
  args.dscores = give(kNeedScores, scores.has_value(), dscores);
  args.dscores_unit_stride = call.packed() ? problem.sets.rows : x.size(1);
  args.dposition_bias = give(kNeedPositionBias, position_bias.has_value(), dbias);
  args.dalpha = give(kNeedAlpha, alpha.has_value(), dalpha);
  args.dbeta = give(kNeedBeta, beta.has_value(), dbeta);

  if (args.dx != nullptr && call.packed()) {  // rows of no set
    const int64_t first = batch > 0 ? problem.sets.first_row[0] : 0;
    const int64_t last = batch > 0 ? problem.sets.first_row[batch - 1] + problem.sets.extent[batch - 1] : 0;
    const int64_t row = features * int64_t(x.element_size());
    char* p = static_cast<char*>(args.dx);
    std::memset(p, 0, size_t(first * row));
    std::memset(p + last * row, 0, size_t((problem.sets.rows - last) * row));
  }
  cpu::kernels().backward(problem, args, parallel_for);
  auto like = [&](const Tensor& t, const Optional& input) {
    return input ? cast(t, input->scalar_type()) : cast(t, dtype);
  };
  return {
      dx, dweight, like(dscores, scores), like(dbias, position_bias), like(dalpha, alpha), like(dbeta, beta)};
}

// What a call with these set lengths would be cut into, for fastac.explain: rows of x packed at a time, units
// and ranges of sets of a forward task, segments that share a set, and the number of partial sums of dweight
// in a backward call.
std::vector<int64_t> plan(const std::vector<int64_t>& lengths, int64_t units, int64_t features) {
  STD_TORCH_CHECK(units >= 1 && features >= 1, "fastac: units and features must be at least 1");
  int64_t rows = 0;
  for (int64_t length : lengths) rows += length;
  Sets sets{};
  sets.count = int64_t(lengths.size());
  sets.length = lengths.data();
  sets.rows = rows;
  const cpu::Plan forward = cpu::plan_forward(sets, units, features);
  const cpu::Plan backward = cpu::plan_backward(sets, units, features, true);
  return {forward.block_rows, forward.unit_block, int64_t(forward.tasks.size()), forward.partials,
          int64_t(backward.tasks.size())};
}

int64_t isa() {
  return cpu::current_isa();
}
int64_t supported_isas() {
  return cpu::supported_isas();
}
int64_t set_isa(int64_t isa) {
  return cpu::set_isa(isa);
}

}  // namespace
}  // namespace fastac

STABLE_TORCH_LIBRARY_FRAGMENT(fastac, m) {
  m.def("cpu_isa() -> int");
  m.def("cpu_supported_isas() -> int");
  m.def("cpu_set_isa(int isa) -> int");
  m.def("cpu_guard(bool on) -> int");
  m.def("cpu_plan(int[] lengths, int units, int features) -> int[]");
}

STABLE_TORCH_LIBRARY_IMPL(fastac, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&fastac::isa));
  m.impl("cpu_supported_isas", TORCH_BOX(&fastac::supported_isas));
  m.impl("cpu_set_isa", TORCH_BOX(&fastac::set_isa));
  m.impl("cpu_guard", TORCH_BOX(&fastac::guard));
  m.impl("cpu_plan", TORCH_BOX(&fastac::plan));
}

STABLE_TORCH_LIBRARY_IMPL(fastac, CPU, m) {
  m.impl("cpu_inference", TORCH_BOX(&fastac::inference));
  m.impl("cpu_forward", TORCH_BOX(&fastac::forward));
  m.impl("cpu_backward", TORCH_BOX(&fastac::backward));
}
