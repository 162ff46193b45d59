"""Files of results: rows in CSV that several processes may add to, and what they were measured on; locks."""

from __future__ import annotations

import csv
import fcntl
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from fastac import __version__
from fastac.training.run import RunError


def folder() -> Path | None:
    """``benchmarks/results`` of the checkout that this runs from; None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    return root / "benchmarks" / "results" if (root / "benchmarks" / "results").is_dir() else None


def commit() -> str:
    """The commit of the checkout this runs from, "-dirty" if it was changed; outside one, the version.

    Changes of the results themselves do not count: each row is one.
    """
    here = Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # An environment may lie in another project's checkout.
        git("ls-files", "--error-unmatch", "__init__.py")
        changed = git(
            *("status", "--porcelain", "--untracked-files=no"),
            *("--", ":(top)", ":(top,exclude)benchmarks/results"),
        )
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return f"v{__version__}"


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


def cpu_model() -> str:
    """The processor's name, or "" where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


@contextmanager
def alone(directory: Path) -> Iterator[bool]:
    """Whether this process is the only one at a run's folder; it is, if so, while the block runs."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
