"""The pictures: narrow enough to be read on a phone, on white, each with what it was measured on."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from . import names
from .content import Picture, number
from .runs import Run

WIDTH = 4.6
"""Inches; a phone shows about as many centimetres, which leaves text of 9 points legible."""

DPI = 200
STYLE: dict[str, Any] = {
    "text.parse_math": False,
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.grid": True,
    "axes.grid.axis": "both",
    "grid.alpha": 0.35,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "figure.facecolor": "white",
}
PNG = {"Software": None}
"""No entry of a PNG may change from one building to the next."""

BAR = 0.155
"""Inches from one bar to the next."""

STYLES: dict[str, Any] = {"forward": "-", "training": "--"}


@dataclass(frozen=True)
class Album:
    """Where pictures go, and the names of those that are there."""

    folder: Path
    files: dict[str, Path]

    def save(self, figure: Figure, run: Run, name: str, caption: str, alt: str) -> Picture:
        """Writes a figure of one run.

        Args:
            figure: without a margin for the line that says what was measured.
            run: the run.
            name: unique among the pictures of a run.
            caption, alt: of the picture on the page.
        """
        stem = f"{run.kind}-{slug(run.device)}-{name}"
        file = f"{stem}.png"
        if file in self.files:  # two names of processors that differ in signs only
            file = f"{stem}-{sum(other.startswith(stem) for other in self.files) + 1}.png"
        source = "\n".join(textwrap.wrap(run.source, 76))
        figure.supxlabel(source, fontsize=6.5, color="#555555", x=0.02, ha="left")
        path = self.folder / file
        figure.savefig(path, dpi=DPI, metadata=PNG)
        self.files[file] = path
        width, height = (round(DPI * inches) for inches in figure.get_size_inches())
        return Picture(file, caption, run.source, alt, width, height)


def slug(text: str) -> str:
    """Text as a part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "device"


def new_figure(height: float, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure with panels below each other."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, list(figure.subplots(rows, 1, squeeze=False)[:, 0])


@contextmanager
def style() -> Iterator[None]:
    """What all pictures are drawn in, whatever a user's own settings are."""
    with mpl.rc_context():
        mpl.rcdefaults()
        parameters: Any = mpl.rcParams
        parameters.update(STYLE)
        yield


def bars(
    title: str, label: str, groups: Mapping[str, Mapping[str, float | None]], *, base: float | None
) -> Figure:
    """Horizontal bars, or points, on a logarithmic axis, one group below the other.

    Args:
        title: above the bars.
        label: of the axis.
        groups: by the group's name and contender the value; None where there is none, which is said. A value
            of 0 has none.
        base: where bars start, such as 1 for ratios; None for points, where no start would mean anything.
    """
    contenders = list(dict.fromkeys(c for group in groups.values() for c in group))
    count = sum(len(group) for group in groups.values())
    rows = math.ceil(len(contenders) / 3)
    figure, (axis,) = new_figure(1.1 + 0.2 * rows + BAR * (count + 0.8 * len(groups)))
    found = [v for group in groups.values() for v in group.values() if v]
    low, high = min([*found, base or math.inf]), max([*found, base or 0])
    left, right = (low / 1.25 if low < (base or math.inf) else low / 1.02), high * (high / low) ** 0.16 * 1.1
    axis.set_xscale("log")
    axis.set_xlim(left, right)
    start = left if base is None else base
    place, ticks = 0.0, []
    for values in groups.values():
        first = place
        for contender, value in values.items():
            if value:
                if base is None:
                    axis.plot(value, place, "o", markersize=6, color=names.colour(contender))
                else:
                    axis.barh(place, value - base, left=base, height=0.86, color=names.colour(contender))
                text = number(value) + ("×" if base is not None else "")
            else:
                text = "no figure" if value is None else "0"
            beside = 0.025 if value and base is None else 0.01  # of the axis; a point is wide
            at = max(value or start, start) * (right / left) ** beside
            axis.text(at, place, text, va="center", fontsize=7, color="black" if value else "#666666")
            place += 1
        ticks.append((first + place - 1) / 2)
        place += 0.8
    axis.set_yticks(ticks, list(groups))
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(place - 0.8, -0.8)
    axis.grid(visible=False, axis="y")
    if base is not None:
        axis.axvline(base, color="black", linewidth=0.9)
    logarithmic(axis, "x")
    axis.set_xlabel(label)
    above(figure, title, [Patch(color=names.colour(name), label=name) for name in contenders], 3)
    return figure


def above(figure: Figure, title: str, handles: Sequence[Patch | Line2D], columns: int) -> None:
    """The title and the legend, above all panels."""
    text = "\n".join(textwrap.wrap(title, 56))
    legend = figure.legend(
        handles=list(handles), loc="outside upper left", ncols=min(columns, len(handles)), columnspacing=0.8,
        handletextpad=0.4, handlelength=2.6, title=text, title_fontsize=9.5, alignment="left",
    )  # fmt: skip
    legend.get_title().set_fontweight("bold")


def logarithmic(axis: Axes, which: str) -> None:
    """Ticks at plain numbers: the 1 of a decade, with its 2 and 5 or more where there are few decades."""
    low, high = axis.get_xlim() if which == "x" else axis.get_ylim()
    decades = math.log10(high / low)
    steps: tuple[float, ...] = (1.0, 2.0, 5.0) if decades < 2.6 else (1.0,)
    if decades < 0.8:
        steps = (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)
    one = axis.xaxis if which == "x" else axis.yaxis
    if decades > 6:
        one.set_major_locator(LogLocator(numticks=6))
    else:
        exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [s * 10.0**e for e in exponents for s in steps]
        one.set_major_locator(FixedLocator([t for t in ticks if low <= t <= high]))
    one.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))
    one.set_minor_locator(NullLocator())


def plain(value: float) -> str:
    """A tick's number: 0.02, 5, 300, 20k, 1M."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit * 0.999:
            return f"{value / unit:g}{name}"
    return f"{value:g}"


def roofline(panels: Mapping[str, pd.DataFrame], gemm: float, bandwidth: float) -> Figure:
    """Operations per byte against operations per second, below the measured roof.

    Args:
        panels: by title, columns workload, contender ("ours" or "eager"), operations, bytes and gflops.
        gemm: the roof's flat part, in GFLOP/s.
        bandwidth: its slope, in GB/s.
    """
    every = pd.concat(panels.values())
    workloads = names.order(names.WORKLOADS, every["workload"])
    intensity = every["operations"] / every["bytes"]
    corner = gemm / bandwidth
    left, right = min(intensity.min(), corner) / 2.2, max(intensity.max(), corner) * 2.2
    low = min(every["gflops"].min(), left * bandwidth) / 1.6
    rows = math.ceil(len(workloads) / 2)
    figure, axes = new_figure(0.9 + 0.17 * rows + 2.9 * len(panels), len(panels))
    for axis, (title, frame) in zip(axes, panels.items(), strict=True):
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlim(left, right)
        axis.set_ylim(low, max(gemm, every["gflops"].max()) * 2)
        axis.plot([left, corner, right], [left * bandwidth, gemm, gemm], color="black", linewidth=1.2)
        axis.text(
            0.015, 0.985, f"roof: torch.mm {number(gemm)} GFLOP/s, copy {number(bandwidth)} GB/s",
            fontsize=7.5, color="#333333", va="top", transform=axis.transAxes,
        )  # fmt: skip
        for position, workload in enumerate(workloads, 1):
            rows_of = frame[frame["workload"] == workload]
            x, y = rows_of["operations"] / rows_of["bytes"], rows_of["gflops"]
            axis.plot(x, y, color="#999999", linewidth=0.8, zorder=2)
            for contender, one_x, one_y in zip(rows_of["contender"], x, y, strict=True):
                ours = contender == "ours"
                axis.plot(
                    one_x, one_y, "o" if ours else "s", markersize=10 if ours else 5, zorder=4 if ours else 3,
                    color=names.colour(contender), markeredgecolor="white", markeredgewidth=0.7,
                )  # fmt: skip
                if ours:
                    axis.text(
                        one_x, one_y, str(position), fontsize=6.5, color="white", ha="center",
                        va="center_baseline", zorder=5,
                    )  # fmt: skip
        axis.set_title(title, loc="left")
        axis.set_ylabel("GFLOP/s")
        logarithmic(axis, "x")
        logarithmic(axis, "y")
    axes[-1].set_xlabel("operations per byte that must move")
    marks = [
        Line2D([], [], marker=marker, markersize=size, linestyle="", color=names.colour(name), label=name)
        for name, marker, size in (("ours", "o", 8), ("eager", "s", 5))
    ]
    marks += [Line2D([], [], linestyle="", label=f"{i}  {name}") for i, name in enumerate(workloads, 1)]
    above(figure, "Rate against operations per byte", marks, 3)
    return figure


def scaling(title: str, symbol: str, panels: Mapping[str, pd.DataFrame]) -> Figure:
    """Cost against one size, logarithmic both ways, with a line of slope 1.

    Args:
        title: above the panels.
        symbol: of the size.
        panels: by the axis' label, columns size, value, contender and mode.
    """
    figure, axes = new_figure(1.1 + 2.3 * len(panels), len(panels))
    for axis, (label, frame) in zip(axes, panels.items(), strict=True):
        axis.set_xscale("log")
        axis.set_yscale("log")
        for (contender, mode), line in frame.groupby(["contender", "mode"], sort=False):
            line = line.sort_values("size")
            axis.plot(
                line["size"], line["value"], color=names.colour(str(contender)), marker="o", markersize=3.5,
                linestyle=STYLES.get(str(mode), ":"), linewidth=1.4,
            )  # fmt: skip
        x = [frame["size"].min(), frame["size"].max()]
        limits = axis.get_ylim()
        # Below the data, so that it hides none of them.
        end = frame[frame["size"] == x[1]]["value"].min() / 2.5
        axis.plot(x, [end * each / x[1] for each in x], color="#777777", linewidth=1, linestyle=":")
        axis.set_ylim(max(limits[0] / 2, min(limits[0], end / 3)), limits[1])
        axis.set_ylabel(label)
        logarithmic(axis, "x")
        logarithmic(axis, "y")
    axes[-1].set_xlabel(symbol)
    pairs = dict.fromkeys(
        (str(c), str(m)) for f in panels.values() for c, m in zip(f["contender"], f["mode"], strict=True)
    )
    handles = [
        Line2D(
            [],
            [],
            color=names.colour(c),
            linestyle=STYLES.get(m, ":"),
            marker="o",
            markersize=3.5,
            label=f"{c}, {m}",
        )
        for c, m in pairs
    ]
    handles.append(Line2D([], [], color="#777777", linestyle=":", label="slope 1"))
    above(figure, title, handles, 2)
    return figure


def span(values: Sequence[float]) -> str:
    """The smallest and the largest of some ratios, for a picture's description."""
    return f"{number(min(values))} to {number(max(values))}" if len(values) > 1 else number(values[0])
