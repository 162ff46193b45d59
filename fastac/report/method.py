"""The first section: what is measured and how, and how to measure it again."""

from __future__ import annotations

import pandas as pd

from . import names
from .content import (
    NONE,
    Block,
    Column,
    Folded,
    Heading,
    Lines,
    Section,
    Table,
    Text,
    missing,
)
from .parts import modes, per_run, workloads
from .runs import Run

COUNTS = {
    "forward": ("4·L·M·N", "(L + N)·M·s", "scores and weighted sums; read x, write y"),
    "backward": (
        "8·L·M·N",
        "(2L + 2N)·M·s",
        "two products for the parameters, two for x; read x, y and dy, write dx",
    ),
    "backward, x frozen": ("4·L·M·N", "(L + 2N)·M·s", "no gradient of x; read x, y and dy"),
    "forward, scores given": ("2·L·M·N", "(L + N)·M·s + L·N·s", "weighted sums; the scores are read"),
    "backward, scores given": ("4·L·M·N", "(2L + 2N)·M·s + 2·L·N·s", "scores read, their gradient written"),
    "backward, scores given, x frozen": ("2·L·M·N", "(L + 2N)·M·s + 2·L·N·s", "the same without dx"),
}
"""By pass, the operations and bytes of one set; s: bytes of an element, a multiply-add: two operations."""


def method(runs: list[Run], gpu_runs: list[Run]) -> Section:
    """What the figures are, the workloads, the counting model, the contenders, the machines."""
    section = Section("method", "What is measured, and how")
    section.blocks += [
        Text(
            "fastac turns a set of L local features of M dimensions into N attention-weighted sums, "
            "shifted and normalised, and computes the gradients. It is timed against what one would write "
            "in torch instead, on named workloads, in one process: in every round each contender runs "
            "once, in an order of its own. Figures are medians over the rounds; a ratio is taken inside "
            "a round, so that a slow spell of the machine hits both sides. Results are held against "
            "float64 before anything is timed: what is wrong has no time."
        ),
        Text("To measure again, on a CPU, on an NVIDIA GPU, and to build this page from what is committed:"),
        Lines(["make bench", "make gpu", "fastac report"]),
        Heading("Workloads"),
        _workloads(),
        Text("A benchmark may divide B on a small machine; the tables then say so."),
        Heading("Modes"),
        _modes(),
        Heading("Counting model"),
        _counting(),
        Text(
            "A multiply-add counts as two operations; s is the bytes of an element. The floor is the "
            "operations at the rate of torch.mm at 4096×1024×2048, measured in the same alternation; the "
            "share of the floor is the floor over the time, taken round by round."
        ),
        Heading("Machines, contenders, checks"),
    ]
    per_run(section, [*runs, *gpu_runs], _run)
    return section


def _workloads() -> Table:
    columns = [Column("workload"), *map(Column, "BLMN"), Column("stands for", is_text=True)]
    table = Table("Named workloads", "", columns)
    for name, shape in names.WORKLOADS.items():
        length = shape.length if not shape.length.isdigit() else f"{int(shape.length):,}"
        sizes = [f"{shape.batch:,}", length, f"{shape.in_features:,}", f"{shape.cluster_size:,}"]
        table.add([name, *sizes, shape.stands_for])
    return table


def _modes() -> Table:
    table = Table("What a call does", "", [Column("mode"), Column("timed", is_text=True)])
    for name, timed in names.MODES.items():
        table.add([name, timed])
    return table


def _counting() -> Table:
    columns = [
        Column("per set"),
        Column("operations", is_text=True),
        Column("bytes that must move", is_text=True),
    ]
    table = Table("Operations and bytes", "", [*columns, Column("which", is_text=True)])
    for name, (operations, moved, which) in COUNTS.items():
        table.add([name, operations, moved, which])
    return table


def _run(run: Run) -> list[Block]:
    about = Table(f"Machine: {run.device}", run.file, [Column("property"), Column("value", is_text=True)])
    for key, value in run.machine.items():
        if isinstance(value, dict):
            text = ", ".join(f"{k} {v}" for k, v in value.items())
        else:
            text = run.commit if key == "commit" else str(value)
        about.add([key.replace("_", " "), text])
    blocks: list[Block] = [about]
    if run.kind == "cpu":
        blocks.append(_contenders(run))
    errors: list[Text | Table | Lines] = [
        Lines([f"{name}, {line}" for line in lines]) for name, lines in run.content["errors"].items()
    ]
    blocks.append(Folded("Largest relative errors against float64", errors) if errors else missing("Errors"))
    return blocks


def _contenders(run: Run) -> Table:
    columns = [Column("contender"), Column("computes", is_text=True), Column("what it is", is_text=True)]
    table = Table("Contenders", run.file, [*columns, Column("without a figure in", is_text=True)])
    frame = run.suite("speed")
    every = workloads(frame["workload"])
    for name, about in run.contenders().items():
        rows = frame[(frame["contender"] == name) & (frame["reason"] != "")]
        table.add([name, about["computes"], about["note"], _places(rows, every) or NONE])
    return table


def _places(rows: pd.DataFrame, every: list[str]) -> str:
    """The modes and workloads of some records of the suite "speed", of which ``every`` are the workloads."""
    by_modes: dict[str, list[str]] = {}
    for workload in workloads(rows["workload"]):
        found = modes(rows[rows["workload"] == workload]["mode"])
        text = "all modes" if set(names.MODES) <= set(found) else ", ".join(found)
        by_modes.setdefault(text, []).append(workload)
    return "; ".join(
        f"{text}: {'every workload' if found == every else ', '.join(found)}"
        for text, found in by_modes.items()
    )
