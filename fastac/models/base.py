"""What every video classifier here is to the training engine and the command line."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from inspect import Parameter
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastac import checks

_REDUCTIONS = ("mean", "sum", "none")

Classifier = TypeVar("Classifier", bound="VideoClassifier")


@runtime_checkable
class HasScores(Protocol):
    """What a ``forward`` returns that has more to say than the scores."""

    @property
    def scores(self) -> Tensor: ...  # noqa: D102


def class_scores(output: Tensor | HasScores) -> Tensor:
    """The class scores (B, C) of what a classifier's ``forward`` returns: itself, or its field ``scores``."""
    return output if isinstance(output, Tensor) else output.scores


def checked_keys(what: str, given: Mapping[str, Any], known: list[str], needed: list[str]) -> None:
    """ValueError for a key of ``given`` that is not known, or one that it needs and lacks."""
    unknown = [repr(key) for key in given if key not in known]
    if unknown:
        raise ValueError(f"{what} has unknown {', '.join(unknown)}; known are {', '.join(known)}")
    missing = [key for key in needed if key not in given]
    if missing:
        raise ValueError(f"{what} must give {', '.join(missing)}, got {', '.join(given) or 'nothing'}")


def checked_config(config: object, known: list[str], needed: list[str]) -> None:
    """TypeError for a ``config`` that is no mapping, ValueError as `checked_keys`."""
    if not isinstance(config, Mapping):
        raise TypeError(f"config must be a mapping, got {type(config).__name__}")
    checked_keys("config", config, known, needed)


def checked_count(name: str, value: object) -> int:
    """An int >= 1. Raises: TypeError or ValueError with the name."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be >= 1, got {value}")
    return value


def checked_switch(name: str, value: object) -> bool:
    """A bool. Raises: TypeError with the name."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r}")
    return value


def checked_dropout(value: object) -> float:
    """A probability in [0, 1). Raises: TypeError or ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"dropout must be a number, got {type(value).__name__}")
    if not 0 <= value < 1:
        raise ValueError(f"dropout must be in [0, 1), got {value}")
    return float(value)


def checked_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """A floating type, torch's default for None. Raises: TypeError."""
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if dtype not in checks.FLOATS:
        raise TypeError(f"dtype must be float16, bfloat16, float32 or float64, got {dtype}")
    return dtype


def checked_modality(modality: object) -> str:
    """The name of a modality. Raises: TypeError, ValueError."""
    if not isinstance(modality, str):
        raise TypeError(f"modality must be a str, got {type(modality).__name__}")
    if not modality:
        raise ValueError("modality must be the name of the features, got ''")
    return modality


class VideoClassifier(nn.Module, ABC):
    """Scores of C classes for videos given as sets of local features, by modality.

    ``forward(features, *, lengths=None, offsets=None, max_length=None)`` takes what
    ``fastac.data.FeatureBatch.inputs`` gives. It returns the scores (B, C), or a NamedTuple with them as
    ``scores`` whose other fields its ``losses`` use.

    Args:
        num_classes: C.
        multi_label: a video has any number of labels, rather than one: it decides ``losses`` and
            ``probabilities``.
    """

    def __init__(self, num_classes: int, *, multi_label: bool = False) -> None:
        super().__init__()
        self.num_classes = checked_count("num_classes", num_classes)
        self.multi_label = checked_switch("multi_label", multi_label)

    @property
    @abstractmethod
    def dimensions(self) -> dict[str, int]:
        """The dimension M of the local features of each modality it takes, in their order."""

    @property
    def has_attention(self) -> bool:
        """Whether ``attention`` has weights to give."""
        return True

    @property
    def attention_rows(self) -> str:
        """What the second dimension of ``attention`` counts, in a word."""
        return "unit"

    @property
    @abstractmethod
    def config(self) -> dict[str, Any]:
        """What ``from_config`` needs to make this model again, in builtins that JSON can hold."""

    @classmethod
    def from_config(
        cls: type[Classifier],
        config: Mapping[str, Any],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Classifier:
        """A new model from a ``config``, by the constructor's arguments; one left out is at its default.

        Raises: ValueError for an unknown or missing key or a wrong value, TypeError for a wrong type.
        """
        arguments = inspect.signature(cls).parameters
        known = [name for name in arguments if name not in ("device", "dtype")]
        checked_config(config, known, [name for name in known if arguments[name].default is Parameter.empty])
        return cls(**{**config, "device": device, "dtype": dtype})

    @abstractmethod
    def attention(
        self,
        features: Mapping[str, Tensor] | Tensor,
        *,
        lengths: Mapping[str, Tensor] | Tensor | None = None,
        offsets: Mapping[str, Tensor] | Tensor | None = None,
        max_length: Mapping[str, int] | int | None = None,
    ) -> dict[str, Tensor]:
        """The attention weights by modality: (B, N, L), or (N, T) where features are packed.

        Raises: ValueError for a model that has none; else as ``forward``.
        """

    def losses(self, output: Tensor | HasScores, labels: Tensor) -> Tensor:
        """The loss of each video, (B,), in float32 (float64 for float64 scores).

        Cross entropy; with ``multi_label`` the mean over the classes of the binary cross entropy with logits.

        Args:
            output: of ``forward``, or scores (B, C).
            labels: (B,) int64 in 0...C-1; with ``multi_label`` (B, C), any float or bool, 0 or 1 (or a
                probability between).

        Raises: TypeError, ValueError; values are checked on the CPU only.
        """
        scores = self._checked_scores(class_scores(output))
        checks.is_tensor("labels", labels)
        shape = tuple(scores.shape) if self.multi_label else (scores.size(0),)
        if tuple(labels.shape) != shape:
            wanted = "(B, C)" if self.multi_label else "(B,)"
            raise ValueError(f"labels must have shape {wanted} = {shape}, got {tuple(labels.shape)}")
        if self.multi_label:
            if not (labels.is_floating_point() or labels.dtype == torch.bool):
                raise TypeError(f"labels must be a floating type or bool, got {labels.dtype}")
            labels = labels.to(scores.dtype)
            _check_labels(labels, 1)
            return F.binary_cross_entropy_with_logits(scores, labels, reduction="none").mean(1)
        if labels.dtype != torch.int64:
            raise TypeError(f"labels must be torch.int64, got {labels.dtype}")
        _check_labels(labels, self.num_classes - 1)
        return F.cross_entropy(scores, labels, reduction="none")

    def loss(
        self,
        output: Tensor | HasScores,
        labels: Tensor,
        weight: Tensor | None = None,
        reduction: str = "mean",
    ) -> Tensor:
        """``losses``, weighted and reduced.

        Args:
            output, labels: as for ``losses``.
            weight: (B,), one per video; the paper's is 1/S for a video of a class with S videos (5.4).
            reduction: "mean", which divides by the sum of the weights as ``F.cross_entropy`` does; "sum"; or
                "none".
        """
        if reduction not in _REDUCTIONS:
            raise ValueError(f"reduction must be one of {', '.join(_REDUCTIONS)}, got {reduction!r}")
        losses = self.losses(output, labels)
        if weight is not None:
            checks.is_tensor("weight", weight)
            if weight.shape != losses.shape:
                shape = tuple(losses.shape)
                raise ValueError(f"weight must have shape (B,) = {shape}, got {tuple(weight.shape)}")
            losses = losses * weight.to(losses.dtype)
        if reduction == "none":
            return losses
        if reduction == "sum":
            return losses.sum()
        return losses.mean() if weight is None else losses.sum() / weight.to(losses.dtype).sum()

    def probabilities(self, output: Tensor | HasScores) -> Tensor:
        """Scores (B, C) as probabilities (B, C) in float32 (float64 for float64 scores).

        They sum to 1 over the classes; with ``multi_label`` each class has its own.
        """
        scores = self._checked_scores(class_scores(output))
        return scores.sigmoid() if self.multi_label else scores.softmax(1)

    def _checked_scores(self, scores: Tensor) -> Tensor:
        """The scores in float32 or float64."""
        checks.is_tensor("scores", scores)
        if scores.dim() != 2 or scores.size(1) != self.num_classes:
            raise ValueError(
                f"scores must have shape (B, C) with C = {self.num_classes}, got {tuple(scores.shape)}"
            )
        if not scores.is_floating_point():
            raise TypeError(f"scores must be a floating type, got {scores.dtype}")
        return scores.to(torch.promote_types(scores.dtype, torch.float32))


def _check_labels(labels: Tensor, highest: int) -> None:
    if labels.numel() and checks.readable(labels):
        low, high = (v.item() for v in torch.aminmax(labels))
        if not (low >= 0 and high <= highest):  # so that NaN is refused
            raise ValueError(f"labels must lie in 0...{highest}, got values in {low}...{high}")
