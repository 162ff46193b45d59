"""Accuracy of y, without gradients (the inference path) and with them."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import (
    DTYPES,
    FEATURES,
    HALF,
    LAYOUTS,
    WEIGHTINGS,
    assert_equal,
    check_case,
    make_case,
    run,
    truth,
)
from tested_backends import Backend

IDS = {"ids": lambda v: str(v).removeprefix("torch.")}
SHIFT = pytest.mark.parametrize("shift", [True, False], ids=["shift", "plain"])


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@SHIFT
def test_weightings(backend: Backend, weighting: str, dtype: torch.dtype, shift: bool) -> None:
    for layout in LAYOUTS:
        case = make_case(weighting=weighting, dtype=dtype, shift=shift, layout=layout)
        y = check_case(backend, case, backward=False)["y"]
        assert y.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
@pytest.mark.parametrize("features", FEATURES)
def test_features(backend: Backend, features: str, dtype: torch.dtype) -> None:
    check_case(backend, make_case(B=4, L=25, M=192, N=16, features=features, dtype=dtype), backward=False)


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
@pytest.mark.parametrize(
    ("B", "L", "M", "N"),
    [
        (1, 1, 1, 1),
        (2, 1, 5, 3),
        (3, 2, 1, 2),
        (2, 25, 64, 64),
        (1, 300, 129, 33),
        (2, 7, 1031, 5),
        (1, 1000, 48, 129),
    ],
)
def test_sizes(backend: Backend, B: int, L: int, M: int, N: int, dtype: torch.dtype) -> None:
    B, L, M, N = backend.affordable(B, L, M, N)
    for weighting in ("fc1", "scores", "average"):
        case = make_case(B=B, L=L, M=M, N=N, dtype=dtype, weighting=weighting)
        check_case(backend, case, backward=False, all_terms=True)


@pytest.mark.parametrize(("L", "M", "N"), [(128, 256, 8), (512, 256, 8), (1000, 128, 32), (4000, 64, 4)])
def test_the_error_does_not_grow_with_the_length(native: Backend, L: int, M: int, N: int) -> None:
    """One chain of additions over all positions errs as their square root: 5 eps at 512."""
    case = make_case(B=4, L=L, M=M, N=N)
    y, exact = (run(call, c)["y"].double() for call, c in ((native, case), (truth, case.to(torch.float64))))
    assert (y - exact).norm() <= 3.5 * torch.finfo(torch.float32).eps * exact.norm()


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_inference_and_training_agree_bitwise(backend: Backend, weighting: str, dtype: torch.dtype) -> None:
    for layout in ("padded", "packed"):
        case = make_case(weighting=weighting, dtype=dtype, layout=layout)
        assert_equal({"y": run(backend, case, case.dy())["y"]}, run(backend, case))


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
def test_average_without_units(backend: Backend, dtype: torch.dtype) -> None:
    """No weight, no α: one unit, the mean."""
    case = make_case(weighting="average", shift=False, dtype=dtype)
    y = check_case(backend, case, backward=False)["y"]
    assert y.shape == (case.batch, 1, case.x.size(2))


@pytest.mark.parametrize("dtype", HALF, **IDS)
@pytest.mark.parametrize("weighting", ["scores", "position_bias"])
def test_float32_parameters_of_half_features(backend: Backend, weighting: str, dtype: torch.dtype) -> None:
    case = make_case(weighting=weighting, dtype=dtype)
    for name in ("scores", "alpha", "beta", "position_bias"):
        t = getattr(case, name)
        case = case if t is None else case.replace(**{name: torch.randn(t.shape)})
    check_case(backend, case, backward=False)


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_scores_of_ten_thousand(backend: Backend, dtype: torch.dtype, size: float) -> None:
    """Every score near ±10,000, so that exp overflows or underflows unless the maximum is taken off first."""
    case = make_case(weighting="scores", dtype=dtype)
    assert case.scores is not None
    check_case(backend, case.replace(scores=(case.scores.double() + size).to(dtype)), backward=False)
    mixed = torch.where(torch.rand(case.scores.shape) < 0.5, size, -size).to(dtype)
    check_case(backend, case.replace(scores=mixed), backward=False)


def test_large_features_make_large_scores(backend: Backend) -> None:
    """fc1 scores of some thousands: the softmax is nearly one-hot, and still exact."""
    case = make_case(weighting="fc1", L=25)
    assert case.weight is not None
    check_case(backend, case.replace(weight=case.weight * 1000), backward=False)


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
def test_every_unit_has_length_one_over_root_n(backend: Backend, dtype: torch.dtype) -> None:
    y = run(backend, make_case(dtype=dtype, features="log_softmax", M=192))["y"].double()
    expected = torch.full(y.shape[:2], 1 / math.sqrt(y.size(1)), dtype=torch.float64)
    torch.testing.assert_close(y.norm(dim=-1), expected, rtol=torch.finfo(dtype).eps * 2, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
def test_scaling_both_alpha_and_beta_changes_nothing(backend: Backend, dtype: torch.dtype) -> None:
    case = make_case(dtype=dtype)
    assert case.alpha is not None and case.beta is not None
    parameters = {"alpha": case.alpha, "beta": case.beta}
    # Powers of two, and no parameter that becomes subnormal: nothing is rounded.
    case = case.replace(**{n: t.sign() * t.abs().clamp(min=2.0**-6) for n, t in parameters.items()})
    for factor in (2.0**-8, 2.0**8):
        other = case.replace(alpha=case.alpha * factor, beta=case.beta * factor)
        assert_equal(run(backend, other), run(backend, case), f"after scaling by {factor}")


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
def test_large_eps_is_the_linear_region(backend: Backend, dtype: torch.dtype) -> None:
    """‖u‖ < eps: y = u/(√N·eps)."""
    case = make_case(dtype=dtype).replace(eps=1e3)
    check_case(backend, case, backward=False)


@pytest.mark.parametrize("dtype", HALF, **IDS)
def test_eps_does_not_vanish_in_half_types(backend: Backend, dtype: torch.dtype) -> None:
    """u = 0: y = 0, not 0/0, though 1e-12 is zero in float16."""
    case = make_case(dtype=dtype)
    case = case.replace(x=torch.zeros_like(case.x), beta=torch.zeros_like(case.alpha))
    assert (run(backend, case)["y"] == 0).all()


def test_features_of_extreme_size(backend: Backend) -> None:
    """The squares of 1e-15 and 1e15 are inside float32's range; β = 0 keeps u of that size."""
    case = make_case()
    nothing = {name: torch.zeros_like(getattr(case, name)) for name in ("weight", "beta")}
    for factor in (1e-15, 1e15):
        other = case.replace(x=case.x * factor, eps=1e-30, **nothing)
        check_case(backend, other, backward=False)


def test_float16_squares_do_not_overflow(backend: Backend) -> None:
    """‖x‖² is 6.7e7, a thousand times what float16 holds."""
    case = make_case(dtype=torch.float16)
    case = case.replace(x=case.x * 1000, weight=case.weight / 1000)  # type: ignore[operator]
    check_case(backend, case, backward=False)
