"""The operator in float32: every workload, mode and contender."""

from __future__ import annotations

import gc
from collections.abc import Iterator

from ..measure import Options, make_contenders, prepare, time_mode
from ..records import Record
from ..workloads import MODES

NAME = "speed"


def run(options: Options, errors: dict[str, list[str]]) -> Iterator[Record]:
    """Every workload, mode and contender in float32."""
    contenders = make_contenders(options)
    for workload in options.chosen():
        ready = prepare(workload, contenders, MODES)
        errors[f"{NAME}: {workload.name}"] = ready.errors
        for mode in MODES:
            yield from time_mode(NAME, ready, mode, options)
        del ready
        gc.collect()
