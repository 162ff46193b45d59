// The backward kernel in its direct form, one pass over x, y and dY; two over x where `reads_twice` says so.
// With c = 1 / (sqrt(N) max(||u||, eps)):
//     dU = c (dY - u^ (u^ . dY)),  u^ = sqrt(N) y          e = alpha dU x^T
//     dS = a (e - rowsum(a e))                             dX = a^T (alpha dU) + dS^T W
//     dW = sum dS x      dbeta = dU . 1      dalpha = dU . z
// A task is a run of segments and owns one copy of every parameter gradient (parameter_sums.h).
//
// Rows of few vectors do not fill a panel and leave little to add up in the lanes of a dot tile. There dU and
// dW are kept transposed, with units in lanes. Included inside an anonymous namespace.

template <typename T, typename O = typename Accumulator<T>::type>
class Backward {
  using A = typename Accumulator<T>::type;
  static constexpr bool kPaired = kSummands<O> > 1;
  static constexpr bool kRounded = !std::is_same_v<T, A>;  // y is
  static constexpr int64_t kRow = kPanelOperands<A, O>;

 public:
  Backward(const Problem& problem, const BackwardArguments& args, ParallelFor parallel_for)
      : problem_(problem),
        args_(args),
        parallel_for_(parallel_for),
        plan_(cpu::plan_backward(problem.sets, problem.units, problem.features,
                                 needs(kNeedWeight | kNeedPositionBias))),
        panels_(panel_count<A>(problem.features)),
        units_(problem.units),
        vectors_(cpu::ceil_div(problem.units, kLanes<A>)),
        stride_(vectors_ * kLanes<A>),
        kept_rows_(kept_rows()),
        units_in_lanes_(!kPaired && problem.features <= cpu::kShortRow && vectors_ % kTileVectors == 0),
        output_gradient_(problem, args, needs_ds()),
        stream_(args.dx != nullptr && streams<T>(args.dx, problem.features,
                                                 problem.sets.rows * problem.features * int64_t(sizeof(T)))),
        sums_(problem, args, int64_t(plan_.tasks.size()), units_in_lanes_) {}

  void run() {
    pack_weight();
    cpu::Arena measure;
    layout_sums(measure);
    sums_memory_ = cpu::allocate(measure.used());
    cpu::Arena arena(sums_memory_.get());
    layout_sums(arena);
    for (int64_t n = 0; n < stride_; ++n) {  // without a shift u = z; beyond N anything finite will do
      alpha_[n] = problem_.shift && n < units_ ? static_cast<const A*>(problem_.alpha)[n] : A(1);
      beta_[n] = problem_.shift && n < units_ ? static_cast<const A*>(problem_.beta)[n] : A(0);
    }
    if (row_sums_ != nullptr) sum_rows_of_cut_sets();
    const int64_t tasks = int64_t(plan_.tasks.size()),
                  operations = 3 * problem_.products() + problem_.outputs() * cpu::kMoving;
    cpu::parallel(parallel_for_, tasks, operations, [&](int64_t begin, int64_t end) {
      Scratch scratch(*this);
      for (int64_t c = begin; c < end; ++c) chunk(scratch, c);
      if (stream_) stream_fence();
    });
    sums_.reduce(parallel_for_);
  }

 private:
  static constexpr int64_t kDotRun = 32;  // features of dU . d added up in one chain, with units in lanes
  static constexpr int64_t kPrefetchBytes = 192 << 10;  // of y and of dY each
  static constexpr int64_t kKept = 128 << 10;           // of a, and of dU . d, between two passes

  struct Scratch {
    explicit Scratch(const Backward& b) : memory(layout(b, nullptr)) { layout(b, memory.data()); }

    int64_t layout(const Backward& b, void* base) {
      const int64_t rows = b.plan_.block_rows;
      row_stride = cpu::ceil_div(rows, kLanes<A>) * kLanes<A>;
      cpu::Arena arena(base);
      panels = arena.take<O>(rows * b.panels_ * kRow);
      du.rows = b.keeps_du_rows() ? arena.take<O>(b.units_ * b.panels_ * kRow) : nullptr;
      du.transposed = b.units_in_lanes_ ? arena.take<A>(b.stride_ * b.panels_ * kPanel<A>) : nullptr;
      all_weights = arena.take<A>(std::max(rows, b.kept_rows_) * b.stride_);
      all_ds = arena.take<A>(std::max(rows, b.kept_rows_) * b.stride_);
      by_unit_weights = arena.take<O>(summed<O>(b.stride_) * row_stride);
      by_unit_ds = arena.take<O>(summed<O>(b.stride_) * row_stride);
      if constexpr (kPaired) {
        weight_gradient = arena.take<O>(summed<O>(rows) * b.stride_);
        x_panel = arena.take<O>(summed<O>(rows) * kPanel<A>);
        du_panel = arena.take<O>(summed<O>(b.units_) * kPanel<A>);
        if (b.keeps_du_low()) {
          du.low = arena.take<O>(b.units_ * b.panels_ * kRow);
          ds_low = arena.take<A>(rows * b.stride_);
        }
        rest = arena.take<A>(b.stride_);
        du.lost = arena.take<A>(b.stride_);
      }
      offset = arena.take<A>(rows);
      tile = arena.take<A>(kTileRows * kPanel<A>);
      dots = arena.take<A>(dot_sums<A>(rows));
      none = arena.take<A>(b.stride_);
      du.sum = arena.take<A>(b.stride_);
      du.dot_u = arena.take<A>(b.stride_);
      dalpha = arena.take<A>(b.stride_);
      ds_offset = arena.take<A>(b.stride_);
      row_sum = arena.take<A>(b.stride_);
      begin_at(0);
      for (A* p : {du.sum, du.dot_u, du.lost}) {
        if (p == nullptr) continue;
        for (int64_t n = b.units_; n < b.stride_; ++n) p[n] = 0;
      }
      // Beyond N dot_products writes nothing; as pairs an odd unit N - 1 is summed together with unit N.
      for (int64_t r = 0; all_ds != nullptr && r < std::max(rows, b.kept_rows_); ++r)
        for (int64_t n = b.units_; n < b.stride_; ++n) all_ds[r * b.stride_ + n] = 0;
      if (none != nullptr)
        for (int64_t n = 0; n < b.stride_; ++n) none[n] = 0;
      return arena.used();
    }

    // Where a and dU . d of a block are, among those of all positions that are kept.
    void begin_at(int64_t element) {
      weights = all_weights + element;
      ds = all_ds + element;
      if constexpr (!kPaired) weight_gradient = ds;
    }

    O* panels;  // [M / kPanel][rows][kRow]: x, in the accumulator type less its offset
    A* offset;  // (rows)
    typename OutputGradient<T, O>::Scratch du;
    A *all_weights, *all_ds;
    A* weights;             // [rows][stride]: a, then alpha a
    A* ds;                  // [rows][stride]: dU . d, then dS
    O* by_unit_weights;     // [N][row_stride]: `weights` transposed
    O* by_unit_ds;          // [N][row_stride]: `ds` transposed
    O* weight_gradient;     // [rows][stride]: `ds` as an operand of dW
    O *x_panel, *du_panel;  // with pairs: a panel of x and of dU for sums over positions and over units
    A* ds_low = nullptr;    // with pairs [rows][stride]: du.low . d
    A* rest = nullptr;      // with pairs (stride): what rounding took from dS . offset
    A* tile;
    A* dots;
    A* none;       // (stride): 0
    A* dalpha;     // (stride): sum_l a_l (dU . x_l)
    A* ds_offset;  // (stride): sum_l dS_l (offset_l - center), with pairs -sum_l dS_l center
    A* row_sum;    // (stride): sum_l a_l h_l of score_gradient, where it is found beforehand
    int64_t row_stride;
    Prefetch next_x, next_y, next_dy;
    void step() {
      next_x.step();
      next_y.step();
      next_dy.step();
    }
    cpu::ThreadScratch memory;
  };

  bool needs(int64_t mask) const { return (args_.needs & mask) != 0; }
  bool needs_ds() const {
    return problem_.has_scores && needs(kNeedX | kNeedWeight | kNeedScores | kNeedPositionBias);
  }

  bool needs_dot() const { return needs_ds() || needs(kNeedAlpha); }
  // dS that a caller receives has to be as good as its own rounding; for dX and dW dS is rounded anyway.
  bool keeps_du_low() const { return needs_ds() && needs(kNeedScores | kNeedPositionBias); }
  bool keeps_du_rows() const { return !units_in_lanes_ || needs(kNeedX); }

  // Of a set that is read twice and not cut; 0 if none is.
  int64_t kept_rows() const {
    if (!kRounded || !needs_ds()) return 0;
    int64_t longest = 0;
    for (const cpu::Segment& s : plan_.segments)
      if (s.partial < 0 && s.end - s.begin <= kKept / stride_) longest = std::max(longest, s.end - s.begin);
    return longest > plan_.block_rows ? longest : 0;
  }

  void layout_sums(cpu::Arena& arena) {
    sums_.take(arena);
    alpha_ = arena.take<A>(stride_);
    beta_ = arena.take<A>(stride_);
    if (kRounded && needs_ds() && plan_.partials > 0) row_sums_ = arena.take<A>(plan_.partials * stride_);
  }

  // Panels of W serve dX = ... + dS^T W, the transposed form recomputes scores that were not saved.
  void pack_weight() {
    if (problem_.weight == nullptr) return;
    const T* weight = static_cast<const T*>(problem_.weight);
    if (needs(kNeedX)) {
      const int64_t panel = summed<O>(units_) * kPanel<A>;
      packed_panels_ = cpu::allocate(panels_ * panel * sizeof(O));
      O* packed = static_cast<O*>(packed_panels_.get());
      weight_panels_ = packed;
      cpu::parallel(parallel_for_, panels_, panels_ * panel * cpu::kMoving, [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p) {
          if constexpr (kPaired)
            pair_rows(weight, units_, problem_.features, p, packed + p * panel);
          else
            pack_matrix<T, A>(weight, units_, problem_.features, p, packed + p * panel);
        }
      });
    }
    if (args_.saved_scores == nullptr) score_weight_.pack(problem_, parallel_for_);
  }

  const int64_t* positions(int64_t set) const {
    return problem_.sets.position ? problem_.sets.position + problem_.sets.begin[set] : nullptr;
  }
  RowSource<T> source(int64_t set) const {
    return {static_cast<const T*>(problem_.x) + problem_.x_begin(set), problem_.x_row_stride, positions(set)};
  }

  A stats(int64_t which, int64_t set, int64_t unit) const {
    return static_cast<const A*>(args_.stats)[(which * problem_.sets.count + set) * units_ + unit];
  }
  A alpha(int64_t unit) const { return alpha_[unit]; }
  A beta(int64_t unit) const { return beta_[unit]; }

  void chunk(Scratch& scratch, int64_t c) const {
    sums_.clear(c);
    for (int64_t s = plan_.tasks[c].begin; s < plan_.tasks[c].end; ++s) {
      segment(scratch, plan_.segments[s], s + 1 < plan_.tasks[c].end ? &plan_.segments[s + 1] : nullptr, c);
    }
  }

  // What the next set reads first, to be fetched while this one's matrix products run: x, and as many rows of
  // y and dY as the second-level cache has room for.
  void prefetch(Scratch& scratch, int64_t set) const {
    const int64_t features = problem_.features, row = features * int64_t(sizeof(T));
    const int64_t rows = std::min(problem_.sets.length[set], plan_.block_rows);
    const int64_t tiles = units_in_lanes_ ? vectors_ / kTileVectors * cpu::ceil_div(kPanel<A>, kTileRows)
                                          : cpu::ceil_div(units_, kTileRows);
    const int64_t steps = panels_ * (cpu::ceil_div(rows, kTileRows) * (needs(kNeedX) ? 1 : 0) +
                                     tiles * (needs(kNeedWeight) ? 1 : 0));
    if (problem_.sets.position == nullptr && problem_.x_row_stride == features)
      scratch.next_x.start(static_cast<const T*>(problem_.x) + problem_.x_begin(set), rows * row, steps);
    const int64_t bytes = std::min(units_ * row, kPrefetchBytes), at = set * units_ * features;
    scratch.next_y.start(static_cast<const T*>(args_.y) + at, bytes, steps);
    scratch.next_dy.start(static_cast<const T*>(args_.dy) + at, bytes, steps);
  }

  void segment(Scratch& scratch, const cpu::Segment& segment, const cpu::Segment* next, int64_t c) const {
    const int64_t set = segment.set, rows = segment.end - segment.begin;
    for (int64_t n = 0; n < stride_; ++n) scratch.dalpha[n] = 0;
    if (rows == 0) {
      if (units_in_lanes_)
        output_gradient_.transposed(scratch.du, set);
      else
        balanced(units_, kDotTile,
                 [&](int64_t n0, int64_t p) { output_gradient_.rows(scratch.du, set, n0, p); });
    }
    const bool cut = segment.partial >= 0, twice = reads_twice(segment),
               kept = twice && !cut && rows <= kept_rows_;
    const RowSum row_sum = twice                            ? RowSum::kFound
                           : cut || rows > plan_.block_rows ? RowSum::kFromU
                                                            : RowSum::kHere;
    const A center = center_of(set);
    if (twice && cut)
      std::memcpy(scratch.row_sum, row_sums_ + segment.partial * stride_, stride_ * sizeof(A));
    else if (twice)
      sum_rows(scratch, segment, kept);
    balanced(rows, plan_.block_rows, [&](int64_t start, int64_t count) {
      if (kept) {
        scratch.begin_at(start * stride_);
        pack(scratch, set, segment.begin + start, count);
      } else {
        load_block(scratch, set, segment.begin + start, count);
        dot_products(scratch, set, count, start == 0 && (cut || !twice));
      }
      score_gradient(scratch, count, center, row_sum);
      write_score_gradients(scratch, set, segment.begin + start, count, c);
      if (next != nullptr && start + count == rows) prefetch(scratch, next->set);
      if (needs(kNeedX | kNeedWeight)) feature_gradients(scratch, set, segment.begin + start, count, c);
    });
    scratch.begin_at(0);
    if (needs(kNeedX)) zero_excluded(segment);
    parameter_gradients(scratch, segment, c);
  }

  // dU . u is off by the rounding of y, which all of a set's dS would share and x, alike in all positions,
  // would magnify. Where half types do not have a set in one block, they sum a h first.
  bool reads_twice(const cpu::Segment& segment) const {
    return kRounded && needs_ds() && (segment.partial >= 0 || segment.end - segment.begin > plan_.block_rows);
  }

  // Brings sum_l a_l h_l over a segment to scratch.row_sum; a and dU . d of all positions stay if `kept`.
  void sum_rows(Scratch& scratch, const cpu::Segment& segment, bool kept) const {
    const A center = center_of(segment.set);
    for (int64_t n = 0; n < stride_; ++n) scratch.row_sum[n] = 0;
    balanced(segment.end - segment.begin, plan_.block_rows, [&](int64_t start, int64_t count) {
      if (kept) scratch.begin_at(start * stride_);
      load_block(scratch, segment.set, segment.begin + start, count);
      dot_products(scratch, segment.set, count, start == 0);
      for (int64_t n = 0; n < stride_; n += kLanes<A>) {
        Vec<A> total = {};
        for (int64_t r = 0; r < count; ++r)
          total +=
              load_vector(scratch.weights + r * stride_ + n) * raised_dot(scratch, stride_, r, n, center);
        store_vector(scratch.row_sum + n, load_vector(scratch.row_sum + n) + total);
      }
    });
  }

  // The same for the sets that several tasks share.
  void sum_rows_of_cut_sets() const {
    const int64_t tasks = int64_t(plan_.tasks.size());
    cpu::parallel(parallel_for_, tasks, 2 * problem_.products(), [&](int64_t begin, int64_t end) {
      Scratch scratch(*this);
      for (int64_t c = begin; c < end; ++c)
        for (int64_t s = plan_.tasks[c].begin; s < plan_.tasks[c].end; ++s) {
          const cpu::Segment& segment = plan_.segments[s];
          if (segment.partial < 0) continue;
          sum_rows(scratch, segment, false);
          std::memcpy(row_sums_ + segment.partial * stride_, scratch.row_sum, stride_ * sizeof(A));
        }
    });
    for (size_t first = 0, end; first < plan_.segments.size(); first = end) {
      for (end = first + 1;
           end < plan_.segments.size() && plan_.segments[end].set == plan_.segments[first].set;)
        ++end;
      if (plan_.segments[first].partial < 0) continue;
      A* sums = row_sums_ + plan_.segments[first].partial * stride_;
      for (size_t s = 1; s < end - first; ++s)
        for (int64_t n = 0; n < stride_; ++n) sums[n] += sums[s * stride_ + n];
      for (size_t s = 1; s < end - first; ++s) std::memcpy(sums + s * stride_, sums, stride_ * sizeof(A));
    }
  }

  // The same for every segment of a set, since only over all its positions dS sums to 0.
  A center_of(int64_t set) const {
    return problem_.sets.length[set] > 0 ? row_offset<T, A>(source(set).row(0), problem_.features) : A(0);
  }

  void pack(Scratch& scratch, int64_t set, int64_t begin, int64_t rows) const {
    if constexpr (kPaired)
      pack_rows(source(set), begin, rows, problem_.features, scratch.panels, nullptr, scratch.offset);
    else
      pack_rows<T, A>(source(set), begin, rows, problem_.features, scratch.panels, scratch.offset);
  }

  // Packs rows of x and brings scratch.weights to a = exp(s - max) / sum.
  void load_block(Scratch& scratch, int64_t set, int64_t begin, int64_t rows) const {
    const int64_t* position = positions(set);
    pack(scratch, set, begin, rows);
    if (args_.saved_scores != nullptr) {
      const A* base = static_cast<const A*>(args_.saved_scores) + problem_.sets.first_row[set] * units_;
      gather_scores(ScoreSource<A>{base, 1, units_}, position, begin, rows, 0, units_, scratch.weights,
                    stride_);
    } else if (score_weight_) {
      score_block<A>(scratch.panels, scratch.offset, rows, problem_.features, score_weight_.units(0),
                     score_weight_.sums(0), vectors_, scratch.weights, stride_, score_run(problem_.features));
    } else if (problem_.scores != nullptr) {
      const ScoreSource<A> given{static_cast<const A*>(problem_.scores) + problem_.scores_begin(set),
                                 problem_.scores_unit_stride, problem_.scores_position_stride};
      gather_scores(given, position, begin, rows, 0, units_, scratch.weights, stride_);
    } else {
      std::memset(scratch.weights, 0, rows * stride_ * sizeof(A));
    }
    if (problem_.position_bias != nullptr && args_.saved_scores == nullptr)
      add_position_bias(static_cast<const A*>(problem_.position_bias), problem_.max_length, position, begin,
                        rows, units_, scratch.weights, stride_);
    normalise(scratch.weights, rows, set);
  }

  void normalise(A* weights, int64_t rows, int64_t set) const {
    const A* maximum = static_cast<const A*>(args_.stats) + set * units_;
    const A* total = maximum + problem_.sets.count * units_;
    for (int64_t n = 0; n < units_; n += kLanes<A>) {
      const int64_t left = std::min(kLanes<A>, units_ - n);
      const Vec<A> sum = load_partial(total + n, left), none = {};
      const Vec<A> top = sum == none ? none : load_partial(maximum + n, left);
      const Vec<A> scale = sum == none ? none : A(1) / sum;
      for (int64_t r = 0; r < rows; ++r) {
        A* s = weights + r * stride_ + n;
        store_vector(s, exponential(load_vector(s) - top) * scale);
      }
    }
  }

  // ds = dU d^T for a block of rows. With the first block of a set comes dU itself, a few units ahead of
  // their products, during which the rows of y and dY that follow are fetched.
  void dot_products(Scratch& scratch, int64_t set, int64_t rows, bool first) const {
    const int64_t row = problem_.features * int64_t(sizeof(T));
    const int64_t row_tiles = cpu::ceil_div(rows, kDotTile);
    if (units_in_lanes_) {
      if (first) output_gradient_.transposed(scratch.du, set);
      if constexpr (!kPaired)
        if (needs_dot())
          score_block<A>(scratch.panels, scratch.offset, rows, problem_.features, scratch.du.transposed,
                         scratch.none, vectors_, scratch.ds, stride_, kDotRun);
      return;
    }
    balanced(units_, kDotTile, [&](int64_t n0, int64_t p) {
      if (first) {
        output_gradient_.rows(scratch.du, set, n0, p);
        const int64_t begin = std::max((n0 + p) * row, kPrefetchBytes),
                      end = std::min(n0 + 2 * p, units_) * row;
        const char* y = static_cast<const char*>(args_.y) + set * units_ * row + begin;
        const char* dy = static_cast<const char*>(args_.dy) + set * units_ * row + begin;
        scratch.next_y.start(y, std::max<int64_t>(end - begin, 0), row_tiles);
        scratch.next_dy.start(dy, std::max<int64_t>(end - begin, 0), row_tiles);
      }
      if (!needs_dot()) return;
      dot_rows<A>(scratch.du.rows + n0 * kRow, units_ * kRow, p, scratch.panels, rows, panels_, scratch.dots,
                  scratch.ds + n0, stride_, [&] {
                    scratch.next_y.step();
                    scratch.next_dy.step();
                  });
      if (scratch.du.low == nullptr) return;
      dot_rows<A>(scratch.du.low + n0 * kRow, units_ * kRow, p, scratch.panels, rows, panels_, scratch.dots,
                  scratch.ds_low + n0, stride_, [] {});
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t n = n0; n < n0 + p; ++n) scratch.ds[r * stride_ + n] += scratch.ds_low[r * stride_ + n];
    });
  }

  // h = dU . d + (offset - center) dU . 1 of one position, which is e / alpha up to a constant of the unit.
  static Vec<A> raised_dot(const Scratch& scratch, int64_t stride, int64_t row, int64_t n, A center) {
    const Vec<A> dot = load_vector(scratch.ds + row * stride + n), du_sum = load_vector(scratch.du.sum + n);
    if constexpr (kPaired)
      return dot + (load_vector(scratch.du.lost + n) * scratch.offset[row] - du_sum * center);
    else
      return dot + du_sum * (scratch.offset[row] - center);
  }

  enum class RowSum {
    kHere,   // the block is the set
    kFromU,  // alpha rowsum(a h) = dU . u - (beta + alpha center) dU . 1, since u = alpha z + beta
    kFound,  // in scratch.row_sum
  };

  // dS = alpha a (h - rowsum(a h)). Leaves alpha a in place of a.
  void score_gradient(Scratch& scratch, int64_t rows, A center, RowSum row_sum) const {
    for (int64_t n = 0; n < stride_; n += kLanes<A>) {
      const Vec<A> alpha = load_vector(alpha_ + n);
      if (needs_dot()) {
        const Vec<A> du_sum = load_vector(scratch.du.sum + n), none = {};
        Vec<A> total = {}, weight_sum = {}, offset_sum = {};
        for (int64_t r = 0; r < rows; ++r) {
          A* dot = scratch.ds + r * stride_ + n;
          const Vec<A> weight = load_vector(scratch.weights + r * stride_ + n);
          const Vec<A> h = raised_dot(scratch, stride_, r, n, center);
          total += weight * h;
          weight_sum += weight;
          store_vector(dot, h);
        }
        store_vector(scratch.dalpha + n,
                     load_vector(scratch.dalpha + n) + total + du_sum * center * weight_sum);
        Vec<A> mean = total;
        if (row_sum == RowSum::kFound) {
          mean = load_vector(scratch.row_sum + n);
        } else if (row_sum == RowSum::kFromU) {
          const Vec<A> scaled =
              load_vector(scratch.du.dot_u + n) - du_sum * (load_vector(beta_ + n) + alpha * center);
          mean = alpha == none ? none : scaled / alpha;
        }
        for (int64_t r = 0; r < rows; ++r) {
          A* ds = scratch.ds + r * stride_ + n;
          const Vec<A> value =
              alpha * load_vector(scratch.weights + r * stride_ + n) * (load_vector(ds) - mean);
          offset_sum += value * (kPaired ? -center : scratch.offset[r] - center);
          store_vector(ds, value);
        }
        store_vector(scratch.ds_offset + n, offset_sum);
      }
      if (needs(kNeedX))
        for (int64_t r = 0; r < rows; ++r) {
          A* weight = scratch.weights + r * stride_ + n;
          store_vector(weight, alpha * load_vector(weight));
        }
    }
    if constexpr (kPaired) {
      if (needs(kNeedX))
        pair_units(scratch.weights, stride_, rows, units_, scratch.by_unit_weights, scratch.row_stride);
      if (needs_ds() && needs(kNeedX))
        pair_units(scratch.ds, stride_, rows, units_, scratch.by_unit_ds, scratch.row_stride);
      if (needs_ds() && needs(kNeedWeight))
        pair_positions(scratch.ds, stride_, rows, vectors_, nullptr, scratch.offset, scratch.weight_gradient,
                       scratch.rest);
    } else {
      if (needs(kNeedX))
        transpose<A>(scratch.weights, stride_, rows, units_, scratch.by_unit_weights, scratch.row_stride);
      if (needs_ds() && needs(kNeedX))
        transpose<A>(scratch.ds, stride_, rows, units_, scratch.by_unit_ds, scratch.row_stride);
    }
  }

  int64_t dscores_begin(int64_t set) const {
    return problem_.packed ? problem_.sets.first_row[set] : set * units_ * args_.dscores_unit_stride;
  }

  void write_score_gradients(const Scratch& scratch, int64_t set, int64_t begin, int64_t rows,
                             int64_t c) const {
    const int64_t* position = positions(set);
    auto place = [&](int64_t r) { return position ? position[begin + r] : begin + r; };
    if (needs(kNeedScores))
      for (int64_t n = 0; n < units_; ++n) {
        A* out = static_cast<A*>(args_.dscores) + dscores_begin(set) + n * args_.dscores_unit_stride;
        for (int64_t r = 0; r < rows; ++r) out[place(r)] = scratch.ds[r * stride_ + n];
      }
    if (A* bias = sums_.position_bias(c))
      for (int64_t n = 0; n < units_; ++n) {
        A* out = bias + n * problem_.max_length;
        for (int64_t r = 0; r < rows; ++r) out[place(r)] += scratch.ds[r * stride_ + n];
      }
  }

  // dX = a^T (alpha dU) + dS^T W and dW += dS d, a panel at a time while it is in the first-level cache. What
  // the offset adds to dW, dS . offset, is the same for every feature; with sum_l dS_l = 0 it is taken
  // relative to `center`.
  void feature_gradients(Scratch& scratch, int64_t set, int64_t begin, int64_t rows, int64_t c) const {
    const int64_t* position = positions(set);
    const int64_t features = problem_.features, panel = units_ * kPanel<A>;
    T* dx = needs(kNeedX) ? static_cast<T*>(args_.dx) + problem_.sets.first_row[set] * features : nullptr;
    A* dweight = sums_.weight(c);
    const int64_t row_operands = summed<O>(rows), unit_operands = summed<O>(units_);
    for (int64_t p = 0; p < panels_; ++p) {
      if (dx != nullptr) {
        const O* du = scratch.du.rows + p * units_ * kRow;
        if constexpr (kPaired) {
          pair_rows(du, units_, scratch.du_panel);
          du = scratch.du_panel;
        }
        balanced(rows, kTileRows, [&](int64_t r0, int64_t count) {
          panel_kernel<A, O, Start::kZero>(count)(scratch.tile, nullptr, scratch.by_unit_weights + r0,
                                                  scratch.row_stride, du, kPanel<A>, unit_operands);
          if (weight_panels_ != nullptr)
            panel_kernel<A, O, Start::kLoad>(count)(
                scratch.tile, nullptr, scratch.by_unit_ds + r0, scratch.row_stride,
                weight_panels_ + p * unit_operands * kPanel<A>, kPanel<A>, unit_operands);
          scratch.step();
          for (int64_t i = 0; i < count; ++i) {
            const int64_t row = position ? position[begin + r0 + i] : begin + r0 + i;
            Vec<A> value[kTileVectors];
            FASTAC_EACH (v, kTileVectors)
              value[v] = load_vector(scratch.tile + i * kPanel<A> + v * kLanes<A>);
            store_panel<T, A>(dx + row * features, p, features, value, stream_);
          }
        });
      }
      if (dweight == nullptr) continue;
      const O* x = scratch.panels + p * rows * kRow;
      if constexpr (kPaired) {
        pair_rows(x, rows, scratch.x_panel);
        x = scratch.x_panel;
      } else if (units_in_lanes_) {
        for (int64_t n = 0; n < stride_; n += kPanel<A>)
          balanced(std::min(kPanel<A>, features - p * kPanel<A>), kTileRows, [&](int64_t m, int64_t count) {
            panel_kernel<A, A, Start::kLoad>(count)(dweight + n * features + (p * kPanel<A> + m) * kPanel<A>,
                                                    nullptr, x + m, kPanel<A>, scratch.ds + n, stride_, rows);
            scratch.step();
          });
        continue;
      }
      balanced(units_, kTileRows, [&](int64_t n0, int64_t count) {
        panel_kernel<A, O, Start::kLoad>(count)(dweight + p * panel + n0 * kPanel<A>, nullptr,
                                                scratch.weight_gradient + n0, stride_, x, kPanel<A>,
                                                row_operands);
        scratch.step();
      });
    }
    if (dweight != nullptr)
      for (int64_t n = 0; n < units_; ++n)
        sums_.weight_offset(c)[n] += scratch.ds_offset[n] + (kPaired ? scratch.rest[n] : A(0));
  }

  // dX is 0 where a position takes no part. Each segment clears the gap before each of its positions, the
  // last one the rest.
  void zero_excluded(const cpu::Segment& segment) const {
    const Sets& sets = problem_.sets;
    const int64_t set = segment.set;
    const int64_t* position = positions(set);
    T* dx = static_cast<T*>(args_.dx) + sets.first_row[set] * problem_.features;
    auto clear = [&](int64_t begin, int64_t end) {
      if (end > begin)
        std::memset(static_cast<void*>(dx + begin * problem_.features), 0,
                    (end - begin) * problem_.features * sizeof(T));
    };
    if (position != nullptr)
      for (int64_t i = segment.begin; i < segment.end; ++i)
        clear(i == 0 ? 0 : position[i - 1] + 1, position[i]);
    if (segment.end == sets.length[set])
      clear(segment.end == 0 ? 0 : position ? position[segment.end - 1] + 1 : segment.end, sets.extent[set]);
  }

  // dbeta = dU . 1; dalpha = dU . z, which with dU . u = 0 is also -beta dU . 1 / alpha. The second form is
  // the better conditioned one, and exact for beta = 0, where |beta| is at most the size of alpha z; with
  // ||u|| / sqrt(M) >= 2 |beta| it is.
  void parameter_gradients(const Scratch& scratch, const cpu::Segment& segment, int64_t c) const {
    const bool first = segment.begin == 0;
    const A root_features = std::sqrt(A(problem_.features));
    A *dalpha = sums_.alpha(c), *dbeta = sums_.beta(c);
    for (int64_t n = 0; n < units_; ++n) {
      if (dbeta != nullptr && first) dbeta[n] += scratch.du.sum[n];
      if (dalpha == nullptr) continue;
      if (problem_.sets.length[segment.set] == 0) continue;  // z = 0
      const A norm = stats(2, segment.set, n);
      const bool through_beta =
          alpha(n) != 0 && norm >= A(problem_.eps) && norm >= 2 * std::abs(beta(n)) * root_features;
      if (!through_beta)
        dalpha[n] += scratch.dalpha[n];
      else if (first)
        dalpha[n] -= beta(n) * scratch.du.sum[n] / alpha(n);
    }
  }

  const Problem& problem_;
  const BackwardArguments& args_;
  const ParallelFor parallel_for_;
  const cpu::Plan plan_;
  const int64_t panels_, units_, vectors_, stride_, kept_rows_;
  const bool units_in_lanes_;
  const OutputGradient<T, O> output_gradient_;
  const bool stream_;
  ParameterSums<T> sums_;
  cpu::Buffer packed_panels_, sums_memory_;
  const O* weight_panels_ = nullptr;
  ScoreWeight<T, O> score_weight_;
  A* alpha_ = nullptr;     // (stride), 1 without a shift
  A* beta_ = nullptr;      // (stride), 0 without a shift
  A* row_sums_ = nullptr;  // (partials, stride): sum_l a_l h_l over the whole set, if its segments need it
};
