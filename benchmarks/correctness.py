"""Nothing is timed that is not right: every contender against float64, in every mode.

Ours may err at most twice as much as eager torch in the same dtype, plus a rounding floor, in the root mean
square and in the maximum. A peer only has to compute the same function: its error relative to the truth stays
below the square root of the dtype's epsilon. Another pooling is held to that against itself in float64, on
its first sets, its gradients to the cube root, since rounding flips some ReLUs; and nothing in an excluded
row may change its result. A wrong result of ours ends the run; that of a peer is why it has no figures.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from .peers import Eager, Prepared, PreparedPooling, reason_of
from .workloads import Case

RATIO = 2.0
FLOOR = {"rms": 2.0, "max": 8.0}
"""Rounding floor of the bound on our error, in epsilons of the dtype times the size of the truth."""

HALF_FLOOR = {"rms": 0.1, "max": 0.5}
"""The same for float16 and bfloat16, where the peer's error already is one rounding of the result."""

DOUBLE_FLOOR = {"rms": 64.0, "max": 256.0}
"""The same for float64, where the truth errs itself."""

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


SETS, POSITIONS = 4, 512
"""How much of x another pooling is checked on, at most."""


def joined(results: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Result, dx, and all other gradients as one.

    The gradient of a bias of keys is 0 by nature, and dbeta of a single unit is a sum that comes out near 0:
    they have no relative error of their own.
    """
    found = {name: t.detach() for name, t in results.items() if name in ("y", "dx")}
    if learned := [t.detach().flatten() for name, t in results.items() if name not in found]:
        found["dparameters"] = torch.cat(learned)
    return found


def of_itself(prepared: PreparedPooling, mode: str) -> Errors:
    """Errors of another pooling relative to itself in float64; raises `Red` where an excluded row counts."""
    small, exact = (prepared.part(SETS, POSITIONS, dtype) for dtype in (prepared.x.dtype, torch.float64))
    mine, truth = (joined(p.comparable(mode, p.closure(mode)())) for p in (small, exact))
    found = {name: relative_errors(result, truth[name]) for name, result in mine.items()}
    if small.mask is not None and not bool(small.mask.all()):
        excluded = ~small.mask
        x = small.x.clone()
        x[excluded] = 7.0
        other = replace(small, x=x)
        changed = joined(other.comparable(mode, other.closure(mode)()))
        for name, result in mine.items():
            found[f"{name} with other excluded rows"] = relative_errors(changed[name], result.double())
        if mode in ("training", "backward"):
            dx = other.closure(mode)()[-1 - len(other.bound(False)[1])]
            if bool(dx[excluded].any()):
                raise Red(f"{mode}: excluded rows have a gradient")
    return found


def check(
    case: Case,
    contenders: Mapping[str, Prepared],
    modes: Iterable[str],
    ours: str = "ours",
    failures: dict[tuple[str, str], str] | None = None,
) -> list[str]:
    """Run every contender once in every mode and compare.

    Ours are the contender of that name and those named after it, as "ours (mask)". What a peer raises, or
    what is wrong with its results, goes into `failures`, by contender and mode, if given; ours is not
    forgiven.

    Returns lines that describe the errors found; raises `Red` naming every contender, mode and result that is
    wrong.
    """
    exact = Eager().prepare(case.to(torch.float64))
    truth = exact.comparable("training", exact.closure("training")())
    del exact
    eager = Eager().prepare(case)
    epsilon = torch.finfo(case.x.dtype).eps
    floor = FLOOR if case.x.dtype == torch.float32 else HALF_FLOOR
    if case.x.dtype == torch.float64:
        floor = DOUBLE_FLOOR
    lines: list[str] = []
    wrong: list[str] = []

    def own(name: str) -> bool:
        return name == ours or name.startswith(f"{ours} (")

    for mode in modes:
        peer = run(eager, mode, truth)
        largest = []
        for name, prepared in contenders.items():
            another, faults = isinstance(prepared, PreparedPooling), []
            try:
                if another:
                    found = of_itself(prepared, mode)
                else:
                    found = peer if name == Eager.name else run(prepared, mode, truth)
            except Red as why:
                faults, found = [f"{name}: {why}"], {}
            except Exception as raised:
                if failures is None or own(name):
                    raise
                failures[name, mode] = reason_of(raised)
                continue
            for result, measures in found.items():
                for measure, error in measures.items():
                    kinked = another and result in ("dx", "dparameters")
                    allowed = epsilon ** (1 / 3 if kinked else 1 / 2)
                    if own(name) and math.isfinite(peer[result][measure]):
                        allowed = RATIO * peer[result][measure] + floor[measure] * epsilon
                    if not error <= allowed:
                        faults.append(
                            f"{result} of {name}: {measure} error {error:.2e}, allowed {allowed:.2e}"
                        )
            if faults and (failures is None or own(name)):
                wrong += [f"{mode}: {fault}" for fault in faults]
            elif faults:
                failures[name, mode] = f"wrong result, {'; '.join(faults)}"
            if not found:
                continue
            largest.append(f"{name} {max(e for measures in found.values() for e in measures.values()):.1e}")
        lines.append(f"{mode}: " + ", ".join(largest))
    if wrong:
        raise Red(f"{case.workload.name}, {case.x.dtype}\n  " + "\n  ".join(wrong))
    return lines
