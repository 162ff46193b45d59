"""The sweeps: fits, the rules of what is fitted, the gate, what is left out and why, measured memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastac import _native

from . import correctness, memory, sweeps
from .peers import Eager, Prepared
from .records import COLUMNS, MEASURED, record
from .sweeps import Sweep
from .workloads import Workload, make_case

BASE = Workload("small", 4, 7, 33, 5, "tests")
TINY = (Sweep("B", BASE, (1, 3)), Sweep("L", replace(BASE, scores="given", batch=1), (5, 64)))
COMPILED = pytest.mark.skipif(not _native.available, reason=f"no native library: {_native.why_not}")


@dataclass
class Options:
    threads: int = 1
    backend: str = "cpu"


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_power_is_found() -> None:
    sizes = [16, 64, 256, 1024]
    found = sweeps.fit(sizes, [3e-9 * s**1.3 for s in sizes])
    assert found["exponent"] == pytest.approx(1.3)
    assert found["low"] == pytest.approx(1.3) and found["high"] == pytest.approx(1.3)
    assert (found["from"], found["to"], found["points"]) == (16, 1024, 4)


def test_the_interval_is_that_of_students_t() -> None:
    # Residuals +1, -2, +1 in the logarithm, at sizes e^0, e^1, e^2: slope 1, s^2 = 6 / (3 - 2),
    # standard error sqrt(6 / 2), t(0.975, one degree of freedom) = 12.706.
    values = [math.exp(x + r) for x, r in zip((0, 1, 2), (1, -2, 1), strict=True)]
    found = sweeps.fit([math.exp(x) for x in (0, 1, 2)], values)  # type: ignore[misc]
    assert found["exponent"] == pytest.approx(1.0)
    assert found["high"] - 1 == pytest.approx(12.7062 * math.sqrt(3), rel=1e-4)
    assert 1 - found["low"] == pytest.approx(12.7062 * math.sqrt(3), rel=1e-4)


@pytest.mark.parametrize(("sizes", "values"), [([1, 2], [1.0, 2.0]), ([1, 2, 4], [1.0, 2.0])])
def test_too_few_points_are_refused(sizes: list[int], values: list[float]) -> None:
    with pytest.raises(ValueError, match="three sizes"):
        sweeps.fit(sizes, values)


def synthetic(sweep: Sweep, **columns: Any) -> list[dict[str, Any]]:
    """Records of ours, forward, one per size; a column is a function of the workload."""
    made = []
    for w in sweep.workloads():
        rows = w.batch * w.length
        values = {name: value(w) for name, value in columns.items()}
        made.append(record(w, rows, suite="sweep", varied=sweep.varied, mode="forward", contender="ours",
                           operations=w.operations(rows, "forward"), **values))  # fmt: skip
    return made


def test_equal_values_are_a_line_of_slope_zero() -> None:
    found = sweeps.fit([1, 10, 100, 1000], [2e6] * 4)
    assert (found["exponent"], found["low"], found["high"]) == (0, 0, 0)


def test_small_sizes_are_not_fitted() -> None:
    sweep = Sweep(
        "L", replace(BASE, batch=1, in_features=1024, cluster_size=64), sweeps.doublings(1, 1 << 16)
    )
    least = sweeps.FITTED_OPERATIONS / (4 * 1024 * 64)

    def seconds(w: Workload) -> float:
        return 1e-6 * w.length**1.25 if w.length >= least else 1.0

    (found,) = sweeps.exponents_of(sweep, synthetic(sweep, median_s=seconds))
    assert found["exponent"] == pytest.approx(1.25)
    assert found["from"] == 512 and found["to"] == 1 << 16
    assert {found[k] for k in ("varied", "mode", "contender", "quantity")} == {"L", "forward", "ours", "time"}


def test_memory_is_fitted_where_operands_are_large_and_noise_counts_as_none() -> None:
    sweep = Sweep("L", replace(BASE, batch=1, in_features=256, scores="given"), sweeps.doublings(16, 1 << 20))
    noise = synthetic(sweep, peak_bytes=lambda w: (w.length * 7919) % 5000)
    (flat,) = sweeps.exponents_of(sweep, noise)
    assert flat["quantity"] == "peak memory"
    assert flat["exponent"] == pytest.approx(0, abs=1e-9)
    assert flat["from"] == 65536  # x alone is 64 MiB
    (linear,) = sweeps.exponents_of(sweep, synthetic(sweep, peak_bytes=lambda w: 100 * w.length))
    assert linear["exponent"] == pytest.approx(1)


def test_two_sizes_with_figures_give_no_exponent() -> None:
    sweep = Sweep("L", replace(BASE, in_features=1024, cluster_size=64), (4096, 8192))
    assert sweeps.exponents_of(sweep, synthetic(sweep, median_s=lambda w: w.length * 1e-6)) == []


def test_cost_that_grows_faster_than_linearly_misses_the_target() -> None:
    about = {"varied": "L", "contender": "ours", "quantity": "time", "workload": "long-sets", "exponent": 1.3}
    found = {f.figure: f for f in sweeps.figures([about | {"mode": "forward"}])}
    assert found["exponent in L, forward (long-sets)"].verdict == "missed by 18 %"
    assert found["exponent in L, training (long-sets)"].verdict == "not measured"
    others = [
        about | {"mode": "forward", "contender": "eager"},
        about | {"mode": "forward", "quantity": "peak memory"},
    ]
    assert all(f.verdict == "not measured" for f in sweeps.figures(others))


def test_the_sweeps_are_those_asked_for() -> None:
    ends = {(s.varied, s.base.name): (min(s.sizes), max(s.sizes)) for s in sweeps.SWEEPS}
    assert ends == {
        ("B", "kinetics-rgb"): (1, 1024), ("L", "mil-bag-256"): (16, 1 << 20),
        ("L", "long-sets"): (16, 16384), ("M", "kinetics-rgb"): (32, 4096), ("N", "kinetics-rgb"): (1, 512),
    }  # fmt: skip
    for sweep in sweeps.SWEEPS:
        workloads = sweep.workloads()
        assert [sweep.size(w) for w in workloads] == sorted(set(sweep.sizes))
        fixed = set(sweeps.FIELDS.values()) - {sweeps.FIELDS[sweep.varied]}
        assert all(getattr(w, f) == getattr(sweep.base, f) for w in workloads for f in fixed)
        for mode in sweeps.MODES:
            fitted = [
                w for w in workloads if w.operations(sweeps.rows_of(w), mode) >= sweeps.FITTED_OPERATIONS
            ]
            assert len(fitted) >= 5


@COMPILED
def test_a_run_measures_every_size_mode_and_contender() -> None:
    records, exponents = sweeps.run(Options(), TINY, rounds=2, budget=0.0)
    assert exponents == []  # nothing here is large enough to be fitted
    assert all(list(r) == list(COLUMNS) for r in records)
    seen = {(r["varied"], r["batch"], r["length"], r["mode"], r["contender"]) for r in records}
    sizes = [("B", 1, 7), ("B", 3, 7), ("L", 1, 5), ("L", 1, 64)]
    assert seen == {(*s, m, c) for s in sizes for m in sweeps.MODES for c in sweeps.CONTENDERS}
    for r in records:
        assert r["median_s"] > 0 and r["suite"] == "sweep" and r["reason"] == ""
        assert r["full_batch"] == r["batch"] and r["rows"] == r["batch"] * r["length"]
        assert r["contender"] != "ours" or r["time_over_ours"] == 1
        assert (r["peak_bytes"] is not None) == memory.available()


@COMPILED
@pytest.mark.skipif(not memory.available(), reason="the system does not tell the peak of the resident memory")
def test_memory_is_that_of_one_call() -> None:
    sweep = Sweep("B", Workload("middle", 1, 25, 512, 32, "tests"), (4, 256))
    wanted = [
        {"batch": b, "mode": m, "contender": c} for b in sweep.sizes for m in sweeps.MODES
        for c in sweeps.CONTENDERS
    ]  # fmt: skip
    found = sweeps.measure_memory(sweep, wanted, Options())
    peaks = {tuple(w.values()): f["peak_bytes"] for w, f in zip(wanted, found, strict=True)}
    y, x = 256 * 32 * 512 * 4, 256 * 25 * 512 * 4
    assert y <= peaks[256, "forward", "ours"] < 1.3 * y
    assert y + x <= peaks[256, "training", "ours"] < peaks[256, "training", "eager"]
    assert peaks[4, "forward", "eager"] < peaks[256, "forward", "eager"] / 8
    large = sweep.workloads()[1]
    for mode in sweeps.MODES:
        assert peaks[256, mode, "eager"] + x < sweeps.needed(large, mode, "eager")
        assert peaks[256, mode, "ours"] + x < sweeps.needed(large, mode, "ours")


@COMPILED
def test_what_needs_too_much_memory_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeps, "MEMORY_LIMIT", 0)
    monkeypatch.setattr(memory, "available", lambda: False)
    records, _ = sweeps.run(Options(), TINY[:1], rounds=2, budget=0.0)
    for r in records:
        if r["contender"] == "eager":
            assert "of this benchmark" in r["reason"]
            assert all(r[name] is None for name in MEASURED)
        else:
            assert r["reason"] == "" and r["median_s"] > 0
    monkeypatch.setattr(sweeps, "available_memory", lambda: 0)
    records, _ = sweeps.run(Options(), TINY[:1], rounds=2, budget=0.0)
    assert len(records) == 8
    assert all("this machine" in r["reason"] for r in records if r["contender"] == "ours")


def spoiled(case: Any, spoil: Any) -> dict[str, Prepared]:
    right = Eager().prepare(case)
    return {"ours": replace(right, call=lambda *operands: spoil(right.call(*operands))), "eager": right}


def wrong_gradient(y: Tensor) -> Tensor:
    return y.detach() + 1.01 * (y - y.detach())


@pytest.mark.parametrize("truth", [10**9, 0], ids=["against float64", "against eager"])
@pytest.mark.parametrize("scores", ["fc1", "given"])
def test_the_gate(monkeypatch: pytest.MonkeyPatch, truth: int, scores: str) -> None:
    monkeypatch.setattr(sweeps, "TRUTH_OPERATIONS", truth)
    case = make_case(replace(BASE, scores=scores))
    for mode in sweeps.MODES:
        assert sweeps.check(case, spoiled(case, lambda y: y), mode).endswith(
            "float64" if truth else "float32"
        )
        with pytest.raises(correctness.Red, match=f"{mode}: y of ours"):
            sweeps.check(case, spoiled(case, lambda y: 1.001 * y), mode)
        with pytest.raises(correctness.Red, match=f"{mode}: y of ours"):
            sweeps.check(case, spoiled(case, lambda y: y * float("nan")), mode)
    with pytest.raises(correctness.Red, match="shape"):
        sweeps.check(case, spoiled(case, lambda y: y[:, 1:]), "forward")
    with pytest.raises(correctness.Red, match=r"dx of ours(.|\n)*dparameters of ours"):
        sweeps.check(case, spoiled(case, wrong_gradient), "training")


def test_without_eager_a_large_size_is_said_to_be_unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeps, "TRUTH_OPERATIONS", 0)
    case = make_case(BASE)
    assert "not checked" in sweeps.check(case, {"ours": Eager().prepare(case)}, "forward")
