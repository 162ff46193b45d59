// The softmax_weight operators on CPU tensors: checks, allocation, and the translation from tensors to
// fastac::SoftmaxWeightProblem. The schemas are defined in fastac/softmax_weight_ops.py.

#include "softmax_weight.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/softmax_weight_plan.h"
#include "tensors.h"

namespace fastac {
namespace {

constexpr int64_t kNeedX = 1, kNeedScores = 2;

// One call: the tensors the kernels read, kept alive, and the problem that points into them.
class Call {
 public:
  Call(const Tensor& x, const Tensor& scores, const std::optional<Tensor>& lengths) {
    STD_TORCH_CHECK(x.is_cpu() && x.dim() == 3, "fastac: x must be a CPU tensor (B, L, M)");
    sets = x.size(0), length = x.size(1), features = x.size(2);
    STD_TORCH_CHECK(features >= 1, "fastac: M must be at least 1");
    check_shape("scores", scores, {sets, length, features});
    dtype = x.scalar_type();
    problem.dtype = storage(dtype);
    STD_TORCH_CHECK(scores.scalar_type() == dtype || scores.scalar_type() == ScalarType::Float,
                    "fastac: scores must have the dtype of x or float32");
    problem.sets = sets;
    problem.length = length;
    problem.features = features;
    folded_ = cpu::softmax_weight_fold(length, features) > 1;
    problem.x = rows(x);
    // Float32 scores of a float64 x are the one mixture that the kernels do not convert as they read.
    const Tensor computed = dtype == ScalarType::Double ? cast(scores, dtype) : scores;
    scores_dtype = computed.scalar_type();
    problem.scores_dtype = storage(scores_dtype);
    problem.scores = rows(computed);
    if (lengths) {
      check_shape("lengths", *lengths, {sets});
      STD_TORCH_CHECK(lengths->scalar_type() == ScalarType::Long, "fastac: lengths must be int64");
      const Tensor values = dense(*lengths);
      const int64_t* p = static_cast<const int64_t*>(values.const_data_ptr());
      lengths_.reserve(sets + 1);
      for (int64_t b = 0; b < sets; ++b) lengths_.push_back(std::clamp<int64_t>(p[b], 0, length));
      problem.lengths = lengths_.data();
    }
  }

  // An operand as the kernels take it: features contiguous, and positions too where they stand in one row.
  SetRows rows(const Tensor& t) {
    const bool good = (features == 1 || t.stride(2) == 1) && (!folded_ || t.stride(1) == features);
    kept_.push_back(good ? t : torch::stable::contiguous(t));
    const Tensor& used = kept_.back();
    return {used.const_data_ptr(), used.stride(0), used.stride(1)};
  }

  int64_t sets, length, features;
  ScalarType dtype, scores_dtype;
  SoftmaxWeightProblem problem{};

 private:
  bool folded_;
  std::vector<Tensor> kept_;
  std::vector<int64_t> lengths_;
};

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& scores,
                                   const std::optional<Tensor>& lengths) {
  const Call call(x, scores, lengths);
  Tensor y = allocate_like(x);
  Tensor stats = allocate({2, call.sets, call.features}, accumulator(call.dtype));
  const SoftmaxWeightForward out{y.mutable_data_ptr(), stats.mutable_data_ptr()};
  cpu::kernels().softmax_weight_forward(call.problem, out, parallel_for);
  return {y, stats};
}

std::tuple<Tensor, Tensor> backward(const Tensor& dy, const Tensor& x, const Tensor& scores,
                                    const std::optional<Tensor>& lengths, const Tensor& stats,
                                    int64_t needs) {
  Call call(x, scores, lengths);
  check_shape("dy", dy, {call.sets, call.length, call.features});
  check_shape("stats", stats, {2, call.sets, call.features});
  STD_TORCH_CHECK(dy.scalar_type() == call.dtype && stats.scalar_type() == accumulator(call.dtype),
                  "fastac: dy must have the dtype of x, stats that of the accumulator");
  const bool need_x = (needs & kNeedX) != 0, need_scores = (needs & kNeedScores) != 0;
  const Tensor stats_c = dense(stats);
  Tensor dx = need_x ? allocate_like(x) : empty_output(call.dtype);
  Tensor dscores = need_scores ? allocate({call.sets, call.length, call.features}, call.scores_dtype)
                               : empty_output(call.scores_dtype);
  const SoftmaxWeightBackward args{call.rows(dy), stats_c.const_data_ptr(),
                                   need_x ? dx.mutable_data_ptr() : nullptr,
                                   need_scores ? dscores.mutable_data_ptr() : nullptr};
  cpu::kernels().softmax_weight_backward(call.problem, args, parallel_for);
  return {dx, cast(dscores, scores.scalar_type())};
}

}  // namespace
}  // namespace fastac

STABLE_TORCH_LIBRARY_IMPL(fastac, CPU, m) {
  m.impl("cpu_softmax_weight", TORCH_BOX(&fastac::forward));
  m.impl("cpu_softmax_weight_backward", TORCH_BOX(&fastac::backward));
}
