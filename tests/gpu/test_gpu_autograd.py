"""Autograd on a GPU: gradcheck in float64, opcheck of the operators, autocast."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from gpu_helpers import IDS, OURS, arguments, gpu_case, gradient_of, leaves_of
from helpers import LAYOUTS, WEIGHTINGS, Case, assert_near, run
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

SMALL = {"B": 3, "L": 4, "M": 5, "N": 2, "dtype": torch.float64, "empty": True}
SHIFT = pytest.mark.parametrize("shift", [True, False], ids=["shift", "plain"])
OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def function_of(case: Case) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """y as a function of the operands that have a gradient, and those operands."""
    names = tuple(case.floats())
    _, leaves = leaves_of(case)
    return lambda *ts: OURS(case.replace(**dict(zip(names, ts, strict=True)))), leaves


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@SHIFT
def test_gradcheck(weighting: str, layout: str, shift: bool) -> None:
    function, leaves = function_of(gpu_case(**SMALL, weighting=weighting, layout=layout, shift=shift))
    assert gradcheck(function, leaves)


def test_gradcheck_of_a_long_set() -> None:
    function, leaves = function_of(gpu_case(B=2, L=150, M=20, N=3, dtype=torch.float64))
    assert gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_gradgradcheck(weighting: str) -> None:
    function, leaves = function_of(gpu_case(**SMALL, weighting=weighting, layout="mask"))
    assert gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_opcheck(weighting: str, layout: str) -> None:
    case = gpu_case(B=3, L=7, M=41, N=2, weighting=weighting, layout=layout, dtype=torch.float64)
    given = arguments(case)
    torch.library.opcheck(OURS.operator("inference"), given, test_utils=OPCHECKS)
    with_leaves, _ = leaves_of(case)
    needs = sum(1 << i for i, t in enumerate(given[:6]) if t is not None)
    for save in (True, False) if layout == "padded" else (True,):
        torch.library.opcheck(OURS.operator("forward"), (*arguments(with_leaves), save), test_utils=OPCHECKS)
        saved = OURS.operator("forward")(*given, save)
        for mask in (needs, needs & ~1, 0) if layout == "padded" else (needs,):
            torch.library.opcheck(
                OURS.operator("backward"),
                (gradient_of(case), *given, *saved, mask),
                test_utils=OPCHECKS,
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], **IDS)
def test_opcheck_of_other_dtypes(dtype: torch.dtype) -> None:
    checks = ("test_schema", "test_faketensor")
    for weighting in WEIGHTINGS:
        case = gpu_case(B=2, L=3, M=64, N=1, weighting=weighting, dtype=dtype)
        given = arguments(case)
        torch.library.opcheck(OURS.operator("inference"), given, test_utils=checks)
        torch.library.opcheck(OURS.operator("forward"), (*given, True), test_utils=checks)
        saved = OURS.operator("forward")(*given, True)
        needs = sum(1 << i for i, t in enumerate(given[:6]) if t is not None)
        torch.library.opcheck(
            OURS.operator("backward"), (gradient_of(case), *given, *saved, needs), test_utils=checks
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], **IDS)
def test_autocast(dtype: torch.dtype) -> None:
    """x and weight are cast, alpha and beta are not; each gradient has its operand's dtype."""
    case = gpu_case(B=4, L=30, M=128, N=8)

    def call(c: Case) -> Tensor:
        with torch.autocast("cuda", dtype):
            return OURS(c)

    assert case.weight is not None
    cast = case.replace(x=case.x.to(dtype), weight=case.weight.to(dtype))
    dy = gradient_of(cast)
    found = run(call, case, dy)
    expected = run(OURS, cast, dy)
    assert found["y"].dtype == dtype
    assert {n: t.dtype for n, t in found.items() if n != "y"} == dict.fromkeys(
        ("dx", "dweight", "dalpha", "dbeta"), torch.float32
    )
    assert_near(found, {n: t.to(found[n].dtype) for n, t in expected.items()}, dtype)


def test_autocast_leaves_float64_alone() -> None:
    case = gpu_case(dtype=torch.float64)
    with torch.autocast("cuda", torch.bfloat16):
        y = OURS(case)
    assert y.dtype == torch.float64
    assert torch.equal(y, OURS(case))
