// The cluster kernels under the emulation, for tests/test_cuda_cluster.py, through ctypes.
#include "cluster_backward.cuh"
#include "cluster_forward.cuh"
#include "launch.cuh"
#include "reduce.cuh"

#include <exception>
#include <stdexcept>
#include <string>

namespace fastac::cuda {
namespace {

// Numbers and addresses, in the order the test has them in.
class Numbers {
 public:
  explicit Numbers(const int64_t* first) : next_(first) {}
  int64_t number() { return *next_++; }
  template <class V = void>
  V* address() {
    return reinterpret_cast<V*>(number());
  }

 private:
  const int64_t* next_;
};

struct Call {
  bool half;
  int ctas, units;
  int64_t clusters;
};

Call call(Numbers& n) {
  Call c{};
  c.half = n.number() != 0;
  c.ctas = int(n.number());
  c.units = int(n.number());
  c.clusters = n.number();
  return c;
}

Operands operands(Numbers& n) {
  Operands in{};
  in.x = n.address();
  in.weight = n.address();
  const bool single = n.number() != 0;
  in.scores = {n.address(), single};
  in.position_bias = {n.address(), single};
  in.alpha = {n.address(), single};
  in.beta = {n.address(), single};
  in.lengths = n.address<int64_t>();
  in.mask = n.address<unsigned char>();
  in.offsets = n.address<int64_t>();
  in.batch = n.number();
  in.length = n.number();
  in.rows = n.number();
  in.features = n.number();
  in.units = n.number();
  in.bias_length = n.number();
  in.x_b = n.number();
  in.x_l = n.number();
  in.x_m = 1;
  in.weight_n = in.features;
  in.weight_m = 1;
  in.scores_b = n.number();
  in.scores_n = n.number();
  in.scores_l = 1;
  in.bias_n = in.bias_length;
  in.bias_l = 1;
  in.mask_b = in.length;
  in.mask_l = 1;
  in.eps = double(n.number()) * 1e-12;
  in.layout = Layout(n.number());
  in.weighting = Weighting(n.number());
  in.shift = n.number() != 0;
  in.x_vectors = in.weight_vectors = true;
  return in;
}

template <class Kernel>
void launch_cluster(const Call& c, const typename Kernel::Arguments& a) {
  if (!Kernel::fits(a)) throw std::invalid_argument("the call does not fit the kernel");
  launch<Kernel>(c.clusters * c.ctas, c.ctas, Kernel::shared_bytes(a.in.features), a, nullptr);
}

// KERNEL<T, CTAS, BN>
template <template <class, int, int> class KERNEL, class Arguments>
void run(const Call& c, const Arguments& a) {
  const auto of = [&](auto element) {
    using T = decltype(element);
    if (c.ctas == 4 && c.units == 64)
      launch_cluster<KERNEL<T, 4, 64>>(c, a);
    else if (c.ctas == 4 && c.units == 32)
      launch_cluster<KERNEL<T, 4, 32>>(c, a);
    else if (c.ctas == 8 && c.units == 64)
      launch_cluster<KERNEL<T, 8, 64>>(c, a);
    else if (c.ctas == 8 && c.units == 32)
      launch_cluster<KERNEL<T, 8, 32>>(c, a);
    else
      throw std::invalid_argument("no such kernel here");
  };
  if (c.half)
    of(c10::Half());
  else
    of(c10::BFloat16());
}

template <class Body>
const char* message(Body body) {
  static thread_local std::string text;
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    text = error.what();
    return text.c_str();
  }
}

}  // namespace
}  // namespace fastac::cuda

#define FASTAC_EXPORT extern "C" __attribute__((visibility("default")))

// Null, or what went wrong.
FASTAC_EXPORT const char* cluster_forward(const int64_t* numbers) {
  using namespace fastac::cuda;
  return message([&] {
    Numbers n(numbers);
    const Call c = call(n);
    ForwardArguments a{};
    a.in = operands(n);
    a.y = n.address();
    a.stats = n.address();
    a.saved = n.address();
    run<ForwardCluster>(c, a);
  });
}

// The same; dW too, by BackwardReduce.
FASTAC_EXPORT const char* cluster_backward(const int64_t* numbers) {
  using namespace fastac::cuda;
  return message([&] {
    Numbers n(numbers);
    const Call c = call(n);
    BackwardArguments a{};
    a.in = operands(n);
    a.dy = n.address();
    a.dy_n = a.in.features;
    a.dy_b = a.in.units * a.dy_n;
    a.dy_m = 1;
    a.dy_vectors = true;
    a.stats = n.address();
    a.saved = n.address();
    a.dx = n.address();
    a.dscores = n.address();
    a.dscores_single = a.in.scores.single;
    a.mix = n.address();
    a.pivots = n.address();
    a.dshift = n.address();
    a.counters = n.address<int>();
    a.tiles = n.number();
    run<BackwardCluster>(c, a);

    ReduceArguments r{};
    r.in = a.in;
    r.mix = a.mix;
    r.pivots = a.pivots;
    r.dweight = n.address();
    if (r.dweight == nullptr) return;
    r.splits = 1;
    r.rows_per_split = a.in.rows;
    const auto reduce = [&](auto element) {
      using Reduce = BackwardReduce<decltype(element)>;
      r.weight_blocks = Reduce::tiles(a.in);
      launch<Reduce>(r.weight_blocks, 1, Reduce::shared_bytes(), r, nullptr);
    };
    if (c.half)
      reduce(c10::Half());
    else
      reduce(c10::BFloat16());
  });
}
