// The forward kernel: y = u / (sqrt(N) max(||u||, eps)), u = alpha z + beta, z = softmax(s) x (Eq. 2-7), one
// pass over x.
//
// A task is a run of positions of one set for a block of units. Where the set fits one packed block, its
// weighted sums leave the registers as u, wait in a few rows of scratch for their norm, and are written to y
// while the next rows are computed. Longer sets keep running sums and combine blocks, and segments of one
// set, by their running maximum. Included inside an anonymous namespace.

template <typename T, typename O = typename Accumulator<T>::type>
class Forward {
  using A = typename Accumulator<T>::type;
  static constexpr bool kPaired = kSummands<O> > 1;

 public:
  Forward(const Problem& problem, const ForwardOutputs& out, ParallelFor parallel_for)
      : problem_(problem),
        out_(out),
        parallel_for_(parallel_for),
        plan_(cpu::plan_forward(problem.sets, problem.units, problem.features)),
        panels_(panel_count<A>(problem.features)),
        root_units_(std::sqrt(A(problem.units))),
        stream_(streams<T>(out.y, problem.features,
                           problem.sets.count * problem.units * problem.features * int64_t(sizeof(T)))) {
    for (int64_t m = 0; m < kPanel<A>; ++m)
      last_panel_[m] = (panels_ - 1) * kPanel<A> + m < problem.features ? A(1) : A(0);
  }

  void run() {
    if (problem_.weight != nullptr) weight_.pack(problem_, parallel_for_);
    if (plan_.partials > 0) workspace_ = cpu::allocate(plan_.partials * partial_size() * sizeof(A));
    const int64_t blocks = cpu::ceil_div(problem_.units, plan_.unit_block),
                  tasks = int64_t(plan_.tasks.size()),
                  operations = 2 * problem_.products() + problem_.outputs() * cpu::kMoving;
    cpu::parallel(parallel_for_, tasks * blocks, operations, [&](int64_t begin, int64_t end) {
      Scratch scratch(*this);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t unit_begin = i % blocks * plan_.unit_block;
        const cpu::Range range = plan_.tasks[i / blocks];
        for (int64_t s = range.begin; s < range.end; ++s) {
          const int64_t units = std::min(plan_.unit_block, problem_.units - unit_begin);
          if (s + 1 < range.end) prefetch(scratch, plan_.segments[s + 1].set, units);
          segment(scratch, plan_.segments[s], unit_begin, units);
        }
      }
      flush(scratch.pending);
      if (stream_) stream_fence();
    });
    if (plan_.partials > 0) combine();
  }

 private:
  // Rows of u whose norm is known: they are scaled and written to y while the next rows are computed.
  // They leave row by row, since one stream of stores is what a processor prefetches best.
  struct Pending {
    A* rows = nullptr;
    int64_t count = 0, row = 0, panel = 0;
    T* y = nullptr;
    A factor[kTileRows];
  };

  struct Scratch {
    explicit Scratch(const Forward& f) : memory(layout(f, nullptr)) { layout(f, memory.data()); }

    int64_t layout(const Forward& f, void* base) {
      const int64_t units = cpu::ceil_div(f.plan_.unit_block, kLanes<A>) * kLanes<A>;
      cpu::Arena arena(base);
      by_feature = arena.take<O>(f.plan_.block_rows * f.panels_ * kPanelOperands<A, O>);
      scores = arena.take<A>(f.plan_.block_rows * units);
      by_position = by_feature;
      coefficients = reinterpret_cast<O*>(scores);
      if constexpr (kPaired) {
        by_position = arena.take<O>(summed<O>(f.plan_.block_rows) * f.panels_ * kPanel<A>);
        coefficients = arena.take<O>(summed<O>(f.plan_.block_rows) * units);
      }
      offset = arena.take<A>(f.plan_.block_rows);
      softmax.max = arena.take<A>(units);
      softmax.sum = arena.take<A>(units);
      softmax.offset_sum = arena.take<A>(units);
      softmax.scale = arena.take<A>(units);
      shift = arena.take<A>(units);
      if constexpr (kPaired) {
        rest = arena.take<A>(units);
        none = arena.take<A>(f.plan_.block_rows);
        for (int64_t r = 0; none != nullptr && r < f.plan_.block_rows; ++r) none[r] = 0;
      }
      u = arena.take<A>(f.problem_.features <= cpu::kShortRow ? f.panels_ * kPanel<A> * kPanel<A> : 0);
      sums = arena.take<A>(std::max<int64_t>(2 * kTileRows, f.plan_.unit_block) * f.panels_ * kPanel<A>);
      return arena.used();
    }

    O *by_feature, *by_position;  // a block of x for sums over features and over positions
    A* scores;                    // [position][unit], then exp(score - max)
    O* coefficients;              // [position][unit]: of the weighted sums
    A *offset, *shift, *u, *sums;
    A *rest = nullptr, *none = nullptr;  // with pairs: what rounding took from the offset; (block_rows) zeros
    RunningSoftmax<A> softmax;
    Pending pending;
    Prefetch prefetch;
    cpu::ThreadScratch memory;
  };

  // x of a set that comes next, to be fetched while the weighted sums of this one are computed.
  void prefetch(Scratch& scratch, int64_t set, int64_t units) const {
    if (problem_.sets.position != nullptr || problem_.x_row_stride != problem_.features) return;
    const int64_t rows = std::min(problem_.sets.length[set], plan_.block_rows);
    scratch.prefetch.start(static_cast<const T*>(problem_.x) + problem_.x_begin(set),
                           rows * problem_.features * int64_t(sizeof(T)),
                           cpu::ceil_div(units, kTileRows) * panels_);
  }

  void segment(Scratch& scratch, const cpu::Segment& segment, int64_t unit_begin, int64_t units) const {
    const int64_t rows = segment.end - segment.begin;
    const int64_t vectors = cpu::ceil_div(units, kLanes<A>);
    scratch.softmax.reset(vectors * kLanes<A>);
    if (segment.partial < 0 && rows <= plan_.block_rows) {
      load_block(scratch, segment.set, segment.begin, rows, unit_begin, units);
      exponentials(scratch, rows, vectors);
      write_stats(scratch.softmax, segment.set, unit_begin, units);
      finish_block(scratch, segment.set, rows, unit_begin, units);
      return;
    }
    flush(scratch.pending);
    std::memset(scratch.sums, 0, units * panels_ * kPanel<A> * sizeof(A));
    balanced(rows, plan_.block_rows, [&](int64_t start, int64_t count) {
      load_block(scratch, segment.set, segment.begin + start, count, unit_begin, units);
      exponentials(scratch, count, vectors);
      accumulate(scratch, count, units);
    });
    if (segment.partial < 0) {
      write_stats(scratch.softmax, segment.set, unit_begin, units);
      for (int64_t n = 0; n < units; ++n)
        write_unit(segment.set, unit_begin + n, scratch.softmax.sum[n], scratch.softmax.offset_sum[n],
                   scratch.sums + n * kPanel<A>, units * kPanel<A>);
      return;
    }
    for (int64_t n = 0; n < units; ++n) {
      A* partial = partial_of(segment.partial, unit_begin + n);
      partial[0] = scratch.softmax.max[n];
      partial[1] = scratch.softmax.sum[n];
      partial[2] = scratch.softmax.offset_sum[n];
      for (int64_t p = 0; p < panels_; ++p)
        std::memcpy(partial + kHeader + p * kPanel<A>, scratch.sums + (p * units + n) * kPanel<A>,
                    kPanel<A> * sizeof(A));
    }
  }

  // Packs rows of x and brings their scores to scratch.scores; saves the scores for the backward pass if
  // asked to.
  void load_block(Scratch& scratch, int64_t set, int64_t begin, int64_t rows, int64_t unit_begin,
                  int64_t units) const {
    const Sets& sets = problem_.sets;
    const int64_t* position = sets.position ? sets.position + sets.begin[set] : nullptr;
    const RowSource<T> source{static_cast<const T*>(problem_.x) + problem_.x_begin(set),
                              problem_.x_row_stride, position};
    if constexpr (kPaired)
      pack_rows(source, begin, rows, problem_.features, weight_ ? scratch.by_feature : nullptr,
                scratch.by_position, scratch.offset);
    else
      pack_rows<T, A>(source, begin, rows, problem_.features, scratch.by_feature, scratch.offset);
    const int64_t vectors = cpu::ceil_div(units, kLanes<A>), stride = vectors * kLanes<A>;
    if (weight_) {
      score_block<A>(scratch.by_feature, scratch.offset, rows, problem_.features, weight_.units(unit_begin),
                     weight_.sums(unit_begin), vectors, scratch.scores, stride, score_run(problem_.features));
    } else if (problem_.scores != nullptr) {
      const ScoreSource<A> given{static_cast<const A*>(problem_.scores) + problem_.scores_begin(set),
                                 problem_.scores_unit_stride, problem_.scores_position_stride};
      gather_scores(given, position, begin, rows, unit_begin, units, scratch.scores, stride);
    } else {
      std::memset(scratch.scores, 0, rows * stride * sizeof(A));  // Eq. 3: equal weights
    }
    if (problem_.position_bias != nullptr)
      add_position_bias(static_cast<const A*>(problem_.position_bias) + unit_begin * problem_.max_length,
                        problem_.max_length, position, begin, rows, units, scratch.scores, stride);
    if (out_.saved_scores != nullptr)
      for (int64_t r = 0; r < rows; ++r)
        std::memcpy(static_cast<A*>(out_.saved_scores) +
                        (sets.first_row[set] + source.index(begin + r)) * problem_.units + unit_begin,
                    scratch.scores + r * stride, units * sizeof(A));
  }

  // Of the scores of a block. As pairs x keeps its offset, so that none is added up here.
  void exponentials(Scratch& scratch, int64_t rows, int64_t vectors) const {
    scratch.softmax.block(scratch.scores, vectors * kLanes<A>, kPaired ? scratch.none : scratch.offset, rows,
                          vectors);
  }

  void write_stats(const RunningSoftmax<A>& softmax, int64_t set, int64_t unit_begin, int64_t units) const {
    if (out_.stats == nullptr) return;
    A* stats = static_cast<A*>(out_.stats) + set * problem_.units + unit_begin;
    std::memcpy(stats, softmax.max, units * sizeof(A));
    std::memcpy(stats + problem_.sets.count * problem_.units, softmax.sum, units * sizeof(A));
  }

  A* norm_of(int64_t set, int64_t unit) const {
    if (out_.stats == nullptr) return nullptr;
    return static_cast<A*>(out_.stats) + (2 * problem_.sets.count + set) * problem_.units + unit;
  }

  A alpha(int64_t unit) const { return problem_.shift ? static_cast<const A*>(problem_.alpha)[unit] : A(1); }
  A beta(int64_t unit) const { return problem_.shift ? static_cast<const A*>(problem_.beta)[unit] : A(0); }

  A output_factor(A norm) const {  // y = factor * u
    return problem_.shift ? A(1) / (root_units_ * std::max(norm, A(problem_.eps))) : A(1);
  }

  T* y_row(int64_t set, int64_t unit) const {
    return static_cast<T*>(out_.y) + (set * problem_.units + unit) * problem_.features;
  }

  // The whole set is in scratch: turn exponentials into coefficients alpha a, then u = (alpha a) d + shift
  // per tile of units.
  void finish_block(Scratch& scratch, int64_t set, int64_t rows, int64_t unit_begin, int64_t units) const {
    const int64_t stride = cpu::ceil_div(units, kLanes<A>) * kLanes<A>;
    A* coefficient = scratch.softmax.scale;
    for (int64_t n = 0; n < stride; ++n) {
      const A sum = scratch.softmax.sum[n];
      const A scale = n < units && sum != 0 ? alpha(unit_begin + n) / sum : A(0);
      coefficient[n] = scale;
      scratch.shift[n] = n < units ? scale * scratch.softmax.offset_sum[n] + beta(unit_begin + n) : A(0);
    }
    if constexpr (kPaired) {
      pair_positions(scratch.scores, stride, rows, stride / kLanes<A>, coefficient, scratch.offset,
                     scratch.coefficients, scratch.rest);
      for (int64_t n = 0; n < units; ++n) scratch.shift[n] += scratch.rest[n];
    } else {
      // Rows of few vectors do not fill a panel and wait long for their norm: units take the lanes instead.
      if (problem_.features <= cpu::kShortRow && stride % kPanel<A> == 0) {
        for (int64_t n = 0; n < stride; n += kPanel<A>)
          unit_panel(scratch, rows, stride, n, set, unit_begin, units);
        return;
      }
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t n = 0; n < stride; n += kLanes<A>)
          store_vector(scratch.scores + r * stride + n,
                       load_vector(scratch.scores + r * stride + n) * load_vector(coefficient + n));
    }
    balanced(units, kTileRows, [&](int64_t n0, int64_t count) {
      with_rows<kTileRows>(count, [&](auto tile_rows) {
        A* u = scratch.pending.rows == scratch.sums ? scratch.sums + kTileRows * panels_ * kPanel<A>
                                                    : scratch.sums;
        unit_tile<tile_rows>(scratch, rows, stride, n0, set, unit_begin + n0, u);
      });
    });
  }

  static constexpr int64_t kSquareRun = 8;  // features whose squares are added up in one chain

  // u = (alpha z + beta) of kPanel units, transposed, and y of those that are below `units`.
  __attribute__((noinline)) void unit_panel(Scratch& scratch, int64_t rows, int64_t stride, int64_t n0,
                                            int64_t set, int64_t unit_begin, int64_t units) const {
    const int64_t features = problem_.features;
    Vec<A> coefficient[kTileVectors], shift[kTileVectors], squares[kTileVectors];
    FASTAC_EACH (v, kTileVectors) {
      coefficient[v] = load_vector(scratch.softmax.scale + n0 + v * kLanes<A>);
      shift[v] = load_vector(scratch.shift + n0 + v * kLanes<A>);
      squares[v] = Vec<A>{};
    }
    for (int64_t p = 0; p < panels_; ++p)
      balanced(std::min(kPanel<A>, features - p * kPanel<A>), kTileRows, [&](int64_t m, int64_t length) {
        scratch.prefetch.step();
        A* u = scratch.u + (p * kPanel<A> + m) * kPanel<A>;
        panel_kernel<A, A, Start::kZero>(length)(u, nullptr, scratch.by_position + p * rows * kPanel<A> + m,
                                                 kPanel<A>, scratch.scores + n0, stride, rows);
      });
    for (int64_t begin = 0; begin < features; begin += kSquareRun) {
      Vec<A> run[kTileVectors] = {};
      for (int64_t m = begin; m < std::min(begin + kSquareRun, features); ++m)
        FASTAC_EACH (v, kTileVectors) {
          A* u = scratch.u + m * kPanel<A> + v * kLanes<A>;
          const Vec<A> value = load_vector(u) * coefficient[v] + shift[v];
          run[v] += value * value;
          store_vector(u, value);
        }
      FASTAC_EACH (v, kTileVectors) squares[v] += run[v];
    }
    FASTAC_EACH (v, kTileVectors) {
      const int64_t n = n0 + v * kLanes<A>, left = std::min(kLanes<A>, units - n);
      Vec<A> factor = broadcast(A(1));
      if (problem_.shift) {
        const Vec<A> norm = square_root<A>(squares[v]), eps = broadcast(A(problem_.eps));
        factor = A(1) / (root_units_ * (norm < eps ? eps : norm));
        if (A* stats = norm_of(set, unit_begin + n)) store_some<A, A>(stats, norm, left, false);
      }
      write_vector(scratch.u + v * kLanes<A>, factor, y_row(set, unit_begin + n), left);
    }
  }

  // y = factor u of one vector of units from u transposed.
  inline __attribute__((always_inline)) void write_vector(const A* u, Vec<A> factor, T* y,
                                                          int64_t units) const {
    const int64_t features = problem_.features;
    for (int64_t m = 0; m < features; m += kLanes<A>) {
      const int64_t left = std::min(kLanes<A>, features - m);
      Vec<A> block[kLanes<A>];
      FASTAC_EACH (i, kLanes<A>) block[i] = load_vector(u + (m + i) * kPanel<A>) * factor;
      transpose_block<A>(block);
      if (units == kLanes<A> && left == kLanes<A> && !stream_) {
        FASTAC_EACH (i, kLanes<A>) Storage<T>::store(y + i * features + m, block[i]);
      } else if (units == kLanes<A>) {
        FASTAC_EACH (i, kLanes<A>) store_some<T, A>(y + i * features + m, block[i], left, stream_);
      } else {
        for (int64_t i = 0; i < units; ++i) store_some<T, A>(y + i * features + m, block[i], left, stream_);
      }
    }
  }

  template <int Rows>
  __attribute__((noinline)) void unit_tile(Scratch& scratch, int64_t rows, int64_t stride, int64_t n0,
                                           int64_t set, int64_t unit, A* u) const {
    Pending& pending = scratch.pending;
    Vec<A> squares[Rows];
    FASTAC_EACH (i, Rows) squares[i] = Vec<A>{};
    const bool shift = problem_.shift;
    for (int64_t p = 0; p < panels_; ++p) {
      scratch.prefetch.step();
      if constexpr (kPaired) write_pending(pending, kTileRows);
      Tile<A, Rows, kTileVectors> tile;
      tile.fill_rows(scratch.shift + n0);
      if ((p + 1) * kPanel<A> > problem_.features) tile.scale_columns(last_panel_);
      const int64_t operands = summed<O>(rows);
      const O* panel = scratch.by_position + p * operands * kPanel<A>;
      if constexpr (kPaired) {
        tile.template add_products<1>(scratch.coefficients + n0, stride, panel, kPanel<A>, operands);
      } else {
        // Half of the finished rows leave in the middle: the stores of a whole tile at once would queue up.
        const int64_t half = operands / 2;
        tile.template add_products<1>(scratch.coefficients + n0, stride, panel, kPanel<A>, half);
        write_pending(pending, kTileRows / 2);
        tile.template add_products<1>(scratch.coefficients + n0 + half * stride, stride,
                                      panel + half * kPanel<A>, kPanel<A>, operands - half);
      }
      if (shift) {
        FASTAC_EACH (i, Rows)
          FASTAC_EACH (v, kTileVectors) squares[i] += tile.acc[i][v] * tile.acc[i][v];
        tile.store(u + p * Rows * kPanel<A>);
        if constexpr (!kPaired) write_pending(pending, kTileRows / 2);
      } else {
        T* y = y_row(set, unit);
        for (int i = 0; i < Rows; ++i)
          store_panel<T, A>(y + i * problem_.features, p, problem_.features, tile.acc[i], stream_);
      }
    }
    if (!shift) return;
    pending.rows = u;
    pending.count = Rows;
    pending.row = pending.panel = 0;
    pending.y = y_row(set, unit);
    A squared_norm[Rows];
    fold_all<A, Rows>(squares, squared_norm);
    for (int i = 0; i < Rows; ++i) {
      const A norm = std::sqrt(squared_norm[i]);
      pending.factor[i] = output_factor(norm);
      if (A* stats = norm_of(set, unit + i)) *stats = norm;
    }
  }

  // Writes the next `count` panels.
  inline __attribute__((always_inline)) void write_pending(Pending& pending, int64_t count) const {
    while (count > 0 && pending.row < pending.count) {
      const int64_t first = pending.panel, run = std::min(count, panels_ - first),
                    step = pending.count * kPanel<A>;
      const A* from = pending.rows + first * step + pending.row * kPanel<A>;
      const Vec<A> factor = broadcast(pending.factor[pending.row]);
      for (int64_t p = first; p < first + run; ++p, from += step) {
        Vec<A> value[kTileVectors];
        FASTAC_EACH (v, kTileVectors) value[v] = load_vector(from + v * kLanes<A>) * factor;
        store_panel<T, A>(pending.y, p, problem_.features, value, stream_);
      }
      count -= run;
      pending.panel += run;
      if (pending.panel == panels_) {
        pending.panel = 0;
        ++pending.row;
        pending.y += problem_.features;
      }
    }
  }

  void flush(Pending& pending) const { write_pending(pending, pending.count * panels_); }

  // sums = sums * scale + exp(s - max) d, over one block of a long set.
  void accumulate(Scratch& scratch, int64_t rows, int64_t units) const {
    const int64_t stride = cpu::ceil_div(units, kLanes<A>) * kLanes<A>, operands = summed<O>(rows);
    if constexpr (kPaired) {
      pair_positions(scratch.scores, stride, rows, stride / kLanes<A>, nullptr, scratch.offset,
                     scratch.coefficients, scratch.rest);
      for (int64_t n = 0; n < units; ++n) scratch.softmax.offset_sum[n] += scratch.rest[n];
    }
    for (int64_t p = 0; p < panels_; ++p)
      balanced(units, kTileRows, [&](int64_t n0, int64_t count) {
        panel_kernel<A, O, Start::kScale>(count)(scratch.sums + (p * units + n0) * kPanel<A>,
                                                 scratch.softmax.scale + n0, scratch.coefficients + n0,
                                                 stride, scratch.by_position + p * operands * kPanel<A>,
                                                 kPanel<A>, operands);
      });
  }

  // y of one unit from its running sums; panel p of the sums is at sums + p * step.
  void write_unit(int64_t set, int64_t unit, A sum, A offset_sum, A* sums, int64_t step) const {
    const A scale = sum != 0 ? alpha(unit) / sum : A(0);
    const A shift = scale * offset_sum + beta(unit);
    Vec<A> squares = {};
    for (int64_t p = 0; p < panels_; ++p) {
      Tile<A, 1, kTileVectors> tile;
      tile.fill(shift);
      if ((p + 1) * kPanel<A> > problem_.features) tile.scale_columns(last_panel_);
      FASTAC_EACH (v, kTileVectors) {
        tile.acc[0][v] += load_vector(sums + p * step + v * kLanes<A>) * scale;
        squares += tile.acc[0][v] * tile.acc[0][v];
        store_vector(sums + p * step + v * kLanes<A>, tile.acc[0][v]);
      }
    }
    const A norm = std::sqrt(horizontal_sum<A>(squares)), factor = output_factor(norm);
    if (A* stats = norm_of(set, unit)) *stats = norm;
    T* y = y_row(set, unit);
    for (int64_t p = 0; p < panels_; ++p) {
      Vec<A> value[kTileVectors];
      FASTAC_EACH (v, kTileVectors) value[v] = load_vector(sums + p * step + v * kLanes<A>) * factor;
      store_panel<T, A>(y, p, problem_.features, value, stream_);
    }
  }

  // Partial results of a segment, per unit: max, sum, offset sum, then sum_l exp(s - max) d.
  static constexpr int64_t kHeader = 8;
  int64_t partial_size() const { return problem_.units * (kHeader + panels_ * kPanel<A>); }
  A* partial_of(int64_t index, int64_t unit) const {
    return static_cast<A*>(workspace_.get()) + index * partial_size() +
           unit * (kHeader + panels_ * kPanel<A>);
  }

  // Segments of one set are joined in their order: total = sum_i exp(max_i - max) sum_i.
  void combine() const {
    for (size_t first = 0; first < plan_.segments.size();) {
      size_t last = first + 1;
      while (last < plan_.segments.size() && plan_.segments[last].set == plan_.segments[first].set) ++last;
      const int64_t set = plan_.segments[first].set,
                    operations = int64_t(last - first) * partial_size() * cpu::kMoving;
      if (plan_.segments[first].partial >= 0)
        cpu::parallel(parallel_for_, problem_.units, operations, [&](int64_t begin, int64_t end) {
          for (int64_t n = begin; n < end; ++n)
            combine_unit(set, n, plan_.segments[first].partial, plan_.segments[last - 1].partial);
        });
      first = last;
    }
  }

  void combine_unit(int64_t set, int64_t unit, int64_t first, int64_t last) const {
    A top = -std::numeric_limits<A>::infinity();
    for (int64_t i = first; i <= last; ++i) {
      const A value = partial_of(i, unit)[0];
      top = value > top || value != value ? value : top;
    }
    A sum = 0, offset_sum = 0;
    A* total = partial_of(first, unit);
    for (int64_t i = first; i <= last; ++i) {
      const A* part = partial_of(i, unit);
      const A scale = part[0] == top ? A(1) : std::exp(part[0] - top);
      sum += scale * part[1];
      offset_sum += scale * part[2];
      for (int64_t m = kHeader; m < kHeader + panels_ * kPanel<A>; m += kLanes<A>) {
        Vec<A> value = load_vector(part + m) * scale;
        store_vector(total + m, i == first ? value : load_vector(total + m) + value);
      }
    }
    if (out_.stats != nullptr) {
      A* stats = static_cast<A*>(out_.stats) + set * problem_.units + unit;
      stats[0] = top;
      stats[problem_.sets.count * problem_.units] = sum;
    }
    write_unit(set, unit, sum, offset_sum, total + kHeader, kPanel<A>);
  }

  const Problem& problem_;
  const ForwardOutputs& out_;
  const ParallelFor parallel_for_;
  const cpu::Plan plan_;
  const int64_t panels_;
  const A root_units_;
  const bool stream_;
  A last_panel_[kPanel<A>];  // 1 for columns of the last panel before M, 0 beyond: the shift must not count
                             // in the norm
  cpu::Buffer workspace_;
  ScoreWeight<T, O> weight_;
};
