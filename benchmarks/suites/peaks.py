"""Peak memory of a call, by workload and mode."""

from __future__ import annotations

from collections.abc import Iterator

from .. import memory
from ..measure import Options, say
from ..peers import SAME
from ..records import Record, record
from ..workloads import make_case

NAME = "memory"
PEER_NAMES = ("eager", "compile", "sdpa")


def run(options: Options, errors: dict[str, list[str]]) -> Iterator[Record]:
    """Peak resident memory of a call beyond its inputs, every workload in a process of its own."""
    names = ["ours", *(p for p in PEER_NAMES if p in options.peers)]
    for workload in options.chosen():
        rows = make_case(workload).rows
        say(f"memory of {workload.name} ...")
        found = memory.measure(workload, options.backend, options.threads, names)
        for contender, modes in found.items():
            layout = "dense" if not workload.ragged else "packed" if contender == "ours" else "padded"
            for mode, figures in modes.items():
                yield record(
                    workload, rows, suite=NAME, mode=mode, dtype="float32", layout=layout,
                    contender=contender, computes=SAME, operations=workload.operations(rows, mode),
                    bytes=workload.bytes_moved(rows, mode, 4), **figures,
                )  # fmt: skip
