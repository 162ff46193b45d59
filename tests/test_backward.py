"""Accuracy of every gradient, and which gradients there are."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import (
    DTYPES,
    FEATURES,
    HALF,
    LAYOUTS,
    WEIGHTINGS,
    Case,
    assert_equal,
    assert_near,
    check_case,
    make_case,
    run,
    term_sizes,
    truth,
)
from tested_backends import Backend

from fastac import ops

IDS = {"ids": lambda v: str(v).removeprefix("torch.")}
SHIFT = pytest.mark.parametrize("shift", [True, False], ids=["shift", "plain"])


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@SHIFT
def test_weightings(backend: Backend, weighting: str, dtype: torch.dtype, shift: bool) -> None:
    for layout in LAYOUTS:
        case = make_case(weighting=weighting, dtype=dtype, shift=shift, layout=layout)
        results = check_case(backend, case)
        for name, t in results.items():
            assert t.is_contiguous(), name
            if name != "y" and not (weighting == "average" and name == "dalpha"):
                assert t.abs().max() > 0, f"{name} vanished"


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("weighting", ["fc1", "scores"])
def test_features(backend: Backend, features: str, weighting: str, dtype: torch.dtype) -> None:
    case = make_case(B=4, L=25, M=192, N=16, features=features, dtype=dtype, weighting=weighting)
    check_case(backend, case)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], **IDS)
@pytest.mark.parametrize("features", FEATURES)
def test_short_rows(cpp: Backend, features: str, dtype: torch.dtype) -> None:
    """Few features and whole panels of units, the last vector of them full or not: units in lanes."""
    for M, N in ((50, 64), (128, 32), (67, 62)):
        for weighting, shift in (("fc1", True), ("fc1", False), ("scores", True)):
            case = make_case(
                B=3, L=25, M=M, N=N, features=features, dtype=dtype, weighting=weighting, shift=shift
            )
            check_case(cpp, case)


def test_short_rows_of_long_sets(cpp: Backend) -> None:
    """Several blocks of rows to a set, and several segments."""
    for L in (1500, 5000):
        for layout in LAYOUTS:
            check_case(cpp, make_case(B=2, L=L, M=50, N=32, layout=layout))


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
@pytest.mark.parametrize("features", ["plain", "log_softmax"])
def test_long_sets(backend: Backend, features: str, dtype: torch.dtype) -> None:
    """L many times N: the direct form."""
    for weighting in ("fc1", "scores"):
        check_case(
            backend, make_case(B=2, L=300, M=129, N=6, features=features, dtype=dtype, weighting=weighting)
        )


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
@pytest.mark.parametrize("N", [1, 3, 16, 17])
def test_what_an_earlier_call_left_in_memory_does_no_harm(
    native: Backend, dtype: torch.dtype, N: int
) -> None:
    """A thread keeps its working memory, and units and positions are padded there."""
    for weighting in WEIGHTINGS:
        case = make_case(L=7, N=N, weighting=weighting, dtype=dtype)
        dy = case.dy()
        found = []
        for left in (1.0, float("nan")):
            before = make_case(B=1, L=100, M=300, N=40, dtype=dtype)
            run(native, before.replace(x=torch.full_like(before.x, left)), before.dy())
            found.append(run(native, case, dy))
        assert_equal(found[1], found[0], f"after a call with NaN ({weighting})")


@pytest.mark.parametrize("dtype", HALF, **IDS)
@pytest.mark.parametrize("features", ["relu", "log_softmax"])
@pytest.mark.parametrize(
    ("B", "L", "M", "N"),
    [(2, 300, 1024, 16), (2, 1500, 129, 6), (1, 1500, 129, 130), (2, 2500, 129, 6)],
    ids=["kept", "kept, short rows", "read twice", "cut"],
)
def test_half_sets_of_several_blocks(
    native: Backend, B: int, L: int, M: int, N: int, features: str, dtype: torch.dtype
) -> None:
    """With y rounded and x alike everywhere, an error that all dS of a set share is magnified in dW."""
    for weighting in ("fc1", "scores", "position_bias"):
        case = make_case(B=B, L=L, M=M, N=N, features=features, dtype=dtype, weighting=weighting)
        check_case(native, case)
    lengths = make_case(B=B, L=L, M=M, N=N, features=features, dtype=dtype, layout="lengths")
    check_case(native, lengths, wanted=("weight",))


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
@pytest.mark.parametrize(
    ("B", "L", "M", "N"),
    [
        (1, 1, 1, 1),
        (2, 1, 5, 3),
        (3, 2, 1, 2),
        (2, 25, 64, 64),
        (2, 7, 1031, 5),
        (1, 1000, 48, 129),
        (40, 3, 17, 4),
    ],
)
def test_sizes(backend: Backend, B: int, L: int, M: int, N: int, dtype: torch.dtype) -> None:
    B, L, M, N = backend.affordable(B, L, M, N)
    for weighting in ("fc1", "scores", "average"):
        check_case(backend, make_case(B=B, L=L, M=M, N=N, dtype=dtype, weighting=weighting), all_terms=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], **IDS)
def test_centred_frames(backend: Backend, dtype: torch.dtype) -> None:
    """Frames centred per set, β = 0, nearly equal weights: ‖u‖ is a small part of ‖d‖.

    A norm from the Gram identity loses the square of that part.
    """
    case = make_case(B=4, L=25, M=192, N=16, features="centred", dtype=dtype)
    assert case.weight is not None and case.beta is not None
    case = case.replace(weight=case.weight / 100, beta=torch.zeros_like(case.beta))
    check_case(backend, case)
    dy = case.dy()
    exact = run(truth, case.to(torch.float64), dy.double())["dx"]
    error = (run(backend, case, dy)["dx"].double() - exact).norm() / exact.norm()
    assert error < 50 * torch.finfo(dtype).eps


def test_offset_features_keep_dweight(cpp: Backend) -> None:
    """Features 5 ± 1e-3 in float32: Σ dS·x cancels, Σ dS·(x - μ) does not."""
    case = make_case(B=4, L=25, M=192, N=16, features="offset")
    dy = case.dy()
    exact = run(truth, case.to(torch.float64), dy.double())["dweight"]
    error = (run(cpp, case, dy)["dweight"].double() - exact).norm() / exact.norm()
    assert error < 1e-4


def test_alpha_and_beta_gradients_are_orthogonal_to_them(backend: Backend) -> None:
    """α·dα + β·dβ = 0 with shift on: scaling both leaves y unchanged."""
    for features, layout in itertools.product(("plain", "log_softmax", "offset"), LAYOUTS):
        for dtype in (torch.float64, torch.float32):
            case = make_case(features=features, layout=layout, dtype=dtype)
            assert case.alpha is not None and case.beta is not None
            dy = case.dy()
            r, sizes = run(backend, case, dy), term_sizes(case, dy)
            alpha, beta = case.alpha.double(), case.beta.double()
            left, right = alpha * r["dalpha"], beta * r["dbeta"]
            terms = alpha.abs() * sizes["dalpha"] + beta.abs() * sizes["dbeta"]
            assert (left + right).abs().max() <= 4 * torch.finfo(dtype).eps * terms.max()
            if features == "plain":  # neither is small enough for the sum to vanish by itself
                assert left.abs().max() > 100 * (left + right).abs().max()


def test_one_of_alpha_and_beta_much_larger(backend: Backend) -> None:
    """dα has two formulas, one for |α| ≥ |β| and one for |α| < |β|; both sides, and the zeros."""
    for a, b in ((1.0, 1e-3), (1e-3, 1.0), (1.0, 0.0), (-1.0, 0.5), (0.5, -1.0), (0.0, 1.0)):
        case = make_case(N=7, dtype=torch.float64)
        case = case.replace(alpha=torch.full((7,), a).double(), beta=torch.full((7,), b).double())
        dy = case.dy()
        exact = run(truth, case, dy)
        ours = run(backend, case, dy)
        for name, t in exact.items():
            torch.testing.assert_close(ours[name], t, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
def test_large_eps_is_the_linear_region(backend: Backend, dtype: torch.dtype) -> None:
    """‖u‖ < eps: the gradient of u/(√N·eps), without the projection."""
    check_case(backend, make_case(dtype=dtype).replace(eps=1e3))


def test_units_on_both_sides_of_eps(backend: Backend) -> None:
    case = make_case(N=8, dtype=torch.float64)
    assert case.alpha is not None and case.beta is not None
    scale = torch.tensor([1e-3, 1.0]).repeat(4).double()
    check_case(backend, case.replace(alpha=case.alpha * scale, beta=case.beta * scale, eps=0.1))


@pytest.mark.parametrize("dtype", HALF, **IDS)
@pytest.mark.parametrize("weighting", ["scores", "position_bias"])
def test_float32_parameters_of_half_features(backend: Backend, weighting: str, dtype: torch.dtype) -> None:
    """Each gradient has its operand's dtype, float32 here."""
    case = make_case(weighting=weighting, dtype=dtype)
    for name in ("scores", "alpha", "beta", "position_bias"):
        t = getattr(case, name)
        case = case if t is None else case.replace(**{name: torch.randn(t.shape)})
    check_case(backend, case)


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_scores_of_ten_thousand(backend: Backend, dtype: torch.dtype, size: float) -> None:
    case = make_case(weighting="scores", dtype=dtype)
    assert case.scores is not None
    check_case(backend, case.replace(scores=(case.scores.double() + size).to(dtype)))
    mixed = torch.where(torch.rand(case.scores.shape) < 0.5, size, -size).to(dtype)
    check_case(backend, case.replace(scores=mixed))


def _subsets(case: Case) -> list[tuple[str, ...]]:
    names = tuple(case.floats())
    singles = [(n,) for n in names]
    all_but_one = [tuple(n for n in names if n != left) for left in names] if len(names) > 2 else []
    return singles + all_but_one


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@SHIFT
def test_any_subset_of_gradients_is_the_same(backend: Backend, weighting: str, shift: bool) -> None:
    """Frozen features included: what is not asked for does not come, what is asked for does not change."""
    for dtype, layout in itertools.product((torch.float32, torch.bfloat16), ("padded", "packed")):
        case = make_case(weighting=weighting, shift=shift, dtype=dtype, layout=layout)
        dy = case.dy()
        everything = run(backend, case, dy)
        for wanted in _subsets(case):
            some = run(backend, case, dy, wanted)
            assert set(some) == {"y"} | {f"d{n}" for n in wanted}
            assert_near(some, {n: everything[n] for n in some}, dtype, eps=4)
            assert_equal({"y": some["y"]}, {"y": everything["y"]})


@pytest.mark.parametrize("features", ["plain", "log_softmax"])
@pytest.mark.parametrize("dtype", DTYPES, **IDS)
def test_frozen_features(backend: Backend, dtype: torch.dtype, features: str) -> None:
    case = make_case(B=4, L=25, M=192, N=16, dtype=dtype, features=features)
    results = check_case(backend, case, wanted=("weight", "alpha", "beta"))
    assert set(results) == {"y", "dweight", "dalpha", "dbeta"}


def test_the_backward_operator_computes_what_is_asked_for_only(cpp: Backend) -> None:
    """`needs` has one bit per operand; the other gradients come back with shape (0,)."""
    for weighting, layout in itertools.product(WEIGHTINGS, LAYOUTS):
        case = make_case(weighting=weighting, layout=layout)
        args = (case.x, case.weight, case.scores, case.position_bias, case.alpha, case.beta)
        args += (case.lengths, case.mask, case.offsets, case.eps)
        saved = ops.operator(cpp.name, "forward")(*args, True)
        dy = case.dy()
        everything = run(cpp, case, dy)
        given = sum(1 << i for i, t in enumerate(args[:6]) if t is not None)
        for needs in (0, 1, given, given & ~1, *(1 << i for i in range(6) if given >> i & 1)):
            grads = ops.operator(cpp.name, "backward")(dy, *args, *saved, needs)
            for i, name in enumerate(("dx", "dweight", "dscores", "dposition_bias", "dalpha", "dbeta")):
                if needs >> i & 1:
                    assert_near({name: grads[i]}, {name: everything[name]}, torch.float32, eps=4)
                else:
                    assert grads[i].shape == (0,), name


def test_gradients_add_up_over_calls(each_backend: Backend) -> None:
    """backward() accumulates into .grad, as everywhere in torch."""
    case = make_case(dtype=torch.float64)
    leaves = {n: t.clone().requires_grad_() for n, t in case.floats().items()}
    for _ in range(2):
        each_backend(case.replace(**leaves)).sum().backward()
    once = run(each_backend, case, torch.ones(case.dy().shape, dtype=torch.float64))
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, 2 * once[f"d{name}"])
