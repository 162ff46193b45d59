"""What is the CUDA kernels' own: families and launches, schedules, edges of tiles, 64-bit offsets.

Everything the backend has in common with others is tested with them. Runs in the emulation.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import cuda_operators
import pytest
import torch
from helpers import HALF, LAYOUTS, WEIGHTINGS, Case, assert_equal, check_case, make_case, pack, run
from tested_backends import CUDA, PORTABLE, Backend

from fastac import ops

pytestmark = pytest.mark.skipif(not CUDA, reason="left out by FASTAC_NATIVE=0")

IDS = {"ids": lambda v: str(v).removeprefix("torch.")}
BOTH = [*CUDA, *PORTABLE]
SEEDS = (1, 2, 3, 4)
BFLOAT, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64
FLOATS = ("x", "weight", "scores", "position_bias", "alpha", "beta")


@pytest.fixture(params=BOTH, ids=str)
def cuda(request: pytest.FixtureRequest) -> Iterator[Backend]:
    with request.param.active(guarded="unguarded" not in request.keywords) as active:
        yield active


def launched() -> list[str]:
    """The kernels that ran since the last call, without dtypes and sizes, with the pass of the backward."""
    emulation = cuda_operators.load()
    names = [re.sub(r"fastac::cuda::|, \d+|c10::\w+|float|double", "", n.name) for n in emulation.launches()]
    emulation.forget()
    return [name.replace("<, ", "<").replace("<>", "") for name in names]


def arguments(case: Case) -> dict[str, Any]:
    names = (*FLOATS, "lengths", "mask", "offsets", "eps")
    return {name: getattr(case, name) for name in names}


def forward(case: Case, **more: Any) -> list[torch.Tensor]:
    found: tuple[torch.Tensor, ...] = ops.operator("cuda", "forward")(
        **arguments(case), **({"save_scores": False} | more)
    )
    return list(found)


def backward(dy: torch.Tensor, case: Case, saved: list[torch.Tensor], **more: Any) -> list[torch.Tensor]:
    needs = sum(1 << i for i, name in enumerate(FLOATS) if getattr(case, name) is not None)
    rest = dict(zip(("y", "stats", "saved_scores"), saved, strict=True))
    found: tuple[torch.Tensor, ...] = ops.operator("cuda", "backward")(
        dy, **arguments(case), **rest, needs=needs, **more
    )
    return list(found)


# Families of kernels


@dataclasses.dataclass(frozen=True)
class Family:
    """A call, on which GPU, and the kernels that its forward and backward launch."""

    capability: int
    dtype: torch.dtype
    sizes: dict[str, int]
    kernels: str
    case: dict[str, Any] = dataclasses.field(default_factory=dict)


WHOLE = "ForwardBlocks BackwardBlocks<Pass::kWhole> BackwardReduce"
GRAM = "ForwardBlocks BackwardBlocks<Pass::kGram> BackwardReduce"
SPLIT = (
    "ForwardBlocks ForwardCombine "
    "BackwardBlocks<Pass::kFirst> BackwardSums BackwardBlocks<Pass::kSecond> BackwardReduce"
)
CLUSTER = "ForwardCluster BackwardCluster BackwardReduce"
FAMILIES = {
    "whole": Family(80, SINGLE, {"B": 3, "L": 20, "M": 70, "N": 9}, WHOLE),
    "whole, double": Family(86, DOUBLE, {"B": 2, "L": 31, "M": 65, "N": 17}, WHOLE),
    "whole, packed": Family(80, BFLOAT, {"B": 4, "L": 29, "M": 70, "N": 9}, WHOLE, {"layout": "packed"}),
    "several unit blocks": Family(80, BFLOAT, {"B": 2, "L": 20, "M": 72, "N": 130}, WHOLE),
    "several unit blocks, single": Family(86, SINGLE, {"B": 1, "L": 20, "M": 40, "N": 130}, WHOLE),
    "several parts of dW": Family(80, SINGLE, {"B": 40, "L": 20, "M": 40, "N": 5}, WHOLE),
    "Gram": Family(80, BFLOAT, {"B": 3, "L": 20, "M": 70, "N": 16}, GRAM),
    "Gram, mask": Family(80, torch.float16, {"B": 3, "L": 20, "M": 72, "N": 40}, GRAM, {"layout": "mask"}),
    "split": Family(80, BFLOAT, {"B": 1, "L": 300, "M": 72, "N": 5}, SPLIT),
    "split, single": Family(90, SINGLE, {"B": 2, "L": 150, "M": 40, "N": 20}, SPLIT),
    "split, packed": Family(86, DOUBLE, {"B": 3, "L": 90, "M": 40, "N": 5}, SPLIT, {"layout": "packed"}),
    "cluster of 4": Family(90, BFLOAT, {"B": 5, "L": 20, "M": 72, "N": 9}, CLUSTER),
    "cluster of 8": Family(90, torch.float16, {"B": 3, "L": 25, "M": 1536, "N": 64}, CLUSTER),
    "cluster, lengths": Family(
        90, BFLOAT, {"B": 5, "L": 32, "M": 136, "N": 33}, CLUSTER, {"layout": "lengths"}
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_schedule_gives_the_same_bits(name: str) -> None:
    """Order of blocks, of warps and of lanes at every barrier shuffled: a race shows as another result."""
    family = FAMILIES[name]
    case = make_case(**family.sizes, dtype=family.dtype, **family.case)
    dy = case.dy()
    emulation = cuda_operators.load()
    with Backend("cuda", capability=family.capability).active() as backend:
        launched()
        expected = check_case(backend, case)
        assert launched() == family.kernels.split()
        expected = run(backend, case, dy)
        for seed in SEEDS:
            with emulation.schedule(seed):
                assert_equal(run(backend, case, dy), expected, f"in schedule {seed}")
                assert_equal(run(backend, case), {"y": expected["y"]}, f"at inference in schedule {seed}")


def test_the_number_of_clusters_that_a_device_holds_does_not_matter() -> None:
    case = make_case(B=7, L=20, M=72, N=9, dtype=BFLOAT, layout="lengths", empty=True)
    dy = case.dy()
    with Backend("cuda", capability=90).active() as backend:
        expected = run(backend, case, dy)
        for clusters in (1, 3, 7, 50):
            torch.ops.fastac.emulated_device(*cuda_operators.GPUS[90], clusters)
            assert_equal(run(backend, case, dy), expected, f"with {clusters} clusters at a time")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_launches_of_sets_that_fit(cuda: Backend, weighting: str, layout: str) -> None:
    """One forward, two backward."""
    case = make_case(B=3, L=20, M=40, N=5, weighting=weighting, layout=layout, dtype=BFLOAT)
    launched()
    run(cuda, case)
    assert len(launched()) == 1
    run(cuda, case, case.dy())
    assert len(launched()) == 3


def test_frozen_features_compute_no_dx(cuda: Backend) -> None:
    """One product less: a call whose x is frozen has fewer matrix instructions, by those of dX."""
    case = make_case(B=2, L=20, M=128, N=16, dtype=BFLOAT)
    emulation = cuda_operators.load()

    def products(wanted: tuple[str, ...]) -> int:
        emulation.forget()
        run(cuda, case, case.dy(), wanted)
        return sum(n.matrix_products for n in emulation.launches() if "Backward" in n.name)

    frozen, trained = products(("weight", "alpha", "beta")), products(("x", "weight", "alpha", "beta"))
    assert 0 < frozen < trained
    assert products(("x",)) < trained


def test_the_gram_form_does_not_read_y(cuda: Backend) -> None:
    case = make_case(B=2, L=20, M=72, N=11, dtype=BFLOAT)
    y, *saved = forward(case)
    dy = case.dy()
    expected = backward(dy, case, [y, *saved])
    nothing = torch.full_like(y, float("nan"))
    for a, b in zip(backward(dy, case, [nothing, *saved]), expected, strict=True):
        assert torch.equal(a, b)
    long = make_case(B=1, L=200, M=35, N=11, dtype=BFLOAT)  # the control: the direct form does
    y, *saved = forward(long)
    assert backward(long.dy(), long, [torch.full_like(y, float("nan")), *saved])[0].isnan().any()


@pytest.mark.parametrize("dtype", HALF, **IDS)
@pytest.mark.parametrize("features", ["plain", "relu", "log_softmax", "offset", "centred", "cancel"])
def test_every_form_is_accurate(cuda: Backend, features: str, dtype: torch.dtype) -> None:
    """The Gram form, of a cluster or a block, and the direct one."""
    sizes = {"B": 3, "L": 25, "M": 72, "dtype": dtype, "features": features}
    for units in (17, 9):
        check_case(cuda, make_case(**sizes, N=units))


# Edges of tiles


@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 129])
def test_lengths_around_a_tile(cuda: Backend, length: int) -> None:
    for layout in ("padded", "packed"):
        for dtype in (torch.float16, SINGLE):
            check_case(cuda, make_case(B=2, L=length, M=24, N=3, dtype=dtype, layout=layout))


@pytest.mark.parametrize("units", [1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 129])
def test_units_around_a_tile(cuda: Backend, units: int) -> None:
    for length in (9, 70):
        for dtype in (BFLOAT, DOUBLE):
            check_case(cuda, make_case(B=2, L=length, M=24, N=units, dtype=dtype))


@pytest.mark.parametrize("features", [1, 7, 8, 31, 32, 33, 63, 64, 65, 127, 128, 129, 256, 264])
def test_features_around_a_tile(cuda: Backend, features: int) -> None:
    for dtype in (BFLOAT, SINGLE, DOUBLE):
        check_case(cuda, make_case(B=2, L=7, M=features, N=3, dtype=dtype), all_terms=True)


def test_packed_sets_of_every_length(cuda: Backend) -> None:
    """Blocks are dealt out to packed sets by their offsets: lengths around multiples of a tile."""
    lengths = torch.tensor([0, 31, 32, 33, 1, 0, 0, 64, 63, 65, 2, 127, 128, 0])
    for dtype in (SINGLE, BFLOAT):
        case = pack(make_case(B=14, L=128, M=8, N=2, dtype=dtype), lengths, trailing=70)
        check_case(cuda, case, all_terms=True)


@pytest.mark.parametrize("dtype", [SINGLE, BFLOAT], **IDS)
def test_a_set_of_many_parts(cuda: Backend, dtype: torch.dtype) -> None:
    """More shares of z, more features and more parts of rowsum(a e) than are summed at a time."""
    for shift in (True, False):
        launched()
        check_case(cuda, make_case(B=1, L=4200, M=520, N=9, dtype=dtype, shift=shift))
        assert launched() == SPLIT.split()


# Values that a device is never asked for


@pytest.mark.parametrize("dtype", [SINGLE, BFLOAT], **IDS)
def test_a_set_longer_than_max_length(cuda: Backend, dtype: torch.dtype) -> None:
    """The bound is the caller's word: what it leaves out of a set that is not split counts as excluded.

    Gradients are then any numbers, but nothing is written out of bounds.
    """
    case = pack(make_case(B=2, L=60, M=24, N=3, dtype=dtype), torch.tensor([60, 10]))
    y = forward(case, max_length=32)[0]
    x = torch.cat([case.x[:32], case.x[60:70]])
    short = case.replace(x=x, offsets=torch.tensor([0, 32, 42]))
    assert torch.equal(y, forward(short, max_length=32)[0])
    backward(case.dy(), case, forward(case, max_length=32), max_length=32)


@pytest.mark.parametrize("dtype", [SINGLE, BFLOAT], **IDS)
def test_nan_in_a_valid_frame_leaves_excluded_gradients_zero(cuda: Backend, dtype: torch.dtype) -> None:
    for length in (10, 70):
        case = make_case(B=2, L=length, M=24, N=3, weighting="scores", layout="mask", dtype=dtype)
        assert case.mask is not None
        case.mask[:, 3], case.mask[:, 4] = True, False
        case.x[0, 3, 0] = float("nan")
        grads = run(cuda, case, case.dy())
        for name, excluded in (("dx", ~case.mask[..., None]), ("dscores", ~case.mask[:, None])):
            assert (grads[name].masked_select(excluded.expand(grads[name].shape)) == 0).all(), name


def test_a_tensor_that_is_not_finite_leaves_other_sets_alone(cuda: Backend) -> None:
    """Blocks and clusters take sets one after the other; nothing of one stays for the next."""
    for dtype in (SINGLE, BFLOAT):
        case = make_case(B=6, L=20, M=72, N=9, dtype=dtype)
        dy = case.dy()
        clean = run(cuda, case, dy, ("x",))
        spoilt = case.replace(x=case.x.clone())
        spoilt.x[2] = float("nan")
        found = run(cuda, spoilt, dy, ("x",))
        for name in ("y", "dx"):
            assert found[name][2].isnan().any()
            others = torch.arange(6) != 2
            assert torch.equal(found[name][others], clean[name][others]), name


# 64-bit offsets


@pytest.mark.unguarded
@pytest.mark.parametrize("dtype", [torch.float16, SINGLE], **IDS)
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_offsets_of_64_bits(cuda: Backend, layout: str, dtype: torch.dtype) -> None:
    """Operands and dY with strides past 2³¹ elements, in memory that is reserved but hardly touched."""
    far = 2**31 + 64
    for weighting, name in (("fc1", "x"), ("fc1", "weight"), ("scores", "scores"), ("fc1", "dy")):
        case = make_case(B=2, L=3, M=8, N=2, dtype=dtype, weighting=weighting)
        if layout == "packed":
            case = pack(case, torch.tensor([1, 1]))
        dy = case.dy()
        expected = run(cuda, case, dy)
        near = dy if name == "dy" else getattr(case, name)
        assert near.size(0) == 2
        storage = torch.empty(far + near[0].numel(), dtype=dtype)
        apart = storage.as_strided(near.shape, (far, *near.stride()[1:])).copy_(near)
        if name == "dy":
            assert_equal(run(cuda, case, apart), expected, "with dY far apart")
        else:
            assert_equal(run(cuda, case.replace(**{name: apart}), dy), expected, f"with {name} far apart")
