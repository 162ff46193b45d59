"""Pictures of training and of what attention units look at (matplotlib; install ``fastac[train]``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

FloatArray = npt.NDArray[np.floating[Any]]

UNITS_SHOWN = 8


def hsv_colours() -> ListedColormap:
    """Hues from blue for weight 0 to red for 1; the whole circle would give both the same red."""
    hues = np.linspace(2 / 3, 0, 256)
    return ListedColormap(hsv_to_rgb(np.stack([hues, np.full(256, 0.85), np.full(256, 0.95)], axis=1)))


def choose_units(weights: FloatArray, positions: Sequence[int], count: int = UNITS_SHOWN) -> list[int]:
    """The units to show, ordered by the position they look at most.

    For each of the given positions the unit that looks at it most, then the most concentrated of the others.

    Args:
        weights: ``(N, L)``.
        positions: those that matter, the frames with a digit for instance.
        count: how many units.
    """
    concentrated = np.argsort(-weights.max(axis=1), kind="stable").tolist()
    chosen: list[int] = []
    for position in positions:
        by_weight = np.argsort(-weights[:, position], kind="stable").tolist()
        chosen += (
            [next(unit for unit in by_weight if unit not in chosen)] if len(chosen) < len(weights) else []
        )
    chosen += [unit for unit in concentrated if unit not in chosen]
    return sorted(chosen[:count], key=lambda unit: int(weights[unit].argmax()))


def weights_under_frames(
    frames: npt.NDArray[np.uint8], frame_names: Sequence[str], weights: FloatArray, *, title: str
) -> Figure:
    """Figure 5 of the paper: the frames of one video, below them the weights of eight units in HSV colours.

    Args:
        frames: ``(L, height, width)``, grey.
        frame_names: what each frame shows; "" where it shows nothing. The named frames choose the units.
        weights: ``(N, L)``.
        title: above the picture.
    """
    length = len(frames)
    named = [position for position, name in enumerate(frame_names) if name]
    units = choose_units(weights, named)
    figure = Figure(figsize=(0.52 * length, 4.2), dpi=120, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1, len(units) / 2))
    extent = (-0.5, length - 0.5, 1.0, 0.0)
    above.imshow(np.concatenate(list(frames), axis=1), cmap="gray", extent=extent, aspect="auto")
    above.set_yticks([])
    above.set_ylabel("frames", rotation=0, ha="right", va="center")
    above.set_title(title, fontsize=11, parse_math=False)
    image = below.imshow(weights[units], cmap=hsv_colours(), vmin=0, vmax=1, aspect="auto")
    below.set_yticks(range(len(units)), [f"unit {unit}" for unit in units])
    below.set_xticks(range(length), [name or "–" for name in frame_names])
    for position, tick in enumerate(below.get_xticklabels()):
        tick.set_fontweight("bold" if position in named else "normal")
    below.set_xlabel("digit in the frame (– noise only)")
    for axis in (above, below):
        _grid(axis, length)
    below.hlines(np.arange(len(units) - 1) + 0.5, -0.5, length - 0.5, color="white", linewidth=1)
    figure.colorbar(image, ax=[above, below], label="attention weight", pad=0.01)
    return figure


def attention_maps(videos: Sequence[tuple[str, Mapping[str, FloatArray]]], *, rows: str = "unit") -> Figure:
    """The weights of the most concentrated units of each modality, one row of panels per video.

    Args:
        videos: name (with what was recognised, for instance) and by modality the weights ``(N, L)``; L = 0
            where the video lacks the modality.
        rows: what a row of the weights is, in a word.
    """
    modalities = list(videos[0][1])
    figure = Figure(
        figsize=(1.0 + 5.0 * len(modalities), 0.6 + 2.2 * len(videos)), dpi=120, layout="constrained"
    )
    panels = figure.subplots(len(videos), len(modalities), squeeze=False)
    image = None
    for row, (name, maps) in zip(panels, videos, strict=True):
        for axis, modality in zip(row, modalities, strict=True):
            weights = maps[modality]
            title = f"{name}  {modality}" if axis is row[0] else modality
            axis.set_title(title, fontsize=9, loc="left", parse_math=False)
            if weights.shape[1] == 0:
                axis.text(0.5, 0.5, "no features", ha="center", va="center", transform=axis.transAxes)
                axis.set_axis_off()
                continue
            units = choose_units(weights, [])
            image = axis.imshow(
                weights[units], cmap=hsv_colours(), vmin=0, vmax=1, aspect="auto", interpolation="nearest"
            )
            axis.set_yticks(range(len(units)), [f"{rows} {unit}" for unit in units], fontsize=7)
            axis.set_xlabel("local feature", fontsize=8)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.tick_params(length=0, labelsize=7)
    if image is not None:
        figure.colorbar(image, ax=panels.ravel().tolist(), label="attention weight", pad=0.01)
    return figure


def training_curves(metrics: pd.DataFrame) -> Figure:
    """Loss and metrics per epoch.

    Args:
        metrics: the content of a run's metrics.csv.
    """
    figure = Figure(figsize=(9, 3.6), dpi=120, layout="constrained")
    losses, scores = figure.subplots(1, 2)
    for name in metrics.columns:
        if name == "epoch" or name.endswith("seconds"):
            continue
        axis = losses if name.endswith("loss") else scores
        axis.plot(metrics["epoch"], metrics[name], marker=".", label=name.replace("_", " "))
    losses.set_ylabel("loss")
    scores.set_ylabel("metric")
    for axis in (losses, scores):
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    return figure


def accuracy_per_epoch(epochs: pd.DataFrame) -> Figure:
    """Figure 4 of the paper: test accuracy per epoch by cluster size, with shift and without.

    Args:
        epochs: columns weighting, shift, cluster_size, seed, epoch, accuracy (in %). Several seeds give the
            mean and a band from the lowest to the highest.

    Raises:
        ValueError: no rows.
    """
    if epochs.empty:
        raise ValueError("epochs must have at least one row, got none")
    kinds = list(epochs.groupby(["weighting", "shift"], sort=True))
    figure = Figure(figsize=(5.0 * len(kinds), 4.0), dpi=120, layout="constrained")
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    sizes = sorted(epochs["cluster_size"].unique().tolist())
    colours = {size: f"C{number}" for number, size in enumerate(sizes)}
    for axis, ((weighting, shift), group) in zip(panels, kinds, strict=True):
        for size, runs in group.groupby("cluster_size"):
            by_epoch = runs.groupby("epoch")["accuracy"]
            mean, low, high = by_epoch.mean(), by_epoch.min(), by_epoch.max()
            axis.plot(mean.index, mean, color=colours[size], marker=".", label=f"N = {size}")
            axis.fill_between(mean.index, low, high, color=colours[size], alpha=0.2, linewidth=0)
        axis.set_title(f"{weighting}, {'with shift' if shift else 'no shift'}")
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="lower right")
    panels[0].set_ylabel("test accuracy (%)")
    panels[0].set_ylim(0, 100)
    return figure


def formats() -> list[str]:
    """The suffixes that `save` takes, without the dot."""
    return sorted(Figure().canvas.get_supported_filetypes())


def save(figure: Figure, path: Path) -> Path:
    """Writes a figure; the suffix of ``path`` decides the format.

    Raises:
        ValueError: matplotlib knows no such format.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _grid(axis: Axes, length: int) -> None:
    """White lines between the positions, nothing around."""
    axis.tick_params(length=0)
    low, high = sorted(axis.get_ylim())
    axis.vlines(np.arange(length - 1) + 0.5, low, high, color="white", linewidth=1)
    for spine in axis.spines.values():
        spine.set_visible(False)
