"""The suite's own error bound: it accepts what is right and refuses planted faults."""

from __future__ import annotations

import functools

import pytest
import torch
from helpers import (
    DTYPES,
    FEATURES,
    HALF,
    LAYOUTS,
    WEIGHTINGS,
    Case,
    Results,
    assert_equal,
    assert_near,
    check,
    make_case,
    peers,
    plain,
    plain_parts,
    rounded_y_noise,
    rounding_noise,
    run,
    sum_sizes,
    term_sizes,
    truth,
)


@functools.cache
def _setup(dtype: torch.dtype) -> tuple[Case, Results, Results, list[Results]]:
    """A case, the truth rounded to its dtype, the truth, and the peers; no test changes them."""
    torch.manual_seed(0)
    case = make_case(dtype=dtype)
    dy = case.dy()
    exact = run(truth, case.to(torch.float64), dy.double())
    ours = {name: t.to(dtype) for name, t in exact.items()}
    return case, ours, exact, peers(case, dy)


RESULTS = ("y", "dx", "dweight", "dalpha", "dbeta")


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_rounded_truth_passes(dtype: torch.dtype) -> None:
    _, ours, exact, others = _setup(dtype)
    check(ours, exact, others, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RESULTS)
@pytest.mark.parametrize("fault", ["sign", "missing unit", "one unit's sign", "nan", "inf", "zero", "swap"])
def test_a_planted_fault_is_refused(dtype: torch.dtype, name: str, fault: str) -> None:
    case, ours, exact, others = _setup(dtype)
    bad = ours[name].clone()
    units = bad.transpose(0, 1) if name == "y" else bad  # the first axis of dx is a set
    order = units.double().flatten(1).norm(dim=1).argsort() if units.dim() > 1 else units.double().argsort()
    smallest, largest = int(order[0]), int(order[-1])
    if fault == "sign":
        bad.neg_()
    elif fault == "missing unit":
        units[largest] = 0
    elif fault == "one unit's sign":
        units[largest].neg_()
    elif fault == "nan":
        bad.view(-1)[-1] = float("nan")
    elif fault == "inf":
        bad.view(-1)[0] = float("inf")
    elif fault == "zero":
        bad.zero_()
    elif fault == "swap":
        units[[smallest, largest]] = units[[largest, smallest]]
    dy = case.dy()
    with pytest.raises(AssertionError, match=name):
        check(ours | {name: bad}, exact, others, dtype)
    with pytest.raises(AssertionError, match=name):
        noise = rounding_noise(case, dy, run(truth, case.to(torch.float64), dy.double()))
        check(ours | {name: bad}, exact, others, dtype, terms=sum_sizes(case, dy), noise=noise)


@pytest.mark.parametrize("name", RESULTS)
@pytest.mark.parametrize(
    ("dtype", "relative"), [(torch.float64, 1e-12), (torch.float32, 1e-3), (torch.float32, 1e-4)]
)
def test_a_relative_perturbation_is_refused(dtype: torch.dtype, relative: float, name: str) -> None:
    case, ours, exact, others = _setup(dtype)
    bad = ours[name] * (1 + relative)
    dy = case.dy()
    allowance = {
        "terms": sum_sizes(case, dy),
        "noise": rounding_noise(case, dy, run(truth, case.to(torch.float64), dy.double())),
    }
    for more in ({}, allowance):
        with pytest.raises(AssertionError, match=name):
            check(ours | {name: bad}, exact, others, dtype, **more)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["y", "dx", "dweight"])
def test_a_second_rounding_to_a_coarser_grid_is_refused(dtype: torch.dtype, name: str) -> None:
    """Half types: twice the rounding of the peer is the limit, so four times is beyond it."""
    _, ours, exact, others = _setup(dtype)
    noise = torch.rand(ours[name].shape) * 2 - 1
    bad = (exact[name] * (1 + 3 * torch.finfo(dtype).eps * noise)).to(dtype)
    with pytest.raises(AssertionError, match=name):
        check(ours | {name: bad}, exact, others, dtype)


def test_a_dropped_or_invented_gradient_is_refused() -> None:
    _, ours, exact, others = _setup(torch.float32)
    with pytest.raises(AssertionError, match="dweight"):
        check({n: t for n, t in ours.items() if n != "dweight"}, exact, others, torch.float32)
    with pytest.raises(AssertionError, match="dscores"):
        check(ours | {"dscores": ours["dx"]}, exact, others, torch.float32)


def test_a_wrong_shape_is_refused() -> None:
    _, ours, exact, others = _setup(torch.float32)
    with pytest.raises(AssertionError, match="shape"):
        check(ours | {"y": ours["y"].flatten(1)}, exact, others, torch.float32)


def test_a_nan_peer_lends_no_slack() -> None:
    _, ours, exact, others = _setup(torch.bfloat16)
    broken = {name: torch.full_like(t, float("nan")) for name, t in ours.items()}
    bad = ours | {"dx": ours["dx"] + 0.02 * ours["dx"].abs().max()}
    for those in ([broken], [broken, others[1]], [others[1], broken]):
        with pytest.raises(AssertionError, match="dx"):
            check(bad, exact, those, torch.bfloat16)
    with pytest.raises(AssertionError, match="not finite"):
        check(broken, exact, [broken], torch.bfloat16)


def test_the_better_peer_decides() -> None:
    _, ours, exact, others = _setup(torch.bfloat16)
    awful = {name: t * 3 for name, t in ours.items()}
    with pytest.raises(AssertionError, match="y"):
        check(awful, exact, [awful, others[1]], torch.bfloat16)


@pytest.mark.parametrize("features", [*FEATURES, "centred"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_peer_agrees_with_the_reference(weighting: str, layout: str, features: str) -> None:
    """Two independent statements of the equations, in float64, empty sets included."""
    for shift in (True, False):
        case = make_case(
            weighting=weighting,
            layout=layout,
            features=features,
            shift=shift,
            dtype=torch.float64,
            empty=True,
        )
        dy = case.dy()
        sizes = term_sizes(case, dy)
        ours, exact = run(plain, case, dy), run(truth, case, dy)
        assert ours.keys() == exact.keys()
        for name, t in ours.items():
            error = float((t - exact[name]).abs().max())
            assert error <= 1e-13 * float(sizes[name].max()), f"{name}: {error}"


def test_equality_helpers_see_one_bit() -> None:
    t = torch.randn(100)
    other = t.clone()
    other[7] = torch.nextafter(other[7], torch.tensor(9.0))
    assert_equal({"y": t}, {"y": t.clone()})
    assert_near({"y": t}, {"y": other}, torch.float32)
    with pytest.raises(AssertionError, match="1 of 100"):
        assert_equal({"y": t}, {"y": other})
    with pytest.raises(AssertionError, match="NaN"):
        assert_equal({"y": t.log()}, {"y": t.log()})
    with pytest.raises(AssertionError, match="differs"):
        assert_near({"y": t}, {"y": t * 1.001}, torch.float32)


@pytest.mark.parametrize("dtype", HALF)
def test_the_noise_of_a_rounded_y(dtype: torch.dtype) -> None:
    """It is the difference that the gradients' formulas make of it, and lends a fault no slack."""
    torch.manual_seed(0)
    case = make_case(dtype=dtype, weighting="scores", layout="mask")
    dy = case.dy()
    exact = run(truth, case.to(torch.float64), dy.double())
    noise = rounded_y_noise(case, dy)
    assert noise.keys() == exact.keys() - {"y"}

    wide = case.to(torch.float64)
    assert wide.alpha is not None
    x, a, _, norm, y = plain_parts(wide)
    unit = y.to(dtype).double() * case.cluster_size**0.5
    du = (dy.double() - unit * (unit * dy.double()).sum(-1, keepdim=True)) / (norm * case.cluster_size**0.5)
    e = (wide.alpha[:, None] * du) @ x.mT
    found = {
        "dx": a.mT @ (wide.alpha[:, None] * du),
        "dscores": a * (e - (a * e).sum(-1, keepdim=True)),
        "dbeta": du.sum((0, 2)),
    }
    for name, t in found.items():
        torch.testing.assert_close(noise[name], (t - exact[name]).abs(), rtol=1e-6, atol=1e-12)
        assert noise[name].max() > 0
        assert_near({name: t}, {name: exact[name]}, torch.float64, noise=noise)
        with pytest.raises(AssertionError, match=name):
            assert_near({name: t}, {name: exact[name]}, torch.float64)
        with pytest.raises(AssertionError, match=name):
            assert_near({name: exact[name].flip(0)}, {name: exact[name]}, dtype, noise=noise)
    assert rounded_y_noise(case.to(torch.float32), dy.float()) == {}
    assert rounded_y_noise(case.replace(alpha=None, beta=None), dy) == {}


def test_cancelling_features_do_cancel() -> None:
    """u is about a thousandth of α·z in float32, and at most a tenth in half types."""
    for dtype, share in ((torch.float32, 2e-3), (torch.bfloat16, 0.1), (torch.float16, 0.1)):
        case = make_case(dtype=dtype, features="cancel").to(torch.float64)
        assert case.alpha is not None
        _, a, u, _, _ = plain_parts(case)
        z = a @ case.x
        assert u.norm() < share * (case.alpha[:, None] * z).norm()
