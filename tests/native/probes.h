// What the harness calls of one instruction set. Plain pointers only, so that no function which several
// translation units share is compiled for an instruction set the processor may lack. Storage types are named
// by DType, and accumulators by `f64`: double, else float. Matrices are contiguous where no stride is given.
#pragma once

#include <cstdint>

#include "attention_cluster.h"

namespace fastac::probe {

struct Probes {
  int64_t vector_bytes, tile_rows, tile_vectors, dot_tile, dot_bytes;

  // vec.h
  void (*exponential)(bool f64, const void* x, void* out, int64_t vectors);
  void (*load)(DType type, const void* from, void* to, int64_t vectors);
  void (*store)(DType type, const void* from, void* to, int64_t vectors);
  void (*load_partial)(DType type, const void* from, void* to, int64_t count);
  void (*store_partial)(DType type, const void* from, void* to, int64_t count);

  // tile.h
  void (*balanced)(int64_t total, int64_t limit, int64_t* starts, int64_t* lengths);
  void (*fold)(bool f64, const void* in, void* out);
  void (*fold_all)(bool f64, const void* in, int64_t count, void* out);  // count <= dot_tile * dot_tile
  void (*horizontal_sum)(bool f64, const void* in, void* out);
  void (*transpose_block)(bool f64, void* block);
  void (*transpose)(bool f64, const void* in, int64_t in_stride, int64_t rows, int64_t columns, void* out,
                    int64_t out_stride);
  void (*dot_rows)(bool f64, const void* p, int64_t count, const void* q, int64_t rows, int64_t panels,
                   void* out, int64_t out_stride);
  // acc = fill[r] * column_factor * row_factor[r] + sum_k ..., with rows of `row` a panel apart or 1 apart
  void (*multiply_add)(bool f64, int64_t rows, int64_t vectors, bool by_panel, const void* fill,
                       const void* column_factor, const void* row_factor, const void* row, int64_t row_step,
                       const void* column, int64_t count, void* out);
  void (*panel_tile)(bool f64, int64_t start, int64_t rows, void* out, const void* scale, const void* row,
                     int64_t row_step, const void* column, int64_t count);

  // pack.h
  void (*pack_rows)(DType type, const void* x, int64_t stride, const int64_t* position, int64_t begin,
                    int64_t count, int64_t features, void* panels, void* offset);
  void (*row_offset)(DType type, const void* row, int64_t features, void* offset);
  void (*pack_matrix)(DType type, const void* rows, int64_t count, int64_t features, int64_t panel,
                      void* out);
  void (*pack_transposed)(DType type, const void* weight, int64_t units, int64_t features, int64_t first,
                          void* out, void* sums);
  bool (*streams)(DType type, const void* p, int64_t features, int64_t bytes);
  void (*store_panel)(DType type, void* row, int64_t panel, int64_t features, const void* value, bool stream);

  // softmax.h
  void (*score_block)(bool f64, const void* panels, const void* offset, int64_t rows, int64_t features,
                      const void* weight, const void* weight_sums, int64_t vectors, void* scores,
                      int64_t stride);
  void (*gather_scores)(bool f64, const void* base, int64_t unit_stride, int64_t position_stride,
                        const int64_t* position, int64_t begin, int64_t rows, int64_t unit_begin,
                        int64_t units, void* scores, int64_t stride);
  void (*add_position_bias)(bool f64, const void* bias, int64_t max_length, const int64_t* position,
                            int64_t begin, int64_t rows, int64_t units, void* scores, int64_t stride);
  // `state` is max, sum, offset_sum and scale, each (vectors * lanes)
  void (*softmax_reset)(bool f64, void* state, int64_t size);
  void (*softmax_block)(bool f64, void* state, void* scores, int64_t stride, const void* offset, int64_t rows,
                        int64_t vectors);
};

extern const Probes baseline;
#if defined(__x86_64__)
extern const Probes avx2;
extern const Probes avx512;
extern const Probes avx512_bf16;
extern const Probes avx512_bf16_dot;
#endif

}  // namespace fastac::probe
