"""The section on the peak memory of a call."""

from __future__ import annotations

import math

from . import names, plots
from .content import Block, Cell, Column, Pictures, Section, Table, Text, megabytes, missing
from .parts import DRAWN_MODES, modes, per_run, reduced, workloads
from .plots import Album
from .runs import Run


def memory(runs: list[Run], album: Album) -> Section:
    """Peak memory of a call."""
    section = Section("memory", "Memory")
    section.blocks.append(
        Text(
            "Peak resident memory of one call beyond its inputs, in a process of its own. The workspace "
            "leaves out the result and the gradients as well: it is what a call needs for itself."
        )
    )
    return per_run(section, runs, lambda run: _memory(run, album))


def _memory(run: Run, album: Album) -> list[Block]:
    frame = run.suite("memory")
    if frame.empty:
        return [missing()]
    found = names.order(["ours", *run.contenders()], frame["contender"])
    columns = [Column("mode")]
    columns += [Column(name, "peak beyond the inputs, MB") for name in found]
    columns += [Column(name, "workspace, MB") for name in found]
    table = Table("Peak memory of a call", run.source, columns, group="workload")
    for workload in workloads(frame["workload"]):
        of_workload = frame[frame["workload"] == workload]
        for mode in modes(of_workload["mode"]):
            cell = of_workload[of_workload["mode"] == mode].set_index("contender")
            row: list[Cell | str] = [mode]
            for column in ("peak_bytes", "workspace_bytes"):
                for name in found:
                    value = cell.at[name, column] if name in cell.index else math.nan
                    reason = str(cell.at[name, "reason"]) if name in cell.index else ""
                    row.append(
                        megabytes(value)
                        if math.isfinite(value)
                        else table.absent(f"{name}: {reason}" if reason else "")
                    )
            table.add(row, workload)
    pictures = []
    for mode in DRAWN_MODES:
        rows = frame[frame["mode"] == mode]
        groups: dict[str, dict[str, float | None]] = {}
        for workload in workloads(rows["workload"]):
            values = rows[rows["workload"] == workload].set_index("contender")["peak_bytes"]
            groups[workload] = {
                name: float(values[name]) / 1e6 if math.isfinite(values[name]) else None
                for name in found
                if name in values.index
            }
        if any(value for group in groups.values() for value in group.values()):
            ours = [v for g in groups.values() if (v := g.get("ours")) is not None]
            with plots.style():
                pictures.append(
                    album.save(
                        plots.bars(f"{mode}: peak memory", "MB beyond the inputs", groups, base=None),
                        run,
                        f"memory-{mode}",
                        f"Peak memory of a call, {mode}.",
                        f"Points by workload, {mode}, megabytes on a logarithmic axis"
                        + (f"; ours {plots.span(ours)} MB." if ours else "."),
                    )
                )
    return [*reduced(frame), table, Pictures(pictures) if pictures else missing("Peak memory")]
