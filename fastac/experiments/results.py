"""Files of results: rows in CSV that several processes may add to; locks on the folders of cells."""

from __future__ import annotations

import csv
import fcntl
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from fastac.training import lock
from fastac.training.run import RunError


def folder() -> Path | None:
    """``benchmarks/results`` of the checkout that this runs from; None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    return root / "benchmarks" / "results" if (root / "benchmarks" / "results").is_dir() else None


def append(
    path: Path,
    columns: Sequence[str],
    rows: Sequence[Mapping[str, object]],
    *,
    key: Sequence[str] | None = None,
) -> None:
    """Adds rows to a CSV file, with its header if it is new; no other process writes meanwhile.

    Args:
        path: the file; its folder is made if need be.
        columns: of the file.
        rows: by column.
        key: columns that identify a row; one that the file has is not added again.

    Raises:
        RunError: the file has other columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", newline="", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        reader = csv.DictReader(file)
        found = reader.fieldnames
        if found is not None and list(found) != list(columns):
            raise RunError(f"{path} must have the columns {','.join(columns)}, got {','.join(found)}")
        there = {tuple(row[name] for name in key) for row in reader} if key else set()
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if found is None:
            writer.writeheader()
        writer.writerows(
            row for row in rows if key is None or tuple(str(row[name]) for name in key) not in there
        )


def alone(directory: Path) -> AbstractContextManager[bool]:
    """Whether this process is the only one at a cell's folder; it is, if so, while the block runs.

    Another file than the engine's: that one is locked in this block, by the same process.
    """
    return lock.alone(directory / "lock")
