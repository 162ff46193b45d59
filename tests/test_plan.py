"""Launch planning of the Triton backend: plain Python, checked for every named workload and dtype."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastac
from fastac.kernels import plan
from fastac.kernels.plan import Problem

WORKLOADS = {  # B, L, M, N
    "kinetics-rgb": (256, 25, 1536, 64),
    "kinetics-flow": (256, 25, 1536, 32),
    "ucf-resnet": (256, 20, 2048, 64),
    "flash-mnist": (1024, 25, 50, 64),
    "yt8m-rgb": (64, 300, 1024, 128),
    "yt8m-audio": (64, 300, 128, 32),
    "mil-bag": (1, 131072, 1024, 8),
    "online": (1, 25, 1536, 64),
}
SIZES = (2, 4, 8)
FITTING = ("kinetics-rgb", "kinetics-flow", "ucf-resnet", "flash-mnist", "online")


def padded(name: str, itemsize: int = 2, **changes: object) -> Problem:
    b, length, m, n = WORKLOADS[name]
    made = Problem(b, length, length, m, n, itemsize, "linear", "padded")
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def ragged(itemsize: int = 2, longest: int = 300) -> Problem:
    return Problem(256, 256 * 150, longest, 1024, 64, itemsize, "linear", "packed")


def check(p: Problem) -> None:
    """What any plan must fulfil."""
    forward, backward = plan.forward_plan(p), plan.backward_plan(p)
    for planned, longest in ((forward, plan.LONGEST), (backward, plan.LONGEST_BACKWARD)):
        c = planned.config
        for size in (c.block_l, c.block_n, c.block_m):
            assert size >= plan.SMALLEST and size & (size - 1) == 0
        assert c.block_l <= longest[p.itemsize]
        assert planned.split or c.block_l >= p.longest  # a set that is not split fits its block
        assert not planned.split or p.longest > c.block_l  # nothing is split that fits
        if p.layout == "packed":
            assert planned.all_blocks == p.length // c.block_l + p.batch + 1
        else:
            assert planned.blocks * c.block_l >= p.length
            assert planned.all_blocks == planned.blocks * p.batch
        in_flight = c.stages * c.block_m * (c.block_l + c.block_n) * p.itemsize
        assert in_flight <= 2 * plan.SHARED
    assert forward.unit_blocks * forward.config.block_n >= p.units
    assert forward.grid == forward.all_blocks * forward.unit_blocks
    r = backward.reduce
    assert backward.tiles == math.ceil(p.units / r.block_n) * math.ceil(p.features / r.block_m)
    if p.weighting == "linear":
        assert backward.splits * backward.rows_per_split >= p.rows
        assert (backward.splits - 1) * backward.rows_per_split < max(p.rows, 1)  # no part is empty
        assert backward.rows_per_split % r.block_l == 0
    if backward.gram:
        assert p.shift and not backward.split and p.itemsize in plan.GRAM


@pytest.mark.parametrize("itemsize", SIZES)
@pytest.mark.parametrize("name", WORKLOADS)
def test_named_workloads(name: str, itemsize: int) -> None:
    for weighting in plan.WEIGHTINGS:
        for layout in plan.LAYOUTS[:3]:
            for shift in (True, False):
                check(padded(name, itemsize, weighting=weighting, layout=layout, shift=shift))
    check(ragged(itemsize))
    check(ragged(itemsize, longest=256 * 150))  # no max_length: T bounds every set


@given(
    st.integers(0, 5000), st.integers(0, 5000), st.integers(1, 5000), st.integers(1, 300),
    st.sampled_from(SIZES), st.sampled_from(plan.WEIGHTINGS), st.sampled_from(plan.LAYOUTS), st.booleans(),
)  # fmt: skip
def test_any_problem(
    b: int, length: int, m: int, n: int, itemsize: int, weighting: str, layout: str, shift: bool
) -> None:
    check(Problem(b, length, length, m, n, itemsize, weighting, layout, shift))
    check(Problem(b, length, min(length, 40), m, n, itemsize, weighting, "packed", shift))


def test_sets_that_fit_are_not_split() -> None:
    for name in FITTING:
        assert not plan.forward_plan(padded(name)).split
        assert not plan.backward_plan(padded(name)).split
        assert plan.backward_plan(padded(name)).gram  # y is not read
    for name in ("yt8m-rgb", "mil-bag"):
        assert plan.forward_plan(padded(name)).split
        assert not plan.backward_plan(padded(name)).gram


def test_few_sets_still_fill_a_gpu() -> None:
    assert plan.forward_plan(padded("mil-bag")).grid >= 4 * plan.PROGRAMS
    assert plan.backward_plan(padded("mil-bag")).grid >= 4 * plan.PROGRAMS
    assert plan.forward_plan(padded("online")).grid == 4  # units are cut as fine as they go
    assert plan.forward_plan(padded("kinetics-rgb")).config.block_n == 64  # enough sets: x is read once
    planned = plan.backward_plan(padded("kinetics-rgb"))
    assert plan.PROGRAMS <= planned.tiles * planned.splits <= 2 * plan.PROGRAMS


def test_the_gram_form_is_for_short_sets_and_half_types() -> None:
    """See plan.GRAM for the measurement; without shift there is no y to save."""
    assert not plan.backward_plan(padded("kinetics-rgb", 4)).gram
    assert not plan.backward_plan(padded("kinetics-rgb", shift=False)).gram
    assert not plan.backward_plan(padded("kinetics-rgb", units=8)).gram  # L² against N: y is the smaller part
    assert not plan.backward_plan(padded("kinetics-rgb", length=33, longest=33)).gram
    assert not plan.backward_plan(padded("kinetics-rgb", features=16)).gram  # nothing to save
    masked = {"weighting": "scores", "layout": "mask"}  # with more than 32 units registers spill on sm_120
    assert not plan.backward_plan(padded("kinetics-rgb", **masked)).gram
    assert plan.backward_plan(padded("kinetics-rgb", units=32, **masked)).gram


def test_a_measured_winner_is_taken_on_its_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    p = padded("kinetics-rgb", gpu="Some GPU")
    chosen = plan.forward_plan(p).config
    name = plan.key("forward", 2, chosen)
    assert name == "forward 16-bit L32 N64"
    measured = {"Some GPU": {name: {"block_m": 128, "warps": 8, "stages": 4}}}
    monkeypatch.setattr(plan, "winners", lambda: measured)
    found = plan.forward_plan(p).config
    assert (found.block_m, found.warps, found.stages) == (128, 8, 4)
    assert (found.block_l, found.block_n) == (chosen.block_l, chosen.block_n)
    assert plan.forward_plan(dataclasses.replace(p, gpu="Another")).config == chosen
    assert plan.forward_plan(dataclasses.replace(p, itemsize=4)).config.warps == 8
    assert "measured on Some GPU" in str(plan.describe(p))
    assert "model" in str(plan.describe(dataclasses.replace(p, gpu="Another")))


def test_the_table_of_winners() -> None:
    for gpu, entries in plan.winners().items():
        assert gpu
        for name, entry in entries.items():
            kernel, bits, length, units = name.split()
            assert kernel in ("forward", "backward", "reduce")
            assert bits in {plan.dtype_class(s) for s in SIZES}
            assert int(length[1:]) and int(units[1:])
            assert set(entry) == {"block_m", "warps", "stages"}


@pytest.mark.parametrize("itemsize", SIZES)
def test_neighbours(itemsize: int) -> None:
    base = plan.forward_plan(padded("kinetics-rgb", itemsize)).config
    found = plan.neighbours(base, itemsize)
    assert found[0] == base
    assert len(set(found)) == len(found) >= 3
    for c in found:
        assert (c.block_l, c.block_n) == (base.block_l, base.block_n)  # the grid depends on these
        assert c.stages * c.block_m * (c.block_l + c.block_n) * itemsize <= 2 * plan.SHARED
    for c in plan.neighbours(base, itemsize, "reduce"):  # its grid depends on the features too
        assert c.block_m == base.block_m


def test_a_bound_of_the_lengths() -> None:
    x, offsets = torch.empty(10, 4), torch.tensor([0, 3, 3, 8])
    assert plan.upper_bound(x, offsets, None) == 5  # CPU offsets are read
    assert plan.upper_bound(x, offsets, 6) == 6
    assert plan.upper_bound(x, offsets, 60) == 10
    assert plan.upper_bound(x.to("meta"), offsets.to("meta"), None) == 10  # a device's are not
    assert plan.upper_bound(x, offsets[:1], None) == 0
    assert plan.upper_bound(torch.empty(2, 7, 4), None, 3) == 7


def test_planning_needs_neither_triton_nor_a_device() -> None:
    code = (
        "import sys; import torch; sys.modules['triton'] = None\n"
        "from fastac.kernels import plan\n"
        "p = plan.Problem(256, 25, 25, 1536, 64, 2, 'linear', 'padded')\n"
        "print(plan.describe(p)['forward'], torch.cuda.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("forward_blocks, 256 programs")
    assert done.stdout.strip().endswith("False")


def test_explain_shows_the_plan() -> None:
    pytest.importorskip("triton")
    text = str(fastac.explain(torch.randn(3, 25, 64), torch.randn(64, 64), backend="triton"))
    for part in (
        "backend    triton",
        "plan       forward: forward_blocks",
        "backward_reduce",
        "warps",
        "scratch",
    ):
        assert part in text
    long = str(fastac.explain(torch.randn(1, 300, 64), torch.randn(8, 64), backend="triton"))
    assert "forward_blocks + forward_combine" in long
    assert "backward_blocks + backward_sums + backward_blocks + backward_reduce" in long
