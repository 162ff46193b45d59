"""What a run leaves to read: metrics.csv, TensorBoard's events, progress on a terminal or in a log file."""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastac.data.progress import Progress

from .checkpoint import CheckpointError

__all__ = ["MetricsLog", "Progress", "quiet"]

logger = logging.getLogger("fastac")


class MetricsLog:
    """One row per epoch in ``metrics.csv``, and the same for TensorBoard.

    Args:
        directory: of the run.
        epochs_done: rows of later epochs, left by a run that was killed, are removed.
        tensorboard: write events to ``directory/tensorboard`` too.

    Raises:
        ImportError: TensorBoard is asked for and not installed; nothing was written.
        CheckpointError: a ``metrics.csv`` is there that is none of these.
    """

    def __init__(self, directory: Path, *, epochs_done: int, tensorboard: bool) -> None:
        self._path = directory / "metrics.csv"
        self.rows = [row for row in self._read() if int(row["epoch"]) <= epochs_done]
        self._events: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError(
                    "TensorBoard is not installed: pip install 'fastac[train]', "
                    "or set training.tensorboard to false"
                ) from error
            self._events = SummaryWriter(str(directory / "tensorboard"), purge_step=epochs_done + 1)
        self._write()

    def _read(self) -> list[dict[str, str]]:
        if not self._path.is_file():
            return []
        with self._path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        if not all((row.get("epoch") or "").isdecimal() for row in rows):
            raise CheckpointError(f"{self._path} must have the number of an epoch in each row, under epoch")
        return rows

    def _write(self) -> None:
        """Replaces the file in one step: a reader never sees half a row."""
        temporary = self._path.with_suffix(".part")
        with temporary.open("w", newline="") as file:
            if self.rows:
                # A run that is resumed with a validation set has more columns from then on.
                columns = dict.fromkeys(name for row in self.rows for name in row)
                writer = csv.DictWriter(file, list(columns), restval="", lineterminator="\n")
                writer.writeheader()
                writer.writerows(self.rows)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self._path)

    def add(self, epoch: int, values: Mapping[str, float]) -> None:
        """Appends the row of one epoch; numbers are written so that they read back exactly."""
        self.rows.append({"epoch": str(epoch), **{name: repr(value) for name, value in values.items()}})
        self._write()
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name.replace("_", "/", 1), value, epoch)
            self._events.flush()

    def close(self) -> None:
        """Closes TensorBoard's file."""
        if self._events is not None:
            self._events.close()


@contextmanager
def quiet() -> Iterator[None]:
    """Without the engine's line per epoch, where epochs are rounds of a measurement."""
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)
