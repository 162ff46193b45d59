"""Labels of videos from a CSV file, and their classes."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .problems import DataProblemsError, Problem, listing
from .storage import Storage

TRAINING_SPLIT = "train"
_SEPARATORS = re.compile(r"[;|]")
_BYTE_ORDER_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


@dataclass(frozen=True)
class LabelTable:
    """The rows of a labels file.

    Attributes:
        path: of the file.
        videos: names, each once.
        cells: by video, the text of its label cell, never empty.
        splits: by video, the text of its split cell, or None without such a column.
        lines: by video, the line of the file, from 1.
    """

    path: Path
    videos: list[str]
    cells: list[str]
    splits: list[str] | None
    lines: list[int]

    def rows(self, split: str | None) -> list[int]:
        """The rows of a split, all of them for None.

        Raises: ValueError if there is no split column or no video has this split.
        """
        if split is None:
            return list(range(len(self.videos)))
        if self.splits is None:
            raise ValueError(f"split {split!r} needs a column 'split' in {self.path}, which has none")
        chosen = [row for row, found in enumerate(self.splits) if found == split]
        if not chosen:
            counts = {name: self.splits.count(name) for name in sorted(set(self.splits))}
            there = ", ".join(f"{name or '(empty)'} ({count:,})" for name, count in counts.items())
            raise ValueError(f"split must be one that {self.path} has: {there}; got {split!r}")
        return chosen


@dataclass(frozen=True)
class Classes:
    """Encoded labels.

    Attributes:
        names: of the C classes, in the order of their numbers.
        labels: ``(V,)`` int64, or ``(V, C)`` float32 of zeros and ones for several labels a video.
    """

    names: list[str]
    labels: Tensor


def read_labels(path: str | os.PathLike[str]) -> LabelTable:
    """Reads a CSV file with the columns ``video``, ``label`` and, if it likes, ``split``.

    The file is UTF-8 (a byte order mark is allowed), separated by commas, with a header; a cell with a comma
    in it stands in double quotes. Other columns are ignored, so are empty lines and blanks around a cell.

    Raises:
        FileNotFoundError: there is no such file.
        DataProblemsError: bytes that are not UTF-8, missing columns, rows with too many or too few cells,
            empty cells, or videos that occur twice: all that were found, with their lines.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"labels must be a CSV file, there is none at {path}")
    text = _decode(path)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[tuple[int, list[str]]] = []
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                rows.append((reader.line_num, [cell.strip() for cell in row]))
    except csv.Error as error:
        problem = Problem("", None, "not CSV", str(error), f"line {reader.line_num}")
        raise _error(path, [problem]) from error
    if not rows:
        raise _error(path, [Problem("", None, "empty", "it has no header and no rows")])
    header = rows.pop(0)[1]
    _check_header(path, header)
    if not rows:
        raise _error(path, [Problem("", None, "empty", "it has a header and no rows")])
    return _table(path, header, rows)


def _error(path: Path, problems: Sequence[Problem]) -> DataProblemsError:
    noun = "problem" if len(problems) == 1 else "problems"
    message = f"labels file {path} has {len(problems):,} {noun}:\n{listing(problems)}"
    return DataProblemsError(message, problems)


def _decode(path: Path) -> str:
    content = path.read_bytes()
    for mark, name in _BYTE_ORDER_MARKS.items():
        if content.startswith(mark):
            raise _error(path, [Problem("", None, "wrong encoding", f"{name}, save it as UTF-8")])
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        problems = []
        for number, raw in enumerate(content.splitlines(), 1):
            try:
                raw.decode()
            except UnicodeDecodeError as error:
                shown = raw.decode(errors="backslashreplace")
                found = f"byte 0x{raw[error.start]:02x} is not UTF-8 in {shown[:80]!r}"
                problems.append(Problem("", None, "wrong encoding", found, f"line {number}"))
        raise _error(path, problems) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise _error(path, [Problem("", None, "not text", "a byte 0", f"line {line}")])
    return text


def _check_header(path: Path, header: list[str]) -> None:
    missing = [name for name in ("video", "label") if name not in header]
    if missing:
        found = f"the header has {', '.join(repr(name) for name in header)}"
        if len(header) == 1 and re.search(r"[;\t]", header[0]):
            found += "; columns must be separated by commas"
        raise _error(path, [Problem("", None, f"no column {name!r}", found, "line 1") for name in missing])
    twice = sorted(
        {name for name in header if name in ("video", "label", "split") and header.count(name) > 1}
    )
    if twice:
        problems = [Problem("", None, f"column {name!r} twice", "", "line 1") for name in twice]
        raise _error(path, problems)


def _table(path: Path, header: list[str], rows: list[tuple[int, list[str]]]) -> LabelTable:
    video_at, label_at = header.index("video"), header.index("label")
    split_at = header.index("split") if "split" in header else None
    problems = []
    first: dict[str, int] = {}
    videos, cells, splits, lines = [], [], [], []
    for line, row in rows:
        where = f"line {line}"
        while len(row) > len(header) and not row[-1]:
            row.pop()  # spreadsheets end lines with commas
        if len(row) != len(header):
            video = row[video_at] if video_at < len(row) else ""
            found = f"{len(row)} cells under {len(header)} columns"
            if len(row) > len(header):
                found += "; a cell with a comma needs double quotes"
            problems.append(Problem(video, None, "wrong number of cells", found, where))
            continue
        video, cell = row[video_at], row[label_at]
        if not video:
            problems.append(Problem("", None, "empty cell", "column 'video'", where))
        elif video in first:
            problems.append(Problem(video, None, "video twice", f"first in line {first[video]}", where))
        else:
            first[video] = line
        if not [name for name in _SEPARATORS.split(cell) if name.strip()]:
            problems.append(Problem(video, None, "empty cell", "column 'label'", where))
        if split_at is not None:
            if not row[split_at]:
                problems.append(Problem(video, None, "empty cell", "column 'split'", where))
            splits.append(row[split_at])
        videos.append(video)
        cells.append(cell)
        lines.append(line)
    if problems:
        raise _error(path, problems)
    return LabelTable(path, videos, cells, None if split_at is None else splits, lines)


def encode_labels(
    table: LabelTable,
    rows: Sequence[int],
    *,
    class_names: Sequence[str] | None = None,
    multi_label: bool = False,
) -> Classes:
    """The labels of some rows as numbers.

    With ``multi_label`` a cell holds one or more names separated by ``;`` or ``|``; without it the whole cell
    is one name. Unless they are given, the classes are the names that occur in the rows of split "train", or
    in all rows of the file if it has no such split, so that every split of a file has the same numbers. They
    are sorted: by value if all are integers, as text otherwise.

    If ``class_names`` are given, none of them is an integer and all labels of the file are, then these are
    numbers of classes.

    Args:
        table: the labels file.
        rows: those to encode; V of them.
        class_names: the C classes in order.
        multi_label: more than one label a video is allowed.

    Raises:
        TypeError, ValueError: class_names is not a sequence of different, non-empty texts.
        DataProblemsError: labels that are not among the classes: all of them, with their videos.
    """
    labels = {row: _split_cell(table.cells[row], multi_label) for row in rows}
    if class_names is None:
        names = _found_names(table, multi_label)
    else:
        names = check_class_names(class_names)
    numbers = {name: number for number, name in enumerate(names)}
    if class_names is not None and not any(_is_integer(name) for name in names):
        used = {name for cell in table.cells for name in _split_cell(cell, multi_label)}
        if all(_is_integer(name) for name in used):
            numbers = {name: int(name) for name in used if 0 <= int(name) < len(names)}

    problems = [
        Problem(table.videos[row], None, f"unknown label {name!r}", "", f"line {table.lines[row]}")
        for row, cell in labels.items()
        for name in cell
        if name not in numbers
    ]
    if problems:
        shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        unknown = len({problem.what for problem in problems})
        raise DataProblemsError(
            f"{unknown:,} labels in {table.path} are not among the {len(names):,} classes "
            f"({shown}):\n{listing(problems)}",
            problems,
        )
    if not multi_label:
        return Classes(names, torch.tensor([numbers[cell[0]] for cell in labels.values()], dtype=torch.int64))
    encoded = torch.zeros(len(rows), len(names))
    for at, cell in enumerate(labels.values()):
        encoded[at, [numbers[name] for name in cell]] = 1
    return Classes(names, encoded)


def unlabelled(
    storage: Storage, stored: Sequence[str], table: LabelTable | None, names: Sequence[str]
) -> list[str]:
    """Videos in storage without a label. Raises: ValueError if labels and storage share no name."""
    if table is None:
        return []
    there = set(stored)
    if not there.intersection(names):

        def two(examples: Sequence[str]) -> str:
            return ", ".join(map(repr, examples[:2])) or "none"

        raise ValueError(
            f"labels and features must name the same videos: none of the {len(names):,} in {table.path} "
            f"(such as {two(names)}) is among the {len(stored):,} in {storage.path} (such as {two(stored)})"
        )
    return sorted(there.difference(table.videos))


def _split_cell(cell: str, multi_label: bool) -> list[str]:
    if not multi_label:
        return [cell]
    return [name.strip() for name in _SEPARATORS.split(cell) if name.strip()]


def _found_names(table: LabelTable, multi_label: bool) -> list[str]:
    training = [row for row, split in enumerate(table.splits or ()) if split == TRAINING_SPLIT]
    chosen = training or range(len(table.videos))
    names = {name for row in chosen for name in _split_cell(table.cells[row], multi_label)}
    if all(_is_integer(name) for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def check_class_names(class_names: Sequence[str]) -> list[str]:
    """The names without blanks around them.

    Raises: TypeError or ValueError if they are not a sequence of different, non-empty texts.
    """
    if isinstance(class_names, str) or not isinstance(class_names, Sequence):
        raise TypeError(f"class_names must be a sequence of str, got {type(class_names).__name__}")
    for name in class_names:
        if not isinstance(name, str):
            raise TypeError(
                f"class_names must be a sequence of str, it has a {type(name).__name__}: {name!r}"
            )
    names = [name.strip() for name in class_names]
    if not names or not all(names):
        raise ValueError(f"class_names must hold names that are not empty, got {list(class_names)[:20]!r}")
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise ValueError(f"class_names must be different, these are there twice: {', '.join(twice[:20])}")
    return names


def _is_integer(name: str) -> bool:
    return re.fullmatch(r"[+-]?[0-9]+", name) is not None
