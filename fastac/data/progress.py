"""`Progress`: how far long work is, on a terminal or in a log file."""

from __future__ import annotations

import logging
import sys
import time
from contextlib import suppress
from typing import Any

logger = logging.getLogger("fastac")

QUIET_SECONDS = 60.0
"""Where there is no bar, long work says how far it is this often."""


class Progress:
    """A bar on a terminal; in a log file, or without tqdm, a line a minute: short work leaves none."""

    def __init__(self, label: str, total: int, unit: str, *, show: bool = True) -> None:
        self._label, self._total, self._unit, self._show = label, total, unit, show
        # None rather than disabled: Python drops a Ctrl-C that falls into a bar's __del__.
        self._bar: Any = None
        if show and sys.stderr.isatty():
            with suppress(ImportError):
                from tqdm import tqdm

                self._bar = tqdm(total=total, desc=label, unit=f" {unit}", leave=False)
        self._done, self._said = 0, time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, count: int) -> None:
        """``count`` more are done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        if self._show and self._bar is None and time.monotonic() - self._said > QUIET_SECONDS:
            self._said = time.monotonic()
            logger.info("%s: %s of %s %s", self._label, f"{self._done:,}", f"{self._total:,}", self._unit)
