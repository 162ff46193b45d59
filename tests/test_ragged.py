"""Sets of different length: lengths, masks with holes, packed rows; what is excluded has no influence."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    DTYPES,
    WEIGHTINGS,
    Case,
    assert_equal,
    assert_near,
    check_case,
    make_case,
    make_lengths,
    pack,
    pad,
    run,
    term_sizes,
)
from tested_backends import Backend
from torch import Tensor

from fastac import ops

IDS = {"ids": lambda v: str(v).removeprefix("torch.")}
RAGGED = ("lengths", "mask", "packed")
SHIFT = pytest.mark.parametrize("shift", [True, False], ids=["shift", "plain"])


def excluded_rows(case: Case) -> Tensor:
    """True where a row of x, (B, L) or (T,), takes no part."""
    if case.offsets is not None:
        return torch.arange(case.x.size(0)) >= case.offsets[-1]
    return ~pad(case.x, None, case.lengths, case.mask, None)[2]


def fill_excluded(case: Case, value: float) -> Case:
    """`value` in every excluded position of x and the scores, and in the columns of position_bias past L."""
    rows = excluded_rows(case)
    changes = {"x": case.x.masked_fill(rows[..., None], value)}
    if case.scores is not None:
        changes["scores"] = case.scores.masked_fill(
            rows if case.offsets is not None else rows[:, None], value
        )
    if case.position_bias is not None:
        bias = case.position_bias.clone()
        bias[:, 23:] = value
        changes["position_bias"] = bias
    return case.replace(**changes)


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
@pytest.mark.parametrize("layout", RAGGED)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@SHIFT
def test_excluded_positions_have_no_influence(
    backend: Backend, weighting: str, layout: str, dtype: torch.dtype, shift: bool
) -> None:
    """NaN, ±Inf or huge numbers there change no bit of y or of any gradient, and their own gradient is 0."""
    case = make_case(weighting=weighting, layout=layout, dtype=dtype, shift=shift, empty=True)
    dy = case.dy()
    rows = excluded_rows(case)
    assert rows.any()
    clean = run(backend, fill_excluded(case, 0.0), dy)
    for value in (float("nan"), float("inf"), -float("inf"), torch.finfo(dtype).max):
        dirty = run(backend, fill_excluded(case, value), dy)
        assert_equal(dirty, clean, f"with {value} in excluded positions")
    assert (clean["dx"][rows] == 0).all()
    if weighting == "scores":
        ds = clean["dscores"] if layout == "packed" else clean["dscores"].transpose(1, 2)[rows].T
        ds = ds[:, rows] if layout == "packed" else ds
        assert (ds == 0).all()
    if weighting == "position_bias":
        assert (clean["dposition_bias"][:, 23:] == 0).all()


@pytest.mark.parametrize("layout", RAGGED)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_nan_in_excluded_positions_at_inference(backend: Backend, weighting: str, layout: str) -> None:
    for dtype in DTYPES:
        case = make_case(weighting=weighting, layout=layout, dtype=dtype, empty=True)
        clean = run(backend, fill_excluded(case, 0.0))
        assert_equal(run(backend, fill_excluded(case, float("nan"))), clean, "with NaN in excluded positions")


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
@pytest.mark.parametrize("layout", RAGGED)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_accuracy_with_empty_sets(backend: Backend, weighting: str, layout: str, dtype: torch.dtype) -> None:
    for shift in (True, False):
        case = make_case(weighting=weighting, layout=layout, dtype=dtype, empty=True, shift=shift)
        results = check_case(backend, case)
        if not shift:
            assert (results["y"][-1] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
@pytest.mark.parametrize("layout", RAGGED)
def test_an_empty_set_is_the_beta_direction(backend: Backend, layout: str, dtype: torch.dtype) -> None:
    """z = 0, u = β·1: y = sign(β)/√(N·M), and 0 where β = 0."""
    case = make_case(layout=layout, dtype=dtype, empty=True)
    assert case.beta is not None
    beta = case.beta.clone()
    beta[0] = 0
    y = run(backend, case.replace(beta=beta))["y"][-1].double()
    N, M = case.cluster_size, case.x.size(-1)
    expected = (beta.double().sign() / (N * M) ** 0.5)[:, None].expand(N, M)
    torch.testing.assert_close(y, expected, rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_all_layouts_of_one_batch_agree(backend: Backend, weighting: str) -> None:
    """lengths, the mask that says the same, packed rows, and one set at a time."""
    for dtype in DTYPES:
        case = make_case(weighting=weighting, dtype=dtype)
        B, L, _ = case.x.shape
        lengths = make_lengths(B, L)
        mask = torch.arange(L) < lengths[:, None]
        dy = case.dy()
        by_lengths = run(backend, case.replace(lengths=lengths), dy)
        assert_near(run(backend, case.replace(mask=mask), dy), by_lengths, dtype)
        packed = run(backend, pack(case, lengths, trailing=2), dy)
        dx = packed.pop("dx")
        # An empty set has u = β·1, which dU loses: what is left of dβ depends on the order of the sums.
        terms = term_sizes(case.replace(lengths=lengths), dy)
        noise = backend.form_noise(case.replace(lengths=lengths), dy)
        near = {n: t for n, t in by_lengths.items() if n not in ("dx", "dscores")}
        if weighting == "scores":
            ds = packed.pop("dscores")
            expected = by_lengths["dscores"].transpose(1, 2)[mask].T
            assert_near({"dscores": ds[:, :-2]}, {"dscores": expected}, dtype, noise=noise)
        assert_near(packed, near, dtype, terms=terms, noise=noise)
        assert_near({"dx": dx[:-2]}, {"dx": by_lengths["dx"][mask]}, dtype, noise=noise)
        for b in (0, 1):
            n = int(lengths[b])
            scores = None if case.scores is None else case.scores[b : b + 1, :, :n]
            alone = run(backend, case.replace(x=case.x[b : b + 1, :n], scores=scores))
            assert_near(alone, {"y": by_lengths["y"][b : b + 1]}, dtype)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_full_lengths_and_full_mask_are_padded(backend: Backend, weighting: str) -> None:
    case = make_case(weighting=weighting)
    dy = case.dy()
    whole = run(backend, case, dy)
    B, L, _ = case.x.shape
    assert_near(run(backend, case.replace(lengths=torch.full((B,), L)), dy), whole, torch.float32)
    mask = torch.ones(B, L, dtype=torch.bool)
    assert_near(run(backend, case.replace(mask=mask), dy), whole, torch.float32)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], **IDS)
@pytest.mark.parametrize("layout", ["lengths", "packed"])
def test_integer_types_of_lengths_and_offsets(each_backend: Backend, layout: str, dtype: torch.dtype) -> None:
    case = make_case(layout=layout)
    name = "lengths" if layout == "lengths" else "offsets"
    assert_equal(
        run(each_backend, case.replace(**{name: getattr(case, name).to(dtype)})), run(each_backend, case)
    )


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
@pytest.mark.parametrize("layout", ["padded", "mask", "packed"])
def test_minus_infinity_scores(backend: Backend, layout: str, dtype: torch.dtype) -> None:
    """A score of -Inf has weight 0 and gradient 0, per unit; a unit with nothing else sees an empty set."""
    case = make_case(weighting="scores", layout=layout, dtype=dtype)
    assert case.scores is not None
    scores = case.scores.masked_fill(torch.rand(case.scores.shape) < 0.3, -float("inf"))
    if layout == "packed":
        scores[2] = -float("inf")
    else:
        scores[1] = -float("inf")
        scores[0, 3] = -float("inf")
    results = check_case(backend, case.replace(scores=scores))
    assert (results["dscores"][scores == -float("inf")] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
def test_all_scores_minus_infinity(backend: Backend, dtype: torch.dtype) -> None:
    for shift in (True, False):
        case = make_case(weighting="scores", dtype=dtype, shift=shift)
        assert case.scores is not None
        case = case.replace(scores=torch.full_like(case.scores, -float("inf")))
        results = check_case(backend, case)
        assert (results["dscores"] == 0).all() and (results["dx"] == 0).all()
        if not shift:
            assert (results["y"] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize(
    ("B", "L", "layout"),
    [
        (0, 5, "padded"),
        (0, 5, "lengths"),
        (0, 5, "mask"),
        (0, 5, "packed"),
        (3, 0, "padded"),
        (3, 0, "lengths"),
        (3, 0, "mask"),
        (3, 0, "packed"),
        (0, 0, "padded"),
    ],
)
def test_nothing_at_all(
    backend: Backend, B: int, L: int, layout: str, weighting: str, dtype: torch.dtype
) -> None:
    """B = 0, L = 0 and T = 0 are legal, with gradients of the right shape."""
    case = make_case(B=B, L=L, layout=layout, weighting=weighting, dtype=dtype)
    if layout == "packed":
        assert case.offsets is not None
        case = case.replace(x=case.x[:0], scores=None if case.scores is None else case.scores[:, :0])
    ours = check_case(backend, case, all_terms=True)
    assert ours["y"].shape == (B, case.cluster_size, case.x.size(-1))
    assert_equal({"y": ours["y"]}, run(backend, case))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_every_set_empty(backend: Backend, weighting: str) -> None:
    for changes in (
        {"lengths": torch.zeros(5, dtype=torch.int64)},
        {"mask": torch.zeros(5, 23, dtype=torch.bool)},
    ):
        case = make_case(B=5, L=23, weighting=weighting).replace(**changes)
        results = check_case(backend, fill_excluded(case, 0.0))
        assert_equal(run(backend, fill_excluded(case, float("nan"))), {"y": results["y"]})
        assert (results["dx"] == 0).all()


def test_first_and_middle_sets_empty(backend: Backend) -> None:
    """Equal neighbours in offsets, and a first set that starts at its own end."""
    lengths = torch.tensor([0, 23, 0, 0, 7])
    for weighting in WEIGHTINGS:
        case = make_case(B=5, L=23, weighting=weighting)
        check_case(backend, case.replace(lengths=lengths))
        check_case(backend, pack(case, lengths, trailing=1))
        check_case(backend, pack(case, lengths))


def test_mask_that_begins_and_ends_with_holes(backend: Backend) -> None:
    mask = torch.zeros(5, 23, dtype=torch.bool)
    mask[0, 22] = mask[1, 0] = mask[2, 11] = True
    mask[3, 5:20:3] = True
    mask[4, 1:] = True
    for weighting in WEIGHTINGS:
        for dtype in (torch.float32, torch.bfloat16):
            case = make_case(B=5, L=23, weighting=weighting, dtype=dtype).replace(mask=mask)
            check_case(backend, case, all_terms=True)


def test_very_uneven_packed_sets(backend: Backend) -> None:
    """One set of 700 rows among sets of a few: the split over rows must not mix sets."""
    lengths = torch.tensor([3, 700, 0, 1, 64, 65, 2])
    for weighting in ("fc1", "scores"):
        for dtype in (torch.float32, torch.bfloat16):
            check_case(
                backend, pack(make_case(B=7, L=700, weighting=weighting, dtype=dtype), lengths, trailing=5)
            )


def test_the_saved_statistics(cpp: Backend) -> None:
    """The greatest valid score, the sum of exp(score - greatest), ‖u‖ before eps, and the scores."""
    for weighting in WEIGHTINGS:
        case = make_case(weighting=weighting, layout="lengths", empty=True, M=640, N=4, dtype=torch.float64)
        assert case.lengths is not None and case.alpha is not None and case.beta is not None
        args = (case.x, case.weight, case.scores, case.position_bias, case.alpha, case.beta)
        _, stats, saved = ops.operator(cpp.name, "forward")(*args, case.lengths, None, None, case.eps, True)
        s = torch.zeros(5, 4, 23, dtype=torch.float64) if case.scores is None else case.scores
        if case.weight is not None:
            s = (case.x @ case.weight.T).transpose(1, 2)
        if case.position_bias is not None:
            s = s + case.position_bias[:, :23]
        valid = torch.arange(23) < case.lengths[:, None, None]
        s = s.masked_fill(~valid, -float("inf"))
        greatest, total, norm = stats
        assert (total[-1] == 0).all(), "the empty set"
        torch.testing.assert_close(greatest + total.log(), s.logsumexp(-1), rtol=1e-13, atol=1e-13)
        u = case.alpha[:, None] * (s.softmax(-1).nan_to_num() @ case.x) + case.beta[:, None]
        torch.testing.assert_close(norm, u.norm(dim=-1), rtol=1e-13, atol=0)
        if case.weight is None:
            assert saved.shape == (0,)
        else:
            found = saved.transpose(1, 2)[valid.expand_as(s)]
            torch.testing.assert_close(found, s[valid.expand_as(s)], rtol=1e-13, atol=1e-13)
