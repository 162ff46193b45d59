"""The smaller suites of a processor's run, each a table; and the figures to reach."""

from __future__ import annotations

import math

import pandas as pd

from . import names
from .content import (
    NONE,
    NOT_MEASURED,
    Block,
    Cell,
    Column,
    Heading,
    Section,
    Table,
    Text,
    milliseconds,
    missing,
    number,
    percent,
    size,
    sizes,
    times,
)
from .parts import modes, per_run, quartiles, reduced, workloads
from .runs import Run


def others(runs: list[Run]) -> Section:
    """Dtypes, layouts, latency, a training step, call overhead, the C library's default."""
    level = 4 if len(runs) > 1 else 3  # below the headings of the machines
    section = Section("suites", "Dtypes, layouts, latency, training step")
    return per_run(section, runs, lambda run: _others(run, level))


def _others(run: Run, level: int) -> list[Block]:
    parts = {
        "Whole training step": _step(run),
        "Dtypes": _dtypes(run),
        "Layouts of sets of different length": _layouts(run),
        "Latency of one clip": _latency(run),
        "Call overhead": _overhead(run),
        "Memory settings of the C library": _malloc(run),
    }
    blocks: list[Block] = []
    for title, found in parts.items():
        blocks += [Heading(title, level), *(found or [missing()])]
    return blocks


def _figures(record: pd.Series, table: Table, *more: str, scale: float = 1e3) -> list[Cell | str]:
    """A record's time and quartiles, in units of which a second has ``scale``, its ratio, and more."""
    if not math.isfinite(record["median_s"]):
        return [table.absent(str(record["reason"]))] * (3 + len(more))
    ratio = Cell(NONE) if record["contender"] == "ours" else times(record["time_over_ours"])
    return [number(scale * record["median_s"]), quartiles(record, scale), ratio, *more]


def _rows(table: Table, frame: pd.DataFrame, name: str) -> None:
    """Adds a row per record: its name, then time, quartiles and ratio."""
    for _, record in _ordered(frame).iterrows():
        own = (str(record[key]) for key in name.split())
        table.add([*own, *_figures(record, table)], str(record["workload"]))


def _columns(name: str, ratio: str = "time over ours") -> list[Column]:
    heads = [Column(part, is_text=True) for part in name.split()]
    heads += [Column("ms"), Column("quartiles, ms"), Column(ratio)]
    return heads


def _ordered(frame: pd.DataFrame) -> pd.DataFrame:
    """Records by workload and mode in the order of the tables, else as they are."""
    keys = {"workload": workloads(frame["workload"]), "mode": modes(frame["mode"])}
    places = pd.DataFrame({key: frame[key].map(known.index) for key, known in keys.items()})
    ordered: pd.DataFrame = frame.loc[places.sort_values(["workload", "mode"], kind="stable").index]
    return ordered


def _step(run: Run) -> list[Block]:
    frame = run.suite("step")
    if frame.empty:
        return []
    table = Table(
        "A whole training step with the classifier", run.source, _columns("contender dtype"), "workload"
    )
    _rows(table, frame, "contender dtype")
    said = "Cluster, dropout, linear layer, cross entropy and optimiser; the features are frozen."
    return [Text(said), *reduced(frame), table]


def _dtypes(run: Run) -> list[Block]:
    frame = run.suite("dtypes")
    if frame.empty:
        return []
    found = names.order(["ours", *run.contenders()], frame["contender"])
    dtypes = names.order(["float64", "float32", "bfloat16", "float16"], frame["dtype"])
    columns = [Column("mode")]
    for dtype in dtypes:
        columns += [Column(f"{name}, ms", dtype) for name in found]
    table = Table("Time of a call by dtype", run.source, columns, "workload")
    for workload in workloads(frame["workload"]):
        for mode in modes(frame[frame["workload"] == workload]["mode"]):
            row: list[Cell | str] = [mode]
            for dtype in dtypes:
                for name in found:
                    chosen = {"workload": workload, "mode": mode, "dtype": dtype, "contender": name}
                    cell = frame[(frame[list(chosen)] == pd.Series(chosen)).all(axis=1)]
                    row.append(_time(cell, table))
            table.add(row, workload)
    return [*reduced(frame), table]


def _time(cell: pd.DataFrame, table: Table) -> Cell | str:
    """The time of the only record of a selection, which may be empty."""
    if cell.empty:
        return table.absent("")
    record = cell.iloc[0]
    if not math.isfinite(record["median_s"]):
        return table.absent(
            f"{record['contender']}, {record['dtype']}: {record['reason']}" if record["reason"] else ""
        )
    return milliseconds(record["median_s"])


def _layouts(run: Run) -> list[Block]:
    frame = run.suite("layouts")
    if frame.empty:
        return []
    name = "mode contender layout"
    columns = _columns(name, "time over ours, packed")
    table = Table("The same sets in every layout", run.source, columns, "workload")
    _rows(table, frame, name)
    return [*reduced(frame), table]


def _latency(run: Run) -> list[Block]:
    frame = run.suite("latency")
    if frame.empty:
        return []
    heads = ("mode", "contender", "median, µs", "quartiles, µs", "time over ours", "95th percentile, µs")
    columns = [Column(name, is_text=name == "contender") for name in heads]
    table = Table("Single calls", run.source, columns, "workload")
    for _, record in _ordered(frame).iterrows():
        cells = _figures(record, table, number(1e6 * record["p95_s"]), scale=1e6)
        table.add([str(record["mode"]), str(record["contender"]), *cells], str(record["workload"]))
    return [table]


def _overhead(run: Run) -> list[Block]:
    frame = run.suite("overhead")
    if frame.empty:
        return []
    columns = [
        Column("contender"),
        Column("mode", is_text=True),
        Column("µs"),
        Column("quartiles, µs"),
        Column("time over ours"),
    ]
    table = Table(
        f"A call that computes next to nothing: {sizes(frame.iloc[0].to_dict())}", run.source, columns
    )
    for _, record in _ordered(frame).iterrows():
        cells = _figures(record, table, scale=1e6)
        table.add([str(record["contender"]), str(record["mode"]), *cells])
    return [table]


def _malloc(run: Run) -> list[Block]:
    frame = run.suite("default-malloc")
    if frame.empty:
        return []
    columns = [*_columns("mode contender"), Column("share of the floor"), Column("page faults")]
    table = Table("With the C library's default settings", run.source, columns, "workload")
    for _, record in _ordered(frame).iterrows():
        share = percent(1 / record["time_over_floor"])
        cells = _figures(record, table, share, size(record["page_faults"]))
        table.add([str(record["mode"]), str(record["contender"]), *cells], str(record["workload"]))
    said = (
        "By default the C library gives large blocks back to the system when they are freed, and every "
        "contender pays for their page faults at the next call. All other times are measured with freed "
        "memory kept."
    )
    return [Text(said), *reduced(frame), table]


# The figures to reach


def targets(runs: list[Run]) -> Section:
    """The figures to reach, each with what was measured."""
    section = Section("targets", "The figures to reach")
    section.blocks.append(Text("What the project set itself to reach. What is missed stays in the table."))
    return per_run(section, runs, target_blocks)


def target_blocks(run: Run) -> list[Block]:
    """The table of one run's targets, with a count of the verdicts."""
    found = run.content["targets"]
    if not found:
        return [missing()]
    columns = [Column("figure"), Column("to reach"), Column("measured"), Column("verdict", is_text=True)]
    table = Table("Figures to reach", run.source, columns)
    kinds = ("met", "missed", NOT_MEASURED)
    counts = dict.fromkeys((*kinds, "without a verdict"), 0)
    for target in found:
        verdict = str(target["verdict"])
        kind = next((word for word in kinds if verdict.startswith(word)), "without a verdict")
        counts[kind] += 1
        mark = {"met": "✓ ", "missed": "✗ "}.get(kind, "")
        styled = Cell(mark + verdict, kind if kind in ("met", "missed") else "absent")
        table.add([str(target["figure"]), _relation(target["target"]), str(target["measured"]), styled])
    said = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    return [Text(f"{said}, of {len(found)}."), table]


def _relation(text: object) -> str:
    return str(text).replace("<=", "≤").replace(">=", "≥")
