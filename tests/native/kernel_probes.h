// The probes of one instruction set. The builder puts this in the place of kernels.h into a copy of each of
// csrc/cpu/{baseline,avx2,avx512,avx512_bf16*}.cpp, so that target pragma, vector width and tile sizes are
// the library's own. FASTAC_PROBES is the name of the table.

namespace {

// Each needs the ones before it.
#include "cpu/vec.h"

#include "cpu/tile.h"

#include "cpu/pack.h"

#include "cpu/operands.h"

#include "cpu/softmax.h"

template <typename F>
inline void with_accumulator(bool f64, F&& f) {
  f64 ? f(double{}) : f(float{});
}

// f(storage, accumulator)
template <typename F>
inline void with_storage(DType type, F&& f) {
  switch (type) {
    case DType::kFloat64: return f(double{}, double{});
    case DType::kFloat32: return f(float{}, float{});
    case DType::kBFloat16: return f(BFloat16{}, float{});
    case DType::kFloat16: return f(Float16{}, float{});
  }
}

template <typename A>
inline const A* in_as(A, const void* p) {
  return static_cast<const A*>(p);
}
template <typename A>
inline A* out_as(A, void* p) {
  return static_cast<A*>(p);
}

void probe_exponential(bool f64, const void* x, void* out, int64_t vectors) {
  with_accumulator(f64, [&](auto a) {
    using A = decltype(a);
    for (int64_t i = 0; i < vectors; ++i)
      store_vector(out_as(a, out) + i * kLanes<A>, exponential(load_vector(in_as(a, x) + i * kLanes<A>)));
  });
}

void probe_load(DType type, const void* from, void* to, int64_t vectors) {
  with_storage(type, [&](auto t, auto a) {
    constexpr int64_t kWidth = kLanes<decltype(a)>;
    for (int64_t i = 0; i < vectors; ++i)
      store_vector(out_as(a, to) + i * kWidth, Storage<decltype(t)>::load(in_as(t, from) + i * kWidth));
  });
}

void probe_store(DType type, const void* from, void* to, int64_t vectors) {
  with_storage(type, [&](auto t, auto a) {
    constexpr int64_t kWidth = kLanes<decltype(a)>;
    for (int64_t i = 0; i < vectors; ++i)
      Storage<decltype(t)>::store(out_as(t, to) + i * kWidth, load_vector(in_as(a, from) + i * kWidth));
  });
}

void probe_load_partial(DType type, const void* from, void* to, int64_t count) {
  with_storage(type,
               [&](auto t, auto a) { store_vector(out_as(a, to), load_partial(in_as(t, from), count)); });
}

void probe_store_partial(DType type, const void* from, void* to, int64_t count) {
  with_storage(type,
               [&](auto t, auto a) { store_partial(out_as(t, to), load_vector(in_as(a, from)), count); });
}

void probe_balanced(int64_t total, int64_t limit, int64_t* starts, int64_t* lengths) {
  balanced(total, limit, [&](int64_t start, int64_t length) {
    *starts++ = start;
    *lengths++ = length;
  });
}

void probe_fold(bool f64, const void* in, void* out) {
  with_accumulator(f64, [&](auto a) {
    using A = decltype(a);
    Vec<A> v[kLanes<A>];
    for (int64_t i = 0; i < kLanes<A>; ++i) v[i] = load_vector(in_as(a, in) + i * kLanes<A>);
    store_vector(out_as(a, out), fold<A>(v));
  });
}

void probe_fold_all(bool f64, const void* in, int64_t count, void* out) {
  with_accumulator(f64, [&](auto a) {
    using A = decltype(a);
    with_rows<kDotTile * kDotTile>(count, [&](auto size) {
      constexpr int kCount = decltype(size)::value;
      Vec<A> v[kCount];
      for (int i = 0; i < kCount; ++i) v[i] = load_vector(in_as(a, in) + i * kLanes<A>);
      fold_all<A, kCount>(v, out_as(a, out));
    });
  });
}

void probe_horizontal_sum(bool f64, const void* in, void* out) {
  with_accumulator(f64,
                   [&](auto a) { *out_as(a, out) = horizontal_sum<decltype(a)>(load_vector(in_as(a, in))); });
}

void probe_transpose_block(bool f64, void* block) {
  with_accumulator(f64, [&](auto a) {
    using A = decltype(a);
    Vec<A> v[kLanes<A>];
    std::memcpy(v, block, sizeof v);
    transpose_block<A>(v);
    std::memcpy(block, v, sizeof v);
  });
}

void probe_transpose(bool f64, const void* in, int64_t in_stride, int64_t rows, int64_t columns, void* out,
                     int64_t out_stride) {
  with_accumulator(
      f64, [&](auto a) { transpose(in_as(a, in), in_stride, rows, columns, out_as(a, out), out_stride); });
}

void probe_dot_rows(bool f64, const void* p, int64_t count, const void* q, int64_t rows, int64_t panels,
                    void* out, int64_t out_stride) {
  with_accumulator(f64, [&](auto a) {
    using A = decltype(a);
    const cpu::Buffer sums = cpu::allocate(dot_sums<A>(rows) * int64_t(sizeof(A)));
    dot_rows<A>(in_as(a, p), count * kPanel<A>, count, in_as(a, q), rows, panels, out_as(a, sums.get()),
                out_as(a, out), out_stride, [] {});
  });
}

template <typename A, int Rows, int Vectors>
void tile_probe(bool by_panel, const A* fill, const A* column_factor, const A* row_factor, const A* row,
                int64_t row_step, const A* column, int64_t count, A* out) {
  Tile<A, Rows, Vectors> tile;
  tile.fill_rows(fill);
  tile.scale_columns(column_factor);
  alignas(64) A scaled[Rows * kPanel<A>];
  tile.store(scaled);
  tile.fill(0);
  tile.add(scaled, row_factor);
  if (by_panel)
    tile.template add_products<kPanel<A>>(row, row_step, column, Vectors * kLanes<A>, count);
  else
    tile.template add_products<1>(row, row_step, column, Vectors * kLanes<A>, count);
  tile.store(out);
}

void probe_multiply_add(bool f64, int64_t rows, int64_t vectors, bool by_panel, const void* fill,
                        const void* column_factor, const void* row_factor, const void* row, int64_t row_step,
                        const void* column, int64_t count, void* out) {
  with_accumulator(f64, [&](auto a) {
    with_rows<kTileRows>(rows, [&](auto tile_rows) {
      with_rows<kTileVectors>(vectors, [&](auto tile_vectors) {
        tile_probe<decltype(a), decltype(tile_rows)::value, decltype(tile_vectors)::value>(
            by_panel, in_as(a, fill), in_as(a, column_factor), in_as(a, row_factor), in_as(a, row), row_step,
            in_as(a, column), count, out_as(a, out));
      });
    });
  });
}

void probe_panel_tile(bool f64, int64_t start, int64_t rows, void* out, const void* scale, const void* row,
                      int64_t row_step, const void* column, int64_t count) {
  with_accumulator(f64, [&](auto a) {
    using A = decltype(a);
    const PanelKernel<A, A> kernel = start == 0   ? panel_kernel<A, A, Start::kZero>(rows)
                                     : start == 1 ? panel_kernel<A, A, Start::kLoad>(rows)
                                                  : panel_kernel<A, A, Start::kScale>(rows);
    kernel(out_as(a, out), in_as(a, scale), in_as(a, row), row_step, in_as(a, column), kPanel<A>, count);
  });
}

void probe_pack_rows(DType type, const void* x, int64_t stride, const int64_t* position, int64_t begin,
                     int64_t count, int64_t features, void* panels, void* offset) {
  with_storage(type, [&](auto t, auto a) {
    const RowSource<decltype(t)> source{in_as(t, x), stride, position};
    pack_rows(source, begin, count, features, out_as(a, panels), out_as(a, offset));
  });
}

void probe_row_offset(DType type, const void* row, int64_t features, void* offset) {
  with_storage(type, [&](auto t, auto a) {
    *out_as(a, offset) = row_offset<decltype(t), decltype(a)>(in_as(t, row), features);
  });
}

void probe_pack_matrix(DType type, const void* rows, int64_t count, int64_t features, int64_t panel,
                       void* out) {
  with_storage(type,
               [&](auto t, auto a) { pack_matrix(in_as(t, rows), count, features, panel, out_as(a, out)); });
}

void probe_pack_transposed(DType type, const void* weight, int64_t units, int64_t features, int64_t first,
                           void* out, void* sums) {
  with_storage(type, [&](auto t, auto a) {
    pack_transposed(in_as(t, weight), units, features, first, out_as(a, out), out_as(a, sums));
  });
}

bool probe_streams(DType type, const void* p, int64_t features, int64_t bytes) {
  bool result = false;
  with_storage(type, [&](auto t, auto) { result = streams<decltype(t)>(p, features, bytes); });
  return result;
}

void probe_store_panel(DType type, void* row, int64_t panel, int64_t features, const void* value,
                       bool stream) {
  with_storage(type, [&](auto t, auto a) {
    using A = decltype(a);
    Vec<A> v[kTileVectors];
    std::memcpy(v, value, sizeof v);
    store_panel<decltype(t), A>(out_as(t, row), panel, features, v, stream);
  });
  if (stream) stream_fence();
}

void probe_score_block(bool f64, const void* panels, const void* offset, int64_t rows, int64_t features,
                       const void* weight, const void* weight_sums, int64_t vectors, void* scores,
                       int64_t stride) {
  with_accumulator(f64, [&](auto a) {
    score_block(in_as(a, panels), in_as(a, offset), rows, features, in_as(a, weight), in_as(a, weight_sums),
                vectors, out_as(a, scores), stride, score_run(features));
  });
}

void probe_gather_scores(bool f64, const void* base, int64_t unit_stride, int64_t position_stride,
                         const int64_t* position, int64_t begin, int64_t rows, int64_t unit_begin,
                         int64_t units, void* scores, int64_t stride) {
  with_accumulator(f64, [&](auto a) {
    const ScoreSource<decltype(a)> source{in_as(a, base), unit_stride, position_stride};
    gather_scores(source, position, begin, rows, unit_begin, units, out_as(a, scores), stride);
  });
}

void probe_add_position_bias(bool f64, const void* bias, int64_t max_length, const int64_t* position,
                             int64_t begin, int64_t rows, int64_t units, void* scores, int64_t stride) {
  with_accumulator(f64, [&](auto a) {
    add_position_bias(in_as(a, bias), max_length, position, begin, rows, units, out_as(a, scores), stride);
  });
}

void probe_softmax_reset(bool f64, void* state, int64_t size) {
  with_accumulator(f64, [&](auto a) {
    auto* p = out_as(a, state);
    RunningSoftmax<decltype(a)>{p, p + size, p + 2 * size, p + 3 * size}.reset(size);
  });
}

void probe_softmax_block(bool f64, void* state, void* scores, int64_t stride, const void* offset,
                         int64_t rows, int64_t vectors) {
  with_accumulator(f64, [&](auto a) {
    using A = decltype(a);
    A* p = out_as(a, state);
    const int64_t size = vectors * kLanes<A>;
    const RunningSoftmax<A> softmax{p, p + size, p + 2 * size, p + 3 * size};
    softmax.block(out_as(a, scores), stride, in_as(a, offset), rows, vectors);
  });
}

}  // namespace

const probe::Probes probe::FASTAC_PROBES = {
    FASTAC_VECTOR_BYTES,
    kTileRows,
    kTileVectors,
    kDotTile,
    kDotBytes,
    probe_exponential,
    probe_load,
    probe_store,
    probe_load_partial,
    probe_store_partial,
    probe_balanced,
    probe_fold,
    probe_fold_all,
    probe_horizontal_sum,
    probe_transpose_block,
    probe_transpose,
    probe_dot_rows,
    probe_multiply_add,
    probe_panel_tile,
    probe_pack_rows,
    probe_row_offset,
    probe_pack_matrix,
    probe_pack_transposed,
    probe_streams,
    probe_store_panel,
    probe_score_block,
    probe_gather_scores,
    probe_add_position_bias,
    probe_softmax_reset,
    probe_softmax_block,
};
