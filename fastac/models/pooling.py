"""Baselines: the features of a video pooled in a simpler way than by attention clusters, then classified."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastac import checks, functional, reference

from .base import checked_count, checked_dropout, checked_dtype
from .inputs import Sets, padded, without_excluded
from .one_modality import OneModalityClassifier

POOLINGS = ("mean", "netvlad", "sdpa")


class NetVLAD(nn.Module):
    """Sums of residuals to K cluster centres, by soft assignment.

        a[l, k] = softmax over k of (w_k . x_l + b_k)        V[k] = sum_l a[l, k] (x_l - c_k)

    then every V[k] is divided by its norm (intra-normalisation), and the whole by its own. Arandjelovic et
    al., *NetVLAD*, CVPR 2016, Eq. 4 and figure 2, with w, b and c independent as there. The paper starts them
    from a clustering of the features. Here w and b start as those of ``torch.nn.Linear``, and c normal with
    standard deviation 1 / sqrt(M), as Miech et al. (*Learnable pooling with context gating*, 2017) train from
    scratch. Features are taken as they are, not normalised first.

    Args:
        in_features: M.
        cluster_size: K.
        device, dtype: where and in what type the parameters are made.

    Parameters: ``assignment.weight`` (K, M), ``assignment.bias`` (K,), ``centroids`` (K, M).
    """

    def __init__(
        self,
        in_features: int,
        cluster_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        m, k = checked_count("in_features", in_features), checked_count("cluster_size", cluster_size)
        dtype = checked_dtype(dtype)
        self.assignment = nn.Linear(m, k, device=device, dtype=dtype)
        self.centroids = nn.Parameter(torch.empty(k, m, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters again."""
        self.assignment.reset_parameters()
        nn.init.normal_(self.centroids, 0.0, self.centroids.size(1) ** -0.5)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """x (B, L, M), the first lengths[b] positions valid and the others finite, to (B, K * M).

        A set without valid positions gives 0.
        """
        wide = reference.accumulation_dtype(x.dtype)
        a = without_excluded(self.assignment(x).softmax(2, dtype=wide), lengths)  # (B, L, K)
        with checks.no_autocast(x):  # the two parts cancel: neither may be rounded before
            residuals = a.transpose(1, 2) @ x.to(wide) - a.sum(1).unsqueeze(2) * self.centroids.to(wide)
            y = F.normalize(F.normalize(residuals, dim=2).flatten(1), dim=1)
        return y.to(x.dtype)


class LearnedQueryPooling(nn.Module):
    """N learned queries attend to the features, which are keys and values as they are.

        a[n, l] = softmax over l of (q_n . x_l / sqrt(M))        z[n] = sum_l a[n, l] x_l

    Scaled dot-product attention (Vaswani et al., 2017) with the learned seeds of Lee et al. (*Set
    Transformer*, ICML 2019, pooling by multihead attention): one head and no projections, as a baseline that
    is torch's own operator alone.

    Args:
        in_features: M.
        cluster_size: N.
        device, dtype: where and in what type the parameters are made.

    Parameters: ``queries`` (N, M), at first uniform in +-1/sqrt(M) as the weight of an attention cluster.
    """

    def __init__(
        self,
        in_features: int,
        cluster_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        m, n = checked_count("in_features", in_features), checked_count("cluster_size", cluster_size)
        self.queries = nn.Parameter(torch.empty(n, m, device=device, dtype=checked_dtype(dtype)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the queries again."""
        bound = 1 / math.sqrt(self.queries.size(1))
        nn.init.uniform_(self.queries, -bound, bound)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """x (B, L, M), L >= 1, the first lengths[b] positions valid and the others 0, to z (B, N * M).

        A set without valid positions gives 0.
        """
        mask = None
        if lengths is not None:  # of an empty set the first position, which is 0: no softmax is over nothing
            mask = reference.valid_positions(x.size(1), lengths.clamp(min=1), None)
            assert mask is not None
            mask = mask[:, None, None]
        queries = self.queries.to(x.dtype).expand(x.size(0), 1, -1, -1)
        z = F.scaled_dot_product_attention(queries, x.unsqueeze(1), x.unsqueeze(1), attn_mask=mask)
        return z.flatten(1)

    def weights(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """The weights a (B, N, L), 0 where excluded."""
        wide = reference.accumulation_dtype(x.dtype)
        scores = self.queries.to(wide) @ x.to(wide).transpose(1, 2) / math.sqrt(x.size(2))
        valid = reference.valid_positions(x.size(1), lengths, None)
        return reference.masked_softmax(scores, valid)[0].to(x.dtype)


class PoolingClassifier(OneModalityClassifier):
    """Features pooled over the positions of a video, dropout, one linear layer.

    - "mean": the mean feature, (B, M), Eq. 3 of Long et al. (CVPR 2018) with one unit;
    - "netvlad": ``NetVLAD``, (B, K * M);
    - "sdpa": ``LearnedQueryPooling``, (B, N * M).

    A video without any feature is pooled to 0: its scores are the bias of the last layer.

    Args:
        in_features: M, the dimension of one local feature.
        num_classes: C.
        pooling: "mean", "netvlad" or "sdpa".
        cluster_size: K of netvlad, N of sdpa; the mean has no use for it.
        dropout: the probability of dropping an entry of the pooled features, in [0, 1).
        multi_label: a video has any number of labels, rather than one: it decides ``losses`` and
            ``probabilities``.
        modality: the name of the features.
        standardize: each feature enters as (x - mean) / std over the training set, which ``set_moments``
            gives.
        device, dtype: where and in what type the parameters are made.

    State: ``fc.weight`` and ``fc.bias``; ``netvlad.assignment.weight``, ``netvlad.assignment.bias`` and
    ``netvlad.centroids``; or ``sdpa.queries``; with ``standardize`` ``feature_mean`` and ``feature_std``.

    Raises: TypeError for a wrong type, ValueError for a wrong value.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        pooling: str = "mean",
        cluster_size: int = 64,
        dropout: float = 0.5,
        multi_label: bool = False,
        modality: str = "features",
        standardize: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_features,
            num_classes,
            standardize=standardize,
            multi_label=multi_label,
            modality=modality,
            device=device,
            dtype=dtype,
        )
        m = self.in_features
        if pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
        self.pooling = pooling
        self.cluster_size = n = checked_count("cluster_size", cluster_size)
        factory: dict[str, Any] = {"device": device, "dtype": checked_dtype(dtype)}
        self.netvlad = NetVLAD(m, n, **factory) if pooling == "netvlad" else None
        self.sdpa = LearnedQueryPooling(m, n, **factory) if pooling == "sdpa" else None
        self.dropout = nn.Dropout(checked_dropout(dropout))
        self.fc = nn.Linear(m if pooling == "mean" else n * m, self.num_classes, **factory)

    def reset_parameters(self) -> None:
        """Draw all parameters again; the last layer's as ``torch.nn.Linear`` does."""
        for module in (self.netvlad, self.sdpa, self.fc):
            if module is not None:
                module.reset_parameters()

    @property
    def has_attention(self) -> bool:
        """Whether ``attention`` has weights to give: those of sdpa."""
        return self.pooling == "sdpa"

    @property
    def config(self) -> dict[str, Any]:
        """What ``from_config`` needs to make this model again, in builtins that JSON and YAML can hold."""
        return {
            "in_features": self.in_features,
            "num_classes": self.num_classes,
            "pooling": self.pooling,
            "cluster_size": self.cluster_size,
            "dropout": self.dropout.p,
            "multi_label": self.multi_label,
            "modality": self.modality,
            "standardize": self.standardize,
        }

    def extra_repr(self) -> str:
        """What the submodules do not show."""
        size = "" if self.pooling == "mean" else f", cluster_size={self.cluster_size}"
        return f"pooling={self.pooling!r}{size}, multi_label={self.multi_label}"

    # Use

    def _pooled(self, sets: Sets) -> Tensor:
        if self.pooling == "mean":
            y = functional.attention_cluster(
                sets.x, None, lengths=sets.lengths, offsets=sets.offsets, max_length=sets.max_length
            )
            return y.squeeze(1)
        x, lengths = _clean(sets)
        pool = self.sdpa if self.netvlad is None else self.netvlad
        assert pool is not None
        pooled: Tensor = pool(x, lengths)
        return pooled

    def forward(
        self,
        features: Mapping[str, Tensor] | Tensor,
        *,
        lengths: Mapping[str, Tensor] | Tensor | None = None,
        offsets: Mapping[str, Tensor] | Tensor | None = None,
        max_length: Mapping[str, int] | int | None = None,
    ) -> Tensor:
        """Class scores (B, C), before any softmax or sigmoid.

        Every argument is by modality or bare.

        Args:
            features: local features: dense (B, L, M); packed (T, M), with offsets; or a jagged nested tensor
                (B, j, M). Of the model's dtype, or any float but float64 under autocast.
            lengths: (B,) integer, for dense features: the valid positions of each set. Whatever stands after
                them has no influence.
            offsets: (B + 1,) int64 or int32, for packed features: the borders of the sets.
            max_length: an upper bound of the lengths of packed sets.

        Raises: TypeError for a wrong type or dtype; ValueError for a wrong shape, value or device or another
            modality.
        """
        pooled = self._pooled(self._sets(features, lengths, offsets, max_length))
        scores: Tensor = self.fc(self.dropout(pooled))
        return scores

    def attention(
        self,
        features: Mapping[str, Tensor] | Tensor,
        *,
        lengths: Mapping[str, Tensor] | Tensor | None = None,
        offsets: Mapping[str, Tensor] | Tensor | None = None,
        max_length: Mapping[str, int] | int | None = None,
    ) -> dict[str, Tensor]:
        """The weights of the learned queries: (B, N, L), or (N, T) where features are packed or nested.

        Raises: ValueError for any pooling but sdpa (the weights of netvlad are over clusters, not positions);
            else as ``forward``.
        """
        if self.sdpa is None:
            raise ValueError(f"attention needs pooling sdpa, the model has {self.pooling}")
        sets = self._sets(features, lengths, offsets, max_length)
        x, limits = _clean(sets)
        weights = self.sdpa.weights(x, limits)
        if sets.offsets is not None:
            return {self.modality: reference.pack_weights(weights, sets.offsets, sets.x.size(0))}
        return {self.modality: weights[..., : sets.x.size(1)]}


def _clean(sets: Sets) -> tuple[Tensor, Tensor | None]:
    """Padded sets, 0 where excluded, of L >= 1 positions."""
    x, lengths = padded(sets)
    x = without_excluded(x, lengths)
    if x.size(1) == 0:
        lengths = torch.zeros(x.size(0), dtype=torch.int64, device=x.device)
        x = F.pad(x, (0, 0, 0, 1))
    return x, lengths
