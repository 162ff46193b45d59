"""What a GPU run leaves behind: CSV rows as they come, JSON and a picture after every group, a summary."""

from __future__ import annotations

import csv
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastac import _cuda

from .gpu_bench import DTYPES, LARGE_BATCH, MODE_TEXT, PASSES, Cell, Group
from .targets import Figure, at_least

COLUMNS = (
    "workload", "dtype", "batch", "length", "in_features", "cluster_size", "rows", "mode", "contender",
    "median_s", "quartile1_s", "quartile3_s", "rounds", "floor_s", "share_of_floor", "time_over_ours",
    "call_s", "bytes", "operations", "form", "copy_s", "matmul_flops", "bytes_per_s", "flops", "reason",
    "date", "commit", "backend", "gpu", "driver", "cuda", "torch", "triton", "python",
)  # fmt: skip
PEERS = ("eager", "compile", "sdpa")
SHARES = {"triton": (0.75, 0.60), "cuda": (0.85, 0.75)}
"""Shares of the floor to reach with short sets, forward and backward, by backend."""

PICTURE_SECONDS = 15.0
"""A picture is drawn at most this often while rows are still coming."""

TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)


def say(text: str) -> None:
    print(text, flush=True)


@dataclass
class Report:
    """Everything one run found; `folder` receives the files, which are valid after every call of `save`."""

    machine: dict[str, object]
    folder: Path
    options: dict[str, object] = field(default_factory=dict)
    stages: dict[str, Any] = field(default_factory=dict)
    """What the stages other than the benchmark found, by stage."""
    cells: list[Cell] = field(default_factory=list)
    errors: dict[str, list[str]] = field(default_factory=dict)
    plans: dict[str, dict[str, dict[str, str]]] = field(default_factory=dict)
    """The plans of each group, by contender."""
    red: dict[str, str] = field(default_factory=dict)
    """Groups without figures of ours because it was wrong, with the errors."""
    unmeasured: dict[str, str] = field(default_factory=dict)
    """Groups without (all) figures for another reason."""

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        stamp = str(self.machine["date"]).replace(":", "").split("+")[0]
        self.stem = self.folder / f"gpu-{stamp}-{self.machine['commit']}"
        self.drawn = float("-inf")
        self.no_picture = ""

    def path(self, suffix: str) -> Path:
        return self.stem.with_name(self.stem.name + suffix)

    def add(self, cell: Cell) -> None:
        """Keep a cell and write its rows to the CSV file at once."""
        self.cells.append(cell)
        new = not self.path(".csv").exists()
        with self.path(".csv").open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="", extrasaction="ignore")
            if new:
                writer.writeheader()
            writer.writerows(self.machine | record for record in cell.records())
            file.flush()
            os.fsync(file.fileno())

    def save(self, last: bool = False) -> list[Path]:
        """Write JSON and, not too often unless `last`, the picture. Returns the paths of the files."""
        content = {
            "machine": self.machine,
            "options": self.options,
            "stages": self.stages,
            "errors": self.errors,
            "plans": self.plans,
            "red": self.red,
            "unmeasured": self.unmeasured,
            "records": [record for cell in self.cells for record in cell.records()],
            "seconds": {f"{c.group}/{c.mode}": c.timings.seconds for c in self.cells},
            "targets": [asdict(f) for f in figures(self.cells)],
            "winners": {str(self.machine["gpu"]): winners(self.cells)},
        }
        partial = self.path(".json.partial")
        partial.write_text(json.dumps(content, indent=1, default=str) + "\n")
        partial.replace(self.path(".json"))
        if self.cells and (last or time.monotonic() - self.drawn > PICTURE_SECONDS):
            self.no_picture = draw(self.cells, self.machine, self.path(".png"))
            self.drawn = time.monotonic()
        return [path for suffix in (".csv", ".json", ".png") if (path := self.path(suffix)).exists()]


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def _microseconds(cell: Cell, name: str) -> str:
    return f"{1e6 * cell.timings.median(name):.1f}" if name in cell.timings.seconds else "-"


def line(cell: Cell) -> dict[str, str]:
    """One line of the table."""
    return {
        "workload": cell.group.workload.name,
        "B": str(cell.group.workload.batch),
        "dtype": cell.group.dtype,
        "mode": cell.mode,
        "ours us": f"{1e6 * cell.timings.median('ours'):.1f}",
        "floor us": f"{1e6 * sum(cell.floors) / len(cell.floors):.1f}",
        "share": f"{100 * cell.share():.0f} %",
        **{
            key: text
            for other in [*cell.backends][1:]
            for key, text in (
                (f"{other} us", _microseconds(cell, other)),
                (f"{other}/ours", _times(cell.speedup(other))),
            )
        },
        **{f"{peer}/ours": _times(cell.speedup(peer)) for peer in PEERS},
        "call us": f"{1e6 * cell.calls['ours']:.1f}" if "ours" in cell.calls else "-",
    }


def table(lines: Iterable[Mapping[str, str]]) -> str:
    """Lines with the same keys as text in columns."""
    rows = list(lines)
    if not rows:
        return ""
    widths = {key: max(len(key), *(len(row[key]) for row in rows)) for key in rows[0]}
    header = "  ".join(key.rjust(width) for key, width in widths.items())
    body = ["  ".join(row[key].rjust(width) for key, width in widths.items()) for row in rows]
    return "\n".join([header, *body])


def figures(cells: Iterable[Cell]) -> list[Figure]:
    """The figures to reach in bfloat16, B = 1024, each with what was measured."""
    cells = list(cells)
    by_name = {
        (c.group.workload.name, c.mode): c
        for c in cells
        if c.group.dtype == "bfloat16" and c.group.workload.batch in (1, LARGE_BATCH)
    }
    found = []

    def share(contender: str, backend: str, name: str, mode: str, target: float) -> None:
        cell = by_name.get((name, mode))
        measured = cell.share(contender) if cell and contender in cell.timings.seconds else None
        found.append(at_least(f"{name} {mode}, {backend}, share of the floor", target, measured, ""))

    for contender, backend in (cells[0].backends if cells else {}).items():
        forward, backward = SHARES.get(backend, SHARES["triton"])
        for name in ("kinetics-rgb", "ucf-resnet", "kinetics-flow"):
            share(contender, backend, name, "forward", forward)
            share(contender, backend, name, "backward", backward)
        if backend == "cuda":
            share(contender, backend, "yt8m-rgb", "forward", 0.55)
            share(contender, backend, "yt8m-rgb", "backward", 0.45)
        share(contender, backend, "mil-bag", "forward", 0.80)
    for mode in PASSES:
        for peer, target in (("compile", 2.0), ("eager", 3.0), ("sdpa", 3.0)):
            cell = by_name.get(("kinetics-rgb", mode))
            ratio = cell.speedup(peer) if cell else None
            found.append(at_least(f"kinetics-rgb {mode}, {peer} / ours", target, ratio))
    return found


def winners(cells: Iterable[Cell]) -> dict[str, str]:
    """Which of cuda and triton is faster in each class of calls: what fastac/measured.json holds for a GPU.

    The faster one of a class has the lower product of times over all its training cells.
    """
    ratios: dict[str, list[float]] = {}
    for cell in cells:
        contenders = {backend: name for name, backend in cell.backends.items()}
        times = [cell.timings.seconds.get(contenders.get(b, "")) for b in ("cuda", "triton")]
        if cell.mode != "training" or None in times:
            continue
        w = cell.group.workload
        sizes = (cell.rows, w.in_features) if w.ragged else (w.batch, w.length, w.in_features)
        x = torch.empty(sizes, dtype=DTYPES[cell.group.dtype], device="meta")
        ratio = cell.timings.ratio(contenders["cuda"], contenders["triton"])
        ratios.setdefault(_cuda.workload(x), []).append(math.log(ratio))
    return {name: "cuda" if sum(each) < 0 else "triton" for name, each in sorted(ratios.items())}


def render(report: Report) -> str:
    """The printed summary, the most important lines last."""
    out = ["", "Machine", *(f"  {key}: {value}" for key, value in report.machine.items())]
    out += ["", "Modes", *(f"  {mode}: {text}" for mode, text in MODE_TEXT.items())]
    if report.cells:
        out += [
            "",
            "Device time, cold second-level cache; share = floor / ours, floor = the longer of a copy of the "
            "bytes that must move and the operations at the matrix rate; call = wall clock of ours in a row",
            table(line(cell) for cell in report.cells),
            "",
            "Targets",
            table({k: str(v) for k, v in asdict(f).items()} for f in figures(report.cells)),
        ]
        found = winners(report.cells)
        if found:
            out += ["", f"Faster, for fastac/measured.json: {json.dumps({report.machine['gpu']: found})}"]
        absent = {f"  {c.group}: no {n}: {why}" for c in report.cells for n, why in c.reasons.items()}
        out += sorted(absent)
    for name, why in report.red.items():
        out += [f"WRONG RESULT, no speed is reported for {name}: {why}"]
    for name, why in report.unmeasured.items():
        out += [f"not measured: {name}: {why}"]
    if report.no_picture:
        out += [f"no picture: {report.no_picture}"]
    return "\n".join(out)


def draw(cells: list[Cell], machine: Mapping[str, object], path: Path) -> str:
    """Draw shares of the floor, and speed-ups, of the first dtype and batch size of every workload.

    Returns: why there is no picture; "" if there is one.
    """
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError as error:
        return str(error)
    first: dict[str, Group] = {}
    for cell in cells:
        first.setdefault(cell.group.workload.name, cell.group)
    by_name = {(c.group.workload.name, c.mode): c for c in cells if first[c.group.workload.name] == c.group}
    names = list(first)
    modes = list(PASSES)
    named = [*[*cells[0].backends][1:], *PEERS]
    peers = [p for p in named if any(c.speedup(p) is not None for c in by_name.values())]
    size = (11, 3 + 2.6 * len(peers))
    figure, axes = plt.subplots(1 + len(peers), 1, figsize=size, sharex=True, squeeze=False)
    width = 0.8 / len(modes)
    colours = ("#4477aa", "#ee6677", "#228833", "#ccbb44")

    def bars(axis: Any, value: Any) -> None:
        for i, mode in enumerate(modes):
            places, heights = [], []
            for j, name in enumerate(names):
                cell = by_name.get((name, mode))
                height = value(cell) if cell is not None else None
                if height is not None:
                    places.append(j + (i - (len(modes) - 1) / 2) * width)
                    heights.append(height)
            drawn = axis.bar(places, heights, width, label=mode, color=colours[i])
            axis.bar_label(drawn, fmt="%.2g", fontsize=6, padding=1)

    bars(axes[0, 0], lambda cell: cell.share())
    axes[0, 0].axhline(1, color="black", linewidth=0.8)
    axes[0, 0].set_ylabel("share of the floor")
    axes[0, 0].legend(ncols=len(modes), fontsize=8, loc="upper right")
    axes[0, 0].set_ylim(0, 1.25)
    for axis, peer in zip(axes[1:, 0], peers, strict=True):
        bars(axis, lambda cell, peer=peer: cell.speedup(peer))
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_yscale("log")
        bottom, top = axis.get_ylim()
        axis.set_ylim(min(bottom, 0.7), max(1.5 * top, 3))
        axis.set_yticks([v for v in TICKS if axis.get_ylim()[0] <= v <= axis.get_ylim()[1]])
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("")
        axis.set_ylabel(f"{peer} / ours")
    axes[-1, 0].set_xticks(range(len(names)))
    axes[-1, 0].set_xticklabels(
        [f"{n}\nB={g.workload.batch}\n{g.dtype}" for n, g in first.items()], fontsize=8
    )
    axes[0, 0].set_title(
        f"{machine['gpu']}, fastac {machine['commit']} ({machine['backend']}), torch {machine['torch']}, "
        f"triton {machine['triton']}, {str(machine['date'])[:10]}",
        fontsize=9,
    )
    figure.tight_layout()
    partial = path.with_name(f"{path.name}.partial")
    try:
        figure.savefig(partial, dpi=130, format="png")
        partial.replace(path)
    finally:
        plt.close(figure)
    return ""


def finish(report: Report) -> None:
    """Write every file a last time and print the summary."""
    paths = report.save(last=True)
    say(render(report))
    for path in paths:
        say(f"saved {path}")
    sys.stdout.flush()
