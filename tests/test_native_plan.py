"""The C++ internals: the planner, which cuts a batch into segments and tasks."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import generator

pytestmark = pytest.mark.xdist_group("native")  # what is built once is shared

# Names and shapes (B, L, M, N) of the workloads of the benchmarks; None: lengths of 1 to 300.
WORKLOADS: dict[str, tuple[int, int | None, int, int]] = {
    "kinetics-rgb": (256, 25, 1536, 64),
    "kinetics-flow": (256, 25, 1536, 32),
    "ucf-resnet": (256, 20, 2048, 64),
    "flash-mnist": (1024, 25, 50, 64),
    "yt8m-rgb": (64, 300, 1024, 128),
    "yt8m-audio": (64, 300, 128, 32),
    "ragged": (256, None, 1024, 64),
    "mil-bag": (1, 131072, 1024, 8),
    "online": (1, 25, 1536, 64),
}


def lengths_of(name: str) -> list[int]:
    batch, length, _, _ = WORKLOADS[name]
    return [length] * batch if length is not None else generator().integers(1, 301, batch).tolist()


ODD_LENGTHS = {
    "no sets": [],
    "one empty": [0],
    "all empty": [0] * 40,
    "some empty": [0, 5, 0, 0, 3000, 0],
    "one position": [1],
    "one long": [100_003],
    "long among short": [7, 50_000, 0, 1, 30, 2048],
    "trailing empty": [4000, *[0] * 100],
    "many": [3] * 5000,
}


def covered_once(plan: dict[str, Any], lengths: list[int]) -> None:
    """Tasks cover the segments in order, segments every position of every set once, empty sets too."""
    at = 0
    for begin, end in plan["tasks"]:
        assert begin == at < end
        at = end
    assert at == len(plan["segments"])
    segments_covered(plan["segments"], lengths)


def segments_covered(segments: list[tuple[int, int, int, int]], lengths: list[int]) -> None:
    i, slots = 0, []
    for b, length in enumerate(lengths):
        first, at = i, 0
        while i < len(segments) and segments[i][0] == b:
            _, begin, end, partial = segments[i]
            assert begin == at
            assert end > begin or length == 0
            at, i = end, i + 1
            slots.append(partial)
        assert i > first, f"set {b} has no segment"
        assert at == length
        shared = i - first > 1
        assert all((s[3] >= 0) == shared for s in segments[first:i])
    assert i == len(segments)
    used = [s for s in slots if s >= 0]
    assert used == list(range(len(used)))


def forward_limits(
    harness: ModuleType, plan: dict[str, Any], lengths: list[int], units: int, features: int
) -> None:
    assert plan["block_rows"] >= 1
    assert plan["unit_block"] >= 16
    assert plan["unit_block"] % 16 == 0
    assert plan["unit_block"] * features <= max(harness.unit_elements, features) + 16 * features
    assert plan["unit_block"] < units + 16
    assert len(plan["tasks"]) <= harness.forward_tasks
    assert plan["partials"] == sum(s[3] >= 0 for s in plan["segments"])
    # Workspace at most 5 % of x + 4 N M, counted in elements; both sides have the factor M.
    assert plan["partials"] * units <= 0.05 * sum(lengths) + 4 * units


def backward_limits(plan: dict[str, Any], rows: int, sets: int, units: int) -> None:
    assert plan["unit_block"] == units
    # One dweight per task, at most 5 % of x and y + 4 N M, and no more than 16.
    assert len(plan["tasks"]) * units <= 0.05 * (rows + 2 * sets * units) + 4 * units
    assert len(plan["tasks"]) <= 16


@pytest.mark.parametrize("name", WORKLOADS)
def test_plan_of_workloads(harness: ModuleType, name: str) -> None:
    lengths, (batch, _, features, units) = lengths_of(name), WORKLOADS[name]
    forward = harness.plan_forward(lengths, units, features)
    covered_once(forward, lengths)
    forward_limits(harness, forward, lengths, units, features)
    pieces = len(forward["tasks"]) * -(-units // forward["unit_block"])
    assert pieces >= 4, "nothing to do for more than one thread"
    rows = sum(lengths)
    for gradients in (False, True):
        backward = harness.plan_backward(lengths, rows, units, features, gradients)
        covered_once(backward, lengths)
        if gradients:
            backward_limits(backward, rows, batch, units)


@pytest.mark.parametrize("units", [1, 8, 17, 64, 1000])
@pytest.mark.parametrize("name", ODD_LENGTHS)
def test_plan_of_odd_lengths(harness: ModuleType, name: str, units: int) -> None:
    lengths, rows = ODD_LENGTHS[name], sum(ODD_LENGTHS[name])
    for features in (1, 50, 1024, 100_000):
        forward = harness.plan_forward(lengths, units, features)
        covered_once(forward, lengths)
        forward_limits(harness, forward, lengths, units, features)
        for gradients in (False, True):
            backward = harness.plan_backward(lengths, rows, units, features, gradients)
            covered_once(backward, lengths)
            if gradients:
                backward_limits(backward, rows, len(lengths), units)


@pytest.mark.parametrize(
    ("batch", "length", "units"), [(15, 1300, 64), (12, 2600, 128), (4, 1025, 51), (8, 1100, 8)]
)
def test_partials_of_sets_barely_cut(harness: ModuleType, batch: int, length: int, units: int) -> None:
    """Sets a little longer than a segment: the workspace stays within its limit however many there are."""
    forward_limits(harness, harness.plan_forward([length] * batch, units, 64), [length] * batch, units, 64)


def test_plan_depends_on_lengths_only(harness: ModuleType) -> None:
    lengths = lengths_of("ragged")
    before, threads = harness.plan_forward(lengths, 64, 1024), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert harness.plan_forward(lengths, 64, 1024) == before
        for fill in (0, 12345):  # positions, first rows and extents; without `others` they are null
            assert harness.plan_forward(lengths, 64, 1024, [fill] * 256) == before
            a = harness.plan_backward(lengths, 1000, 64, 1024, True, [fill] * 256)
            assert a == harness.plan_backward(lengths, 1000, 64, 1024, True)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ODD_LENGTHS)
def test_make_segments(harness: ModuleType, name: str) -> None:
    for units in (1, 64, 5000):
        segments_covered(harness.make_segments(ODD_LENGTHS[name], units), ODD_LENGTHS[name])


@pytest.mark.parametrize("count", [1, 2, 7, 64])
@pytest.mark.parametrize("fixed", [1, 33])
def test_balance(harness: ModuleType, count: int, fixed: int) -> None:
    for rows in ([], [5], [0] * 30, [3] * 200, generator().integers(0, 300, 500).tolist(), [9000, 1, 1, 1]):
        ranges, at = harness.balance(rows, count, fixed), 0
        for begin, end in ranges:
            assert begin == at < end
            at = end
        assert at == len(rows)
        assert len(ranges) <= count
        work = [sum(n + fixed for n in rows[b:e]) for b, e in ranges]
        if rows:
            assert max(work) <= sum(work) / count + max(rows) + fixed


def test_arena(harness: ModuleType) -> None:
    counts = [0, 1, 8, 9, 1000, 3]
    starts, used = harness.arena(counts)
    assert all(at % harness.alignment == 0 for at in starts)
    ends = [at + 8 * n for at, n in zip(starts, counts, strict=True)]
    assert all(end <= at for end, at in zip(ends, [*starts[1:], used], strict=True))
