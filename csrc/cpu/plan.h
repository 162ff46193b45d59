// How a call is cut into tasks. Everything here depends on shapes and lengths only, never on the number of
// threads or the machine, so that results do not either.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../attention_cluster.h"

namespace fastac::cpu {

constexpr int64_t kBlockElements =
    128 * 1024;                        // of x packed at a time: 512 KiB in float32, a quarter of a common L2
constexpr int64_t kForwardRows = 128;  // ... of no more rows in the forward pass, each one chain of sums
constexpr int64_t kUnitElements = 512 * 1024;  // of running sums (units x features) a forward task holds
constexpr int64_t kUnitGranule = 16;    // unit blocks start at multiples of every instruction set's vector
constexpr int64_t kForwardTasks = 64;   // ranges of equal work a forward call is cut into
constexpr int64_t kFewTasks = 8;        // below this many segments the units are split as well
constexpr int64_t kSegmentRows = 1024;  // a set is cut into segments no shorter than this
constexpr int64_t kSegments = 16;       // ... and into about this many when it is alone
constexpr int64_t kMaxChunks = 16;      // partial sums of dweight
constexpr int64_t kShortRow = 128;      // features up to which a backward task keeps units in lanes

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// A run of positions of one set that one task reduces; `partial` is its slot in the workspace, -1 if it is
// the whole set.
struct Segment {
  int64_t set, begin, end, partial;
};

struct Range {
  int64_t begin, end;
};

struct Plan {
  int64_t block_rows = 1;  // rows of x packed at a time
  int64_t unit_block = 1;  // units of one forward task
  int64_t partials = 0;    // segments that share a set with another
  std::vector<Segment> segments;
  std::vector<Range> tasks;  // of segments, of about equal work
};

inline int64_t block_rows(int64_t features) {
  return std::max<int64_t>(8, kBlockElements / std::max<int64_t>(features, 64));
}

inline std::vector<Segment> make_segments(const Sets& sets, int64_t units) {
  int64_t total = 0;
  for (int64_t b = 0; b < sets.count; ++b) total += sets.length[b];
  // A partial result is units x features, so a segment of at least 20 * units rows keeps the workspace within
  // 5 % of x.
  const int64_t target = std::max({kSegmentRows, 20 * units, ceil_div(total, kSegments)});
  std::vector<Segment> segments;
  segments.reserve(sets.count);
  int64_t partial = 0;
  for (int64_t b = 0; b < sets.count; ++b) {
    const int64_t parts = std::max<int64_t>(1, sets.length[b] / target);
    for (int64_t i = 0; i < parts; ++i)
      segments.push_back(
          {b, sets.length[b] * i / parts, sets.length[b] * (i + 1) / parts, parts > 1 ? partial++ : -1});
  }
  return segments;
}

// Cuts the segments into at most `count` consecutive ranges of about equal work; `fixed` rows stand for what
// a set costs whatever its length.
inline std::vector<Range> balance(const std::vector<Segment>& segments, int64_t count, int64_t fixed) {
  double total = 0;
  for (const Segment& s : segments) total += double(s.end - s.begin + fixed);
  std::vector<Range> ranges;
  const int64_t n = int64_t(segments.size());
  double done = 0;
  for (int64_t i = 0, start = 0; i < n; ++i) {
    done += double(segments[i].end - segments[i].begin + fixed);
    if (i + 1 == n || done * double(count) >= total * double(ranges.size() + 1)) {
      ranges.push_back({start, i + 1});
      start = i + 1;
    }
  }
  return ranges;
}

inline Plan plan_forward(const Sets& sets, int64_t units, int64_t features) {
  Plan plan;
  plan.block_rows = std::min(block_rows(features), kForwardRows);
  plan.segments = make_segments(sets, units);
  for (const Segment& s : plan.segments) plan.partials += s.partial >= 0;
  plan.tasks = balance(plan.segments, kForwardTasks, units / 2 + 1);
  int64_t blocks = ceil_div(units * features, kUnitElements);
  const int64_t segments = int64_t(plan.segments.size());
  if (segments < kFewTasks && features * units >= 16 * 1024)
    blocks = std::max(blocks, ceil_div(kFewTasks, std::max<int64_t>(segments, 1)));
  plan.unit_block = ceil_div(ceil_div(units, blocks), kUnitGranule) * kUnitGranule;
  return plan;
}

inline Plan plan_backward(const Sets& sets, int64_t units, int64_t features, bool parameter_gradients) {
  Plan plan;
  plan.block_rows = block_rows(features);
  plan.unit_block = units;
  plan.segments = make_segments(sets, units);
  for (const Segment& s : plan.segments) plan.partials += s.partial >= 0;
  // Every chunk sums dweight into a copy of its own: four, and more while all copies stay within 4 % of x and
  // y.
  int64_t chunks = kForwardTasks;
  if (parameter_gradients) {
    const double traffic = double(sets.rows + 2 * sets.count * units) * double(features);
    chunks = std::min(kMaxChunks, int64_t(4 + 0.04 * traffic / double(units * features)));
  }
  plan.tasks = balance(plan.segments, chunks, units + 1);
  return plan;
}

}  // namespace fastac::cpu
