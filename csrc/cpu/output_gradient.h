// dU of one set, where the backward kernel begins, and what it needs of it besides. With
// c = 1 / (sqrt(N) max(||u||, eps)):
//     dU = c (dY - u^ (u^ . dY)),  u^ = sqrt(N) y; without a shift dU = dY
// Included inside an anonymous namespace.

template <typename T, typename O>
class OutputGradient {
  using A = typename Accumulator<T>::type;
  static constexpr bool kPaired = kSummands<O> > 1;
  static constexpr int64_t kRow = kPanelOperands<A, O>;

 public:
  // Units are padded to whole vectors; what lies beyond N stays as it is.
  struct Scratch {
    O* rows = nullptr;        // dU, [M / kPanel][N][kRow], or null where only `transposed` is wanted
    O* low = nullptr;         // with pairs, or null: what rounding took from dU, rounded
    A* transposed = nullptr;  // [N / kLanes][M][kLanes], M rounded up to whole panels
    A* sum = nullptr;         // (N): dU . 1
    A* lost = nullptr;        // with pairs (N): what rounding took from dU . 1
    A* dot_u = nullptr;       // (N): dU . u, 0 unless the norm was below eps or there is no shift
  };

  // wants_dot_u: whether dot_u is wanted without a shift, where nothing else needs y.
  OutputGradient(const Problem& problem, const BackwardArguments& args, bool wants_dot_u)
      : problem_(problem),
        args_(args),
        wants_dot_u_(wants_dot_u),
        units_(problem.units),
        panels_(panel_count<A>(problem.features)),
        root_units_(std::sqrt(A(problem.units))) {}

  // dU of `count` <= kDotTile units from `first` on, in rows.
  void rows(const Scratch& scratch, int64_t set, int64_t first, int64_t count) const {
    with_rows<kDotTile>(count, [&](auto units) {
      if constexpr (kPaired)
        this->template rounded_rows<units>(scratch, set, first);
      else
        plain_rows<units>(scratch, set, first);
    });
  }

  // dU of all units, transposed and, where wanted, in rows.
  void transposed(const Scratch& scratch, int64_t set) const {
    for (int64_t first = 0; first < units_; first += kLanes<A>) {
      A factor[kLanes<A>], project[kLanes<A>];
      const int64_t count = std::min(kLanes<A>, units_ - first);
      balanced(count, kDotTile, [&](int64_t i, int64_t length) {
        with_rows<kDotTile>(
            length, [&](auto units) { factors<units>(scratch, set, first + i, factor + i, project + i); });
      });
      if constexpr (!kPaired) vector_of_units(scratch, set, first, count, factor, project);
    }
  }

 private:
  static constexpr int64_t kSumRun = 4;  // panels whose numbers are added up in one chain

  // dU = c (dY - u^ (u^ . dY)) = factor dY - project y: both factors of `Units` units.
  template <int Units>
  void factors(const Scratch& scratch, int64_t set, int64_t first, A* factor, A* project) const {
    const int64_t features = problem_.features, at = (set * units_ + first) * features;
    const T* dy = static_cast<const T*>(args_.dy) + at;
    const T* y = static_cast<const T*>(args_.y) + at;
    A dot[Units] = {};
    if (problem_.shift || wants_dot_u_) {
      Vec<A> sum[Units] = {};
      constexpr int64_t kStep = kLanes<A> * kSummands<O>;
      for (int64_t begin = 0; begin < features; begin += kSumRun * kPanel<A>) {
        Vec<A> run[Units] = {};
        const int64_t end = std::min(begin + kSumRun * kPanel<A>, features);
        for (int64_t m = begin; m < end; m += kStep) {
          const int64_t left = std::min(kStep, end - m);
          FASTAC_EACH (i, Units) {
            if constexpr (kPaired)
              run[i] = multiply_add<A, O>(run[i], load_pairs(dy + i * features + m, left),
                                          load_pairs(y + i * features + m, left));
            else
              run[i] += load_some(dy + i * features + m, left) * load_some(y + i * features + m, left);
          }
        }
        FASTAC_EACH (i, Units) sum[i] += run[i];
      }
      fold_all<A, Units>(sum, dot);
    }
    for (int i = 0; i < Units; ++i) {
      factor[i] = 1;
      project[i] = 0;
      scratch.dot_u[first + i] = 0;
      if (!problem_.shift) {
        if (wants_dot_u_) scratch.dot_u[first + i] = dot[i];  // dY . z
        continue;
      }
      const A norm = this->norm(set, first + i), eps = A(problem_.eps);
      factor[i] = A(1) / (root_units_ * std::max(norm, eps));
      if (norm < eps)
        scratch.dot_u[first + i] = dot[i];  // y = factor u, so dU . u = factor dY . u = dY . y
      else
        project[i] = A(problem_.units) * dot[i] * factor[i];  // c u^ (u^ . dY) = c N y (y . dY)
    }
  }

  // dU of `Units` units into panels, with its sum over features. What dalpha and dbeta are made of is a small
  // rest of many signed terms, so its sums are sums of short ones: kSumRun panels at a time.
  template <int Units>
  void plain_rows(const Scratch& scratch, int64_t set, int64_t first) const {
    const int64_t features = problem_.features, at = (set * units_ + first) * features;
    const T* dy = static_cast<const T*>(args_.dy) + at;
    const T* y = static_cast<const T*>(args_.y) + at;
    A factor[Units], project[Units];
    factors<Units>(scratch, set, first, factor, project);
    Vec<A> sum[Units] = {};
    const int64_t step = units_ * kPanel<A>;
    A* out = scratch.rows + first * kPanel<A>;
    for (int64_t begin = 0; begin < panels_; begin += kSumRun) {
      Vec<A> run[Units] = {};
      for (int64_t p = begin; p < std::min(begin + kSumRun, panels_); ++p, out += step)
        for (int v = 0; v < kTileVectors; ++v) {
          const int64_t m = p * kPanel<A> + v * kLanes<A>, left = std::min(kLanes<A>, features - m);
          FASTAC_EACH (i, Units) {
            Vec<A> value = {};
            if (left > 0) {
              value = load_some(dy + i * features + m, left) * factor[i];
              if (problem_.shift) value -= load_some(y + i * features + m, left) * project[i];
            }
            run[i] += value;
            store_vector(out + i * kPanel<A> + v * kLanes<A>, value);
          }
        }
      FASTAC_EACH (i, Units) sum[i] += run[i];
    }
    fold_all<A, Units>(sum, scratch.sum + first);
  }

#if defined(FASTAC_BFLOAT16_DOT)
  // The same in pairs, and what rounding takes from the sum.
  template <int Units>
  void rounded_rows(const Scratch& scratch, int64_t set, int64_t first) const {
    const int64_t features = problem_.features, at = (set * units_ + first) * features;
    const T* dy = static_cast<const T*>(args_.dy) + at;
    const T* y = static_cast<const T*>(args_.y) + at;
    A factor[Units], project[Units];
    factors<Units>(scratch, set, first, factor, project);
    Vec<A> sum[Units] = {}, kept[Units] = {};
    const Vec<O> ones = pair_of_ones();
    const int64_t step = units_ * kRow;
    O* out = scratch.rows + first * kRow;
    O* low = scratch.low;
    for (int64_t begin = 0; begin < panels_; begin += kSumRun) {
      Vec<A> run[Units] = {};
      for (int64_t p = begin; p < std::min(begin + kSumRun, panels_); ++p, out += step) {
        const int64_t m = p * kPanel<A>, left = features - m;
        FASTAC_EACH (i, Units) {
          const Vec<Pair> g = load_pairs(dy + i * features + m, left);
          Vec<A> even = first_of(g) * factor[i], odd = second_of(g) * factor[i];
          if (problem_.shift) {
            const Vec<Pair> v = load_pairs(y + i * features + m, left);
            even -= first_of(v) * project[i];
            odd -= second_of(v) * project[i];
          }
          const Vec<Pair> rounded = round_across(even, odd);
          run[i] += even + odd;
          kept[i] = multiply_add<A, O>(kept[i], rounded, ones);
          store_vector(out + i * kRow, rounded);
          if (low == nullptr) continue;
          const Vec<Pair> rest = round_across(even - first_of(rounded), odd - second_of(rounded));
          kept[i] = multiply_add<A, O>(kept[i], rest, ones);
          store_vector(low + (out - scratch.rows) + i * kRow, rest);
        }
      }
      FASTAC_EACH (i, Units) sum[i] += run[i];
    }
    fold_all<A, Units>(sum, scratch.sum + first);
    FASTAC_EACH (i, Units) sum[i] -= kept[i];
    fold_all<A, Units>(sum, scratch.lost + first);
  }
#endif

  // dU = factor dY - project y of one vector of units.
  void vector_of_units(const Scratch& scratch, int64_t set, int64_t first, int64_t count, const A* factor,
                       const A* project) const {
    const int64_t features = problem_.features, at = (set * units_ + first) * features;
    const int64_t padded = panels_ * kPanel<A>;
    const T* dy = static_cast<const T*>(args_.dy) + at;
    const T* y = static_cast<const T*>(args_.y) + at;
    A* transposed = scratch.transposed + first * padded;
    Vec<A> sum = {};
    for (int64_t m = 0; m < padded; m += kLanes<A>) {
      const int64_t left = std::min(kLanes<A>, features - m);
      Vec<A> block[kLanes<A>];
      if (left <= 0) {
        FASTAC_EACH (i, kLanes<A>) block[i] = Vec<A>{};
      } else if (left == kLanes<A> && count == kLanes<A>) {
        FASTAC_EACH (i, kLanes<A>) block[i] = Storage<T>::load(dy + i * features + m) * factor[i];
        if (problem_.shift)
          FASTAC_EACH (i, kLanes<A>) block[i] -= Storage<T>::load(y + i * features + m) * project[i];
      } else {
        FASTAC_EACH (i, kLanes<A>)
          block[i] = i < count ? load_some(dy + i * features + m, left) * factor[i] : Vec<A>{};
        if (problem_.shift)
          FASTAC_EACH (i, kLanes<A>)
            if (i < count) block[i] -= load_some(y + i * features + m, left) * project[i];
      }
      if (scratch.rows != nullptr) {
        A* rows = scratch.rows + (m / kPanel<A> * units_ + first) * kPanel<A> + m % kPanel<A>;
        FASTAC_EACH (i, kLanes<A>)
          if (i < count) store_vector(rows + i * kPanel<A>, block[i]);
      }
      if (left <= 0) continue;
      transpose_block<A>(block);
      Vec<A> run = {};
      FASTAC_EACH (i, kLanes<A>) {
        run += block[i];
        store_vector(transposed + (m + i) * kLanes<A>, block[i]);
      }
      sum += run;
    }
    store_vector(scratch.sum + first, sum);
  }

  static inline __attribute__((always_inline)) Vec<A> load_some(const T* p, int64_t count) {
    return count == kLanes<A> ? Storage<T>::load(p) : load_partial(p, count);
  }

  A norm(int64_t set, int64_t unit) const {
    return static_cast<const A*>(args_.stats)[(2 * problem_.sets.count + set) * units_ + unit];
  }

  const Problem& problem_;
  const BackwardArguments& args_;
  const bool wants_dot_u_;
  const int64_t units_, panels_;
  const A root_units_;
};
