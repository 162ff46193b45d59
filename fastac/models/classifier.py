"""Attention clusters over several modalities, one linear layer on top (Long et al., CVPR 2018).

Every modality (appearance, motion, sound, ...) has a cluster of its own. Their outputs are concatenated,
dropped out of, and classified by one fully connected layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from fastac import AttentionCluster, checks

from .base import VideoClassifier, checked_config, checked_dropout, checked_keys, checked_switch


@dataclass(frozen=True)
class ClusterConfig:
    """The cluster of one modality: the arguments of ``fastac.AttentionCluster``.

    ``in_features`` is M, ``cluster_size`` is N; ``hidden_features=None`` is the weighting's own default.

    Raises: TypeError if ``shared_hidden`` or ``shift`` is no bool; the rest is checked by the cluster.
    """

    in_features: int
    cluster_size: int
    weighting: str = "fc1"
    hidden_features: int | None = None
    shared_hidden: bool = False
    position_bias: int | None = None
    shift: bool = True
    eps: float = 1e-12

    def __post_init__(self) -> None:
        for name in ("shared_hidden", "shift"):
            checked_switch(name, getattr(self, name))


def _cluster_config(modality: str, given: object) -> ClusterConfig:
    if isinstance(given, ClusterConfig):
        return given
    what = f"modalities[{modality!r}]"
    if not isinstance(given, Mapping):
        raise TypeError(f"{what} must be a ClusterConfig or a mapping, got {type(given).__name__}")
    known = fields(ClusterConfig)
    checked_keys(what, given, [f.name for f in known], [f.name for f in known if f.default is MISSING])
    try:
        return ClusterConfig(**given)
    except TypeError as error:
        raise TypeError(f"{what}: {error}") from None


def _cluster(modality: str, config: ClusterConfig, **factory: Any) -> AttentionCluster:
    try:
        return AttentionCluster(**asdict(config), **factory)
    except (TypeError, ValueError) as error:
        raise type(error)(f"modalities[{modality!r}]: {error}") from None


class _Sets(NamedTuple):
    """The arguments of one cluster."""

    x: Tensor
    lengths: Tensor | None
    offsets: Tensor | None
    max_length: int | None


def _bounded(x: Tensor, offsets: Tensor, max_length: int) -> Tensor:
    """Packed sets with a bound of their lengths, which the cluster takes with a nested tensor only."""
    nested: Tensor = torch.nested.nested_tensor_from_jagged(x, offsets, max_seqlen=max_length)
    return nested


class AttentionClusterClassifier(VideoClassifier):
    """One attention cluster per modality, concatenation, dropout, one linear layer.

    Long et al., *Attention Clusters*, CVPR 2018, as they use it on real video (section 5).

    A modality that a video lacks, as a silent one lacks audio, is the set whose only feature is the mean
    feature of the training set (5.3; that it is one feature, not a set of copies, changes nothing but with
    ``position_bias``: inferred). The means are buffers, given by ``set_means``. As long as one is not known,
    a video without that modality is an error; where finding it would synchronise with a device or break a
    graph (CUDA tensors without FASTAC_CHECK=1, ``torch.compile``, ``torch.export``) its scores are NaN.

    Args:
        modalities: the clusters by modality, each a ``ClusterConfig`` or a mapping with its fields. Names are
            identifiers; their order is that of the concatenation.
        num_classes: C.
        dropout: the probability of dropping an entry of the concatenation, in [0, 1); the paper's 0.9.
        multi_label: a video has any number of labels, rather than one: it decides ``losses`` and
            ``probabilities``.
        device, dtype: where and in what type parameters and means are made.

    State: what the clusters hold, under ``clusters.<name>.``; ``fc.weight`` (C, sum of N * M) and ``fc.bias``
    (C,); ``mean_<name>`` (M,), 0 until it is known; ``means_known``, bool, one entry per modality.

    Raises: TypeError for a wrong type, ValueError for a wrong value, with the modality's name.
    """

    means_known: Tensor

    def __init__(
        self,
        modalities: Mapping[str, ClusterConfig | Mapping[str, Any]],
        num_classes: int,
        *,
        dropout: float = 0.9,
        multi_label: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_classes, multi_label=multi_label)
        if not isinstance(modalities, Mapping):
            raise TypeError(
                f"modalities must be a mapping from name to ClusterConfig, got {type(modalities).__name__}"
            )
        if not modalities:
            raise ValueError("modalities must have at least one entry, got none")
        self.modalities: dict[str, ClusterConfig] = {}
        self.clusters = nn.ModuleDict()
        for name, given in modalities.items():
            if not isinstance(name, str):
                raise TypeError(f"modalities must have names of type str, got {name!r}")
            if not name.isidentifier():
                raise ValueError(f"modalities must have identifiers as names, got {name!r}")
            if hasattr(self.clusters, name):
                raise ValueError(f"modalities must not have a name that ModuleDict uses itself, got {name!r}")
            config = _cluster_config(name, given)
            self.clusters[name] = _cluster(name, config, device=device, dtype=dtype)
            self.modalities[name] = config
            self.register_buffer(f"mean_{name}", torch.zeros(config.in_features, device=device, dtype=dtype))
        known = torch.zeros(len(self.modalities), dtype=torch.bool, device=device)
        self.register_buffer("means_known", known)
        self.dropout = nn.Dropout(checked_dropout(dropout))
        entries = sum(c.cluster_size * c.in_features for c in self.modalities.values())
        self.fc = nn.Linear(entries, num_classes, device=device, dtype=dtype)

    # Configuration and state

    @property
    def dimensions(self) -> dict[str, int]:
        """The dimension M of each modality's features."""
        return {name: config.in_features for name, config in self.modalities.items()}

    @property
    def config(self) -> dict[str, Any]:
        """What ``from_config`` needs to make this model again, in builtins that JSON and YAML can hold.

        ``order`` repeats the names of the modalities: both formats may be written with sorted keys, and the
        order decides which weights of the last layer belong to which modality.
        """
        return {
            "modalities": {name: asdict(config) for name, config in self.modalities.items()},
            "order": list(self.modalities),
            "num_classes": self.num_classes,
            "dropout": self.dropout.p,
            "multi_label": self.multi_label,
        }

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> AttentionClusterClassifier:
        """A new model from a ``config``; without ``order`` the modalities come as they stand.

        Raises: ValueError for an unknown or missing key or a wrong value, TypeError for a wrong type.
        """
        known = ["modalities", "order", "num_classes", "dropout", "multi_label"]
        checked_config(config, known, ["modalities", "num_classes"])
        arguments = dict(config)
        order = arguments.pop("order", None)
        modalities = arguments.pop("modalities")
        if not isinstance(modalities, Mapping):
            raise TypeError(f"modalities must be a mapping, got {type(modalities).__name__}")
        if order is not None:
            if not isinstance(order, (list, tuple)):
                raise TypeError(f"order must be a list of names, got {type(order).__name__}")
            if len(order) != len(modalities) or any(order.count(name) != 1 for name in modalities):
                raise ValueError(f"order must name each of {', '.join(modalities)} once, got {order!r}")
            modalities = {name: modalities[name] for name in order}
        return cls(modalities, **arguments, device=device, dtype=dtype)

    def set_means(self, means: Mapping[str, Tensor]) -> None:
        """Give the mean local feature of the training set, by modality; others stay as they are.

        Args:
            means: (M,) floating and finite each.

        Raises: TypeError or ValueError, before anything is set.
        """
        if not isinstance(means, Mapping):
            raise TypeError(f"means must be a mapping from modality to Tensor, got {type(means).__name__}")
        checked_keys("means", means, list(self.modalities), [])
        for name, mean in means.items():
            what = f"means[{name!r}]"
            checks.is_tensor(what, mean)
            if not mean.is_floating_point():
                raise TypeError(f"{what} must be a floating type, got {mean.dtype}")
            m = self.modalities[name].in_features
            if mean.shape != (m,):
                raise ValueError(f"{what} must have shape (M,) with M = {m}, got {tuple(mean.shape)}")
            if not bool(mean.isfinite().all()):
                raise ValueError(f"{what} must be finite, got NaN or Inf")
        for number, name in enumerate(self.modalities):
            if name in means:
                self._mean(name).copy_(means[name].detach())
                self.means_known[number] = True

    def _mean(self, name: str) -> Tensor:
        return self.get_buffer(f"mean_{name}")

    def reset_parameters(self) -> None:
        """Draw the parameters of the clusters and of the last layer again; the means stay."""
        for cluster in self._clusters().values():
            cluster.reset_parameters()
        self.fc.reset_parameters()

    def _clusters(self) -> dict[str, AttentionCluster]:
        return dict(self.clusters.items())  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        """What the submodules do not show."""
        return f"num_classes={self.num_classes}, multi_label={self.multi_label}"

    # Inputs

    def _by_modality(self, what: str, given: object) -> dict[str, Any]:
        """An argument as a dict by modality; bare for a model of one."""
        if given is None:
            return {}
        if isinstance(given, Mapping):
            unknown = [name for name in given if name not in self.modalities]
            if unknown:
                raise ValueError(
                    f"{what} must be of the modalities {', '.join(self.modalities)}, got {unknown[0]!r}"
                )
            return dict(given)
        if len(self.modalities) > 1:
            names = ", ".join(self.modalities)
            raise TypeError(f"{what} must be a mapping from modality ({names}), got {type(given).__name__}")
        return {next(iter(self.modalities)): given}

    def _sets(
        self, features: object, lengths: object, offsets: object, max_length: object
    ) -> dict[str, _Sets]:
        """The arguments of each cluster whose modality is there."""
        xs = self._by_modality("features", features)
        if not xs:
            raise ValueError(f"features must have at least one of {', '.join(self.modalities)}, got none")
        more: dict[str, dict[str, Any]] = {}
        for what, given in (("lengths", lengths), ("offsets", offsets), ("max_length", max_length)):
            more[what] = self._by_modality(what, given)
            for name in more[what]:
                if name not in xs:
                    raise ValueError(f"{what} must be of modalities in features, got {name!r}")
        sets: dict[str, _Sets] = {}
        for name in self.modalities:
            if name not in xs:
                continue
            x, what = xs[name], f"features[{name!r}]"
            checks.is_tensor(what, x)
            if x.device != self.fc.weight.device:
                device = self.fc.weight.device
                raise ValueError(f"{what} must be on the device of the model, {device}, got {x.device}")
            wanted = checks.computed_dtype(self.fc.weight)
            if checks.computed_dtype(x) != wanted:
                raise TypeError(f"{what} must be {self.fc.weight.dtype} as the model, got {x.dtype}")
            sets[name] = _Sets(
                x, more["lengths"].get(name), more["offsets"].get(name), more["max_length"].get(name)
            )
        return sets

    def _call(self, name: str, sets: _Sets, **options: Any) -> Any:
        """The cluster of a modality on its sets; errors name the modality."""
        x, lengths, offsets, max_length = sets
        checks.check_max_length(max_length)
        # The CPU's kernels read the offsets, and a nested tensor costs more than 200 us there.
        if max_length is not None and offsets is not None and lengths is None and x.is_cuda and x.dim() == 2:
            x, offsets = _bounded(x, offsets, max_length), None
        cluster = self.clusters[name]
        if is_compiling():
            return cluster(x, lengths=lengths, offsets=offsets, **options)
        try:
            return cluster(x, lengths=lengths, offsets=offsets, **options)
        except (TypeError, ValueError) as error:
            raise type(error)(f"modality {name!r}: {error}") from None

    # Missing modalities

    def _of_mean(self, name: str) -> Tensor:
        """The cluster's output (1, N * M) on the set that is the mean alone; NaN while that is not known."""
        known = self.means_known[list(self.modalities).index(name)]
        if checks.readable(known) and not known:
            raise ValueError(
                f"modality {name!r} is missing from a video and its mean is not known: give it to set_means"
            )
        y: Tensor = self.clusters[name](self._mean(name)[None, None])
        return torch.where(known, y, float("nan"))

    def _output(self, name: str, sets: _Sets) -> Tensor:
        """The cluster's outputs (B, N * M), the mean's in the place of those of empty sets."""
        y: Tensor = self._call(name, sets)
        x, lengths, offsets, _ = sets
        if x.is_nested:
            offsets = x.offsets()  # type: ignore[attr-defined]
        if offsets is not None:
            missing = offsets[1:] <= offsets[:-1]
        elif lengths is not None:
            missing = lengths <= 0
        elif x.size(1) == 0:
            return self._of_mean(name).expand(y.size(0), -1)
        else:
            return y
        if checks.readable(missing) and not missing.any():
            return y
        return torch.where(missing.unsqueeze(1), self._of_mean(name), y)

    # Use

    def forward(
        self,
        features: Mapping[str, Tensor] | Tensor,
        *,
        lengths: Mapping[str, Tensor] | Tensor | None = None,
        offsets: Mapping[str, Tensor] | Tensor | None = None,
        max_length: Mapping[str, int] | int | None = None,
    ) -> Tensor:
        """Class scores (B, C), before any softmax or sigmoid.

        Every argument is by modality; a model of one modality takes them bare too. A modality that is not in
        features is missing from all videos, a set of length 0 from its own.

        Args:
            features: local features: dense (B, L, M); packed (T, M), with offsets; or a jagged nested tensor
                (B, j, M). Of the model's dtype, or any float but float64 under autocast.
            lengths: (B,) integer, for dense features: the valid positions of each set.
            offsets: (B + 1,) int64 or int32, for packed features: the borders of the sets.
            max_length: an upper bound of the lengths of packed sets, a hint that spares GPUs a detour.

        Raises: TypeError for a wrong type or dtype; ValueError for a wrong shape, value or device, an unknown
            modality, none at all, sets that differ in number, or a missing one without a mean.
        """
        sets = self._sets(features, lengths, offsets, max_length)
        outputs = {name: self._output(name, of_modality) for name, of_modality in sets.items()}
        first = next(iter(outputs))
        batch = outputs[first].size(0)
        for name, y in outputs.items():
            if y.size(0) != batch:
                raise ValueError(
                    f"features[{name!r}] must have B = {batch} sets, as {first!r} has, got {y.size(0)}"
                )
        parts = [
            outputs[name] if name in outputs else self._of_mean(name).expand(batch, -1)
            for name in self.modalities
        ]
        scores: Tensor = self.fc(self.dropout(torch.cat(parts, 1)))
        return scores

    def attention(
        self,
        features: Mapping[str, Tensor] | Tensor,
        *,
        lengths: Mapping[str, Tensor] | Tensor | None = None,
        offsets: Mapping[str, Tensor] | Tensor | None = None,
        max_length: Mapping[str, int] | int | None = None,
    ) -> dict[str, Tensor]:
        """The attention weights by modality: (B, N, L), or (N, T) where features are packed or nested.

        Arguments and errors are those of ``forward``, but a modality that is not in features has no entry and
        a mean stands for no set. Excluded positions have weight 0. Differentiable.
        """
        sets = self._sets(features, lengths, offsets, max_length)
        return {name: self._call(name, s, return_weights=True)[1] for name, s in sets.items()}
