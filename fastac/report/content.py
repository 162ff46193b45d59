"""What a page consists of, before it is HTML: sections of text, tables and pictures; numbers as text."""

from __future__ import annotations

import math
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

NOT_MEASURED = "not measured"
NONE = "–"


@dataclass(frozen=True)
class Cell:
    """Text in a table, with a class for its style and the letter of a note below the table."""

    text: str
    style: str = ""
    note: str = ""


@dataclass(frozen=True)
class Column:
    """A column's head, perhaps below one that spans several; text columns are left-aligned."""

    name: str
    above: str = ""
    is_text: bool = False


@dataclass
class Table:
    """A table whose rows stand in groups.

    Attributes:
        caption: what the table shows.
        source: what the figures come from.
        columns: the first is that of the rows' names; with grouped rows the groups' names stand before it.
        group: the head of the groups' column; "" if the rows are not grouped.
        notes: by text, the letter.
    """

    caption: str
    source: str
    columns: Sequence[Column]
    group: str = ""
    rows: dict[str, list[list[Cell]]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    kind = "table"

    def add(self, cells: Iterable[Cell | str], group: str = "") -> None:
        """Adds a row, whose first cell is its name."""
        row = [cell if isinstance(cell, Cell) else Cell(cell) for cell in cells]
        if len(row) != len(self.columns):
            raise ValueError(f"cells must be {len(self.columns)}, got {len(row)}")
        self.rows.setdefault(group, []).append(row)

    def absent(self, reason: str) -> Cell:
        """A cell without a figure; the reason becomes a note."""
        if not reason:
            return Cell(NOT_MEASURED, "absent")
        letter = self.notes.setdefault(reason, _letter(len(self.notes)))
        return Cell(NONE, "absent", letter)

    @property
    def heads(self) -> list[tuple[str, int]]:
        """The upper row of heads with their spans; empty if no column has one."""
        if not any(column.above for column in self.columns):
            return []
        spans: list[tuple[str, int]] = []
        for column in self.columns:
            if spans and spans[-1][0] == column.above:
                spans[-1] = (column.above, spans[-1][1] + 1)
            else:
                spans.append((column.above, 1))
        return spans


@dataclass(frozen=True)
class Picture:
    """A PNG beside the page."""

    file: str
    caption: str
    source: str
    alt: str
    width: int
    height: int

    kind = "picture"


@dataclass(frozen=True)
class Pictures:
    """Pictures side by side where there is room."""

    pictures: Sequence[Picture]

    kind = "pictures"


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    style: str = ""

    kind = "text"


@dataclass(frozen=True)
class Lines:
    """Lines of a terminal, to read or to type."""

    lines: Sequence[str]

    kind = "lines"


@dataclass(frozen=True)
class Heading:
    """A heading inside a section."""

    text: str
    level: int = 3

    kind = "heading"


@dataclass(frozen=True)
class Folded:
    """Blocks that are shown on demand."""

    summary: str
    blocks: Sequence[Table | Text | Lines]

    kind = "folded"


Block = Table | Picture | Pictures | Text | Lines | Heading | Folded


@dataclass
class Section:
    """A section with a heading; `name` is the target of links to it."""

    name: str
    title: str
    blocks: list[Block] = field(default_factory=list)


def missing(what: str = "") -> Text:
    """The paragraph in the place of what a run has not got."""
    return Text(f"{what}: {NOT_MEASURED}." if what else f"{NOT_MEASURED.capitalize()}.", "absent")


def number(value: float, digits: int = 3) -> str:
    """A number with so many significant digits and no exponent; what is not finite is a dash."""
    if not math.isfinite(value):
        return NONE
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits}g}")
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(rounded))))
    return f"{rounded:,.{decimals}f}"


def milliseconds(seconds: float) -> str:
    """Seconds as milliseconds, without the unit."""
    return number(1e3 * seconds)


def times(ratio: float) -> Cell:
    """A contender's time over ours; marked where the contender is faster."""
    if not math.isfinite(ratio):
        return Cell(NONE, "absent")
    return Cell(f"{number(ratio)}×", "behind" if ratio < 1 else "")


def percent(share: float) -> str:
    """A share in %, without digits after the point."""
    return f"{100 * share:.0f} %" if math.isfinite(share) else NONE


def megabytes(size: float) -> str:
    """Bytes as megabytes (10⁶), without the unit."""
    return number(size / 1e6)


def size(value: float) -> str:
    """A whole number with separators; a dash for NaN."""
    return f"{value:,.0f}" if math.isfinite(value) else NONE


def sizes(record: Mapping[Any, Any]) -> str:
    """B, L, M and N of a record."""
    symbols = {"B": "batch", "L": "length", "M": "in_features", "N": "cluster_size"}
    known = {s: float(record[key]) for s, key in symbols.items()}
    text = ", ".join(f"{s} = {size(value)}" for s, value in known.items() if math.isfinite(value))
    full = float(record.get("full_batch", math.nan))
    if math.isfinite(full) and full != known["B"]:
        text += f" (B reduced from {size(full)})"
    return text


def _letter(position: int) -> str:
    """a, b, ..., z, aa, ab, ..."""
    letters = string.ascii_lowercase
    return letters[position] if position < 26 else _letter(position // 26 - 1) + letters[position % 26]
