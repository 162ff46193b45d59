"""Nothing is timed that is not right: every contender against float64 plain torch, in every mode.

Ours may err at most twice as much as eager torch in the same dtype, plus a rounding floor, in the root mean
square and in the maximum. A peer only has to compute the same function: its error relative to the truth stays
below the square root of the dtype's epsilon.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .peers import Eager, Prepared
from .workloads import Case

RATIO = 2.0
FLOOR = {"rms": 2.0, "max": 8.0}
"""Rounding floor of the bound on our error, in epsilons of the dtype times the size of the truth."""

HALF_FLOOR = {"rms": 0.1, "max": 0.5}
"""The same for float16 and bfloat16, where the peer's error already is one rounding of the result."""

Errors = dict[str, dict[str, float]]


class Red(Exception):
    """A contender is wrong; no speed is reported."""


def relative_errors(result: Tensor, truth: Tensor) -> dict[str, float]:
    """Errors ||r - t|| / ||t|| and max|r - t| / max|t|; infinite if the result is not finite."""
    if result.shape != truth.shape:
        raise Red(f"shape {tuple(result.shape)} where {tuple(truth.shape)} was expected")
    truth = truth.detach()
    difference = result.detach().double() - truth
    if not bool(difference.isfinite().all()):
        return {"rms": math.inf, "max": math.inf}
    return {
        "rms": float(difference.norm() / truth.norm()),
        "max": float(difference.abs().max() / truth.abs().max()),
    }


def run(prepared: Prepared, mode: str, truth: Mapping[str, Tensor]) -> Errors:
    results = prepared.comparable(mode, prepared.closure(mode)())
    return {name: relative_errors(result, truth[name]) for name, result in results.items()}


def check(
    case: Case, contenders: Mapping[str, Prepared], modes: Iterable[str], ours: str = "ours"
) -> list[str]:
    """Run every contender once in every mode and compare.

    Returns lines that describe the errors found; raises `Red` naming every contender, mode and result that is
    wrong.
    """
    exact = Eager().prepare(case.to(torch.float64))
    truth = exact.comparable("training", exact.closure("training")())
    eager = Eager().prepare(case)
    epsilon = torch.finfo(case.x.dtype).eps
    floor = FLOOR if case.x.dtype == torch.float32 else HALF_FLOOR
    lines, wrong = [], []
    for mode in modes:
        peer = run(eager, mode, truth)
        largest = []
        for name, prepared in contenders.items():
            found = peer if name == Eager.name else run(prepared, mode, truth)
            for result, measures in found.items():
                for measure, error in measures.items():
                    allowed = math.sqrt(epsilon)
                    if name == ours and math.isfinite(peer[result][measure]):
                        allowed = RATIO * peer[result][measure] + floor[measure] * epsilon
                    if not error <= allowed:
                        wrong.append(
                            f"{mode}: {result} of {name}: {measure} error {error:.2e}, allowed {allowed:.2e}"
                        )
            largest.append(f"{name} {max(e for measures in found.values() for e in measures.values()):.1e}")
        lines.append(f"{mode}: " + ", ".join(largest))
    if wrong:
        raise Red(f"{case.workload.name}, {case.x.dtype}\n  " + "\n  ".join(wrong))
    return lines
