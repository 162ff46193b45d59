"""The section on what the processor could do."""

from __future__ import annotations

from . import plots
from .content import Block, Pictures, Section, Text, missing, number
from .parts import DRAWN_MODES, per_run
from .plots import Album
from .runs import Run


def roofline(runs: list[Run], album: Album) -> Section:
    """How far from what the processor can do."""
    section = Section("roofline", "Roofline")
    section.blocks.append(
        Text(
            "The roof is what this processor was measured to do in the same run: it cannot go faster than "
            "its matrix product (flat part) nor than its memory allows (slope). Operations and bytes are "
            "those of the counting model, the same for all contenders; what stays in the caches can lie "
            "above the slope."
        )
    )
    return per_run(section, runs, lambda run: _roofline(run, album))


def _roofline(run: Run, album: Album) -> list[Block]:
    frame = run.suite("speed").dropna(subset=["gflops", "operations", "bytes"])
    frame = frame[frame["contender"].isin(["ours", "eager"])]
    roof = frame.dropna(subset=["gemm_gflops", "copy_gbytes_per_s"])
    panels = {mode: frame[frame["mode"] == mode] for mode in DRAWN_MODES}
    panels = {mode: rows for mode, rows in panels.items() if not rows.empty}
    if roof.empty or not panels:
        return [missing()]
    gemm, bandwidth = float(roof["gemm_gflops"].median()), float(roof["copy_gbytes_per_s"].median())
    ours = panels[next(iter(panels))]
    ours = ours[ours["contender"] == "ours"]
    reach = [float(v) for v in ours["gflops"]]
    with plots.style():
        picture = album.save(
            plots.roofline(panels, gemm, bandwidth),
            run,
            "roofline",
            "Rate against operations per byte, ours and plain torch.",
            f"Roofline: a roof of {number(gemm)} GFLOP/s and {number(bandwidth)} GB/s, and a point for "
            "each workload"
            + (f"; ours, {next(iter(panels))}: {plots.span(reach)} GFLOP/s." if reach else "."),
        )
    return [Pictures([picture])]
