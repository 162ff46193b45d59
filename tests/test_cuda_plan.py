"""Launch planning of the CUDA backend: csrc/cuda/plan.h, through the operator that `fastac.explain` calls."""

from __future__ import annotations

from typing import Any

import cuda_operators
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import fastac
from benchmarks.workloads import WORKLOADS, Workload
from fastac import _cuda

LIMITS = {
    "100 KB": (99 << 10, 86),
    "164 KB": (163 << 10, 80),
    "227 KB": (227 << 10, 90),
    "100 KB, clusters": (99 << 10, 120),
    "227 KB, no clusters": (227 << 10, 89),
}
ALIGNED = {"x_vectors": True, "weight_vectors": True, "dy_vectors": True}
CLUSTER = 1  # the kernel
WHOLE, GRAM, SPLIT, CLUSTERED = range(4)  # the forms
PROGRAMS = 128  # csrc/cuda/plan.h
SIZES = (2, 4, 8)
Plans = tuple[dict[str, int], dict[str, int]]


@pytest.fixture(scope="module", autouse=True)
def library() -> None:
    cuda_operators.load()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def plan(limits: str = "227 KB", **changes: Any) -> Plans:
    call: dict[str, Any] = {
        "batch": 256,
        "length": 25,
        "features": 1536,
        "units": 64,
        "itemsize": 2,
        "layout": "padded",
        "weighting": "fc1",
        "shift": True,
        "kept": True,
        "needs_x": True,
        "needs_weight": True,
    } | ALIGNED
    call |= changes
    call.setdefault("longest", call["length"])
    shared, capability = LIMITS[limits]
    made = _cuda.plan(**call, shared=shared, capability=capability)
    check(made, call, shared, capability)
    return made


def check(made: Plans, call: dict[str, Any], shared: int, capability: int) -> None:
    """What any plan must fulfil."""
    forward, backward = made
    batch, length, units = call["batch"], call["length"], call["units"]
    packed = call["layout"] == "packed"
    rows = length if packed else batch * length
    for p in made:
        assert 0 < p["shared"] <= shared
        assert p["block_l"] in (32, 64)
        assert p["block_n"] in (16, 32, 64)
        assert p["cluster"] in (1, 4, 8)
        positions = p.get("positions", p["block_l"])
        assert positions % p["block_l"] == 0
        blocks = length // positions + batch + 1 if packed else batch * max(ceil_div(length, positions), 1)
        assert p["blocks"] == blocks
        split = p["split"] if p is forward else p["form"] == SPLIT
        assert bool(split) == (call["longest"] > positions)
        assert p["scratch"] >= 0
        assert p["bytes"] >= 0
        assert p["operations"] >= 0
    assert forward["unit_blocks"] == ceil_div(units, forward["block_n"])
    assert (forward["cluster"] > 1) == (forward["kernel"] == CLUSTER)
    assert (backward["cluster"] > 1) == (backward["form"] == CLUSTERED)
    vectors = call["x_vectors"] and (call["weight_vectors"] or call["weighting"] != "fc1")
    for p, aligned in ((forward, vectors), (backward, vectors and call["dy_vectors"])):
        if p["cluster"] == 1:
            continue
        assert capability >= 90
        assert aligned
        assert call["itemsize"] == 2
        assert call["longest"] <= 32
        assert units <= p["block_n"]
        assert call["features"] % 8 == 0
        assert call["features"] <= p["cluster"] * 256  # what its registers have room for
        assert p["grid"] == batch * p["cluster"]
    if forward["cluster"] == 1:
        assert forward["grid"] == forward["blocks"] * forward["unit_blocks"]
    assert forward["launches"] == 1 + forward["split"]
    assert not forward["resident"] or forward["positions"] == forward["block_l"]
    if backward["cluster"] == 1:
        assert backward["grid"] == backward["blocks"]
    assert backward["launches"] == (4 if backward["form"] == SPLIT else 2)
    assert backward["splits"] * backward["rows_per_split"] >= (rows if call["needs_weight"] else 0)
    if call["needs_weight"] and backward["splits"] > 1:
        assert (backward["splits"] - 1) * backward["rows_per_split"] < rows  # no part is empty
    if backward["form"] == GRAM:
        assert call["shift"] and call["itemsize"] == 2 and call["longest"] <= 32
        assert units <= backward["block_n"]
    # Outputs must move whatever the plan; products cannot be fewer than the sizes ask for.
    assert forward["bytes"] >= (rows + batch * units) * call["features"] * call["itemsize"]
    products = 2 if call["weighting"] == "fc1" else 1
    if not packed:
        assert forward["operations"] >= 2 * products * rows * units * call["features"]


def of_workload(w: Workload) -> dict[str, Any]:
    sizes = {"batch": w.batch, "features": w.in_features, "units": w.cluster_size}
    weighting = "fc1" if w.scores == "fc1" else "scores"
    if not w.ragged:
        return sizes | {"length": w.length, "layout": "padded", "weighting": weighting}
    rows = w.batch * (w.length + 1) // 2
    return sizes | {"length": rows, "longest": w.length, "layout": "packed", "weighting": weighting}


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("name", WORKLOADS)
def test_named_workloads(name: str, limits: str) -> None:
    call = of_workload(WORKLOADS[name])
    for itemsize in SIZES:
        for shift in (True, False):
            for kept in (True, False):
                plan(limits, **call, itemsize=itemsize, shift=shift, kept=kept)
        plan(limits, **call | {"weighting": "average"}, itemsize=itemsize)
        plan(limits, **call, itemsize=itemsize, needs_x=False)
    if call["layout"] == "packed":  # without max_length T bounds every set
        plan(limits, **call | {"longest": call["length"]})


@settings(max_examples=150)
@given(
    st.integers(0, 5000), st.integers(0, 5000), st.integers(1, 5000), st.integers(1, 300),
    st.sampled_from(SIZES), st.sampled_from(_cuda.WEIGHTINGS), st.sampled_from(_cuda.LAYOUTS),
    st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()), st.sampled_from(list(LIMITS)),
    st.integers(0, 60), st.tuples(st.booleans(), st.booleans(), st.booleans()),
)  # fmt: skip
def test_any_sizes(
    batch: int, length: int, features: int, units: int, itemsize: int, weighting: str, layout: str,
    switches: tuple[bool, bool, bool, bool], limits: str, longest: int, aligned: tuple[bool, bool, bool],
) -> None:  # fmt: skip
    shift, kept, needs_x, needs_weight = switches
    plan(
        limits, batch=batch, length=length, features=features, units=units, itemsize=itemsize,
        longest=min(length, longest) if layout == "packed" else length, layout=layout, weighting=weighting,
        shift=shift, kept=kept and weighting == "fc1", needs_x=needs_x,
        needs_weight=needs_weight and weighting == "fc1", **dict(zip(ALIGNED, aligned, strict=True)),
    )  # fmt: skip


@settings(max_examples=100)
@given(
    st.integers(0, 3000), st.integers(0, 34), st.integers(1, 2500), st.integers(1, 70),
    st.sampled_from(_cuda.WEIGHTINGS), st.sampled_from(["227 KB", "100 KB, clusters"]), st.booleans(),
)  # fmt: skip
def test_any_short_sets(
    batch: int, length: int, features: int, units: int, weighting: str, limits: str, shift: bool
) -> None:
    features -= features % 8 if features >= 8 else 0
    plan(
        limits, batch=batch, length=length, features=features, units=units, weighting=weighting, shift=shift,
        needs_weight=weighting == "fc1",
    )  # fmt: skip


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("itemsize", SIZES)
def test_sizes_at_the_ends(limits: str, itemsize: int) -> None:
    for changes in (
        {"units": 1},
        {"features": 1},
        {"length": 1},
        {"batch": 1},
        {"batch": 0},
        {"length": 0},
        {"batch": 1, "length": 1, "features": 1, "units": 1},
        {"batch": 1 << 22, "features": 4096, "units": 512},  # N M B beyond 2^31
        {"batch": 1, "length": 1 << 20, "units": 8},
        {"features": 1 << 20},
        {"units": 5000},
        {"batch": 3, "length": 1 << 24, "layout": "packed", "longest": 1 << 24},
    ):
        plan(limits, itemsize=itemsize, **changes)


def test_short_sets_take_one_launch_and_the_gram_form() -> None:
    for name in ("kinetics-rgb", "kinetics-flow", "ucf-resnet", "flash-mnist", "online"):
        for limits in LIMITS:
            forward, backward = plan(limits, **of_workload(WORKLOADS[name]))
            assert (forward["launches"], backward["launches"]) == (1, 2)
            assert backward["form"] in (GRAM, CLUSTERED)
    portable = "164 KB"
    assert plan(portable)[1]["form"] == GRAM
    assert plan(portable, itemsize=4)[1]["form"] == WHOLE  # full types cannot afford its rounding
    assert plan(portable, shift=False)[1]["form"] == WHOLE
    assert plan(portable, length=33)[1]["form"] != GRAM
    assert plan(portable, units=8)[1]["form"] == WHOLE  # L² against N: y is the smaller part


def clusters(limits: str = "227 KB", **changes: Any) -> tuple[int, int]:
    """Blocks of a cluster in the forward and in the backward pass, 1 where it is no cluster kernel."""
    forward, backward = plan(limits, **changes)
    return forward["cluster"], backward["cluster"]


def test_clusters_take_short_sets() -> None:
    for name in ("kinetics-rgb", "kinetics-flow", "ucf-resnet", "online"):
        call = of_workload(WORKLOADS[name])
        assert clusters(**call) == (8, 8)
        assert clusters("227 KB, no clusters", **call) == (1, 1)
        assert clusters(**call, itemsize=4) == (1, 1)
        forward, backward = plan(**call)
        assert forward["block_n"] == backward["block_n"] == (32 if call["units"] <= 32 else 64)
    for name in ("flash-mnist", "yt8m-rgb", "yt8m-audio", "ragged", "mil-bag"):  # M = 50, or long sets
        assert clusters(**of_workload(WORKLOADS[name])) == (1, 1)
    # At 100 KB there is room for what the forward keeps, not for what the backward does.
    assert clusters("100 KB, clusters", **of_workload(WORKLOADS["kinetics-rgb"])) == (8, 1)
    assert clusters("100 KB, clusters", features=256) == (4, 8)


def test_what_a_cluster_cannot_take() -> None:
    assert clusters() == (8, 8)
    for changes in ({"length": 33}, {"units": 65}, {"features": 1540}, {"features": 2056}):
        assert clusters(**changes) == (1, 1)
    assert clusters(length=32, units=64, features=2048) == (8, 8)
    assert clusters(x_vectors=False) == clusters(weight_vectors=False) == (1, 1)
    assert clusters(weight_vectors=False, weighting="scores", needs_weight=False) == (8, 8)  # there is no W
    assert clusters(dy_vectors=False) == (8, 1)
    # A packed call is bound by max_length, if there is one.
    packed = {"layout": "packed", "length": 6400, "batch": 256}
    assert clusters(**packed, longest=32) == (8, 8)
    assert clusters(**packed) == (1, 1)


def test_blocks_of_a_cluster() -> None:
    assert clusters(features=64) == (1, 1)  # one tile
    assert clusters(features=72) == (4, 4)
    assert clusters(features=1024) == (4, 4)
    assert clusters(features=1032) == (8, 8)
    # Few sets leave multiprocessors idle.
    assert clusters(features=1024, batch=31) == (8, 8)
    assert clusters(features=1024, batch=32) == (4, 4)
    assert clusters(features=504, batch=1) == (4, 4)  # slices would be less than a tile


def test_online_is_one_cluster_and_one_launch() -> None:
    forward, backward = plan(**of_workload(WORKLOADS["online"]))
    assert (forward["launches"], forward["grid"], forward["cluster"]) == (1, 8, 8)
    assert (backward["launches"], backward["grid"], backward["cluster"]) == (2, 8, 8)
    assert forward["scratch"] == 0


def test_clusters_read_everything_once() -> None:
    """Least bytes, and no scratch but what BackwardReduce reads."""
    call = of_workload(WORKLOADS["kinetics-rgb"])
    forward, backward = plan(**call)
    rows, sets, m = 256 * 25, 256 * 64, 1536
    assert forward["bytes"] == (rows + sets) * m * 2
    assert backward["bytes"] == (3 * rows + sets) * m * 2 + 2 * backward["scratch"]
    portable = plan("227 KB, no clusters", **call)[1]
    assert portable["scratch"] - backward["scratch"] == 4 * sets * 4
    assert forward["operations"] == 2 * 2 * 256 * 32 * 64 * m
    assert plan(**call, itemsize=2, kept=False)[1]["operations"] > backward["operations"]


def test_long_sets_are_split_where_they_must_be() -> None:
    assert plan("227 KB", **of_workload(WORKLOADS["yt8m-rgb"]))[0]["split"] == 0  # its scores fit
    assert plan("100 KB", **of_workload(WORKLOADS["yt8m-rgb"]))[0]["split"] == 1
    forward, backward = plan(**of_workload(WORKLOADS["mil-bag"]), needs_weight=False)
    assert forward["split"] == 1
    assert forward["grid"] >= PROGRAMS
    assert backward["grid"] >= PROGRAMS
    # Shares of z are a small part of what moves.
    assert forward["scratch"] < 0.1 * forward["bytes"]


def test_few_sets_are_cut_finer() -> None:
    assert plan("227 KB, no clusters", **of_workload(WORKLOADS["online"]))[0]["grid"] == 4
    assert plan()[0]["unit_blocks"] == 1  # enough sets: x is read once
    _, backward = plan()
    assert PROGRAMS <= backward["tiles"] * backward["splits"] <= 2 * PROGRAMS


def test_x_stays_where_there_is_room() -> None:
    online, large = of_workload(WORKLOADS["online"]), "227 KB, no clusters"
    assert plan(large, **online)[0]["resident"]  # one block is all there is
    assert plan("100 KB", **online)[0]["resident"] == 0  # 110 KB
    assert plan(large, **of_workload(WORKLOADS["flash-mnist"]))[0]["resident"]  # one tile of features
    assert plan(large)[0]["resident"] == 0  # one block would be alone on its multiprocessor


def test_plans_depend_on_their_arguments_only() -> None:
    assert plan() == plan()
    lengths = plan(layout="lengths")
    assert lengths == plan(layout="mask") == plan()


def test_explain_shows_the_plan() -> None:
    x, weight = torch.randn(3, 25, 64).bfloat16(), torch.randn(64, 64).bfloat16()
    ones = torch.ones(64)
    text = str(fastac.explain(x, weight, ones, ones, backend="cuda"))
    for part in (
        "backend    cuda",
        "plan       configurations: the model of csrc/cuda/plan.h, not measured",
        "plan       forward: ForwardBlocks, 12 blocks of 32 positions, tiles L 32 x N 16",
        "BackwardBlocks + BackwardReduce",
        "backward form: Gram",
        "scratch",
        "weight gradient: none",
    ):
        assert part in text
    rows = torch.randn(3, 25, 136).bfloat16()
    ready = str(fastac.explain(rows[..., :128], weight.repeat(1, 2), ones, ones, backend="cuda"))
    assert "forward: ForwardCluster, at most 3 clusters of 4 blocks, tiles L 32 x N 64" in ready
    assert "backward: BackwardCluster + BackwardReduce, at most 3 clusters of 4 blocks" in ready
    assert "backward form: Gram, by clusters" in ready
    shifted = str(fastac.explain(rows[..., 1:129], weight.repeat(1, 2), ones, ones, backend="cuda"))
    assert "ForwardBlocks" in shifted
    assert "BackwardCluster" not in shifted
    trained = fastac.explain(x, weight.requires_grad_(), ones, ones, backend="cuda")
    assert "1 tiles x 1 parts of 128 rows" in str(trained.plan["weight gradient"])
    offsets = torch.tensor([0, 900, 1000])
    packed = fastac.explain(torch.randn(1000, 64), torch.randn(8, 64), offsets=offsets, backend="cuda")
    assert "BackwardBlocks + BackwardSums + BackwardBlocks" in str(packed.plan["backward"])
    short = fastac.explain(
        torch.randn(1000, 64), torch.randn(8, 64), offsets=torch.arange(0, 1001, 20), max_length=20,
        backend="cuda",
    )  # fmt: skip
    assert "BackwardSums" not in str(short.plan["backward"])


@pytest.mark.filterwarnings("error")
def test_explain_of_fake_tensors() -> None:
    """They have no address, which counts as one that is aligned."""
    with FakeTensorMode():
        x, weight = (torch.empty(*sizes, dtype=torch.bfloat16) for sizes in ((3, 25, 128), (64, 128)))
        text = str(fastac.explain(x, weight, backend="cuda"))
    assert "forward: ForwardCluster" in text


def test_nonsense_is_refused() -> None:
    for changes in ({"units": 0}, {"features": 0}, {"batch": -1}, {"itemsize": 3}):
        with pytest.raises(RuntimeError, match="fastac: "):
            plan(**changes)
    with pytest.raises(RuntimeError, match="no tile fits"):
        _cuda.plan(1, 1, 1, 64, 64, 2, "padded", "fc1", True, True, True, True, True, True, True, 1 << 10, 90)
