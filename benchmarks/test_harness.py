"""The harness itself: the gate closes on wrong results, the counts are right, the verdicts add up."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from . import correctness, targets
from .peers import Compiled, Eager, Prepared, Sdpa, Unavailable
from .timing import Floor, Timings, alternate
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
    assert [SMALL.operations(1000, m) / product for m in MODES] == [4, 12, 8]
    assert [GIVEN.operations(1000, m) / product for m in MODES] == [2, 6, 4]


def test_a_reduced_batch_is_stated() -> None:
    workload = WORKLOADS["kinetics-rgb"].reduced(8)
    assert workload.batch == 32
    assert "B reduced from 256" in workload.describe()
    assert WORKLOADS["online"].reduced(8) is WORKLOADS["online"]


def test_runs_alternate_and_start_with_everyone_in_turn() -> None:
    order: list[str] = []
    closures = {name: (lambda name=name: order.append(name)) for name in "abc"}
    timings = alternate(closures, rounds=3, min_rounds=1, budget=60, block=0)
    assert "".join(order) == "aabbcc" + "abc" + "bca" + "cab"
    assert timings.rounds == 3


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
