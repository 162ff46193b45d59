"""What is the Triton kernels' own: launches, forms, edges of blocks, order, 64-bit offsets, precision.

Everything the backend has in common with others is tested with them. Runs in Triton's interpreter.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import (
    Case,
    assert_equal,
    assert_near,
    check_case,
    fenced,
    make_case,
    pack,
    run,
    term_sizes,
    truth,
)
from tested_backends import TRITON, Backend
from torch.autograd import gradcheck

pytest.importorskip("triton")

from fastac.kernels import launch, plan

IDS = {"ids": lambda v: str(v).removeprefix("torch.")}
HALF = (torch.bfloat16, torch.float16)
NAMES = ("x", "weight", "scores", "position_bias", "alpha", "beta", "lengths", "mask", "offsets", "eps")


@pytest.fixture
def triton() -> Iterator[Backend]:
    with TRITON[0].active() as active:
        yield active


Launches = list[tuple[str, int, dict[str, Any]]]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """Name, programs and arguments of every launch."""
    seen: Launches = []
    start = launch.start

    def note(kernel: Any, grid: int, arguments: dict[str, Any], warps: int, stages: int) -> None:
        seen.append((kernel.__name__, grid, dict(arguments)))
        if not arguments.get("stats_ptr", arguments.get("mix_ptr")).is_meta:
            start(kernel, grid, arguments, warps, stages)

    monkeypatch.setattr(launch, "start", note)
    return seen


def operands(case: Case) -> list[Any]:
    return [getattr(case, name) for name in NAMES]


def needs(case: Case) -> int:
    return sum(1 << i for i, name in enumerate(NAMES[:6]) if getattr(case, name) is not None)


# Launches


@pytest.mark.parametrize("layout", ["padded", "lengths", "mask", "packed"])
@pytest.mark.parametrize("weighting", ["fc1", "position_bias", "average", "scores"])
def test_launches_of_sets_that_fit(triton: Backend, launches: Launches, weighting: str, layout: str) -> None:
    """One forward, two backward."""
    case = make_case(B=3, L=20, M=35, N=5, weighting=weighting, layout=layout, dtype=torch.bfloat16)
    run(triton, case)
    assert [name for name, *_ in launches] == ["forward_blocks"]
    launches.clear()
    run(triton, case, case.dy())
    assert [name for name, *_ in launches] == ["forward_blocks", "backward_blocks", "backward_reduce"]


def test_launches_of_long_sets(triton: Backend, launches: Launches) -> None:
    case = make_case(B=1, L=300, M=19, N=3, dtype=torch.bfloat16)
    run(triton, case, case.dy())
    names = [name for name, *_ in launches]
    assert names[:2] == ["forward_blocks", "forward_combine"]
    assert names[2:] == ["backward_blocks", "backward_sums", "backward_blocks", "backward_reduce"]


def test_frozen_features_compute_no_dx(triton: Backend, launches: Launches) -> None:
    case = make_case(B=2, L=9, M=35, N=3)
    run(triton, case, case.dy(), ("weight", "alpha"))
    given = {name: arguments for name, _, arguments in launches}
    assert not given["backward_blocks"]["NEED_X"]
    assert given["backward_blocks"]["dx_ptr"].numel() == 0
    assert given["backward_reduce"]["NEED_WEIGHT"]
    launches.clear()
    run(triton, case, case.dy(), ("x",))
    given = {name: arguments for name, _, arguments in launches}
    assert given["backward_blocks"]["NEED_X"]
    assert "backward_reduce" not in given  # nothing to sum over the sets


@pytest.mark.parametrize("layout", ["padded", "lengths", "mask", "packed"])
def test_no_value_is_read_from_the_device(launches: Launches, layout: str) -> None:
    """Planning and launching work on tensors that have no values."""
    for length in (20, 400):
        case = make_case(B=3, L=length, M=48, N=17, layout=layout, dtype=torch.float16)
        given = [t.to("meta") if isinstance(t, torch.Tensor) else t for t in operands(case)]
        y, stats, saved = launch.forward(*given, True, None)
        assert y.shape == (3, 17, 48)
        grads = launch.backward(y, *given, y, stats, saved, needs(case), None)
        assert grads[0].shape == case.x.shape
    assert launches


# Forms of the backward


@pytest.mark.parametrize("layout", ["padded", "lengths", "mask", "packed"])
@pytest.mark.parametrize("weighting", ["fc1", "scores"])
def test_gradcheck_of_the_gram_form(
    triton: Backend, launches: Launches, monkeypatch: pytest.MonkeyPatch, weighting: str, layout: str
) -> None:
    """In float64, where automatic choice takes the direct form."""
    monkeypatch.setattr(plan, "GRAM", (8,))
    case = make_case(B=2, L=5, M=17, N=9, dtype=torch.float64, weighting=weighting, layout=layout, empty=True)
    names = tuple(case.floats())
    leaves = tuple(getattr(case, n).clone().requires_grad_() for n in names)
    assert gradcheck(
        lambda *ts: triton(case.replace(**dict(zip(names, ts, strict=True)))), leaves, fast_mode=True
    )
    assert all(a["GRAM"] for name, _, a in launches if name == "backward_blocks")
    check_case(triton, case)


@pytest.mark.parametrize("dtype", HALF, **IDS)
@pytest.mark.parametrize("features", ["plain", "relu", "log_softmax", "offset", "centred", "cancel"])
def test_both_forms_are_accurate(
    triton: Backend, monkeypatch: pytest.MonkeyPatch, features: str, dtype: torch.dtype
) -> None:
    case = make_case(B=3, L=25, M=67, N=17, dtype=dtype, features=features)
    assert plan.GRAM == (2,)
    check_case(triton, case)
    monkeypatch.setattr(plan, "GRAM", ())
    check_case(triton, case)


@pytest.mark.parametrize("dtype", HALF, **IDS)
def test_an_offset_of_x_does_not_spoil_the_gram_form(
    triton: Backend, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """x xᵀ has the square of the offset in it: 4096 times G here, and float32 sums would lose digits of G."""
    case = make_case(B=4, L=25, M=192, N=16, dtype=dtype, features="cancel", weighting="scores")
    dy = case.dy()
    exact = run(truth, case.to(torch.float64), dy.double())["dscores"]
    errors = []
    for itemsizes in ((2,), ()):  # the Gram form, the direct one
        monkeypatch.setattr(plan, "GRAM", itemsizes)
        errors.append(run(triton, case, dy)["dscores"].double().dist(exact))
    assert errors[0] <= 1.25 * errors[1]


def test_the_gram_form_does_not_read_y(triton: Backend) -> None:
    case = make_case(B=2, L=20, M=35, N=11, dtype=torch.bfloat16)
    y, *saved = launch.forward(*operands(case), False)
    dy = case.dy()
    expected = launch.backward(dy, *operands(case), y, *saved, needs(case))
    nothing = torch.full_like(y, float("nan"))
    found = launch.backward(dy, *operands(case), nothing, *saved, needs(case))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    long = make_case(B=1, L=200, M=35, N=11, dtype=torch.bfloat16)  # the control: the direct form does
    y, *saved = launch.forward(*operands(long), False)
    spoilt = launch.backward(
        long.dy(), *operands(long), torch.full_like(y, float("nan")), *saved, needs(long)
    )
    assert spoilt[0].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], **IDS)
@pytest.mark.parametrize("layout", ["padded", "lengths", "mask", "packed"])
def test_split_sets_agree_with_whole_ones(
    triton: Backend, monkeypatch: pytest.MonkeyPatch, layout: str, dtype: torch.dtype
) -> None:
    for weighting, shift in (("fc1", True), ("position_bias", False), ("scores", True), ("average", True)):
        case = make_case(
            B=3, L=30, M=35, N=5, dtype=dtype, weighting=weighting, shift=shift, layout=layout, empty=True
        )
        dy = case.dy()
        whole = run(triton, case, dy)
        with monkeypatch.context() as patch:
            for table in ("LONGEST", "LONGEST_BACKWARD"):
                patch.setattr(plan, table, dict.fromkeys((2, 4, 8), 16))
            check_case(triton, case)
            assert_near(run(triton, case, dy), whole, dtype, eps=4, terms=term_sizes(case, dy))


# Edges of blocks


@pytest.mark.parametrize("length", [1, 15, 16, 17, 32, 33, 64, 65, 128, 129])
def test_lengths_around_a_block(triton: Backend, length: int) -> None:
    for layout in ("padded", "packed"):
        check_case(triton, make_case(B=2, L=length, M=17, N=3, dtype=torch.float16, layout=layout))


@pytest.mark.parametrize("units", [1, 15, 16, 17, 64, 65, 129])
def test_units_around_a_block(triton: Backend, units: int) -> None:
    for length in (9, 70):
        check_case(triton, make_case(B=2, L=length, M=17, N=units, dtype=torch.bfloat16))


@pytest.mark.parametrize("features", [1, 31, 32, 33, 63, 64, 65, 127, 128, 129])
def test_features_around_a_block(triton: Backend, features: int) -> None:
    for dtype in (torch.bfloat16, torch.float64):
        check_case(triton, make_case(B=2, L=7, M=features, N=3, dtype=dtype), all_terms=True)


def test_packed_sets_of_every_length(triton: Backend) -> None:
    """Blocks are dealt out to packed sets by their offsets: lengths around multiples of the block."""
    lengths = torch.tensor([0, 31, 32, 33, 1, 0, 0, 64, 63, 65, 2, 127, 128, 0])
    case = pack(make_case(B=14, L=128, M=5, N=2, dtype=torch.float32), lengths, trailing=70)
    check_case(triton, case, all_terms=True)


# Order and repeats


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("B", "L"), [(5, 20), (1, 300)], ids=["many", "long"])
def test_the_order_of_programs_does_not_matter(
    triton: Backend, monkeypatch: pytest.MonkeyPatch, B: int, L: int, seed: int
) -> None:
    """Bitwise, with the programs of every launch shuffled: any of them may bring the last part of a sum."""
    from triton.runtime import interpreter

    case = make_case(B=B, L=L, M=70, N=9, dtype=torch.float32)
    monkeypatch.setattr(plan, "ROWS", {2: 16, 4: 16, 8: 16})  # several parts of dW
    dy = case.dy()
    expected = run(triton, case, dy)
    builder = type(interpreter.interpreter_builder)
    original, launched = builder.set_grid_idx, []

    def shuffled(self: Any, x: int, y: int, z: int) -> None:
        programs = self.grid_dim[0]
        order = torch.randperm(programs, generator=torch.Generator().manual_seed(seed)).tolist()
        launched.append(order[x])
        original(self, order[x], y, z)

    monkeypatch.setattr(builder, "set_grid_idx", shuffled)
    assert_equal(run(triton, case, dy), expected, "in another order")
    assert launched != sorted(launched)


def test_counters_are_left_at_zero(triton: Backend, launches: Launches) -> None:
    """The same scratch can serve a second launch: `triton.autotune` and CUDA graphs repeat launches."""
    case = make_case(B=40, L=20, M=33, N=5, dtype=torch.float32)
    run(triton, case, case.dy())
    name, grid, arguments = launches[-1]
    assert name == "backward_reduce" and arguments["splits"] > 1
    assert (arguments["counters_ptr"] == 0).all()
    dweight = arguments["dweight_ptr"]
    first = dweight.clone()
    dweight.fill_(float("nan"))
    from fastac.kernels.reduce import backward_reduce

    launch.start(backward_reduce, grid, arguments, 4, 2)
    assert torch.equal(dweight, first)


# 64-bit offsets


@pytest.mark.unguarded
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_offsets_of_64_bits(triton: Backend, layout: str) -> None:
    """x and dY whose strides reach past 2³¹ elements, in memory that is reserved but hardly touched."""
    far = 2**31 + 64
    case = make_case(B=2, L=3, M=5, N=2, dtype=torch.float16, weighting="fc1")
    if layout == "packed":
        case = pack(case, torch.tensor([2, 1]))
    dy = case.dy()
    expected = run(triton, case, dy)
    storage = torch.empty(3 * far, dtype=torch.float16)  # 13 GB of address space
    x = storage.as_strided(case.x.shape, (far, *case.x.stride()[1:]))
    x.copy_(case.x)
    assert x.stride(0) * (x.size(0) - 1) > 2**31
    assert_equal(run(triton, case.replace(x=x), dy), expected, "with x far apart")
    del x, storage
    storage = torch.empty(2 * far, dtype=torch.float16)
    far_dy = storage.as_strided(dy.shape, (far, *dy.stride()[1:])).copy_(dy)
    assert_equal(run(triton, case, far_dy), expected, "with dY far apart")


# Values that a device is never asked for


@pytest.mark.parametrize("weighting", ["fc1", "position_bias", "scores"])
def test_lengths_are_clamped(triton: Backend, weighting: str) -> None:
    """A length beyond L counts as L, a negative one as 0."""
    for length in (9, 300):
        case = make_case(B=5, L=length, M=19, N=3, weighting=weighting)
        wild = case.replace(lengths=torch.tensor([2**40, -1, length, length + 1, -(2**40)]))
        tame = case.replace(lengths=torch.tensor([length, 0, length, length, 0]))
        dy, found = case.dy(), []
        for c in (wild, tame):
            y, stats, saved = launch.forward(*operands(c), False)
            found.append((y, *launch.backward(dy, *operands(c), y, stats, saved, needs(c))))
        for ours, expected in zip(*found, strict=True):
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("weighting", ["fc1", "position_bias", "average", "scores"])
@pytest.mark.parametrize(
    "offsets",
    [
        [0, 20, 40, 60, 80, 2**40],
        [-(2**40), 20, 40, 60, 80, 100],
        [0, 50, 40, 30, 20, 10],
        [100, 0] * 3,
        [37] * 6,
    ],
    ids=["beyond", "below", "falling", "jumping", "late"],
)
def test_wild_offsets_stay_in_bounds(triton: Backend, weighting: str, offsets: list[int]) -> None:
    """Some answer, no guard hit, no crash; what lies around every operand is NaN and reaches nothing."""
    case = pack(make_case(B=5, L=20, M=19, N=3, weighting=weighting), torch.full((5,), 20))
    around = {name: fenced(t) for name, t in case.floats().items()}
    case = case.replace(**around, offsets=torch.tensor(offsets))
    y, stats, saved = launch.forward(*operands(case), True, 100)
    rising = all(a <= b for a, b in itertools.pairwise([0, *offsets[1:]]))
    if rising and offsets[-1] >= 0:  # every row then belongs to one set
        assert y.isfinite().all()
    launch.backward(case.dy(), *operands(case), y, stats, saved, needs(case), 100)


def test_a_set_longer_than_max_length(triton: Backend) -> None:
    """The bound is the caller's word: what it leaves out of a set that is not split counts as excluded."""
    case = pack(make_case(B=2, L=60, M=19, N=3), torch.tensor([60, 10]))
    y, *_ = launch.forward(*operands(case), False, 16)
    short = pack(make_case(B=2, L=16, M=19, N=3), torch.tensor([16, 10]))
    x = torch.cat([case.x[:16], case.x[60:70]])
    short = short.replace(x=x, weight=case.weight, alpha=case.alpha, beta=case.beta)
    assert torch.equal(y, launch.forward(*operands(short), False, 16)[0])


def test_nan_in_a_valid_frame_leaves_excluded_gradients_zero(triton: Backend) -> None:
    for length in (10, 70):
        case = make_case(B=2, L=length, M=19, N=3, weighting="scores", layout="mask")
        assert case.mask is not None
        case.mask[:, 3], case.mask[:, 4] = True, False
        case.x[0, 3, 0] = float("nan")
        grads = run(triton, case, case.dy())
        for name, excluded in (("dx", ~case.mask[..., None]), ("dscores", ~case.mask[:, None])):
            assert (grads[name].masked_select(excluded.expand(grads[name].shape)) == 0).all(), name


# Precision


def test_precision_follows_torch(triton: Backend, launches: Launches) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        for setting, dtype, expected in (
            ("highest", torch.float32, "ieee"),
            ("high", torch.float32, "tf32"),
            ("medium", torch.float32, "tf32"),
            ("high", torch.float64, "ieee"),
        ):
            torch.set_float32_matmul_precision(setting)
            case = make_case(B=2, L=5, M=9, N=3, dtype=dtype)
            launches.clear()
            run(triton, case, case.dy())
            found = {a["PRECISION"] for name, _, a in launches if "PRECISION" in a}
            assert found == {expected}, (setting, dtype)
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.fp32_precision = "tf32"  # the newer setting
        assert plan._relaxed(torch.float32)
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        torch.set_float32_matmul_precision(before)


def test_autotune_tries_the_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """One tuner per kernel, configuration and problem; timing itself needs a GPU."""
    monkeypatch.setenv("FASTAC_AUTOTUNE", "1")
    assert plan.autotunes()
    p = plan.Problem(256, 25, 25, 1536, 64, 2, "linear", "padded")
    config = plan.forward_plan(p).config
    tuner: Any = launch._tuned(launch.forward_blocks, "forward", config, 2, "linear", "padded")
    tried = [(c.kwargs["BLOCK_M"], c.num_warps, c.num_stages) for c in tuner.configs]
    assert tried == [(c.block_m, c.warps, c.stages) for c in plan.neighbours(config, 2)]
    assert {"M", "N", "SPLIT", "SHIFT", "BLOCK_L"} <= set(tuner.keys) and "BLOCK_M" not in tuner.keys
    assert launch._tuned(launch.forward_blocks, "forward", config, 2, "linear", "padded") is tuner
    backward: Any = launch._tuned(launch.backward_blocks, "backward", config, 2, "linear", "padded")
    assert backward.restore_value == ["mix_ptr"]
