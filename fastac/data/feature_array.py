"""Feature sets of one length in one array, in memory or memory-mapped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .batch import FeatureBatch
from .moments import Moments


class FeatureArray(Dataset[Any]):
    """Videos whose sets all have the same length; a batch is one gather, without a copy per video.

    Args:
        features: by modality, ``(V, L, M)`` float32, or uint8 such as pixels, which batches have as float32.
            A ``numpy.memmap`` is read as batches ask for it.
        labels: ``(V,)`` int64 in 0…C-1.
        class_names: the C names.
        names: the videos' names; their numbers unless given.

    Raises:
        TypeError: features or labels that are no arrays, or of another dtype.
        ValueError: shapes that do not fit each other, no modality, or a label outside 0…C-1.
    """

    multi_label = False

    def __init__(
        self,
        features: Mapping[str, npt.NDArray[np.float32] | npt.NDArray[np.uint8]],
        labels: npt.NDArray[np.int64],
        class_names: Sequence[str],
        names: Sequence[str] | None = None,
    ) -> None:
        if not features:
            raise ValueError("features must have at least one modality, got none")
        for what, array in {"labels": labels, **{f"features[{m!r}]": a for m, a in features.items()}}.items():
            if not isinstance(array, np.ndarray):
                raise TypeError(f"{what} must be a numpy.ndarray, got {type(array).__name__}")
        if labels.ndim != 1:
            raise ValueError(f"labels must have shape (V,), got {labels.shape}")
        if labels.dtype != np.int64:
            raise TypeError(f"labels must be int64, got {labels.dtype}")
        for modality, array in features.items():
            if array.ndim != 3 or len(array) != len(labels):
                raise ValueError(
                    f"features[{modality!r}] must have shape ({len(labels)}, L, M), got {array.shape}"
                )
            if array.dtype not in (np.float32, np.uint8):
                raise TypeError(f"features[{modality!r}] must be float32 or uint8, got {array.dtype}")
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(class_names):
            raise ValueError(f"labels must be in 0…{len(class_names) - 1}, got {labels.min()}…{labels.max()}")
        if names is not None and len(names) != len(labels):
            raise ValueError(f"names must be {len(labels)}, got {len(names)}")
        self._features = dict(features)
        self.labels: Tensor = torch.from_numpy(labels)
        self.class_names = list(class_names)
        self.names = [str(number) for number in range(len(labels))] if names is None else list(names)

    @property
    def modalities(self) -> dict[str, int]:
        """The dimension M of each modality's features."""
        return {modality: array.shape[2] for modality, array in self._features.items()}

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> FeatureBatch:
        return self.__getitems__([number])

    def __getitems__(self, numbers: Sequence[int]) -> FeatureBatch:
        index = np.asarray(numbers, dtype=np.int64)
        return FeatureBatch(
            features={m: _rows(array, index) for m, array in self._features.items()},
            labels=self.labels[index],
            index=torch.from_numpy(index),
        )

    def head(self, count: int) -> FeatureArray:
        """The first ``count`` videos, without a copy of their features.

        Raises:
            ValueError: count is not in 1…V.
        """
        if not 1 <= count <= len(self):
            raise ValueError(f"count must be in 1…{len(self)}, got {count}")
        return FeatureArray(
            {modality: array[:count] for modality, array in self._features.items()},
            self.labels[:count].numpy(),
            self.class_names,
            self.names[:count],
        )

    def collate(self, batch: FeatureBatch) -> FeatureBatch:
        """The batch itself: ``__getitems__`` made it whole."""
        return batch

    def set_epoch(self, epoch: int) -> None:
        """Nothing here depends on the epoch."""

    def mean_features(self) -> dict[str, Tensor]:
        """The mean local feature of each modality, ``(M,)`` float32, summed in float64."""
        means = {}
        for modality, array in self._features.items():
            total = np.zeros(array.shape[2])
            for first in range(0, len(array), 1024):
                total += array[first : first + 1024].sum(axis=(0, 1), dtype=np.float64)
            means[modality] = torch.from_numpy(total / max(1, array.shape[0] * array.shape[1])).float()
        return means

    def feature_moments(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Mean and standard deviation of each modality's local features, ``(M,)`` float32 each.

        The deviation is 1 for a feature that never changes.
        """
        found = {}
        for modality, array in self._features.items():
            moments = Moments(array.shape[2])
            for first in range(0, len(array), 1024):
                moments.add(array[first : first + 1024].reshape(-1, array.shape[2]))
            found[modality] = moments.mean, moments.std
        return found

    def mean_lengths(self) -> dict[str, float]:
        """L of each modality."""
        return {modality: float(array.shape[1]) for modality, array in self._features.items()}

    def class_counts(self) -> Tensor:
        """How many videos each class has, ``(C,)`` int64."""
        return torch.bincount(self.labels, minlength=self.num_classes)


def _rows(array: npt.NDArray[Any], index: npt.NDArray[np.int64]) -> Tensor:
    """Rows as float32."""
    return torch.from_numpy(np.take(array, index, axis=0)).float()
