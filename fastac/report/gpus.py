"""The section on GPUs: a row for each backend and workload, empty where nothing was measured."""

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
    Folded,
    Heading,
    Section,
    Table,
    Text,
    number,
    percent,
    size,
    times,
)
from .parts import quartiles, workloads
from .runs import Run
from .suites import target_blocks

BACKENDS = ("triton", "cuda")
SHOWN = ("forward", "backward", "training")
PEERS = ("eager", "compile", "sdpa")


def gpus(runs: list[Run]) -> Section:
    """Device times of both backends."""
    section = Section("gpus", "GPUs")
    section.blocks.append(
        Text(
            "Device time with a cold second-level cache. The floor is the longer of a copy of the bytes "
            "that must move and the operations at the rate of a large matrix product, both measured on "
            "the same card. A peer's figure is its time over the backend's."
        )
    )
    if not runs:
        section.blocks.append(Text("No GPU has been measured: every row waits for one.", "absent"))
        section.blocks.append(_table(None))
    for run in runs:
        section.blocks.append(Heading(run.device))
        section.blocks += _blocks(run)
    return section


def _blocks(run: Run) -> list[Block]:
    blocks: list[Block] = [_table(run)]
    wrong = {**run.content["red"]}
    if wrong:
        blocks += [
            Text(f"Wrong result, no speed is reported for {name}: {why}", "missed")
            for name, why in wrong.items()
        ]
    absent = [Text(f"{name}: {why}") for name, why in run.content["unmeasured"].items()]
    if absent:
        blocks.append(Folded("Groups that were not measured", absent))
    blocks.append(_every(run))
    return [*blocks, *target_blocks(run)]


def backends(run: Run) -> list[str]:
    """The backends measured; the first is the contender "ours"."""
    return str(run.machine.get("backend", "")).split(",")


def backend(run: Run, contender: str) -> str:
    """The backend of a contender; "" for a peer."""
    own = backends(run)
    if contender == "ours":
        return own[0]
    return contender if contender in own else ""


def _table(run: Run | None) -> Table:
    """One row per backend and workload: the first dtype and number of sets that was measured."""
    columns = [Column("workload"), Column("measured", is_text=True)]
    for mode in SHOWN:
        columns += [Column("µs", mode), Column("share of the floor", mode), *(Column(p, mode) for p in PEERS)]
    source = run.source if run is not None else NOT_MEASURED
    table = Table("Device time by backend and workload", source, columns, "backend")
    width = 2 + len(PEERS)
    for name in BACKENDS:
        for workload in names.WORKLOADS:
            group = None if run is None else _first(run, name, workload)
            if run is None or group is None:
                table.add([workload, table.absent(""), *[Cell(NONE, "absent")] * (width * len(SHOWN))], name)
                continue
            said = f"{group.iloc[0]['dtype']}, B = {size(group.iloc[0]['batch'])}"
            cells = [
                cell for mode in SHOWN for cell in _cells(run, name, group[group["mode"] == mode], table)
            ]
            table.add([workload, said, *cells], name)
    return table


def _first(run: Run, name: str, workload: str) -> pd.DataFrame | None:
    """The records of the first dtype and batch size in which a backend ran a workload."""
    rows = run.records[run.records["workload"] == workload]
    own = rows[(rows["contender"].map(lambda c: backend(run, c)) == name) & rows["median_s"].notna()]
    if own.empty:
        return None
    same = (rows["dtype"] == own.iloc[0]["dtype"]) & (rows["batch"] == own.iloc[0]["batch"])
    found: pd.DataFrame = rows[same]
    return found


def _cells(run: Run, name: str, rows: pd.DataFrame, table: Table) -> list[Cell | str]:
    by_name = rows.set_index("contender")
    own = next((c for c in by_name.index if backend(run, c) == name), None)
    if own is None or not math.isfinite(by_name.at[own, "median_s"]):
        reason = str(by_name.at[own, "reason"]) if own is not None else ""
        return [table.absent(reason), *[Cell(NONE, "absent")] * (1 + len(PEERS))]
    record = by_name.loc[own]
    cells: list[Cell | str] = [number(1e6 * record["median_s"]), percent(record["share_of_floor"])]
    for peer in PEERS:
        if peer not in by_name.index:
            cells.append(table.absent(""))
        elif not math.isfinite(by_name.at[peer, "median_s"]):
            cells.append(table.absent(f"{peer}: {by_name.at[peer, 'reason']}"))
        else:
            # Ratios in the file are over the first backend, taken round by round.
            cells.append(times(by_name.at[peer, "time_over_ours"] / record["time_over_ours"]))
    return cells


def _every(run: Run) -> Folded:
    heads = (
        "contender",
        "mode",
        "dtype",
        "B",
        "µs",
        "quartiles, µs",
        "share of the floor",
        f"time over {backends(run)[0]}",
        "rounds",
    )
    columns = [Column(name, is_text=name in ("mode", "dtype")) for name in heads]
    table = Table("Every time on this card", run.source, columns, "workload")
    for workload in workloads(run.records["workload"]):
        for _, record in run.records[run.records["workload"] == workload].iterrows():
            ours = backend(run, str(record["contender"]))
            if math.isfinite(record["median_s"]):
                cells: list[Cell | str] = [number(1e6 * record["median_s"]), quartiles(record, 1e6)]
                cells += [
                    percent(record["share_of_floor"]),
                    times(record["time_over_ours"]),
                    size(record["rounds"]),
                ]
            else:
                cells = [table.absent(f"{record['contender']}: {record['reason']}")] * 5
            name = f"ours, {ours}" if ours else str(record["contender"])
            table.add(
                [name, str(record["mode"]), str(record["dtype"]), size(record["batch"]), *cells], workload
            )
    return Folded("Every time, with quartiles", [table])
