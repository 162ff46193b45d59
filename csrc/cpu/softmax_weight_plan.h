// How a softmax_weight call is cut into tasks, by its shapes only.
#pragma once

#include <algorithm>
#include <cstdint>

#include "plan.h"

namespace fastac::cpu {

constexpr int64_t kTileBytes = 256 * 1024;  // a tile of a whole set, in the accumulation type
constexpr int64_t kTileColumns = 4096;      // columns of a task at the most
constexpr int64_t kTileLeast = 64;     // a cache line in every dtype; narrower, a set is read twice instead
constexpr int64_t kTileTasks = 16;     // tasks wanted, as far as tiles of kTileLeast columns give them
constexpr int64_t kFoldColumns = 128;  // columns aimed at where M is small

// How many positions stand side by side in one row of a kernel. With few features the lanes of a vector and
// the lines of a cache would be left empty otherwise.
inline int64_t softmax_weight_fold(int64_t length, int64_t features) {
  if (features >= kTileLeast || length == 0) return 1;
  // Folding the statistics back costs a column's work: there should be some rows to a column, but first of
  // all a vector should be full.
  const int64_t worthwhile = std::max(length / 8, ceil_div(16, features));
  return std::max<int64_t>(1, std::min({ceil_div(kFoldColumns, features), worthwhile, length}));
}

struct SoftmaxWeightPlan {
  int64_t fold;          // positions in a row
  int64_t columns;       // of a full row: fold * M
  int64_t rows;          // of a full set
  int64_t tile;          // columns of a task; all of them where fold > 1
  int64_t tiles;         // tasks side by side
  bool kept;             // a tile of a whole set is kept between the passes over it
  int64_t segments;      // tasks one below the other; 1 where kept
  int64_t segment_rows;  // rows of such a task
  int64_t block_rows;    // rows kept at a time

  int64_t tasks(int64_t sets) const { return sets * segments * tiles; }
};

// `size`: bytes of a number of the accumulation type.
inline SoftmaxWeightPlan plan_softmax_weight(int64_t sets, int64_t length, int64_t features, int64_t size) {
  SoftmaxWeightPlan plan{};
  plan.fold = softmax_weight_fold(length, features);
  plan.columns = plan.fold * features;
  plan.rows = ceil_div(length, plan.fold);
  const int64_t budget = kTileBytes / size, rows = std::max<int64_t>(plan.rows, 1);
  plan.kept = rows * std::min(plan.columns, kTileLeast) <= budget;
  int64_t widest = kTileColumns;
  if (plan.kept) widest = std::min(widest, std::max(budget / rows, kTileLeast));
  if (plan.fold > 1) {
    plan.kept = rows * plan.columns <= budget;
    widest = plan.columns;
  } else {
    if (plan.kept) {
      const int64_t wanted = ceil_div(kTileTasks, std::max<int64_t>(sets, 1));
      widest = std::min(widest, std::max(ceil_div(plan.columns, wanted), kTileLeast));
    }
    widest = widest / kTileLeast * kTileLeast;
    const int64_t even = ceil_div(plan.columns, ceil_div(plan.columns, widest));
    widest = std::min(widest, ceil_div(even, kTileLeast) * kTileLeast);
  }
  plan.tile = std::min(widest, plan.columns);
  plan.tiles = ceil_div(plan.columns, plan.tile);
  plan.segments = 1;
  if (!plan.kept) {
    const int64_t side = std::max<int64_t>(sets, 1) * plan.tiles;
    plan.segments = std::clamp<int64_t>(ceil_div(kTileTasks, side), 1, ceil_div(rows, 256));
  }
  plan.segment_rows = ceil_div(rows, plan.segments);
  plan.block_rows =
      plan.kept ? rows
                : std::clamp<int64_t>(budget / (2 * plan.tile), 1, std::max<int64_t>(plan.segment_rows, 1));
  return plan;
}

}  // namespace fastac::cpu
