// Register tiles: the only loops that matter. A tile is `Rows` x kTileVectors accumulators that stay in
// registers while the sum runs; rows are scalars broadcast from memory, columns are vectors. Included inside
// an anonymous namespace.
//
// Panels: a matrix of `rows` x M is kept as [M / kPanel][rows][kPanel], zero beyond M, so that whatever a
// tile touches is contiguous and aligned whatever M is.
//
// An operand O of a product is a number of the accumulator type, or a Pair of bfloat16 whose products are
// summed in one instruction; kSummands says how many. What is summed over lies in pairs: in a product that
// sums over features a row of a panel has kPanel / kSummands operands, in one that sums over rows a panel has
// rows / kSummands of them.

constexpr int kTileRows = FASTAC_TILE_ROWS;
constexpr int kTileVectors = FASTAC_TILE_VECTORS;
template <typename A>
constexpr int64_t kPanel = kTileVectors * kLanes<A>;

using Pair = int32_t;  // two bfloat16, the first one in the lower half
template <typename O>
constexpr int64_t kSummands = std::is_same_v<O, Pair> ? 2 : 1;

// sum + a b, with pairs the two products of each.
template <typename A, typename O>
inline __attribute__((always_inline)) Vec<A> multiply_add(Vec<A> sum, Vec<O> a, Vec<O> b) {
#if defined(FASTAC_BFLOAT16_DOT)
  if constexpr (kSummands<O> == 2)
    return (Vec<A>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  else
#endif
    return sum + a * b;
}

// A loop over a small constant range that must be unrolled for its arrays to live in registers.
#define FASTAC_EACH(i, count) _Pragma("GCC unroll 32") for (int i = 0; i < (count); ++i)

template <typename A, int Rows, int Vectors>
struct Tile {
  Vec<A> acc[Rows][Vectors];

  inline __attribute__((always_inline)) void fill(A value) {
    FASTAC_EACH (r, Rows)
      FASTAC_EACH (v, Vectors) acc[r][v] = broadcast<A>(value);
  }

  inline __attribute__((always_inline)) void fill_rows(const A* value) {
    FASTAC_EACH (r, Rows)
      FASTAC_EACH (v, Vectors) acc[r][v] = broadcast<A>(value[r]);
  }
  inline __attribute__((always_inline)) void scale_columns(const A* factor) {
    FASTAC_EACH (v, Vectors) {
      const Vec<A> f = load_vector(factor + v * kLanes<A>);
      FASTAC_EACH (r, Rows) acc[r][v] *= f;
    }
  }

  // Rows of one panel, kPanel apart.
  inline __attribute__((always_inline)) void store(A* to) const {
    FASTAC_EACH (r, Rows)
      FASTAC_EACH (v, Vectors) store_vector(to + r * kPanel<A> + v * kLanes<A>, acc[r][v]);
  }
  inline __attribute__((always_inline)) void add(const A* from) {
    FASTAC_EACH (r, Rows)
      FASTAC_EACH (v, Vectors) acc[r][v] += load_vector(from + r * kPanel<A> + v * kLanes<A>);
  }
  inline __attribute__((always_inline)) void add(const A* from, const A* factor) {
    FASTAC_EACH (r, Rows)
      FASTAC_EACH (v, Vectors) acc[r][v] += load_vector(from + r * kPanel<A> + v * kLanes<A>) * factor[r];
  }

  // acc[r, v] += sum_k row[k * row_step + r * RowStride] * column[k * column_step + v * vector_stride]
  template <int64_t RowStride, typename O>
  inline __attribute__((always_inline)) void add_products(const O* row, int64_t row_step, const O* column,
                                                          int64_t column_step, int64_t count,
                                                          int64_t vector_stride = kLanes<A>) {
    for (int64_t k = 0; k < count; ++k) {
      Vec<O> b[Vectors];
      FASTAC_EACH (v, Vectors) b[v] = load_vector(column + v * vector_stride);
      FASTAC_EACH (r, Rows) {
        Vec<O> a = broadcast<O>(row[r * RowStride]);
        FASTAC_EACH (v, Vectors) acc[r][v] = multiply_add<A, O>(acc[r][v], a, b[v]);
      }
      row += row_step;
      column += column_step;
    }
  }
};

// f(std::integral_constant<int, rows>) for a row count known only at run time.
template <int Limit, typename F>
inline void with_rows(int64_t rows, F&& f) {
  if constexpr (Limit > 1) {
    if (rows < Limit) return with_rows<Limit - 1>(rows, f);
  }
  f(std::integral_constant<int, Limit>{});
}

// Splits [0, total) into ceil(total / limit) runs that differ by at most one and calls f(start, length).
template <typename F>
inline void balanced(int64_t total, int64_t limit, F&& f) {
  const int64_t parts = (total + limit - 1) / limit;
  for (int64_t i = 0, start = 0; i < parts; ++i) {
    const int64_t length = (total - start + parts - i - 1) / (parts - i);
    f(start, length);
    start += length;
  }
}

// Dot tiles: both operands run along M, so the sum over M is kept in lanes and folded once at the end.
constexpr int kDotTile = FASTAC_DOT_TILE;

// The two halves of a butterfly between vectors `Step` apart: a keeps its lanes where bit `Step` of the lane
// is 0 and takes the partner lanes of b elsewhere (near); what is left over of both is far.
template <typename A, int Step, int64_t... Lane>
inline __attribute__((always_inline)) void exchange(Vec<A> a, Vec<A> b, Vec<A>& near, Vec<A>& far,
                                                    std::integer_sequence<int64_t, Lane...>) {
  using Index = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
  typedef Index Indices __attribute__((vector_size(FASTAC_VECTOR_BYTES)));
  constexpr Index kCount = kLanes<A>;
  constexpr Indices kNear = {Index((Lane & Step) ? (Lane ^ Step) + kCount : Lane)...};
  constexpr Indices kFar = {Index((Lane & Step) ? Lane + kCount : (Lane ^ Step))...};
  near = __builtin_shuffle(a, b, kNear);
  far = __builtin_shuffle(a, b, kFar);
}

// Lane i of the result is the sum of the lanes of v[i].
template <typename A, int Step = 1>
inline __attribute__((always_inline)) Vec<A> fold(const Vec<A>* v) {
  if constexpr (Step == kLanes<A>) {
    return v[0];
  } else {
    constexpr int kPairs = kLanes<A> / Step / 2;
    Vec<A> half[kPairs];
    FASTAC_EACH (i, kPairs) {
      Vec<A> near, far;
      exchange<A, Step>(v[2 * i], v[2 * i + 1], near, far, std::make_integer_sequence<int64_t, kLanes<A>>{});
      half[i] = near + far;
    }
    return fold<A, 2 * Step>(half);
  }
}

template <typename A, int Step = 1>
inline A horizontal_sum(Vec<A> v) {
  if constexpr (Step == kLanes<A>) {
    return v[0];
  } else {
    Vec<A> near, far;
    exchange<A, Step>(v, v, near, far, std::make_integer_sequence<int64_t, kLanes<A>>{});
    return horizontal_sum<A, 2 * Step>(near + far);
  }
}

// sums[i] = the sum of the lanes of v[i], i < Count.
template <typename A, int Count>
inline __attribute__((always_inline)) void fold_all(const Vec<A>* v, A* sums) {
  constexpr int kWidth = kLanes<A>, kFolds = (Count + kWidth - 1) / kWidth;
  FASTAC_EACH (f, kFolds) {
    Vec<A> group[kWidth];
    FASTAC_EACH (i, kWidth) group[i] = f * kWidth + i < Count ? v[(f * kWidth + i) % Count] : Vec<A>{};
    A folded[kWidth];
    store_vector(folded, fold<A>(group));
    FASTAC_EACH (i, kWidth)
      if (f * kWidth + i < Count) sums[f * kWidth + i] = folded[i];
  }
}

// v[i] lane j  <->  v[j] lane i.
template <typename A, int Step = 1>
inline __attribute__((always_inline)) void transpose_block(Vec<A>* v) {
  if constexpr (Step < kLanes<A>) {
    FASTAC_EACH (i, kLanes<A>)
      if ((i & Step) == 0) {
        Vec<A> near, far;
        exchange<A, Step>(v[i], v[i + Step], near, far, std::make_integer_sequence<int64_t, kLanes<A>>{});
        v[i] = near;
        v[i + Step] = far;
      }
    transpose_block<A, 2 * Step>(v);
  }
}

// out[c * out_stride + r] = in[r * in_stride + c] for whole blocks of lanes that cover rows x columns; both
// strides are multiples of the lanes, `in` may be read to the end of a block of rows.
template <typename A>
inline void transpose(const A* in, int64_t in_stride, int64_t rows, int64_t columns, A* out,
                      int64_t out_stride) {
  for (int64_t r = 0; r < rows; r += kLanes<A>)
    for (int64_t c = 0; c < columns; c += kLanes<A>) {
      Vec<A> block[kLanes<A>];
      FASTAC_EACH (i, kLanes<A>)
        block[i] = r + i < rows ? load_vector(in + (r + i) * in_stride + c) : Vec<A>{};
      transpose_block<A>(block);
      FASTAC_EACH (i, kLanes<A>)
        if (c + i < columns) store_vector(out + (c + i) * out_stride + r, block[i]);
    }
}

// acc[i * Q + j] += lane sums of p[i, m] * q[j, m] over `panels` panels, i < P, j < Q; from zero if `first`.
template <typename A, typename O, int P, int Q>
void dot_tile(const O* p, int64_t p_panel, const O* q, int64_t q_panel, int64_t panels, A* sums, bool first) {
  constexpr int kVectors = kTileVectors / kSummands<O>;
  constexpr int64_t kRow = kVectors * kLanes<A>;
  Vec<A> acc[P * Q];
  if (first) {
    FASTAC_EACH (i, P * Q) acc[i] = Vec<A>{};
  } else {
    FASTAC_EACH (i, P * Q) acc[i] = load_vector(sums + i * kLanes<A>);
  }
  for (int64_t panel = 0; panel < panels; ++panel) {
    FASTAC_EACH (v, kVectors) {
      Vec<O> b[Q];
      FASTAC_EACH (j, Q) b[j] = load_vector(q + j * kRow + v * kLanes<A>);
      FASTAC_EACH (i, P) {
        Vec<O> a = load_vector(p + i * kRow + v * kLanes<A>);
        FASTAC_EACH (j, Q) acc[i * Q + j] = multiply_add<A, O>(acc[i * Q + j], a, b[j]);
      }
    }
    p += p_panel;
    q += q_panel;
  }
  FASTAC_EACH (i, P * Q) store_vector(sums + i * kLanes<A>, acc[i]);
}

// out[j * out_stride + i] = the sum of the lanes of acc[i * Q + j].
template <typename A, int P, int Q>
void dot_finish(const A* sums, A* out, int64_t out_stride) {
  Vec<A> acc[P * Q];
  FASTAC_EACH (i, P * Q) acc[i] = load_vector(sums + i * kLanes<A>);
  A folded[P * Q];
  fold_all<A, P * Q>(acc, folded);
  FASTAC_EACH (i, P)
    FASTAC_EACH (j, Q) out[j * out_stride + i] = folded[i * Q + j];
}

template <typename A, typename O>
struct DotKernel {
  void (*accumulate)(const O*, int64_t, const O*, int64_t, int64_t, A*, bool);
  void (*finish)(const A*, A*, int64_t);
};
template <typename A, typename O, int... Index>
constexpr std::array<DotKernel<A, O>, sizeof...(Index)> dot_kernels(std::integer_sequence<int, Index...>) {
  return {DotKernel<A, O>{&dot_tile<A, O, Index / kDotTile + 1, Index % kDotTile + 1>,
                          &dot_finish<A, Index / kDotTile + 1, Index % kDotTile + 1>}...};
}
template <typename A, typename O>
inline const DotKernel<A, O>& dot_kernel(int64_t p, int64_t q) {
  static constexpr auto kTable = dot_kernels<A, O>(std::make_integer_sequence<int, kDotTile * kDotTile>{});
  return kTable[(p - 1) * kDotTile + q - 1];
}

// Bytes of one operand's rows that a dot tile runs over before it moves on: two such operands fit a
// first-level cache.
constexpr int64_t kDotBytes = 16 << 10;

// out[j * out_stride + i] = sum_m p[i, m] * q[j, m] for i < count <= kDotTile and j < rows. `sums` holds
// dot_sums(rows) numbers; `between` is called once per tile.
template <typename A, typename O, typename F>
inline void dot_rows(const O* p, int64_t p_panel, int64_t count, const O* q, int64_t rows, int64_t panels,
                     A* sums, A* out, int64_t out_stride, F&& between) {
  constexpr int64_t kRow = kPanel<A> / kSummands<O>;
  const int64_t run = std::max<int64_t>(1, kDotBytes / (kDotTile * kRow * int64_t(sizeof(O))));
  const int64_t q_panel = rows * kRow;
  balanced(panels, run, [&](int64_t first, int64_t length) {
    A* tile = sums;
    balanced(rows, kDotTile, [&](int64_t r0, int64_t n) {
      between();
      dot_kernel<A, O>(count, n).accumulate(p + first * p_panel, p_panel, q + first * q_panel + r0 * kRow,
                                            q_panel, length, tile, first == 0);
      tile += kDotTile * kDotTile * kLanes<A>;
    });
  });
  const A* tile = sums;
  balanced(rows, kDotTile, [&](int64_t r0, int64_t n) {
    dot_kernel<A, O>(count, n).finish(tile, out + r0 * out_stride, out_stride);
    tile += kDotTile * kDotTile * kLanes<A>;
  });
}
template <typename A>
inline int64_t dot_sums(int64_t rows) {
  return (rows + kDotTile - 1) / kDotTile * kDotTile * kDotTile * kLanes<A>;
}

// Panel tiles: `Rows` consecutive rows of one panel in memory,
//     out[r, :] = scale[r] * out[r, :] + sum_k row[k * row_step + r] * column[k * column_step + :].
// Functions of their own, so that nothing around them competes for registers.
enum class Start { kZero, kLoad, kScale };

template <typename A, typename O, int Rows, Start From>
void panel_tile(A* out, const A* scale, const O* row, int64_t row_step, const O* column, int64_t column_step,
                int64_t count) {
  Tile<A, Rows, kTileVectors> tile;
  tile.fill(0);
  tile.template add_products<1>(row, row_step, column, column_step, count);
  // Added at the end, so that a long sum is a sum of short ones.
  if constexpr (From == Start::kScale) tile.add(out, scale);
  if constexpr (From == Start::kLoad) tile.add(out);
  tile.store(out);
}

template <typename A, typename O>
using PanelKernel = void (*)(A*, const A*, const O*, int64_t, const O*, int64_t, int64_t);
template <typename A, typename O, Start From, int... Index>
constexpr std::array<PanelKernel<A, O>, sizeof...(Index)> panel_kernels(
    std::integer_sequence<int, Index...>) {
  return {&panel_tile<A, O, Index + 1, From>...};
}
template <typename A, typename O, Start From>
inline PanelKernel<A, O> panel_kernel(int64_t rows) {
  static constexpr auto kTable = panel_kernels<A, O, From>(std::make_integer_sequence<int, kTileRows>{});
  return kTable[rows - 1];
}
