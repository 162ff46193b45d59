"""Whether the fast paths are still taken: `python -m benchmarks.ratio_check`.

Forward + backward against plain torch, correctness first. The thresholds lie far below what is
measured on a quiet machine, and each workload has several attempts, so noise does not fail it. What does is a
call that no longer reaches the compiled kernels.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from . import correctness, machine
from .peers import Eager, Ours, Prepared
from .timing import alternate
from .workloads import WORKLOADS, Workload, make_case

MODE = "training"


@dataclass(frozen=True)
class Check:
    """A workload, and the least that eager's time over ours must come to."""

    workload: Workload
    threshold: float


CHECKS = (
    Check(WORKLOADS["kinetics-rgb"].reduced(8), 1.3),
    Check(WORKLOADS["flash-mnist"].reduced(4), 1.3),
)


def ratios(check: Check, *, attempts: int, rounds: int, budget: float) -> list[float]:
    """Medians of eager's time over ours, one per attempt, up to the first that reaches the threshold.

    Raises: correctness.Red before anything is timed if a result is wrong.
    """
    case = make_case(check.workload)
    contenders: dict[str, Prepared] = {"ours": Ours().prepare(case), "eager": Eager().prepare(case)}
    correctness.check(case, contenders, [MODE])
    closures = {name: prepared.closure(MODE) for name, prepared in contenders.items()}
    found: list[float] = []
    while len(found) < attempts and (not found or max(found) < check.threshold):
        found.append(alternate(closures, rounds=rounds, budget=budget).ratio("eager", "ours"))
    return found


def backend() -> str:
    """The backend that ran ours, and what chose it."""
    import fastac

    chosen = fastac.backends.choose(torch.empty(1, 1, 1))
    named = os.environ.get("FASTAC_BACKEND")
    return f"backend {chosen!r}" + (f", as FASTAC_BACKEND={named} asks" if named else "")


def run(checks: Sequence[Check], *, attempts: int, rounds: int, budget: float) -> bool:
    """Measure, print one line per workload; whether all thresholds were reached."""
    passed = True
    for check in checks:
        where = f"{check.workload.name} ({check.workload.describe()}), forward + backward"
        found = ratios(check, attempts=attempts, rounds=rounds, budget=budget)
        values = ", ".join(f"{ratio:.2f}" for ratio in found)
        text = f"{where}: eager / ours {values}, at least {check.threshold:g} is asked for"
        if max(found) >= check.threshold:
            print(f"{text}: passed", flush=True)
        else:
            passed = False
            print(f"{text}: a fast path is lost ({backend()})", file=sys.stderr, flush=True)
    return passed


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ratio_check", description=__doc__)
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default 2)")
    parser.add_argument("--attempts", type=int, default=3, help="per workload, the best counts (default 3)")
    parser.add_argument("--rounds", type=int, default=15, help="at most this many per attempt (default 15)")
    parser.add_argument("--budget", type=float, default=4.0, help="seconds per attempt (default 4)")
    return parser


def main() -> int:
    parser = arguments()
    given = parser.parse_args()
    for name in ("threads", "attempts", "rounds"):
        if getattr(given, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(given, name)}")
    machine.reexecute(False, "benchmarks.ratio_check")
    torch.set_num_threads(given.threads)
    machine.prime(1)
    try:
        passed = run(CHECKS, attempts=given.attempts, rounds=given.rounds, budget=given.budget)
    except correctness.Red as wrong:
        print(f"WRONG RESULT, no ratio is reported: {wrong}", file=sys.stderr)
        return 1
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
