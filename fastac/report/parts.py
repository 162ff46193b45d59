"""What several sections share: orders of names, and blocks that every run gets."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pandas as pd

from . import names
from .content import NONE, Block, Heading, Section, Text, missing, number, sizes
from .runs import Run

DRAWN_MODES = ("forward", "training")


def modes(found: Iterable[str]) -> list[str]:
    """The modes found, in the order of the tables."""
    return names.order(names.MODES, found)


def workloads(found: Iterable[str]) -> list[str]:
    """The workloads found, in the order of the tables."""
    return names.order(names.WORKLOADS, found)


def per_run(section: Section, runs: list[Run], blocks: Callable[[Run], list[Block]]) -> Section:
    """Fills a section with what a function makes of every run; of several, each below its device's name."""
    if not runs:
        section.blocks.append(missing())
    for run in runs:
        if len(runs) > 1:
            section.blocks.append(Heading(run.device))
        section.blocks += blocks(run)
    return section


def reduced(frame: pd.DataFrame) -> list[Text]:
    """A line for every workload that was measured with fewer sets than it has by its definition."""
    fewer = frame[frame["full_batch"].notna() & (frame["full_batch"] != frame["batch"])]
    firsts = fewer.drop_duplicates("workload").set_index("workload")
    return [Text(f"{name}: {sizes(firsts.loc[name])}.") for name in workloads(firsts.index)]


def quartiles(record: pd.Series, scale: float = 1e3) -> str:
    """The interval from the first to the third quartile, in units of which a second has ``scale``."""
    low, high = (number(scale * record[key]) for key in ("quartile1_s", "quartile3_s"))
    return NONE if low == NONE and high == NONE else f"{low}–{high}"
