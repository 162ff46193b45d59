"""The harness itself: the gate closes on wrong results, the counts are right, the verdicts add up."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from . import correctness, targets
from .peers import Compiled, Eager, Prepared, Sdpa, Unavailable
from .timing import Copy, Floor, Staged, Timings, alternate
from .workloads import MODES, WORKLOADS, Workload, make_case

SMALL = Workload("small", 4, 7, 33, 5, "tests")
RAGGED = replace(SMALL, name="small ragged", ragged=True)
GIVEN = replace(SMALL, name="small given", scores="given")


def eager_as_ours(workload: Workload, spoil: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    case = make_case(workload, dtype)
    prepared = Eager().prepare(case)
    spoiled = replace(prepared, call=lambda *operands: spoil(prepared.call(*operands)))
    correctness.check(case, {"ours": spoiled}, MODES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("workload", [SMALL, RAGGED, GIVEN], ids=lambda w: w.name)
def test_the_gate_opens_for_right_results(workload: Workload, dtype: torch.dtype) -> None:
    eager_as_ours(workload, lambda y: y, dtype)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda y: -y,
        lambda y: y * (1 + 1e-4),
        lambda y: y * float("nan"),
        lambda y: y.flip(1),
        lambda y: y[:, 1:],
    ],
    ids=["sign", "scale", "nan", "units", "shape"],
)
def test_the_gate_closes(spoil: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises((correctness.Red, RuntimeError)):
        eager_as_ours(SMALL, spoil, torch.float32)


def test_the_gate_closes_on_a_wrong_gradient_alone() -> None:
    def spoil(y: Tensor) -> Tensor:
        return y.detach() + 1.001 * (y - y.detach())

    with pytest.raises(correctness.Red, match="training: dx of ours"):
        eager_as_ours(SMALL, spoil, torch.float32)


def test_the_gate_holds_peers_too() -> None:
    case = make_case(SMALL)
    right = Eager().prepare(case)
    wrong = replace(right, call=lambda *operands: right.call(*operands) * 1.01)
    with pytest.raises(correctness.Red, match="y of sdpa"):
        correctness.check(case, {"ours": right, "sdpa": wrong}, MODES)


@pytest.mark.parametrize("workload", [SMALL, RAGGED], ids=lambda w: w.name)
def test_sdpa_computes_the_same(workload: Workload) -> None:
    case = make_case(workload)
    contenders: dict[str, Prepared] = {"ours": Eager().prepare(case), "sdpa": Sdpa().prepare(case)}
    correctness.check(case, contenders, MODES)


def test_a_contender_that_cannot_run_says_why() -> None:
    with pytest.raises(Unavailable, match="scores are given"):
        Sdpa().prepare(make_case(GIVEN))
    broken = Compiled.__new__(Compiled)
    broken.why_not = "no compiler"
    with pytest.raises(Unavailable, match="no compiler"):
        broken.prepare(make_case(SMALL))


def test_operations_are_the_cost_model() -> None:
    product = 1000 * 33 * 5
    assert [SMALL.operations(1000, m) / product for m in MODES] == [4, 12, 8, 8]
    assert [GIVEN.operations(1000, m) / product for m in MODES] == [2, 6, 4, 4]


def test_bytes_are_the_cost_model() -> None:
    """Per set: forward (L + N) M, backward (2 L + 2 N) M, frozen backward (L + 2 N) M."""
    rows, units, m = 4 * 7, 4 * 5, 33
    forward, backward, frozen = (rows + units) * m, (2 * rows + 2 * units) * m, (rows + 2 * units) * m
    expected = {"forward": forward, "training": forward + backward, "frozen": forward + frozen}
    expected["backward"] = backward
    assert {mode: SMALL.bytes_moved(rows, mode, 4) for mode in MODES} == {
        mode: 4 * elements for mode, elements in expected.items()
    }
    scores = 4 * 5 * 7
    extra = {m: (GIVEN.bytes_moved(rows, m, 4) - SMALL.bytes_moved(rows, m, 4)) // 4 for m in MODES}
    assert extra == {"forward": scores, "training": 3 * scores, "frozen": 3 * scores, "backward": 2 * scores}


@pytest.mark.parametrize("workload", [SMALL, GIVEN], ids=lambda w: w.name)
def test_operand_bytes_are_those_of_the_results(workload: Workload) -> None:
    case = make_case(workload)
    prepared = Eager().prepare(case)
    for mode in ("forward", "training", "frozen"):
        results = prepared.closure(mode)()
        size = sum(t.numel() * 4 for t in (case.x, *results))
        assert workload.operand_bytes(case.rows, mode, 4) == size


def test_a_reduced_batch_is_stated() -> None:
    workload = WORKLOADS["kinetics-rgb"].reduced(8)
    assert workload.batch == 32
    assert "B reduced from 256" in workload.describe()
    assert WORKLOADS["online"].reduced(8) is WORKLOADS["online"]


def test_everyone_runs_once_a_round_and_after_each_of_the_others() -> None:
    order: list[str] = []
    closures = {name: (lambda name=name: order.append(name)) for name in "abc"}
    timings = alternate(closures, rounds=30, min_rounds=1, budget=60, block=0)
    assert timings.rounds == 30
    text = "".join(order)
    assert text[:6] == "aabbcc"
    rounds = [text[k : k + 3] for k in range(6, len(text), 3)]
    assert len(rounds) == 30
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(rounds)) == 6


def test_only_the_second_stage_is_timed() -> None:
    seen: list[str] = []

    def setup() -> str:
        time.sleep(0.02)
        seen.append("setup")
        return f"state {len(seen)}"

    staged = Staged(setup, seen.append)
    timings = alternate({"staged": staged}, rounds=3, min_rounds=3, block=0)
    assert timings.median("staged") < 0.01
    assert seen[0::2] == ["setup"] * 5
    assert seen[1::2] == [f"state {k}" for k in (1, 3, 5, 7, 9)]


def test_a_slow_call_is_warmed_up_once() -> None:
    calls = {"slow": 0, "quick": 0}

    def call(name: str, seconds: float) -> None:
        calls[name] += 1
        time.sleep(seconds)

    closures = {"slow": lambda: call("slow", 0.12), "quick": lambda: call("quick", 0)}
    alternate(closures, rounds=2, min_rounds=2, block=0, patience=0.1)
    assert calls == {"slow": 3, "quick": 4}


def test_what_raises_is_left_out_only_if_asked() -> None:
    def broken() -> None:
        raise RuntimeError("no room")

    with pytest.raises(RuntimeError, match="no room"):
        alternate({"broken": broken}, rounds=1)
    failures: dict[str, Exception] = {}
    timings = alternate({"broken": broken, "sound": lambda: None}, rounds=1, failures=failures)
    assert list(timings.seconds) == ["sound"]
    assert str(failures["broken"]) == "no room"


def test_the_copy_counts_bytes_read_and_written() -> None:
    copy = Copy(megabytes=1)
    copy()
    assert torch.equal(copy.source, copy.target)
    assert copy.bytes == 2 << 20
    assert copy.gbytes_per_s(Timings({"copy": [1e-3]}, {"copy": 0})) == pytest.approx((2 << 20) / 1e6)


def test_ratios_are_taken_round_by_round() -> None:
    slow_spell = Timings({"ours": [1.0, 10.0, 2.0], "eager": [3.0, 30.0, 6.0]}, {"ours": 0, "eager": 0})
    assert slow_spell.ratio("eager", "ours") == 3.0
    assert slow_spell.median("ours") == 2.0


def test_floor_counts_operations_at_the_rate_of_the_product() -> None:
    floor = Floor()
    timings = Timings({"gemm": [1.0, 2.0], "ours": [1.0, 2.0]}, {"gemm": 0, "ours": 0})
    assert floor.operations == 2 * 4096 * 1024 * 2048
    assert floor.share(timings, "ours", floor.operations // 2) == 2.0
    assert floor.seconds(timings, floor.operations // 2) == 0.75


@pytest.mark.parametrize(
    ("figure", "verdict"),
    [
        (targets.at_most("f", 2.0, 1.9), "met"),
        (targets.at_most("f", 2.0, 2.5), "missed by 25 %"),
        (targets.at_least("f", 2.0, 2.1), "met"),
        (targets.at_least("f", 2.0, 1.5), "missed by 25 %"),
        (targets.at_least("f", 2.0, None), "not measured"),
    ],
)
def test_verdicts(figure: targets.Figure, verdict: str) -> None:
    assert figure.verdict == verdict


def test_ragged_cases_are_packed_for_us_and_padded_for_peers() -> None:
    case = make_case(RAGGED)
    assert case.offsets is not None
    padded, mask = case.padded()
    assert mask is not None
    assert torch.equal(padded[mask], case.x)
    starts = case.offsets.tolist()
    for b, (start, stop) in enumerate(itertools.pairwise(starts)):
        assert int(mask[b].sum()) == stop - start
