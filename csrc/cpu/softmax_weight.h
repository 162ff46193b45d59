// softmax_weight: y = x softmax(scores) over the positions of a set, one softmax per feature (You & Korhonen,
// ICIP 2020, the attention block), and its backward.
//
// A task is a tile of columns of one set. A column is a feature or, where M is small, a feature of every
// fold-th position: several positions then stand side by side in a row, and what their columns found is put
// together afterwards ("folded"). A tile that fits the second-level cache is kept: every operand is read from
// memory once, a few rows ahead of its use or while exponentials are computed. Of longer sets a first sweep
// finds the statistics, in segments, and a second one reads the operands again. Included inside an anonymous
// namespace.

constexpr int64_t kSumRun =
    128;  // rows summed before they are added to the sum of all: rounding grows with them

// Calls f(column, count) for every vector of `width` columns; count is a constant but for the last.
template <typename A, typename F>
inline __attribute__((always_inline)) void each_vector(int64_t width, F&& f) {
  int64_t c = 0;
  for (; c + kLanes<A> <= width; c += kLanes<A>) f(c, std::integral_constant<int64_t, kLanes<A>>{});
  if (c < width) f(c, width - c);
}

template <typename Count>
constexpr bool kIsPartial = std::is_same_v<Count, int64_t>;

template <typename T, typename Count>
inline __attribute__((always_inline)) auto load_columns(const T* p, Count count) {
  if constexpr (kIsPartial<Count>)
    return load_partial(p, count);
  else
    return Storage<T>::load(p);
}

template <typename T, typename A = typename Accumulator<T>::type, typename Count>
inline __attribute__((always_inline)) void store_columns(T* p, Vec<A> v, Count count, bool stream) {
  if constexpr (kIsPartial<Count>)
    store_partial(p, v, count);
  else
    store_some<T, A>(p, v, kLanes<A>, stream);
}

template <typename A>
constexpr A kLowest = -std::numeric_limits<A>::infinity();

// The vector with -inf in the lanes from `count` on.
template <typename A, typename Count>
inline __attribute__((always_inline)) Vec<A> lowest_beyond(Vec<A> v, Count count) {
  if constexpr (kIsPartial<Count>) {
    A padded[2 * kLanes<A>];
    store_vector(padded, v);
    store_vector(padded + count, broadcast(kLowest<A>));
    return load_vector(padded);
  } else {
    return v;
  }
}

// What is subtracted from the scores of a column: their greatest, or 0 where none is above -inf, since every
// exponential has to be exp(-inf) = 0 then and not exp(-inf + inf).
template <typename A>
inline Vec<A> subtrahend(Vec<A> top) {
  return top == broadcast(kLowest<A>) ? Vec<A>{} : top;
}

// One over a sum of exponentials; 0 for none, so that weights are 0 there.
template <typename A>
inline Vec<A> reciprocal(Vec<A> sum) {
  return sum == Vec<A>{} ? Vec<A>{} : broadcast(A(1)) / sum;
}

// A score of -inf takes no part, whatever x and dy hold there. Its weight is marked as -0, which no other
// weight is: one that underflows is +0.
template <typename A>
inline Vec<A> mark(Vec<A> score, Vec<A> weight) {
  return score == broadcast(kLowest<A>) ? -Vec<A>{} : weight;
}
template <typename A>
inline Vec<A> where_taken(Vec<A> marked, Vec<A> value) {
  using Bits = std::conditional_t<std::is_same_v<A, double>, VecI64, VecI32>;
  return (Bits)marked == (Bits)(-Vec<A>{}) ? Vec<A>{} : value;
}

// The rows of one set that a task works on.
struct RowRange {
  int64_t begin, full, rest;  // rows begin ... begin + full - 1, then, if rest > 0, one with `rest` columns

  template <typename F>
  void each(int64_t width, F&& f) const {  // f(row, columns of it)
    for (int64_t r = begin; r < begin + full; ++r) f(r, width);
    if (rest > 0) f(begin + full, rest);
  }
  int64_t count() const { return full + (rest > 0); }
};

// What forward and backward share: where a task's rows and columns are.
template <typename T, typename S>
class SoftmaxWeightTasks {
 protected:
  using A = typename Accumulator<T>::type;

  explicit SoftmaxWeightTasks(const SoftmaxWeightProblem& problem)
      : problem_(problem),
        plan_(cpu::plan_softmax_weight(problem.sets, problem.length, problem.features, sizeof(A))),
        padded_(cpu::ceil_div(plan_.tile, kLanes<A>) * kLanes<A>) {}

  struct Task {
    int64_t set, segment, column, width;
  };

  Task task(int64_t i) const {
    const int64_t tile = i % plan_.tiles, rest = i / plan_.tiles, column = tile * plan_.tile;
    return {rest / plan_.segments, rest % plan_.segments, column,
            std::min(plan_.tile, plan_.columns - column)};
  }

  int64_t length(int64_t set) const {
    return problem_.lengths == nullptr ? problem_.length : problem_.lengths[set];
  }

  RowRange rows(const Task& task) const {
    const int64_t positions = length(task.set), full = positions / plan_.fold;
    const int64_t begin = task.segment * plan_.segment_rows, end = begin + plan_.segment_rows;
    const bool last = full >= begin && full < end;
    return {begin, std::clamp<int64_t>(full - begin, 0, plan_.segment_rows),
            last ? positions % plan_.fold * problem_.features : 0};
  }

  // Calls f with the rows of a range, at most block_rows at a time.
  template <typename F>
  void each_block(const RowRange& range, F&& f) const {
    for (int64_t done = 0; done < range.full; done += plan_.block_rows)
      f(RowRange{range.begin + done, std::min(plan_.block_rows, range.full - done), 0});
    if (range.rest > 0) f(RowRange{range.begin + range.full, 0, range.rest});
  }

  template <typename E>
  const E* row(const SetRows& operand, const Task& task, int64_t r) const {
    return static_cast<const E*>(operand.base) + task.set * operand.set_stride +
           r * plan_.fold * operand.row_stride + task.column;
  }
  template <typename E>
  E* result(void* base, const Task& task, int64_t r) const {
    return static_cast<E*>(base) + (task.set * problem_.length + r * plan_.fold) * problem_.features +
           task.column;
  }

  // Zeroes a result in the task's share of the positions that take no part.
  template <typename E>
  void clear_excluded(void* base, const Task& task) const {
    const int64_t positions = length(task.set);
    const int64_t begin = std::max(positions, task.segment * plan_.segment_rows * plan_.fold);
    const int64_t end = std::min(problem_.length, (task.segment + 1) * plan_.segment_rows * plan_.fold);
    if (begin >= end) return;
    E* p = static_cast<E*>(base) + (task.set * problem_.length + begin) * problem_.features + task.column;
    if (plan_.tiles == 1) {
      std::memset(p, 0, (end - begin) * problem_.features * sizeof(E));
      return;
    }
    for (int64_t l = begin; l < end; ++l, p += problem_.features) std::memset(p, 0, task.width * sizeof(E));
  }

  // Where a task's columns begin in a row of the (2, B, M) statistics, and how many numbers it has there.
  int64_t stats_at(const Task& task) const { return task.set * problem_.features + task.column; }
  int64_t stats_width(const Task& task) const { return plan_.fold > 1 ? problem_.features : task.width; }

  // values[j * M + m] for all j becomes the sum, or the greatest, of them.
  template <typename F>
  void fold(A* values, F&& combine) const {
    const int64_t m = problem_.features;
    for (int64_t j = 1; j < plan_.fold; ++j)
      for (int64_t i = 0; i < m; ++i) values[i] = combine(values[i], values[j * m + i]);
    unfold(values);
  }
  void unfold(A* values) const {
    for (int64_t j = 1; j < plan_.fold; ++j)
      std::memcpy(values + j * problem_.features, values, problem_.features * sizeof(A));
  }
  void fold_sum(A* values) const {
    fold(values, [](A a, A b) { return a + b; });
  }
  void fold_max(A* values) const {
    fold(values, [](A a, A b) { return b > a ? b : a; });
  }

  void fill(A* values, A value) const {
    for (int64_t c = 0; c < padded_; ++c) values[c] = value;
  }
  void add(A* to, const A* values) const {
    for (int64_t c = 0; c < padded_; c += kLanes<A>)
      store_vector(to + c, load_vector(to + c) + load_vector(values + c));
  }

  // From the greatest score of every column and its sum of exponentials to what the weights are computed
  // with: a = exp(s - level) factor.
  void make_level(const A* top, A* level) const {
    for (int64_t c = 0; c < padded_; c += kLanes<A>)
      store_vector(level + c, subtrahend<A>(load_vector(top + c)));
  }
  void make_factor(A* total) const {
    for (int64_t c = 0; c < padded_; c += kLanes<A>)
      store_vector(total + c, reciprocal<A>(load_vector(total + c)));
  }

  const SoftmaxWeightProblem& problem_;
  const cpu::SoftmaxWeightPlan plan_;
  const int64_t padded_;  // columns of a tile in whole vectors
};
