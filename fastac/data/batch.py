"""A batch of feature sets: what every data set here gives and every model here takes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass
class FeatureBatch:
    """B videos, each with one set of local features per modality.

    Attributes:
        features: by modality, dense ``(B, L, M)`` or packed ``(T, M)``.
        offsets: by packed modality, ``(B + 1,)`` int64: the sets' borders in the T rows. A set without rows
            is a modality that the video lacks.
        max_length: by packed modality, the rows of its longest set.
        labels: ``(B,)`` int64 classes, ``(B, C)`` float32 of zeros and ones for several labels a video, or
            None where they are not known.
        index: ``(B,)`` int64, the videos' numbers in their data set.
    """

    features: dict[str, Tensor]
    labels: Tensor | None
    index: Tensor
    offsets: dict[str, Tensor] = field(default_factory=dict)
    max_length: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.index)

    def inputs(self) -> dict[str, Any]:
        """The keyword arguments of a model's ``forward``."""
        return {"features": self.features, "offsets": self.offsets, "max_length": self.max_length}

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> FeatureBatch:
        """The batch with its tensors on ``device``."""

        def moved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in tensors.items()}

        return replace(
            self,
            features=moved(self.features),
            labels=None if self.labels is None else self.labels.to(device, non_blocking=non_blocking),
            index=self.index.to(device, non_blocking=non_blocking),
            offsets=moved(self.offsets),
        )

    def pin_memory(self) -> FeatureBatch:
        """The batch in page-locked memory, as ``torch.utils.data.DataLoader`` asks for."""

        def pinned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.pin_memory() for name, tensor in tensors.items()}

        return replace(
            self,
            features=pinned(self.features),
            labels=None if self.labels is None else self.labels.pin_memory(),
            index=self.index.pin_memory(),
            offsets=pinned(self.offsets),
        )
