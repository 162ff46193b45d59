"""The section on the speed of a call."""

from __future__ import annotations

import math

import pandas as pd

from . import names, plots
from .content import (
    NONE,
    Block,
    Cell,
    Column,
    Folded,
    Picture,
    Pictures,
    Section,
    Table,
    Text,
    milliseconds,
    missing,
    number,
    percent,
    size,
    times,
)
from .parts import DRAWN_MODES, modes, per_run, quartiles, reduced, workloads
from .plots import Album
from .runs import Run


def speed(runs: list[Run], album: Album) -> Section:
    """Times and ratios of all workloads."""
    section = Section("speed", "Speed")
    section.blocks.append(
        Text(
            "Our time is the median of alternating runs, with its first and third quartile. The share of "
            "the floor is the floor over our time. A peer's figure is its time over ours, taken round by "
            "round: above 1 ours is faster, and what is below 1 is set in bold italics. Other poolings "
            "alternate with ours afterwards, in fewer rounds."
        )
    )
    return per_run(section, runs, lambda run: _speed(run, album))


def _speed(run: Run, album: Album) -> list[Block]:
    frame = run.suite("speed")
    if frame.empty:
        return [missing()]
    kinds = _peers(run, frame)
    columns = [
        Column("mode"),
        Column("ms", "ours"),
        Column("quartiles, ms", "ours"),
        Column("share of the floor", "ours"),
    ]
    for kind, members in kinds.items():
        above = "computing the same, time over ours" if kind == names.SAME else f"{kind}, time over ours"
        columns += [Column(name, above) for name in members]
    dtypes = ", ".join(dict.fromkeys(frame["dtype"]))
    table = Table(f"Time of a call, {dtypes}", run.source, columns, group="workload")
    every = Table(
        f"Every time, {dtypes}",
        run.source,
        [
            Column("contender"),
            *map(
                Column,
                ("mode", "ms", "quartiles, ms", "time over ours", "GFLOP/s", "GB/s", "rounds", "page faults"),
            ),
        ],
        group="workload",
    )
    for workload in workloads(frame["workload"]):
        of_workload = frame[frame["workload"] == workload]
        for mode in modes(of_workload["mode"]):
            cell = of_workload[of_workload["mode"] == mode].set_index("contender")
            table.add(
                [
                    mode,
                    *_ours(cell, table),
                    *(_ratio(cell, name, table) for k in kinds.values() for name in k),
                ],
                workload,
            )
            for name, record in cell.iterrows():
                if math.isfinite(record["median_s"]):
                    every.add(_every(str(name), mode, record), workload)
    blocks: list[Block] = [*reduced(frame)]
    if run.machine.get("malloc_keeps_freed_memory") is False:
        blocks.append(Text("The C library gave freed memory back: these times have its page faults in them."))
    blocks += [
        table,
        Folded("Every time, with quartiles and rates", [every]) if every.rows else missing("Every time"),
    ]
    pictures = [
        picture
        for mode in DRAWN_MODES
        for kind, members in kinds.items()
        if (picture := _bars(run, frame, mode, kind, members, album)) is not None
    ]
    blocks.append(Pictures(pictures) if pictures else missing("Speed-up of each workload"))
    return blocks


def _peers(run: Run, frame: pd.DataFrame) -> dict[str, list[str]]:
    """The peers in some records: those that compute the same as ours, and the others."""
    about = run.contenders()
    found = names.order(about, frame["contender"])
    groups: dict[str, list[str]] = {names.SAME: [], "another pooling": []}
    for name in found:
        if name == "ours":
            continue
        of = (
            about[name]["computes"]
            if name in about
            else str(frame[frame["contender"] == name]["computes"].iloc[0])
        )
        groups.setdefault(of or names.SAME, []).append(name)
    return {kind: members for kind, members in groups.items() if members}


def _ours(cell: pd.DataFrame, table: Table) -> list[Cell | str]:
    if "ours" not in cell.index:
        return [table.absent("")] * 3
    record = cell.loc["ours"]
    if not math.isfinite(record["median_s"]):
        return [table.absent(f"ours: {record['reason']}" if record["reason"] else "")] * 3
    return [milliseconds(record["median_s"]), quartiles(record), percent(1 / record["time_over_floor"])]


def _ratio(cell: pd.DataFrame, name: str, table: Table) -> Cell:
    if name not in cell.index:
        return table.absent("")
    record = cell.loc[name]
    if not math.isfinite(record["median_s"]):
        return table.absent(f"{name}: {record['reason']}" if record["reason"] else "")
    return times(record["time_over_ours"])


def _every(name: str, mode: str, record: pd.Series) -> list[Cell | str]:
    return [
        name,
        mode,
        milliseconds(record["median_s"]),
        quartiles(record),
        times(record["time_over_ours"]) if name != "ours" else Cell(NONE),
        number(record["gflops"]),
        number(record["gbytes_per_s"]),
        size(record["rounds"]),
        size(record["page_faults"]),
    ]


def _bars(
    run: Run, frame: pd.DataFrame, mode: str, kind: str, members: list[str], album: Album
) -> Picture | None:
    of_mode = frame[(frame["mode"] == mode) & frame["contender"].isin(members)]
    groups: dict[str, dict[str, float | None]] = {}
    for workload in workloads(of_mode["workload"]):
        rows = of_mode[of_mode["workload"] == workload].set_index("contender")["time_over_ours"]
        ratios = {name: float(rows[name]) for name in members if name in rows.index}
        groups[workload] = {name: ratio if math.isfinite(ratio) else None for name, ratio in ratios.items()}
    found = {n: [v for g in groups.values() if (v := g.get(n)) is not None] for n in members}
    found = {name: ratios for name, ratios in found.items() if ratios}
    if not found:
        return None
    what = "peers that compute the same" if kind == names.SAME else f"peers that compute {kind}"
    with plots.style():
        figure = plots.bars(
            f"{mode}: {what}", "time over ours (right of 1: ours is faster)", groups, base=1.0
        )
        return album.save(
            figure,
            run,
            f"speed-{mode}-{plots.slug(kind)}",
            f"Time over ours, {mode}: {what}.",
            f"Bars by workload, {mode}, time over ours on a logarithmic axis. "
            + "; ".join(f"{name} {plots.span(ratios)}" for name, ratios in found.items())
            + ".",
        )
