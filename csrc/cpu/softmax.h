// Scores of a block of positions and their softmax over positions. Scores are kept as S[position][unit], so
// that the softmax runs down the rows with one unit per lane. Included inside an anonymous namespace.

// A score is summed in runs of this many features, since the rounding error of one long chain of additions
// grows with it. Short rows, where torch.mm errs less as well, have shorter runs.
inline int64_t score_run(int64_t features) {
  return features < 512 ? 128 : 256;
}

// W as score_block takes it: [vector of units][feature][unit], zero beyond N and M, and sum_m W[n, m].
template <typename T, typename O>
class ScoreWeight {
  using A = typename Accumulator<T>::type;

 public:
  void pack(const Problem& problem, ParallelFor parallel_for) {
    const int64_t vectors = cpu::ceil_div(problem.units, kLanes<A>);
    size_ = panel_count<A>(problem.features) * kPanelOperands<A, O> * kLanes<A>;
    memory_ = cpu::allocate(vectors * (size_ * int64_t(sizeof(O)) + kLanes<A> * int64_t(sizeof(A))));
    weight_ = static_cast<O*>(memory_.get());
    sums_ = reinterpret_cast<A*>(weight_ + vectors * size_);
    const T* weight = static_cast<const T*>(problem.weight);
    const int64_t operations = problem.units * problem.features * cpu::kTransposing;
    cpu::parallel(parallel_for, vectors, operations, [&](int64_t begin, int64_t end) {
      for (int64_t v = begin; v < end; ++v) {
        const int64_t first = v * kLanes<A>;
        if constexpr (kSummands<O> > 1)
          pack_transposed(weight, problem.units, problem.features, first, weight_ + v * size_);
        else
          pack_transposed<T, A>(weight, problem.units, problem.features, first, weight_ + v * size_,
                                sums_ + first);
      }
    });
  }

  explicit operator bool() const { return weight_ != nullptr; }
  const O* units(int64_t begin) const { return weight_ + begin / kLanes<A> * size_; }
  const A* sums(int64_t begin) const { return sums_ + begin; }

 private:
  cpu::Buffer memory_;
  O* weight_ = nullptr;
  A* sums_ = nullptr;  // not filled for pairs, from which no offset was taken
  int64_t size_ = 0;
};

// S[r, n] = sum_m x[r, m] weight[n, m] (Eq. 4) for r < rows and the units of `vectors` packed vectors, in
// runs of `run_features`.
template <typename A, typename O>
inline void score_block(const O* panels, const A* offset, int64_t rows, int64_t features,
                        const O* packed_weight, const A* weight_sums, int64_t vectors, A* scores,
                        int64_t stride, int64_t run_features) {
  constexpr int64_t kRow = kPanelOperands<A, O>;
  const int64_t count = panel_count<A>(features), padded = count * kRow, operands = summed<O>(features),
                run_panels = std::max<int64_t>(run_features / kPanel<A>, 1);
  auto run = [&](int64_t first, auto width) {
    constexpr int kWidth = decltype(width)::value;
    balanced(rows, kTileRows, [&](int64_t r0, int64_t n) {
      with_rows<kTileRows>(n, [&](auto tile_rows) {
        const O* weight = packed_weight + first * padded * kLanes<A>;
        for (int64_t p = 0; p < count;) {
          const int64_t end = std::min(p + run_panels, count);
          const bool starts = p == 0;
          Tile<A, tile_rows, kWidth> tile;
          tile.fill(0);
          for (; p < end; ++p)
            tile.template add_products<kRow>(panels + (p * rows + r0) * kRow, 1,
                                             weight + p * kRow * kLanes<A>, kLanes<A>,
                                             std::min(kRow, operands - p * kRow), padded * kLanes<A>);
          for (int i = 0; i < tile_rows; ++i)
            for (int v = 0; v < kWidth; ++v) {
              const int64_t at = (first + v) * kLanes<A>;
              A* s = scores + (r0 + i) * stride + at;
              Vec<A> before = {};
              if (!starts)
                before = load_vector(s);
              else if (kSummands<O> == 1)
                before = load_vector(weight_sums + at) * offset[r0 + i];
              store_vector(s, tile.acc[i][v] + before);
            }
        }
      });
    });
  };
  int64_t v = 0;
  for (; v + kTileVectors <= vectors; v += kTileVectors) run(v, std::integral_constant<int, kTileVectors>{});
  for (; v < vectors; ++v) run(v, std::integral_constant<int, 1>{});
}

// Where the scores of a call come from when they are not computed: scores given, or saved by the forward
// pass.
template <typename A>
struct ScoreSource {
  const A* base;
  int64_t unit_stride, position_stride;
};

template <typename A>
inline void gather_scores(const ScoreSource<A>& source, const int64_t* position, int64_t begin, int64_t rows,
                          int64_t unit_begin, int64_t units, A* scores, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) {
    const A* row = source.base + (position ? position[begin + r] : begin + r) * source.position_stride +
                   unit_begin * source.unit_stride;
    A* out = scores + r * stride;
    if (source.unit_stride == 1) {
      std::memcpy(out, row, units * sizeof(A));
    } else {
      for (int64_t n = 0; n < units; ++n) out[n] = row[n * source.unit_stride];
    }
    for (int64_t n = units; n < stride; ++n) out[n] = 0;
  }
}

template <typename A>
inline void add_position_bias(const A* bias, int64_t max_length, const int64_t* position, int64_t begin,
                              int64_t rows, int64_t units, A* scores, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) {
    const A* column = bias + (position ? position[begin + r] : begin + r);
    for (int64_t n = 0; n < units; ++n) scores[r * stride + n] += column[n * max_length];
  }
}

// Running softmax of every unit: after a block, S holds exp(S - max), `max` and `sum` include the block,
// `offset_sum` is sum_l exp(s - max) offset_l, and `scale` is what earlier sums were multiplied by.
template <typename A>
struct RunningSoftmax {
  A *max, *sum, *offset_sum, *scale;  // (vectors * lanes)

  void reset(int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      max[i] = -std::numeric_limits<A>::infinity();
      sum[i] = offset_sum[i] = 0;
    }
  }

  void block(A* scores, int64_t stride, const A* offset, int64_t rows, int64_t vectors) const {
    const Vec<A> lowest = broadcast<A>(-std::numeric_limits<A>::infinity());
    for (int64_t v = 0; v < vectors; ++v) {
      A* column = scores + v * kLanes<A>;
      const int64_t at = v * kLanes<A>;
      Vec<A> old = load_vector(max + at), top = old;
      for (int64_t r = 0; r < rows; ++r) {
        Vec<A> s = load_vector(column + r * stride);
        top = s > top ? s : top;
      }
      // With nothing but -inf so far every exponential has to be exp(-inf) = 0, not exp(-inf + inf).
      Vec<A> reference = top == lowest ? Vec<A>{} : top;
      Vec<A> factor = exponential(old - reference);
      Vec<A> total = load_vector(sum + at) * factor, weighted = load_vector(offset_sum + at) * factor;
      for (int64_t r = 0; r < rows; ++r) {
        Vec<A> e = exponential(load_vector(column + r * stride) - reference);
        store_vector(column + r * stride, e);
        total += e;
        weighted += e * offset[r];
      }
      store_vector(max + at, top);
      store_vector(sum + at, total);
      store_vector(offset_sum + at, weighted);
      store_vector(scale + at, factor);
    }
  }
};
