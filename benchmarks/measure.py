"""From a workload and its contenders to records: checked first, then timed in alternation."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from . import correctness
from .peers import ANOTHER, PEERS, SAME, MaxAutotune, Ours, Prepared, reason_of
from .records import Record, measured, record
from .timing import Copy, Floor, Timings, alternate
from .workloads import WORKLOADS, Case, Workload, make_case


@dataclass
class Options:
    """What to measure, and for how long."""

    workloads: list[str]
    peers: list[str]
    suites: list[str]
    rounds: int = 30
    budget: float = 3.0
    """Seconds one workload in one mode may be timed for, once five rounds are done."""
    threads: int = 2
    backend: str = "cpu"
    divide_batch: int = 1
    default_malloc: bool = False
    tuning: float = 300.0
    """Seconds that max-autotune may compile for, all workloads together."""

    def chosen(self) -> list[Workload]:
        return [WORKLOADS[name].reduced(self.divide_batch) for name in self.workloads]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def make_contenders(options: Options, names: Iterable[str] | None = None) -> dict[str, Any]:
    """Ours, and those of the peers asked for that are in `names`."""
    chosen = [name for name in options.peers if names is None or name in names]
    made = {n: MaxAutotune(options.tuning) if n == MaxAutotune.name else PEERS[n]() for n in chosen}
    return {"ours": Ours(options.backend), **made}


@dataclass
class Ready:
    """A case, and who can run it, in which mode, and why not."""

    case: Case
    prepared: dict[str, Prepared] = field(default_factory=dict)
    computes: dict[str, str] = field(default_factory=dict)
    reasons: dict[tuple[str, str], str] = field(default_factory=dict)
    """By contender and mode."""
    errors: list[str] = field(default_factory=list)

    def closures(self, mode: str, computes: str) -> dict[str, Any]:
        """Ours, and those that compute this and can run the mode."""
        return {
            name: prepared.closure(mode)
            for name, prepared in self.prepared.items()
            if (name, mode) not in self.reasons and (name == "ours" or self.computes[name] == computes)
        }

    def absent(self, mode: str) -> dict[str, str]:
        """Why contenders are not there in this mode."""
        return {name: why for (name, m), why in self.reasons.items() if m == mode}


def make_ready(case: Case, contenders: Mapping[str, Any], modes: Iterable[str]) -> Ready:
    """Prepare contenders and hold them against float64.

    Raises: `correctness.Red` for a wrong result. A peer that cannot run the workload, or a mode of it, is
    left out there with the reason.
    """
    modes = list(modes)
    ready = Ready(case, computes={name: c.computes for name, c in contenders.items()})
    for name, contender in contenders.items():
        try:
            ready.prepared[name] = contender.prepare(case)
        except Exception as error:
            if name.startswith("ours"):
                raise
            ready.reasons |= {(name, mode): reason_of(error) for mode in modes}
    ready.errors = correctness.check(case, ready.prepared, modes, failures=ready.reasons)
    return ready


def records_of(
    suite: str, ready: Ready, mode: str, timings: Timings, layouts: Mapping[str, str]
) -> Iterator[Record]:
    """A record of every contender of a case: what was timed under its name, or why nothing was."""
    case = ready.case
    w, rows, size = case.workload, case.rows, case.x.element_size()
    operations, moved = w.operations(rows, mode), w.bytes_moved(rows, mode, size)
    for name in ready.computes:
        about = {
            "suite": suite, "mode": mode, "dtype": dtype_name(case.x.dtype), "layout": layouts[name],
            "contender": name, "computes": SAME,
        }  # fmt: skip
        if name in timings.seconds:
            figures = measured(timings, name, operations=operations, moved=moved)
            yield record(w, rows, **about, **figures)
        else:
            why = ready.reasons[name, mode]
            yield record(w, rows, **about, operations=operations, bytes=moved, reason=why)


ANOTHER_MODES = ("forward", "training")
"""Modes in which another pooling is timed. A call of some takes seconds."""


def time_mode(suite: str, ready: Ready, mode: str, options: Options) -> list[Record]:
    """Records of all contenders of a case in one mode.

    Those that compute the same alternate with ours, the floor's product and the copy. The other poolings
    alternate with ours afterwards, in fewer rounds.
    """
    case = ready.case
    w, rows, size = case.workload, case.rows, case.x.element_size()
    common = {"suite": suite, "mode": mode, "dtype": dtype_name(case.x.dtype)}
    counts = {"operations": w.operations(rows, mode), "moved": w.bytes_moved(rows, mode, size)}
    layouts = {
        name: "dense" if case.offsets is None else "packed" if name == "ours" else "padded"
        for name in ready.computes
    }
    floor, copy = Floor(), Copy()
    closures = ready.closures(mode, SAME)
    timings = alternate(
        closures | {floor.name: floor, copy.name: copy}, rounds=options.rounds, budget=options.budget
    )
    del closures
    reasons = ready.absent(mode)
    found = []
    for name in ready.computes:
        if name in timings.seconds:
            common |= {"contender": name, "computes": SAME, "layout": layouts[name]}
            figures = measured(timings, name, floor=floor, copy=copy, **counts)
            found.append(record(w, rows, **common, **figures))
    ours = found[0]
    say(
        f"  {mode}: ours {1e3 * ours['median_s']:.3f} ms, {ours['time_over_floor']:.2f} x floor, "
        f"{timings.rounds} rounds"
    )
    others = [name for name, what in ready.computes.items() if what == ANOTHER and name not in reasons]
    if others and mode in ANOTHER_MODES:
        closures = ready.closures(mode, ANOTHER)
        del floor, copy
        failures: dict[str, Exception] = {}
        slow = alternate(
            closures,
            rounds=options.rounds,
            min_rounds=2,
            budget=options.budget / 3,
            patience=0.2,
            failures=failures,
        )
        if "ours" in failures:
            raise failures["ours"]
        reasons |= {name: reason_of(error) for name, error in failures.items()}
        for name in others:
            if name in failures:
                continue
            common |= {"contender": name, "computes": ANOTHER, "layout": layouts[name]}
            found.append(record(w, rows, **common, **measured(slow, name)))
    elif others:
        reasons |= dict.fromkeys(others, f"another pooling: timed in {' and '.join(ANOTHER_MODES)} only")
    for name, why in reasons.items():
        common |= {"contender": name, "computes": ready.computes[name], "layout": layouts[name]}
        empty = {"operations": counts["operations"], "bytes": counts["moved"], "reason": why}
        found.append(record(w, rows, **common, **empty))
    return found


def prepare(
    workload: Workload,
    contenders: Mapping[str, Any],
    modes: Iterable[str],
    dtype: torch.dtype = torch.float32,
) -> Ready:
    """The checked case of a workload."""
    say(f"{workload.name}, {dtype_name(dtype)}: {workload.describe()}; checking ...")
    return make_ready(make_case(workload, dtype), contenders, modes)
