"""What the classifiers of one modality share: its name, its dimension, and its standardization."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastac import checks

from .base import VideoClassifier, checked_count, checked_dtype, checked_modality, checked_switch
from .inputs import Sets, one_modality


class OneModalityClassifier(VideoClassifier):
    """A classifier of videos by the features of one modality.

    With ``standardize`` each of the M features enters as (x - mean) / std over the training set, which
    ``set_moments`` gives. Recurrent and projecting layers want features of such a size: the gates of an LSTM
    are saturated by log-probabilities near -7, for example.

    Args:
        in_features: M, the dimension of one local feature.
        num_classes: C.
        standardize: standardize the features.
        multi_label: a video has any number of labels, rather than one.
        modality: the name of the features.
        device, dtype: where and in what type mean and std are kept.

    State: with ``standardize`` the buffers ``feature_mean`` and ``feature_std`` (M,), 0 and 1 until
    ``set_moments`` is called.
    """

    fc: nn.Linear
    feature_mean: Tensor | None
    feature_std: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        standardize: bool,
        multi_label: bool,
        modality: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(num_classes, multi_label=multi_label)
        self.in_features = m = checked_count("in_features", in_features)
        self.standardize = checked_switch("standardize", standardize)
        self.modality = checked_modality(modality)
        dtype = checked_dtype(dtype)
        zeros = torch.zeros(m, device=device, dtype=dtype) if standardize else None
        self.register_buffer("feature_mean", zeros)
        self.register_buffer("feature_std", None if zeros is None else torch.ones_like(zeros))

    @property
    def dimensions(self) -> dict[str, int]:
        """The dimension M of the features of its one modality."""
        return {self.modality: self.in_features}

    @torch.no_grad()
    def set_moments(self, mean: Tensor, std: Tensor) -> None:
        """Give the mean and the standard deviation of the training set's local features.

        Args:
            mean: (M,), floating and finite.
            std: (M,), floating, finite and > 0; 1 for a feature that never changes.

        Raises: TypeError for a wrong type; ValueError for a wrong shape or value, or without ``standardize``.
        """
        if self.feature_mean is None or self.feature_std is None:
            raise ValueError("set_moments needs a model made with standardize=True")
        for what, given in (("mean", mean), ("std", std)):
            checks.is_tensor(what, given)
            if not given.is_floating_point():
                raise TypeError(f"{what} must be a floating type, got {given.dtype}")
            if given.shape != (self.in_features,):
                raise ValueError(
                    f"{what} must have shape (M,) with M = {self.in_features}, got {tuple(given.shape)}"
                )
            if bad := int((~given.isfinite()).sum()):
                raise ValueError(f"{what} must be finite, got {bad} values that are not")
        if not bool((std > 0).all()):
            raise ValueError(f"std must be > 0, got {float(std.min()):g}")
        self.feature_mean.copy_(mean)
        self.feature_std.copy_(std)

    def _sets(self, features: object, lengths: object, offsets: object, max_length: object) -> Sets:
        """The arguments of ``forward``, checked, and standardized where that is asked for."""
        sets = one_modality(
            features,
            lengths,
            offsets,
            max_length,
            modality=self.modality,
            in_features=self.in_features,
            like=self.fc.weight,
        )
        if self.feature_mean is None or self.feature_std is None:
            return sets
        return sets._replace(x=((sets.x - self.feature_mean) / self.feature_std).to(sets.x.dtype))
