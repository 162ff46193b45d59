"""Mean and standard deviation of features that come in blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class Moments:
    """The mean and the standard deviation of rows (n, M), in float64.

    Blocks are joined by their means and their sums of squared deviations (Chan, Golub & LeVeque 1979), so
    that a mean much larger than the deviation costs no digits.
    """

    def __init__(self, dimension: int) -> None:
        self.count = 0
        self._mean = np.zeros(dimension)
        self._squares = np.zeros(dimension)

    def add(self, rows: npt.NDArray[Any]) -> None:
        """Count (n, M) more rows."""
        n = len(rows)
        if not n:
            return
        mean = rows.mean(0, dtype=np.float64)
        total = self.count + n
        away = mean - self._mean
        self._squares += np.square(rows - mean).sum(0) + away**2 * (self.count * n / total)
        self._mean += away * (n / total)
        self.count = total

    @property
    def mean(self) -> Tensor:
        """(M,) float32."""
        return torch.from_numpy(self._mean).float()

    @property
    def std(self) -> Tensor:
        """(M,) float32; 1 for a feature that never changes."""
        std = np.sqrt(self._squares / max(1, self.count))
        return torch.from_numpy(np.where(std > 0, std, 1.0)).float()
