"""Small calls: the distribution of single ones, and what a call costs among many."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..measure import Options, make_contenders, prepare, records_of, say
from ..peers import SAME
from ..records import Record
from ..timing import alternate
from ..workloads import OVERHEAD, WORKLOADS, Workload

PEER_NAMES = ("eager", "compile", "sdpa")
MODES = ("forward", "training")
SINGLE_CALLS = 2000


def _records(
    suite: str, workload: Workload, options: Options, errors: dict[str, list[str]], arguments: dict[str, Any]
) -> Iterator[Record]:
    ready = prepare(workload, make_contenders(options, PEER_NAMES), MODES)
    errors[f"{suite}: {workload.name}"] = ready.errors
    for mode in MODES:
        timings = alternate(ready.closures(mode, SAME), budget=options.budget / 2, **arguments)
        say(f"  {mode}: ours {1e6 * timings.median('ours'):.1f} us, {timings.rounds} rounds")
        yield from records_of(suite, ready, mode, timings, dict.fromkeys(ready.computes, "dense"))


def latency(options: Options, errors: dict[str, list[str]]) -> Iterator[Record]:
    """Single calls of small workloads, every one timed: each contender runs once, then the next."""
    rounds = max(options.rounds, SINGLE_CALLS) if options.rounds >= 30 else options.rounds
    for workload in (WORKLOADS["online"], OVERHEAD):
        yield from _records("latency", workload, options, errors, {"rounds": rounds, "block": 0.0})


def overhead(options: Options, errors: dict[str, list[str]]) -> Iterator[Record]:
    """What a call costs before it computes anything: the mean of many in a row."""
    yield from _records("overhead", OVERHEAD, options, errors, {"rounds": max(options.rounds, 50)})
