// From user memory to panels: rows of x are gathered, converted to the accumulator type, freed of a large
// common offset and padded with zeros, so that the tiles never meet a stride, a mask, a half type or a tail.
// Included inside an anonymous namespace.

template <typename T>
struct RowSource {
  const T* base;            // of the set
  int64_t stride;           // elements between positions
  const int64_t* position;  // valid positions, or null
  const T* row(int64_t i) const { return base + (position ? position[i] : i) * stride; }
  int64_t index(int64_t i) const { return position ? position[i] : i; }
};

template <typename A>
inline int64_t panel_count(int64_t features) {
  return (features + kPanel<A> - 1) / kPanel<A>;
}

// Sum and sum of squares of a row, in four chains each.
template <typename A>
struct RowSums {
  Vec<A> sum[4] = {}, squares[4] = {};

  template <int Chain>
  inline __attribute__((always_inline)) void add(Vec<A> x) {
    sum[Chain] += x;
    squares[Chain] += x * x;
  }

  // The offset taken off a row: its mean where that dominates the row, else 0, so that ordinary rows stay
  // exact.
  A offset(int64_t features) const {
    Vec<A> both[2] = {(sum[0] + sum[1]) + (sum[2] + sum[3]),
                      (squares[0] + squares[1]) + (squares[2] + squares[3])};
    A total[2];
    fold_all<A, 2>(both, total);
    const A mean = total[0] / A(features);
    return total[0] * mean > A(0.5) * total[1] && std::isfinite(mean) ? mean : A(0);
  }
};

// Takes `mean` off one row of the panels, leaving the columns beyond M at zero.
template <typename A>
inline void subtract(A* row, int64_t step, int64_t features, A mean) {
  for (int64_t m = 0; m < features; m += kPanel<A>, row += step)
    FASTAC_EACH (v, kTileVectors) {
      A* at = row + v * kLanes<A>;
      const int64_t left = features - m - v * kLanes<A>;
      if (left >= kLanes<A>)
        store_vector(at, load_vector(at) - mean);
      else if (left > 0)
        store_partial(at, load_vector(at) - mean, left);
    }
}

constexpr int64_t kRowsAhead = 3;

// panels[p][r][:] = x[begin + r] - offset[r] for r < count. Meanwhile a row ahead is fetched: the processor's
// own prefetching stops at every page.
template <typename T, typename A>
inline void pack_rows(const RowSource<T>& source, int64_t begin, int64_t count, int64_t features, A* panels,
                      A* offset) {
  const int64_t full = features / kPanel<A>, step = count * kPanel<A>, last = begin + count - 1;
  for (int64_t r = 0; r < count; ++r) {
    const T* row = source.row(begin + r);
    const T* ahead = source.row(std::min(begin + r + kRowsAhead, last));
    A* out = panels + r * kPanel<A>;
    RowSums<A> sums;
    auto copy = [&](int64_t p, auto chain) {
      const T* from = row + p * kPanel<A>;
      FASTAC_EACH (v, kTileVectors) {
        const Vec<A> x = Storage<T>::load(from + v * kLanes<A>);
        __builtin_prefetch(ahead + p * kPanel<A> + v * kLanes<A>, 0, 2);
        sums.sum[(chain + v) % 4] += x;
        sums.squares[(chain + v) % 4] += x * x;
        store_vector(out + p * step + v * kLanes<A>, x);
      }
    };
    int64_t p = 0;
    for (; p + 2 <= full; p += 2) {
      copy(p, std::integral_constant<int, 0>{});
      copy(p + 1, std::integral_constant<int, kTileVectors>{});
    }
    if (p < full) copy(p, std::integral_constant<int, 0>{});
    const int64_t tail = features - full * kPanel<A>;
    if (tail > 0)
      for (int v = 0; v < kTileVectors; ++v) {
        const int64_t left = std::min(kLanes<A>, tail - v * kLanes<A>);
        const Vec<A> value = left > 0 ? load_partial(row + full * kPanel<A> + v * kLanes<A>, left) : Vec<A>{};
        sums.template add<0>(value);
        store_vector(out + full * step + v * kLanes<A>, value);
      }
    const A mean = offset[r] = sums.offset(features);
    if (mean != 0) subtract(out, step, features, mean);
  }
}

// The offset of one row, without packing it.
template <typename T, typename A>
inline A row_offset(const T* row, int64_t features) {
  RowSums<A> sums;
  for (int64_t m = 0; m < features; m += kLanes<A>) {
    const int64_t left = std::min(kLanes<A>, features - m);
    sums.template add<0>(left == kLanes<A> ? Storage<T>::load(row + m) : load_partial(row + m, left));
  }
  return sums.offset(features);
}

// Without the offset: weight and other parameters.
template <typename T, typename A>
inline void pack_matrix(const T* rows, int64_t count, int64_t features, int64_t panel, A* out) {
  const int64_t start = panel * kPanel<A>;
  for (int64_t r = 0; r < count; ++r, out += kPanel<A>)
    for (int v = 0; v < kTileVectors; ++v) {
      const int64_t m = start + v * kLanes<A>, left = std::min(kLanes<A>, features - m);
      const T* p = rows + r * features + m;
      store_vector(out + v * kLanes<A>, left == kLanes<A> ? Storage<T>::load(p)
                                        : left > 0        ? load_partial(p, left)
                                                          : Vec<A>{});
    }
}

// weight, one vector of units after the other and transposed: out[m][lane] = weight[first + lane][m], zero
// outside; sums[lane] = sum_m weight[first + lane][m].
template <typename T, typename A>
inline void pack_transposed(const T* weight, int64_t units, int64_t features, int64_t first, A* out,
                            A* sums) {
  const int64_t padded = panel_count<A>(features) * kPanel<A>, valid = std::min(kLanes<A>, units - first);
  Vec<A> total = {};
  for (int64_t m0 = 0; m0 < padded; m0 += kLanes<A>) {
    Vec<A> block[kLanes<A>];
    const int64_t left = std::min(kLanes<A>, features - m0);
    for (int64_t i = 0; i < kLanes<A>; ++i) {
      const T* p = weight + (first + i) * features + m0;
      block[i] = i >= valid || left <= 0 ? Vec<A>{}
                 : left == kLanes<A>     ? Storage<T>::load(p)
                                         : load_partial(p, left);
    }
    transpose_block<A>(block);
    for (int64_t m = 0; m < kLanes<A>; ++m) {
      total += block[m];
      store_vector(out + (m0 + m) * kLanes<A>, block[m]);
    }
  }
  store_vector(sums, total);
}

// Brings memory that is about to be read into the second-level cache, a few lines at every step of another
// computation.
class Prefetch {
 public:
  void start(const void* p, int64_t bytes, int64_t steps) {
    at_ = static_cast<const char*>(p);
    end_ = at_ + bytes;
    stride_ = (bytes / kLine / std::max<int64_t>(steps, 1) + 1) * kLine;
  }
  inline __attribute__((always_inline)) void step() {
    const char* stop = std::min(at_ + stride_, end_);
    for (; at_ < stop; at_ += kLine) __builtin_prefetch(at_, 0, 2);
  }

 private:
  static constexpr int64_t kLine = 64;
  const char* at_ = nullptr;
  const char* end_ = nullptr;
  int64_t stride_ = 0;
};

constexpr int64_t kStreamBytes = 32 << 20;  // results at least this large are stored past the caches

// Whether a panel of a row of T is a number of whole vectors of memory.
template <typename T>
constexpr bool kWholePanels =
    kPanel<typename Accumulator<T>::type> * int64_t(sizeof(T)) % FASTAC_VECTOR_BYTES == 0;

// Whether rows of `features` elements in `bytes` bytes of results are to be streamed.
template <typename T>
inline bool streams(const void* p, int64_t features, int64_t bytes) {
  return kCanStream && kWholePanels<T> && bytes >= kStreamBytes &&
         features * int64_t(sizeof(T)) % FASTAC_VECTOR_BYTES == 0 &&
         reinterpret_cast<uintptr_t>(p) % FASTAC_VECTOR_BYTES == 0;
}

// One panel of a row of y or dx from registers to user memory.
template <typename T, typename A>
inline __attribute__((always_inline)) void store_panel(T* row, int64_t panel, int64_t features,
                                                       const Vec<A>* value, bool stream) {
  const int64_t start = panel * kPanel<A>;
  if (start + kPanel<A> <= features) {
    if constexpr (std::is_same_v<T, A>) {
      if (stream) {
        FASTAC_EACH (v, kTileVectors) stream_vector(row + start + v * kLanes<A>, value[v]);
        return;
      }
    } else if constexpr (kTileVectors == 2) {
      const VecU16 both = join(narrow(value[0], T{}), narrow(value[1], T{}));
      if (stream)
        stream_bytes(row + start, &both, std::integral_constant<int, FASTAC_VECTOR_BYTES>{});
      else
        __builtin_memcpy(row + start, &both, sizeof both);
      return;
    }
    FASTAC_EACH (v, kTileVectors) Storage<T>::store(row + start + v * kLanes<A>, value[v]);
    return;
  }
  for (int v = 0; v < kTileVectors; ++v) {
    const int64_t m = start + v * kLanes<A>, left = std::min(kLanes<A>, features - m);
    if (left == kLanes<A>)
      Storage<T>::store(row + m, value[v]);
    else if (left > 0)
      store_partial(row + m, value[v], left);
  }
}

// Up to a vector of a row, or of a block of rows, of y or dweight. Streamed where a vector is a whole line.
template <typename T, typename A>
inline __attribute__((always_inline)) void store_some(T* p, Vec<A> value, int64_t count, bool stream) {
  if constexpr (std::is_same_v<T, A> && FASTAC_VECTOR_BYTES == 64) {
    if (stream && count == kLanes<A>) return stream_vector(p, value);
  }
  if (count == kLanes<A>)
    Storage<T>::store(p, value);
  else
    store_partial(p, value, count);
}
