"""The systems that `fastac train` knows: the settings of each, and the model that they describe."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field
from torch import Tensor

from fastac.models import (
    AttentionBoostedLSTM,
    AttentionClusterClassifier,
    ClusterConfig,
    PoolingClassifier,
    PyramidClassifier,
    VideoClassifier,
)
from fastac.models.one_modality import OneModalityClassifier

from .config import Integer, Number, Settings, Switch

PositiveInt = Annotated[Integer, Field(ge=1)]
Dropout = Annotated[Number, Field(ge=0, lt=1)]
Weight = Annotated[Number, Field(ge=0)]


class TrainingFeatures(Protocol):
    """What a model is made for; `fastac.data.FeatureSetDataset` is such."""

    @property
    def modalities(self) -> Mapping[str, int]: ...  # noqa: D102
    @property
    def num_classes(self) -> int: ...  # noqa: D102
    @property
    def multi_label(self) -> bool: ...  # noqa: D102
    def mean_features(self) -> dict[str, Tensor]: ...  # noqa: D102
    def feature_moments(self) -> dict[str, tuple[Tensor, Tensor]]: ...  # noqa: D102
    def mean_lengths(self) -> dict[str, float]: ...  # noqa: D102


class SystemSettings(Settings):
    """The settings of one system; ``system`` is its name."""

    @abstractmethod
    def build(self, data: TrainingFeatures) -> VideoClassifier:
        """The untrained model, for the modalities and classes of a training set.

        Raises: ValueError for data that the system cannot take.
        """


class ClusterSettings(Settings):
    """The attention cluster of a modality (`fastac.AttentionCluster`)."""

    cluster_size: PositiveInt = Field(default=32, description="N, the number of attention units")
    weighting: Literal["fc1", "fc2", "gated", "average"] = Field(
        default="fc1", description="weighting function"
    )
    hidden_features: PositiveInt | None = Field(
        default=None, description="H of fc2 and gated; null: the weighting's own default"
    )
    shared_hidden: Switch = Field(default=False, description="fc2: one hidden layer for all units")
    position_bias: PositiveInt | None = Field(
        default=None, description="learn one score per position up to this many; null: none"
    )
    shift: Switch = Field(default=True, description="the shifting operation (paper Eq. 7)")


class AttentionClusterSettings(SystemSettings):
    """`fastac.models.AttentionClusterClassifier`."""

    system: Literal["attention-cluster"] = Field(
        default="attention-cluster", description="attention clusters, one per modality"
    )
    dropout: Dropout = Field(default=0.9, description="before the last layer")
    cluster: ClusterSettings = Field(default=ClusterSettings(), description="the cluster of every modality")
    clusters: dict[str, ClusterSettings] = Field(
        default={}, description="other settings for single modalities, by name"
    )

    def build(self, data: TrainingFeatures) -> VideoClassifier:
        """See `SystemSettings.build`. The mean features of the data stand for missing modalities."""
        unknown = sorted(set(self.clusters) - set(data.modalities))
        if unknown:
            raise ValueError(
                f"model.clusters must be of the data's modalities {', '.join(data.modalities)}, "
                f"got {', '.join(unknown)}"
            )
        clusters = {
            name: ClusterConfig(in_features=m, **self.clusters.get(name, self.cluster).model_dump())
            for name, m in data.modalities.items()
        }
        model = AttentionClusterClassifier(
            clusters, data.num_classes, dropout=self.dropout, multi_label=data.multi_label
        )
        model.set_means(data.mean_features())
        return model


class OneModalitySettings(SystemSettings):
    """A system that takes one modality."""

    def arguments(self, data: TrainingFeatures) -> dict[str, Any]:
        """What every such model is made with. Raises: ValueError for data of several modalities."""
        if len(data.modalities) > 1:
            raise ValueError(
                f"data.modalities must name one modality for {self.model_dump()['system']}, "
                f"the data have {', '.join(data.modalities)}"
            )
        (modality,) = data.modalities
        return {"num_classes": data.num_classes, "multi_label": data.multi_label, "modality": modality}


def _standardized(model: OneModalityClassifier, data: TrainingFeatures) -> OneModalityClassifier:
    """The model, with the moments of the training set where it wants them."""
    if model.standardize:
        model.set_moments(*data.feature_moments()[model.modality])
    return model


class AttentionBoostedLSTMSettings(OneModalitySettings):
    """`fastac.models.AttentionBoostedLSTM`."""

    system: Literal["attention-boosted-lstm"] = Field(
        default="attention-boosted-lstm",
        description="bi-LSTM with temporal attention, one modality",
    )
    position: Literal["none", "before", "after"] = Field(
        default="after", description="where the attention stands, seen from the LSTM"
    )
    sequence_length: PositiveInt | None = Field(
        default=None, description="T; null: the mean number of features of the training videos, rounded down"
    )
    hidden_features: PositiveInt = Field(default=256, description="of the LSTM, per direction")
    dense_features: PositiveInt = Field(default=512, description="of the layer before the last")
    dropout: Dropout = Field(default=0.5, description="before the last layer")
    standardize: Switch = Field(
        default=False, description="features enter less the training set's mean, over its deviation"
    )
    honor_lengths: Switch = Field(
        default=True, description="false: padding takes part, as in the published code"
    )

    def build(self, data: TrainingFeatures) -> VideoClassifier:
        """See `SystemSettings.build`."""
        common = self.arguments(data)
        length = self.sequence_length
        if length is None:
            mean = data.mean_lengths()[common["modality"]]
            if math.isnan(mean):
                raise ValueError(f"no video has the modality {common['modality']}: it has no mean length")
            length = max(1, int(mean))
        model = AttentionBoostedLSTM(
            data.modalities[common["modality"]],
            sequence_length=length,
            **self.model_dump(exclude={"system", "sequence_length"}),
            **common,
        )
        return _standardized(model, data)


class PoolingSettings(OneModalitySettings):
    """`fastac.models.PoolingClassifier`."""

    system: Literal["pooling"] = Field(
        default="pooling", description="a baseline: features pooled in a simpler way, one modality"
    )
    pooling: Literal["mean", "netvlad", "sdpa"] = Field(
        default="mean", description="mean, NetVLAD, or scaled dot products with learned queries"
    )
    cluster_size: PositiveInt = Field(default=64, description="clusters of netvlad, queries of sdpa")
    dropout: Dropout = Field(default=0.5, description="before the last layer")
    standardize: Switch = Field(
        default=False, description="features enter less the training set's mean, over its deviation"
    )

    def build(self, data: TrainingFeatures) -> VideoClassifier:
        """See `SystemSettings.build`."""
        common = self.arguments(data)
        model = PoolingClassifier(
            data.modalities[common["modality"]], **self.model_dump(exclude={"system"}), **common
        )
        return _standardized(model, data)


class PyramidSettings(OneModalitySettings):
    """`fastac.models.PyramidClassifier` on a small CNN: the "features" are the pixels of frames."""

    system: Literal["pyramid-attention"] = Field(
        default="pyramid-attention", description="a small CNN on frames, attention over its maps"
    )
    frame_shape: Annotated[list[PositiveInt], Field(min_length=3, max_length=3)] = Field(
        description="channels, height, width of a frame; a feature is a frame's values in that order"
    )
    pixel_mean: Number = Field(default=0.0, description="subtracted from every value")
    pixel_std: Annotated[Number, Field(gt=0)] = Field(default=1.0, description="then it is divided by this")
    backbone: Literal["small", "frame-cnn"] = Field(
        default="small", description="convolutions of small's channels; or those of the Flash-MNIST CNN"
    )
    channels: list[PositiveInt] | None = Field(
        default=None, description="of the stages of small; null: 16, 32, 64"
    )
    cluster_size: PositiveInt = Field(default=1, description="N, score maps; more than one is inferred")
    dropout: Dropout = Field(default=0.5, description="before the last layer")
    orthonormality: Weight = Field(default=1.0, description="lambda of the interaction loss")
    interaction_weight: Weight = Field(default=0.1, description="of the interaction loss")
    diversity_weight: Weight = Field(default=0.1, description="of the loss that keeps scales apart")

    def build(self, data: TrainingFeatures) -> VideoClassifier:
        """See `SystemSettings.build`."""
        common = self.arguments(data)
        (m,) = data.modalities.values()
        if m != math.prod(self.frame_shape):
            raise ValueError(
                f"model.frame_shape must have the {m:,} values of a feature, "
                f"got {' x '.join(map(str, self.frame_shape))} = {math.prod(self.frame_shape):,}"
            )
        return PyramidClassifier(**self.model_dump(exclude={"system"}), **common)


System = AttentionClusterSettings | AttentionBoostedLSTMSettings | PyramidSettings | PoolingSettings
"""The settings of any system."""

MODELS: dict[str, type[VideoClassifier]] = {
    "attention-cluster": AttentionClusterClassifier,
    "attention-boosted-lstm": AttentionBoostedLSTM,
    "pyramid-attention": PyramidClassifier,
    "pooling": PoolingClassifier,
}
"""The class of each system's models, by the system's name."""


def system_of(model: VideoClassifier) -> str:
    """The name of a model's system. Raises: TypeError for a model of another class."""
    for name, kind in MODELS.items():
        if isinstance(model, kind):
            return name
    raise TypeError(
        f"model must be one of {', '.join(k.__name__ for k in MODELS.values())}, got {type(model).__name__}"
    )
