"""The kernels on a GPU against float64 and torch's own error, forward and backward."""

from __future__ import annotations

import itertools

import pytest
import torch
from gpu_helpers import (
    DEVICE,
    DTYPES,
    IDS,
    OURS,
    check,
    gpu_case,
    gradient_of,
    on_device,
)
from helpers import FEATURES, HALF, LAYOUTS, WEIGHTINGS, assert_equal, pack, run

LENGTHS = (1, 25, 64, 65, 300, 1000)
UNITS = (1, 8, 64, 129)
WIDTHS = (50, 128, 1024, 1536, 2048)
# Every length with every width, the units in turn so that each meets each length and width.
SIZES = [
    (length, UNITS[(i + j) % len(UNITS)], width)
    for i, length in enumerate(LENGTHS)
    for j, width in enumerate(WIDTHS)
]


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weightings_and_layouts(weighting: str, layout: str, dtype: torch.dtype) -> None:
    """An empty set among them where the layout allows one."""
    for shift in (True, False):
        check(gpu_case(weighting=weighting, layout=layout, dtype=dtype, shift=shift, empty=True))


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
@pytest.mark.parametrize(("L", "N", "M"), SIZES)
def test_sizes(L: int, N: int, M: int, dtype: torch.dtype) -> None:
    check(gpu_case(B=3, L=L, N=N, M=M, dtype=dtype), all_terms=True)


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES, **IDS)
@pytest.mark.parametrize(("L", "N", "M"), [*itertools.product(LENGTHS, UNITS, WIDTHS)])
def test_all_sizes(L: int, N: int, M: int, dtype: torch.dtype) -> None:
    check(gpu_case(B=3, L=L, N=N, M=M, dtype=dtype), all_terms=True)


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
@pytest.mark.parametrize("features", FEATURES)
def test_features(features: str, dtype: torch.dtype) -> None:
    """Offsets that beta cancels included; short sets and long ones, which may run in different forms."""
    for L in (25, 300):
        check(gpu_case(B=4, L=L, M=256, N=16, features=features, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
@pytest.mark.parametrize("weighting", ["fc1", "scores", "average"])
def test_a_long_bag(weighting: str, dtype: torch.dtype) -> None:
    """One set whose positions many programs share."""
    check(gpu_case(B=1, L=20_011, M=256, N=8, weighting=weighting, dtype=dtype), all_terms=True)


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
def test_uneven_packed_sets(dtype: torch.dtype) -> None:
    """Lengths of 0, 1 and 2000 side by side; rows beyond the last offset take no part."""
    with on_device():
        lengths = torch.tensor([1, 2000, 0, 30, 31, 500, 3])
        case = pack(gpu_case(B=7, L=2000, M=128, N=9, dtype=dtype), lengths, trailing=5)
    check(case, all_terms=True)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_nothing_but_empty_sets(weighting: str) -> None:
    """z = 0, so that y is the direction of beta; every gradient is finite."""
    with on_device():
        case = gpu_case(weighting=weighting).replace(lengths=torch.zeros(5, dtype=torch.int64))
    results = run(OURS, case, gradient_of(case))
    assert case.beta is not None
    n, m = case.cluster_size, case.x.size(-1)
    expected = (case.beta.sign() / (n * m) ** 0.5)[None, :, None].expand(5, n, m)
    torch.testing.assert_close(results["y"], expected)
    assert int(results["dx"].count_nonzero()) == 0
    assert all(t.isfinite().all() for t in results.values())


@pytest.mark.parametrize("shape", [(0, 7), (3, 0)], ids=["no sets", "no positions"])
def test_nothing_at_all(shape: tuple[int, int]) -> None:
    B, L = shape
    case = gpu_case(B=B, L=L)
    results = run(OURS, case, gradient_of(case))
    assert results["y"].shape == (B, 11, 67)
    assert results["dx"].shape == (B, L, 67)
    assert all(t.isfinite().all() for t in results.values())


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, **IDS)
@pytest.mark.parametrize("layout", ["lengths", "mask", "packed"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_what_stands_in_padding_has_no_influence(
    weighting: str, layout: str, dtype: torch.dtype, poison: float
) -> None:
    case = gpu_case(B=6, L=70, weighting=weighting, layout=layout, dtype=dtype, empty=True)
    dy = gradient_of(case)
    expected = run(OURS, case, dy)
    if layout == "packed":
        assert case.offsets is not None
        excluded = torch.arange(case.x.size(0), device=DEVICE) >= case.offsets[-1]
    elif layout == "mask":
        assert case.mask is not None
        excluded = ~case.mask
    else:
        assert case.lengths is not None
        excluded = torch.arange(case.x.size(1), device=DEVICE) >= case.lengths[:, None]
    assert excluded.any()
    case.x[excluded] = poison
    if case.scores is not None:
        where = excluded[:, None].expand(case.scores.shape) if layout != "packed" else excluded
        case.scores = case.scores.masked_fill(where, poison)
    results = run(OURS, case, dy)
    assert_equal(results, expected, f"with {poison} in excluded positions")
    assert int(results["dx"][excluded].count_nonzero()) == 0


def test_scores_of_minus_infinity_take_no_part() -> None:
    case = gpu_case(B=4, L=100, M=128, weighting="scores")
    assert case.scores is not None
    scores = case.scores.clone()
    scores[:, :, 40:] = -float("inf")
    scores[2, 3] = -float("inf")
    results = check(case.replace(scores=scores), all_terms=True)
    assert int(results["dscores"][scores == -float("inf")].count_nonzero()) == 0


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
def test_eps_above_the_norm(dtype: torch.dtype) -> None:
    """The linear region: y = u / (sqrt(N) eps)."""
    check(gpu_case(dtype=dtype).replace(eps=1e3))


@pytest.mark.parametrize("dtype", HALF, **IDS)
def test_float32_parameters_beside_half_features(dtype: torch.dtype) -> None:
    """alpha, beta, position_bias and scores may be float32; each gradient has its operand's dtype."""
    for weighting in ("position_bias", "scores"):
        case = gpu_case(dtype=dtype, weighting=weighting)
        names = [n for n in ("alpha", "beta", "position_bias", "scores") if getattr(case, n) is not None]
        case = case.replace(**{n: getattr(case, n).float() for n in names})
        results = run(OURS, case, gradient_of(case))
        assert results["y"].dtype == dtype
        for n in names:
            assert results[f"d{n}"].dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
def test_frozen_features(dtype: torch.dtype) -> None:
    """Without dX the other gradients are the same to rounding, and right."""
    for L in (25, 300):
        check(gpu_case(B=4, L=L, M=256, N=16, dtype=dtype), wanted=("weight", "alpha", "beta"))


@pytest.mark.parametrize("wild", [[2**40, -1, 23, 24, -(2**40)], [2**31 + 1, 2**32 + 5, -(2**31), 5, 0]])
def test_lengths_out_of_range_are_clamped(wild: list[int]) -> None:
    """Values are not read on the host: no length leads beyond x."""
    lengths = torch.tensor(wild)
    case = gpu_case().replace(lengths=lengths.to(DEVICE))
    tame = case.replace(lengths=lengths.clamp(0, 23).to(DEVICE))
    dy = gradient_of(case)
    assert_equal(run(OURS, case, dy), run(OURS, tame, dy), "between wild and clamped lengths")
