// How a call is launched: which form, which tile, what stays in shared memory, what grid. Host C++ without a
// CUDA call. A plan depends on shapes, on alignment and on what a block of the chip may hold, never on the
// number of multiprocessors, so equal calls give equal bits. Of the grid of a cluster kernel the launch takes
// no more than the chip can hold at a time: which cluster works on a set changes no bit of it.
//
// The model behind it, nothing of which was measured yet:
//
// - The smallest tile that holds the units wastes least; longer tiles read W less often.
// - A set is one block where its scores fit into shared memory, since shares of z are written and read again;
//   not where that leaves multiprocessors idle.
// - Fewer than kPrograms blocks leave multiprocessors idle: units are then cut finer, and x comes from the
//   cache again for each part of them.
// - x stays in shared memory, instead of coming from the cache a second and third time, where there is room
//   for two blocks per multiprocessor, the loads of one hiding behind the work of the other, or where there
//   are too few blocks for that anyway.
// - A cluster reads x once, W once for all its sets, and exchanges scores and norms for it. It is chosen
//   wherever it can be and x is more than one tile of features: there the other kernels read W again for
//   every set and, but for a resident x, x too.
// - Fewer blocks to a cluster exchange less and let more sets be worked on at a time: 4 where their slices of
//   x and W fit. With fewer sets than keep the chip busy, 8, if each still has a tile of features.
#pragma once

#include "operands.h"

#include <algorithm>
#include <cstddef>
#include <stdexcept>

namespace fastac::cuda {

// Positions and units of a block of threads.
struct Tile {
  int block_l, block_n;
};
constexpr bool operator==(const Tile& a, const Tile& b) {
  return a.block_l == b.block_l && a.block_n == b.block_n;
}

// The tiles that are compiled, by element size. With 16 units, float32 products of 64 positions are too
// narrow for four warps.
inline constexpr Tile kForwardHalf[] = {{32, 16}, {32, 32}, {32, 64}, {64, 16}, {64, 64}};
inline constexpr Tile kForwardFull[] = {{32, 16}, {32, 64}, {64, 64}};
inline constexpr Tile kBackwardHalf[] = {{32, 16}, {32, 64}, {64, 16}, {64, 64}};
inline constexpr Tile kBackwardFull[] = {{32, 16}, {32, 64}};
// What a block of the Gram form takes: a set in one tile, all units in one tile.
inline constexpr int kGramPositions = 32, kGramUnits = 64;

// A cluster: its blocks, and the units there is room for; those of fewer units and blocks first.
struct ClusterShape {
  int blocks, units;
};
inline constexpr ClusterShape kClusterShapes[] = {{4, 32}, {8, 32}, {4, 64}, {8, 64}};
// What a cluster takes: a set in one tile, features in pieces of 16 bytes, and more than one tile of them.
inline constexpr int kClusterLongest = 32, kClusterPiece = 8, kClusterTile = 64;

constexpr int64_t kPrograms = 128;  // blocks that keep a large GPU busy
constexpr int64_t kLongest = 1024;  // positions of a forward block

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// What a plan depends on.
struct Sizes {
  int64_t batch;     // B
  int64_t length;    // L, or T when packed
  int64_t longest;   // an upper bound of the positions of a set
  int64_t features;  // M
  int64_t units;     // N
  int itemsize;      // of x
  Layout layout;
  Weighting weighting;
  bool shift;
  bool kept;     // whether the forward keeps the scores
  bool needs_x;  // whether the backward makes dX
  bool needs_weight;
  bool x_vectors, weight_vectors, dy_vectors;  // whether rows can be read 16 bytes at a time

  int64_t rows() const { return layout == Layout::kPacked ? length : batch * length; }
  int64_t accumulated() const { return itemsize == 8 ? 8 : 4; }
};

struct Limits {
  int64_t shared;  // bytes of a block; a multiprocessor has 1 KB more, and takes 1 KB more for every block
  int capability;  // 10 major + minor

  int64_t blocks_together(int64_t bytes) const { return (shared + 1024) / (bytes + 1024); }
};

// A family of kernels for one dtype, as far as a plan is concerned.
enum class Form : int {
  kWhole = 0,    // sets of one block
  kGram = 1,     // the same in the Gram form, which does not read y
  kSplit = 2,    // sets of several blocks
  kCluster = 3,  // sets of one cluster, in the Gram form
};
using ForwardBytes = size_t (*)(Tile, bool resident, int64_t features, int64_t positions);
using BackwardBytes = size_t (*)(Tile, Form, bool resident, int64_t features);
using ClusterBytes = size_t (*)(ClusterShape, int64_t features);  // null where the dtype has no such kernel
struct ReduceTile {
  int64_t units, features;  // of a tile of dW
  int64_t rows;             // of a step
};

// Which kernel makes the forward pass.
enum class Kernel : int {
  kBlocks = 0,   // ForwardBlocks, and ForwardCombine if split
  kCluster = 1,  // ForwardCluster
};

struct ForwardPlan {
  Kernel kernel;
  Tile tile;
  int cluster;  // blocks of a cluster, or 1
  bool resident;
  int64_t shared;  // bytes
  Blocks blocks;
  int64_t unit_blocks;
  int64_t grid;  // of clusters: a cluster for every set, of which a launch takes fewer where there is no room
  int64_t launches;
  int64_t scratch;     // bytes
  int64_t bytes;       // to and from memory, if what comes twice comes from the cache
  int64_t operations;  // of the products, what tiles waste included
};

struct BackwardPlan {
  Form form;
  Tile tile;
  int cluster;
  bool resident;
  int64_t shared;
  Blocks blocks;
  int64_t grid;
  int64_t launches;
  int64_t scratch;
  int64_t tiles;           // of dW
  int64_t splits;          // parts of the rows in dW
  int64_t rows_per_split;  // a multiple of a step
  int64_t bytes;
  int64_t operations;
};

// Blocks of at most so many positions.
inline Blocks cut(const Sizes& s, int64_t positions) {
  const int64_t per_set = std::max<int64_t>(ceil_div(s.length, positions), 1);
  // What rows.cuh's `first_block` deals out, and one for the rows behind the last set.
  if (s.layout == Layout::kPacked)
    return {positions, 1, s.length / positions + s.batch + 1, s.longest > positions};
  return {positions, per_set, s.batch * per_set, per_set > 1};
}

namespace planning {

// The tile, of those that fit(tile), for the positions and units of a call.
template <size_t COUNT, class Fits>
Tile choose(const Tile (&tiles)[COUNT], const Sizes& s, bool cut_units, Fits fits) {
  const auto better = [&](const Tile& a, const Tile& b) {
    const int64_t of_a = ceil_div(s.units, a.block_n), of_b = ceil_div(s.units, b.block_n);
    if (a.block_n != b.block_n) {
      const bool idle_a = cut(s, a.block_l).all * of_a < kPrograms;
      const bool idle_b = cut(s, b.block_l).all * of_b < kPrograms;
      if (cut_units && idle_a != idle_b) return idle_b;
      if (of_a != of_b) return cut_units && idle_a ? of_a > of_b : of_a < of_b;
      return a.block_n < b.block_n;
    }
    const bool holds_a = s.longest <= a.block_l, holds_b = s.longest <= b.block_l;
    if (holds_a != holds_b) return holds_a;
    return holds_a ? a.block_l < b.block_l : a.block_l > b.block_l;
  };
  const Tile* best = nullptr;
  for (const Tile& tile : tiles)
    if (fits(tile) && (best == nullptr || better(tile, *best))) best = &tile;
  if (best == nullptr) throw std::runtime_error("fastac: no tile fits the shared memory of this GPU");
  return *best;
}

inline bool stays(const Limits& limits, int64_t bytes, int64_t streamed, int64_t grid) {
  if (bytes > limits.shared) return false;
  return bytes <= streamed || limits.blocks_together(bytes) >= 2 || grid <= kPrograms;
}

// x, y and given scores.
inline int64_t forward_bytes(const Sizes& s) {
  const int64_t scores = s.weighting == Weighting::kScores ? s.rows() * s.units : 0;
  return ((s.rows() + s.batch * s.units) * s.features + scores) * s.itemsize;
}

// The cluster that takes a call, or null. `vectors` is whether all operands of a pass are aligned.
inline const ClusterShape* choose_cluster(const Sizes& s, const Limits& limits, bool vectors,
                                          ClusterBytes shared_bytes) {
  const bool aligned = vectors && s.x_vectors && (s.weighting != Weighting::kLinear || s.weight_vectors);
  if (shared_bytes == nullptr || limits.capability < 90 || !aligned || s.longest > kClusterLongest ||
      s.features % kClusterPiece != 0 || s.features <= kClusterTile)
    return nullptr;
  const ClusterShape* best = nullptr;
  for (const ClusterShape& shape : kClusterShapes) {
    if (s.units > shape.units || int64_t(shared_bytes(shape, s.features)) > limits.shared) continue;
    const bool wider = best != nullptr && shape.units == best->units && s.batch * best->blocks < kPrograms &&
                       s.features >= int64_t(shape.blocks) * kClusterTile;
    if (best == nullptr || wider) best = &shape;
  }
  return best;
}

}  // namespace planning

// Positions of a forward block: of a longer set as many as shared memory holds, since every block but one
// adds a share of z to be written and read, N M accumulators; but no more than leaves kPrograms blocks.
inline int64_t positions_of(const Sizes& s, const Limits& limits, const Tile& tile,
                            ForwardBytes shared_bytes) {
  const int64_t units = ceil_div(s.units, tile.block_n);
  const int64_t needed = std::max<int64_t>(ceil_div(s.longest, tile.block_l), 1);
  int64_t tiles = needed;
  if (s.batch * units < kPrograms) {
    const int64_t rows = ceil_div(s.rows() * units, kPrograms);
    tiles = std::min(tiles, std::max<int64_t>(ceil_div(rows, tile.block_l), 1));
  }
  tiles = std::min(tiles, std::max<int64_t>(kLongest / tile.block_l, 1));
  while (tiles > 1 && int64_t(shared_bytes(tile, false, s.features, tiles * tile.block_l)) > limits.shared)
    --tiles;
  // Of the sizes that make as many blocks, the least.
  return ceil_div(needed, ceil_div(needed, tiles)) * tile.block_l;
}

inline ForwardPlan plan_forward(const Sizes& s, const Limits& limits, ForwardBytes shared_bytes,
                                ClusterBytes cluster_bytes) {
  ForwardPlan plan{};
  if (const ClusterShape* shape = planning::choose_cluster(s, limits, true, cluster_bytes)) {
    plan.kernel = Kernel::kCluster;
    plan.tile = {kClusterLongest, shape->units};
    plan.cluster = shape->blocks;
    plan.blocks = cut(s, kClusterLongest);
    plan.unit_blocks = 1;
    plan.grid = s.batch * shape->blocks;
    plan.shared = int64_t(cluster_bytes(*shape, s.features));
    plan.launches = 1;
    plan.bytes = planning::forward_bytes(s);
    const int64_t product = 2 * s.batch * kClusterLongest * shape->units * s.features;
    plan.operations = product * (s.weighting == Weighting::kLinear ? 2 : 1);
    return plan;
  }
  const auto streamed = [&](const Tile& tile, int64_t positions) {
    return int64_t(shared_bytes(tile, false, s.features, positions));
  };
  const auto fits = [&](const Tile& tile) { return streamed(tile, tile.block_l) <= limits.shared; };
  plan.kernel = Kernel::kBlocks;
  plan.cluster = 1;
  plan.tile = s.itemsize == 2 ? planning::choose(kForwardHalf, s, true, fits)
                              : planning::choose(kForwardFull, s, true, fits);
  plan.unit_blocks = ceil_div(s.units, plan.tile.block_n);

  const int64_t positions = positions_of(s, limits, plan.tile, shared_bytes), step = plan.tile.block_l;
  plan.blocks = cut(s, positions);
  plan.grid = plan.blocks.all * plan.unit_blocks;
  plan.shared = streamed(plan.tile, positions);
  if (positions == step) {  // a resident x has one tile of positions
    const int64_t resident = int64_t(shared_bytes(plan.tile, true, s.features, step));
    plan.resident = planning::stays(limits, resident, plan.shared, plan.grid);
    if (plan.resident) plan.shared = resident;
  }

  plan.launches = plan.blocks.split ? 2 : 1;
  const int64_t shares = plan.blocks.split ? plan.blocks.all * s.units * (s.features + 3) : 0;
  plan.scratch = shares * s.accumulated();
  plan.bytes = planning::forward_bytes(s) + 2 * plan.scratch;
  const int64_t tiles = ceil_div(std::min(positions, std::max<int64_t>(s.longest, 1)), step);
  const int64_t product = 2 * plan.grid * tiles * step * plan.tile.block_n * s.features;
  const int64_t outputs = s.shift && !plan.blocks.split ? 2 : 1;  // for ||u||, and for y
  plan.operations = product * (outputs + (s.weighting == Weighting::kLinear ? 1 : 0));
  return plan;
}

namespace planning {

// Form, tile and what follows from them: the part of a plan before BackwardReduce's.
inline BackwardPlan choose_blocks(const Sizes& s, const Limits& limits, BackwardBytes shared_bytes) {
  BackwardPlan plan{};
  // The Gram form saves reading y, N M elements, and costs 2 L² M operations.
  const bool gram = s.itemsize == 2 && s.shift && s.weighting != Weighting::kAverage &&
                    !cut(s, kGramPositions).split && s.longest <= 2 * s.units && s.units <= kGramUnits;
  const auto form_of = [&](const Tile& tile) {
    return gram ? Form::kGram : cut(s, tile.block_l).split ? Form::kSplit : Form::kWhole;
  };
  const auto fits = [&](const Tile& tile) {
    if (gram && (tile.block_l != kGramPositions || tile.block_n < s.units)) return false;
    return int64_t(shared_bytes(tile, form_of(tile), false, s.features)) <= limits.shared;
  };
  plan.tile = s.itemsize == 2 ? choose(kBackwardHalf, s, false, fits) : choose(kBackwardFull, s, false, fits);
  plan.form = form_of(plan.tile);
  plan.cluster = 1;
  plan.blocks = cut(s, plan.tile.block_l);
  plan.grid = plan.blocks.all;
  const int64_t unit_blocks = ceil_div(s.units, plan.tile.block_n);
  const int64_t streamed = int64_t(shared_bytes(plan.tile, plan.form, false, s.features));
  const int64_t whole = int64_t(shared_bytes(plan.tile, plan.form, true, s.features));
  // Whether x is wanted a second time, and not the second time as it was: types whose scores come again
  // before the pivots are subtracted.
  const bool again = unit_blocks > 1 || (gram && s.needs_x);
  const bool spoilt = unit_blocks > 1 && s.itemsize > 2 && s.weighting == Weighting::kLinear && !s.kept;
  plan.resident = again && !spoilt && stays(limits, whole, streamed, plan.grid);
  plan.shared = plan.resident ? whole : streamed;
  return plan;
}

}  // namespace planning

inline BackwardPlan plan_backward(const Sizes& s, const Limits& limits, BackwardBytes shared_bytes,
                                  ClusterBytes cluster_bytes, const ReduceTile& reduce) {
  BackwardPlan plan{};
  const ClusterShape* shape = planning::choose_cluster(s, limits, s.dy_vectors, cluster_bytes);
  if (shape != nullptr) {
    plan.form = Form::kCluster;
    plan.tile = {kClusterLongest, shape->units};
    plan.cluster = shape->blocks;
    plan.blocks = cut(s, kClusterLongest);
    plan.grid = s.batch * shape->blocks;
    plan.shared = int64_t(cluster_bytes(*shape, s.features));
  } else {
    plan = planning::choose_blocks(s, limits, shared_bytes);
  }
  plan.launches = (plan.blocks.split ? 3 : 1) + 1;

  plan.tiles = ceil_div(s.units, reduce.units) * ceil_div(s.features, reduce.features);
  plan.splits = 1;
  int64_t steps = 1;
  if (s.needs_weight) {
    const int64_t all_steps = std::max<int64_t>(ceil_div(s.rows(), reduce.rows), 1);
    const int64_t wanted =
        std::min(std::max<int64_t>(2 * kPrograms / plan.tiles, 1), std::max<int64_t>(all_steps / 4, 1));
    steps = ceil_div(all_steps, wanted);
    plan.splits = ceil_div(all_steps, steps);
  }
  plan.rows_per_split = steps * reduce.rows;

  const int64_t per_row = 2 * (s.units + 1), per_set = ((shape ? 0 : 4) + (s.shift ? 2 : 0)) * s.units;
  const int64_t sums = plan.blocks.split ? plan.blocks.all * s.units : 0;
  const int64_t parts = plan.splits > 1 ? plan.splits * s.units * s.features : 0;
  plan.scratch = (s.rows() * per_row + s.batch * per_set + sums + parts) * s.accumulated() +
                 (plan.splits > 1 ? plan.tiles * int64_t(sizeof(int)) : 0);
  const bool gram = s.shift && (plan.form == Form::kGram || plan.form == Form::kCluster);
  // x for e and for dW; dX; dY, twice where sets are split; y unless it is the Gram form.
  const int64_t of_rows = 1 + (s.needs_weight ? 1 : 0) + (s.needs_x ? 1 : 0);
  const int64_t of_units = (plan.blocks.split && s.needs_x ? 2 : 1) * (s.shift && !gram ? 2 : 1);
  plan.bytes =
      (of_rows * s.rows() + of_units * s.batch * s.units) * s.features * s.itemsize + 2 * plan.scratch;
  const bool linear = s.weighting == Weighting::kLinear;
  const int64_t with_y = s.shift && !gram ? 1 : 0;
  const int64_t for_scores = 1 + (linear && !s.kept ? 1 : 0) + with_y;
  const int64_t for_x = s.needs_x ? 1 + (linear ? 1 : 0) + (s.itemsize == 2 ? with_y : 0) : 0;
  const int64_t tile_rows = (shape ? s.batch : plan.grid) * plan.tile.block_l;
  const int64_t unit_blocks = ceil_div(s.units, plan.tile.block_n);
  plan.operations = 2 * tile_rows * unit_blocks * plan.tile.block_n * s.features * (for_scores + for_x);
  if (gram) plan.operations += 2 * tile_rows * kGramPositions * s.features * (s.needs_x ? 2 : 1);
  if (s.needs_weight) plan.operations += 2 * s.rows() * plan.tiles * reduce.units * reduce.features;
  return plan;
}

}  // namespace fastac::cuda
