// The backward kernel of softmax_weight: see softmax_weight.h. Included inside an anonymous namespace.

template <typename T, typename S>
class SoftmaxWeightBackwardKernel : SoftmaxWeightTasks<T, S> {
  using Base = SoftmaxWeightTasks<T, S>;
  using typename Base::A;
  using typename Base::Task;

 public:
  SoftmaxWeightBackwardKernel(const SoftmaxWeightProblem& problem, const SoftmaxWeightBackward& args)
      : Base(problem),
        args_(args),
        stream_dx_(args.dx != nullptr && streams<T>(args.dx, problem.features, bytes(sizeof(T)))),
        stream_dscores_(args.dscores != nullptr &&
                        streams<S>(args.dscores, problem.features, bytes(sizeof(S)))) {}

  void run(ParallelFor parallel_for) {
    const int64_t tasks = plan_.tasks(problem_.sets), operations = problem_.elements() * cpu::kExponential;
    const bool two_sweeps = !plan_.kept && args_.dscores != nullptr;
    if (two_sweeps) {
      partials_ = cpu::allocate(tasks * padded_ * sizeof(A));
      cpu::parallel(parallel_for, tasks, operations, [&](int64_t begin, int64_t end) {
        Scratch scratch(*this);
        for (int64_t i = begin; i < end; ++i) {
          const Task task = this->task(i);
          load_stats(scratch, task);
          first_sweep<false>(scratch, task, partial(i));
        }
        finish();
      });
    }
    cpu::parallel(parallel_for, tasks, operations, [&](int64_t begin, int64_t end) {
      Scratch scratch(*this);
      for (int64_t i = begin; i < end; ++i) {
        const Task task = this->task(i);
        load_stats(scratch, task);
        if (args_.dscores == nullptr) {
          dx_alone(scratch, task);
        } else if (two_sweeps) {
          sum_segments(scratch, task, i);
          second_sweep(scratch, task);
        } else {
          first_sweep<true>(scratch, task, scratch.sum);
          this->fold_sum(scratch.sum);
          dscores_of_kept(scratch, task);
        }
        if (args_.dx != nullptr) this->template clear_excluded<T>(args_.dx, task);
        if (args_.dscores != nullptr) this->template clear_excluded<S>(args_.dscores, task);
      }
      finish();
    });
  }

 private:
  using Base::padded_;
  using Base::plan_;
  using Base::problem_;

  struct Scratch {
    explicit Scratch(const SoftmaxWeightBackwardKernel& kernel) : memory(layout(kernel, nullptr)) {
      layout(kernel, memory.data());
    }
    int64_t layout(const SoftmaxWeightBackwardKernel& kernel, void* base) {
      cpu::Arena arena(base);
      for (A** p : {&top, &total, &sum, &run}) *p = arena.take<A>(kernel.padded_);
      const bool keeps = kernel.plan_.kept && kernel.args_.dscores != nullptr;
      const int64_t kept = keeps ? (kernel.plan_.rows + 1) * kernel.padded_ : 0;
      weights = arena.take<A>(kept);
      products = arena.take<A>(kept);
      return arena.used();
    }
    A *top, *total, *sum, *run, *weights, *products;
    cpu::ThreadScratch memory;
  };

  int64_t bytes(int64_t size) const { return problem_.sets * problem_.length * problem_.features * size; }
  A* partial(int64_t i) const { return static_cast<A*>(partials_.get()) + i * padded_; }
  void finish() const {
    if (stream_dx_ || stream_dscores_) stream_fence();
  }

  void load_stats(Scratch& scratch, const Task& task) const {
    const A* stats = static_cast<const A*>(args_.stats) + this->stats_at(task);
    const int64_t size = this->stats_width(task) * int64_t(sizeof(A));
    this->fill(scratch.top, kLowest<A>);
    this->fill(scratch.total, 0);
    std::memcpy(scratch.top, stats, size);
    std::memcpy(scratch.total, stats + problem_.sets * problem_.features, size);
    this->unfold(scratch.top);
    this->unfold(scratch.total);
    this->make_level(scratch.top, scratch.top);
    this->make_factor(scratch.total);
  }

  template <typename Count>
  inline __attribute__((always_inline)) Vec<A> weight(const Scratch& scratch, const S* scores, int64_t c,
                                                      Count count) const {
    const Vec<A> score = load_columns(scores + c, count);
    const Vec<A> e = exponential(score - load_vector(scratch.top + c));
    return mark<A>(score, e * load_vector(scratch.total + c));
  }

  void dx_alone(Scratch& scratch, const Task& task) const {
    if (args_.dx == nullptr) return;
    this->rows(task).each(task.width, [&](int64_t r, int64_t width) {
      const S* scores = this->template row<S>(problem_.scores, task, r);
      const T* dy = this->template row<T>(args_.dy, task, r);
      T* dx = this->template result<T>(args_.dx, task, r);
      each_vector<A>(width, [&](int64_t c, auto count) {
        const Vec<A> a = weight(scratch, scores, c, count);
        store_columns(dx + c, where_taken<A>(a, a * load_columns(dy + c, count)), count, stream_dx_);
      });
    });
  }

  // dx where asked for, and sum_l a dy x of every column; a and dy x of every row are kept if Keep.
  template <bool Keep>
  void first_sweep(Scratch& scratch, const Task& task, A* sum) const {
    this->fill(sum, 0);
    this->fill(scratch.run, 0);
    A *weights = scratch.weights, *products = scratch.products;
    int64_t summed = 0;
    const RowRange range = this->rows(task);
    const int64_t last = range.begin + range.count() - 1;
    range.each(task.width, [&](int64_t r, int64_t width) {
      const S* scores = this->template row<S>(problem_.scores, task, r);
      const T* x = this->template row<T>(problem_.x, task, r);
      const T* dy = this->template row<T>(args_.dy, task, r);
      T* dx = args_.dx == nullptr ? nullptr : this->template result<T>(args_.dx, task, r);
      const int64_t next = std::min(r + kRowsAhead, last);
      const S* next_scores = this->template row<S>(problem_.scores, task, next);
      const T* next_x = this->template row<T>(problem_.x, task, next);
      const T* next_dy = this->template row<T>(args_.dy, task, next);
      each_vector<A>(width, [&](int64_t c, auto count) {
        __builtin_prefetch(next_scores + c, 0, 2);
        __builtin_prefetch(next_x + c, 0, 2);
        __builtin_prefetch(next_dy + c, 0, 2);
        const Vec<A> a = weight(scratch, scores, c, count), g = load_columns(dy + c, count),
                     p = where_taken<A>(a, g * load_columns(x + c, count));
        if (dx != nullptr) store_columns(dx + c, where_taken<A>(a, a * g), count, stream_dx_);
        store_vector(scratch.run + c, load_vector(scratch.run + c) + a * p);
        if (Keep) {
          store_vector(weights + c, a);
          store_vector(products + c, p);
        }
      });
      if (Keep) {
        weights += padded_;
        products += padded_;
      }
      if (++summed % kSumRun == 0) {
        this->add(sum, scratch.run);
        this->fill(scratch.run, 0);
      }
    });
    this->add(sum, scratch.run);
  }

  void dscores_of_kept(Scratch& scratch, const Task& task) const {
    const A *weights = scratch.weights, *products = scratch.products;
    this->rows(task).each(task.width, [&](int64_t r, int64_t width) {
      S* dscores = this->template result<S>(args_.dscores, task, r);
      each_vector<A>(width, [&](int64_t c, auto count) {
        const Vec<A> a = load_vector(weights + c),
                     away = load_vector(products + c) - load_vector(scratch.sum + c);
        store_columns(dscores + c, where_taken<A>(a, a * away), count, stream_dscores_);
      });
      weights += padded_;
      products += padded_;
    });
  }

  void sum_segments(Scratch& scratch, const Task& task, int64_t index) const {
    this->fill(scratch.sum, 0);
    const int64_t first = index - task.segment * plan_.tiles;
    for (int64_t s = 0; s < plan_.segments; ++s) this->add(scratch.sum, partial(first + s * plan_.tiles));
    this->fold_sum(scratch.sum);
  }

  void second_sweep(Scratch& scratch, const Task& task) const {
    this->rows(task).each(task.width, [&](int64_t r, int64_t width) {
      const S* scores = this->template row<S>(problem_.scores, task, r);
      const T* x = this->template row<T>(problem_.x, task, r);
      const T* dy = this->template row<T>(args_.dy, task, r);
      S* dscores = this->template result<S>(args_.dscores, task, r);
      each_vector<A>(width, [&](int64_t c, auto count) {
        const Vec<A> a = weight(scratch, scores, c, count);
        const Vec<A> p = load_columns(dy + c, count) * load_columns(x + c, count);
        store_columns(dscores + c, where_taken<A>(a, a * (p - load_vector(scratch.sum + c))), count,
                      stream_dscores_);
      });
    });
  }

  const SoftmaxWeightBackward& args_;
  const bool stream_dx_, stream_dscores_;
  cpu::Buffer partials_;  // (tasks, padded): of every segment, sum_l a dy x
};
