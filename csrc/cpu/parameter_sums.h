// The gradients of the parameters are sums over sets. Every task adds to a copy of its own; the copies are
// added in a fixed order at the end. Included inside an anonymous namespace.

template <typename T>
class ParameterSums {
  using A = typename Accumulator<T>::type;

 public:
  // With units in lanes a copy of dW is [N / kPanel][M][kPanel], else [M / kPanel][N][kPanel].
  ParameterSums(const Problem& problem, const BackwardArguments& args, int64_t copies, bool units_in_lanes)
      : problem_(problem),
        args_(args),
        copies_(copies),
        panels_(panel_count<A>(problem.features)),
        units_(problem.units),
        weight_size_(units_in_lanes ? cpu::ceil_div(units_, kLanes<A>) * kLanes<A> * problem.features
                                    : units_ * panels_ * kPanel<A>),
        bias_size_(units_ * problem.max_length),
        units_in_lanes_(units_in_lanes) {}

  void take(cpu::Arena& arena) {
    if (needs(kNeedWeight)) {
      weight_ = arena.take<A>(copies_ * weight_size_);
      weight_offset_ = arena.take<A>(copies_ * units_);
    }
    if (needs(kNeedPositionBias)) position_bias_ = arena.take<A>(copies_ * bias_size_);
    if (needs(kNeedAlpha)) alpha_ = arena.take<A>(copies_ * units_);
    if (needs(kNeedBeta)) beta_ = arena.take<A>(copies_ * units_);
  }

  void clear(int64_t c) const {
    const std::pair<A*, int64_t> all[] = {{weight(c), weight_size_},
                                          {weight_offset(c), units_},
                                          {position_bias(c), bias_size_},
                                          {alpha(c), units_},
                                          {beta(c), units_}};
    for (const auto& [sums, size] : all)
      if (sums != nullptr) std::memset(sums, 0, size * sizeof(A));
  }

  // Copy c of each sum; null if nobody asked for it.
  A* weight(int64_t c) const { return at(weight_, c, weight_size_); }
  A* weight_offset(int64_t c) const { return at(weight_offset_, c, units_); }  // the same for all features
  A* position_bias(int64_t c) const { return at(position_bias_, c, bias_size_); }
  A* alpha(int64_t c) const { return at(alpha_, c, units_); }
  A* beta(int64_t c) const { return at(beta_, c, units_); }

  void reduce(ParallelFor parallel_for) const {
    const int64_t operations = copies_ * weight_size_ * cpu::kMoving;
    if (needs(kNeedWeight) && units_in_lanes_)
      for (int64_t n = 0; n < units_; n += kLanes<A>) reduce_transposed(n);
    else if (needs(kNeedWeight))
      cpu::parallel(parallel_for, panels_, operations, [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p) reduce_panel(p);
      });
    if (needs(kNeedPositionBias)) add(position_bias_, args_.dposition_bias, bias_size_);
    if (needs(kNeedAlpha)) add(alpha_, args_.dalpha, units_);
    if (needs(kNeedBeta)) add(beta_, args_.dbeta, units_);
  }

 private:
  bool needs(int64_t mask) const { return (args_.needs & mask) != 0; }
  static A* at(A* sums, int64_t c, int64_t size) { return sums == nullptr ? nullptr : sums + c * size; }

  void reduce_panel(int64_t p) const {
    const int64_t features = problem_.features;
    for (int64_t n = 0; n < units_; ++n) {
      A offset = 0;
      for (int64_t c = 0; c < copies_; ++c) offset += weight_offset(c)[n];
      Tile<A, 1, kTileVectors> sum;
      sum.fill(offset);
      for (int64_t c = 0; c < copies_; ++c)
        FASTAC_EACH (v, kTileVectors)
          sum.acc[0][v] += load_vector(weight(c) + (p * units_ + n) * kPanel<A> + v * kLanes<A>);
      store_panel<T, A>(static_cast<T*>(args_.dweight) + n * features, p, features, sum.acc[0], false);
    }
  }

  // One vector of units.
  void reduce_transposed(int64_t first) const {
    const int64_t features = problem_.features, count = std::min(kLanes<A>, units_ - first);
    Vec<A> offset = {};
    for (int64_t c = 0; c < copies_; ++c) offset += load_partial(weight_offset(c) + first, count);
    const int64_t begin = first / kPanel<A> * kPanel<A> * features + first % kPanel<A>;
    T* dweight = static_cast<T*>(args_.dweight) + first * features;
    for (int64_t m = 0; m < features; m += kLanes<A>) {
      const int64_t left = std::min(kLanes<A>, features - m);
      Vec<A> block[kLanes<A>];
      FASTAC_EACH (i, kLanes<A>) {
        block[i] = offset;
        if (i < left)
          for (int64_t c = 0; c < copies_; ++c)
            block[i] += load_vector(weight(c) + begin + (m + i) * kPanel<A>);
      }
      transpose_block<A>(block);
      for (int64_t i = 0; i < count; ++i) store_some<T, A>(dweight + i * features + m, block[i], left, false);
    }
  }

  void add(const A* sums, void* out, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) {
      A sum = 0;
      for (int64_t c = 0; c < copies_; ++c) sum += sums[c * count + i];
      static_cast<A*>(out)[i] = sum;
    }
  }

  const Problem& problem_;
  const BackwardArguments& args_;
  const int64_t copies_, panels_, units_, weight_size_, bias_size_;
  const bool units_in_lanes_;
  A* weight_ = nullptr;
  A* weight_offset_ = nullptr;
  A* position_bias_ = nullptr;
  A* alpha_ = nullptr;
  A* beta_ = nullptr;
};
