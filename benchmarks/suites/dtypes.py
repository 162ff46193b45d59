"""The same numbers in four dtypes: ours alternate with each other, and then with the peers.

float16 products of torch take seconds where the processor has none; beside them ours would have few rounds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..measure import Options, dtype_name, make_contenders, prepare, say
from ..peers import SAME
from ..records import Record, measured, record
from ..timing import alternate
from ..workloads import MODES, WORKLOADS

NAME = "dtypes"
WORKLOAD_NAMES = ("kinetics-rgb", "yt8m-rgb")
CONTENDERS = ("eager",)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def run(options: Options, errors: dict[str, list[str]]) -> Iterator[Record]:
    """Ours and eager in float32, float64, bfloat16 and float16."""
    contenders = make_contenders(options, CONTENDERS)
    for name in WORKLOAD_NAMES:
        workload = WORKLOADS[name].reduced(options.divide_batch)
        ready = {dtype: prepare(workload, contenders, MODES, dtype) for dtype in DTYPES}
        for dtype, one in ready.items():
            errors[f"{NAME}: {name}, {dtype_name(dtype)}"] = one.errors
        for mode in MODES:
            closures: dict[str, Any] = {
                f"{contender} {dtype_name(dtype)}": closure
                for dtype, one in ready.items()
                for contender, closure in one.closures(mode, SAME).items()
            }
            own = {key: closure for key, closure in closures.items() if key.startswith("ours ")}
            mine = alternate(own, rounds=options.rounds, budget=options.budget)
            both = mine
            if len(closures) > len(own):
                both = alternate(
                    closures, rounds=options.rounds, min_rounds=3, budget=options.budget, patience=0.2
                )
            single = mine.median("ours float32")
            say(f"  {mode}: ours float32 {1e3 * single:.3f} ms, {mine.rounds} rounds")
            for dtype, one in ready.items():
                rows, size = one.case.rows, one.case.x.element_size()
                common = {"suite": NAME, "mode": mode, "dtype": dtype_name(dtype), "layout": "dense"}
                counts = {"operations": workload.operations(rows, mode)}
                moved = workload.bytes_moved(rows, mode, size)
                for contender in one.computes:
                    key = f"{contender} {dtype_name(dtype)}"
                    common |= {"contender": contender, "computes": SAME}
                    timings = mine if contender == "ours" else both
                    if key in timings.seconds:
                        ours = f"ours {dtype_name(dtype)}"
                        figures = measured(timings, key, moved=moved, ours=ours, **counts)
                        yield record(workload, rows, **common, **figures)
                    else:
                        why = one.reasons[contender, mode]
                        yield record(workload, rows, **common, **counts, bytes=moved, reason=why)
