// The forward kernel of softmax_weight: see softmax_weight.h. Included inside an anonymous namespace.

template <typename T, typename S>
class SoftmaxWeightForwardKernel : SoftmaxWeightTasks<T, S> {
  using Base = SoftmaxWeightTasks<T, S>;
  using typename Base::A;
  using typename Base::Task;

 public:
  SoftmaxWeightForwardKernel(const SoftmaxWeightProblem& problem, const SoftmaxWeightForward& out)
      : Base(problem),
        out_(out),
        stream_(streams<T>(out.y, problem.features,
                           problem.sets * problem.length * problem.features * int64_t(sizeof(T)))) {}

  void run(ParallelFor parallel_for) {
    const int64_t tasks = plan_.tasks(problem_.sets), operations = problem_.elements() * cpu::kExponential;
    if (!plan_.kept) {
      partials_ = cpu::allocate(tasks * 2 * padded_ * sizeof(A));
      cpu::parallel(parallel_for, tasks, operations, [&](int64_t begin, int64_t end) {
        Scratch scratch(*this);
        for (int64_t i = begin; i < end; ++i) statistics(scratch, this->task(i), partial(i));
      });
    }
    cpu::parallel(parallel_for, tasks, operations, [&](int64_t begin, int64_t end) {
      Scratch scratch(*this);
      for (int64_t i = begin; i < end; ++i) {
        const Task task = this->task(i);
        if (plan_.kept)
          whole(scratch, task);
        else
          second_sweep(scratch, task, i);
        this->template clear_excluded<T>(out_.y, task);
      }
      if (stream_) stream_fence();
    });
  }

 private:
  using Base::padded_;
  using Base::plan_;
  using Base::problem_;

  struct Scratch {
    explicit Scratch(const SoftmaxWeightForwardKernel& kernel) : memory(layout(kernel, nullptr)) {
      layout(kernel, memory.data());
    }
    int64_t layout(const SoftmaxWeightForwardKernel& kernel, void* base) {
      cpu::Arena arena(base);
      for (A** p : {&top, &total, &run, &old, &level}) *p = arena.take<A>(kernel.padded_);
      exponentials = arena.take<A>((kernel.plan_.block_rows + 1) * kernel.padded_);
      return arena.used();
    }
    A *top, *total, *run, *old, *level, *exponentials;
    cpu::ThreadScratch memory;
  };

  A* partial(int64_t i) const { return static_cast<A*>(partials_.get()) + i * 2 * padded_; }

  // Copies rows of scores, -inf beyond their columns, and raises `top` to their greatest.
  void copy_scores(const Task& task, const RowRange& range, A* copy, A* top) const {
    const int64_t last = range.begin + range.count() - 1;
    range.each(task.width, [&](int64_t r, int64_t width) {
      const S* scores = this->template row<S>(problem_.scores, task, r);
      const S* ahead = this->template row<S>(problem_.scores, task, std::min(r + kRowsAhead, last));
      each_vector<A>(width, [&](int64_t c, auto count) {
        __builtin_prefetch(ahead + c, 0, 2);
        const Vec<A> s = lowest_beyond<A>(load_columns(scores + c, count), count), t = load_vector(top + c);
        store_vector(copy + c, s);
        store_vector(top + c, s > t ? s : t);
      });
      for (int64_t c = cpu::ceil_div(width, kLanes<A>) * kLanes<A>; c < padded_; c += kLanes<A>)
        store_vector(copy + c, broadcast(kLowest<A>));
      copy += padded_;
    });
  }

  // Adds the exponentials of copied rows to `total`, and keeps them if Keep.
  template <bool Keep>
  void exponentials(const Task& task, const RowRange& range, A* copy, const A* level, A* total,
                    A* run) const {
    const int64_t rows = range.count();
    for (int64_t begin = 0; begin < rows; begin += kSumRun) {
      this->fill(run, 0);
      for (int64_t r = begin; r < std::min(begin + kSumRun, rows); ++r) {
        A* at = copy + r * padded_;
        const T* x = this->template row<T>(problem_.x, task, range.begin + r);
        for (int64_t c = 0; c < padded_; c += kLanes<A>) {
          if (Keep) __builtin_prefetch(x + c, 0, 2);
          const Vec<A> s = load_vector(at + c), e = exponential(s - load_vector(level + c));
          if (Keep) store_vector(at + c, mark<A>(s, e));
          store_vector(run + c, load_vector(run + c) + e);
        }
      }
      this->add(total, run);
    }
  }

  void write_stats(const Task& task, const A* top, const A* total) const {
    A* stats = static_cast<A*>(out_.stats) + this->stats_at(task);
    const int64_t bytes = this->stats_width(task) * int64_t(sizeof(A));
    std::memcpy(stats, top, bytes);
    std::memcpy(stats + problem_.sets * problem_.features, total, bytes);
  }

  // All three passes over a tile that is kept.
  void whole(Scratch& scratch, const Task& task) const {
    const RowRange range = this->rows(task);
    this->fill(scratch.top, kLowest<A>);
    this->fill(scratch.total, 0);
    copy_scores(task, range, scratch.exponentials, scratch.top);
    this->fold_max(scratch.top);
    this->make_level(scratch.top, scratch.level);
    exponentials<true>(task, range, scratch.exponentials, scratch.level, scratch.total, scratch.run);
    this->fold_sum(scratch.total);
    write_stats(task, scratch.top, scratch.total);
    this->make_factor(scratch.total);
    const A* e = scratch.exponentials;
    range.each(task.width, [&](int64_t r, int64_t width) {
      const T* x = this->template row<T>(problem_.x, task, r);
      T* y = this->template result<T>(out_.y, task, r);
      each_vector<A>(width, [&](int64_t c, auto count) {
        const Vec<A> marked = load_vector(e + c), a = marked * load_vector(scratch.total + c);
        store_columns(y + c, where_taken<A>(marked, load_columns(x + c, count) * a), count, stream_);
      });
      e += padded_;
    });
  }

  // Greatest score and sum of exponentials of a segment, per column: the sum follows the greatest from block
  // to block.
  void statistics(Scratch& scratch, const Task& task, A* out) const {
    A *top = out, *total = out + padded_;
    this->fill(top, kLowest<A>);
    this->fill(total, 0);
    this->each_block(this->rows(task), [&](const RowRange& block) {
      std::memcpy(scratch.old, top, padded_ * sizeof(A));
      copy_scores(task, block, scratch.exponentials, top);
      this->make_level(top, scratch.level);
      rescale(total, scratch.old, scratch.level);
      exponentials<false>(task, block, scratch.exponentials, scratch.level, total, scratch.run);
    });
  }

  // A sum of exponentials relative to `old` becomes relative to `level`.
  void rescale(A* total, const A* old, const A* level) const {
    for (int64_t c = 0; c < padded_; c += kLanes<A>)
      store_vector(total + c,
                   load_vector(total + c) * exponential(load_vector(old + c) - load_vector(level + c)));
  }

  void second_sweep(Scratch& scratch, const Task& task, int64_t index) const {
    A *top = scratch.top, *total = scratch.total, *share = scratch.run, *level = scratch.level;
    this->fill(top, kLowest<A>);
    this->fill(total, 0);
    const int64_t first = index - task.segment * plan_.tiles;
    for (int64_t s = 0; s < plan_.segments; ++s) {
      const A* segment = partial(first + s * plan_.tiles);
      for (int64_t c = 0; c < padded_; ++c) top[c] = segment[c] > top[c] ? segment[c] : top[c];
    }
    this->fold_max(top);
    this->make_level(top, level);
    for (int64_t s = 0; s < plan_.segments; ++s) {
      const A* segment = partial(first + s * plan_.tiles);
      std::memcpy(share, segment + padded_, padded_ * sizeof(A));
      rescale(share, segment, level);
      this->add(total, share);
    }
    this->fold_sum(total);
    if (task.segment == 0) write_stats(task, top, total);
    this->make_factor(total);
    this->rows(task).each(task.width, [&](int64_t r, int64_t width) {
      const S* scores = this->template row<S>(problem_.scores, task, r);
      const T* x = this->template row<T>(problem_.x, task, r);
      T* y = this->template result<T>(out_.y, task, r);
      each_vector<A>(width, [&](int64_t c, auto count) {
        const Vec<A> score = load_columns(scores + c, count);
        const Vec<A> e = mark<A>(score, exponential(score - load_vector(level + c)));
        const Vec<A> a = e * load_vector(total + c);
        store_columns(y + c, where_taken<A>(e, load_columns(x + c, count) * a), count, stream_);
      });
    });
  }

  const SoftmaxWeightForward& out_;
  const bool stream_;
  cpu::Buffer partials_;  // (tasks, 2, padded): of every segment, greatest score and sum of exponentials
};
