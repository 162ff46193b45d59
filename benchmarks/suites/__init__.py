"""What is measured besides the speed of the operator: each suite gives records of the same form.

A suite is a function of `measure.Options` and the errors found, by name, that it adds to; it yields records.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ..measure import Options
from ..records import Record
from . import calls, dtypes, layouts, malloc, peaks, speed, step

Suite = Callable[[Options, dict[str, list[str]]], Iterator[Record]]

SUITES: dict[str, Suite] = {
    "speed": speed.run,
    "overhead": calls.overhead,
    "latency": calls.latency,
    "layouts": layouts.run,
    "dtypes": dtypes.run,
    "step": step.run,
    "memory": peaks.run,
    "default-malloc": malloc.run,
}
"""In the order they run."""

SWEEP = "sweep"
"""The suite of `benchmarks.sweeps`, which also gives exponents."""


def notes() -> dict[str, str]:
    """One line about each suite, by name."""
    found: dict[str, Any] = {name: suite.__doc__ for name, suite in SUITES.items()}
    return {name: str(text).splitlines()[0] for name, text in found.items()} | {
        SWEEP: "Sizes varied one at a time, with the exponents of time and memory."
    }
