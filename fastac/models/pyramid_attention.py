"""Interaction-aware attention over the positions of several feature maps (Du et al., ECCV 2018).

*Interaction-aware Spatio-temporal Pyramid Attention Networks for Action Classification*. Stated there, as
far as its abstract and readers' notes tell: the maps of several layers are flattened and brought to one size;
in each scale a linear map, whose parameters depend on that layer's map only, gives a (P, P) attention map
of unit rows, so that any number of frames can be fed; in the PCA reading its rows are spatial bases, and the
channels are the samples that are projected on them; the scales are fused into scores of all positions; the
losses are the PCA's variance under orthonormality, and a term that asks the scales to differ. There is no
public code. The exact form of each formula below is inferred.

F frames (those of a video: K), P = H * W positions, C channels, N attention units.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastac import attention_cluster, attention_pool, checks, reference

from .base import checked_count

_ROUNDING = 16
"""A spread over the channels below this many roundings of the largest entry is none."""


def checked_weight(name: str, value: object) -> float:
    """A finite number >= 0. Raises: TypeError or ValueError with the name."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and >= 0, got {value}")
    return float(value)


def checked_size(name: str, value: object) -> tuple[int, int]:
    """Two ints >= 1, (H, W). Raises: TypeError or ValueError with the name."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a pair (H, W), got {type(value).__name__}")
    if len(value) != 2:
        raise ValueError(f"{name} must be a pair (H, W), got {len(value)} entries")
    return checked_count(f"{name}[0]", value[0]), checked_count(f"{name}[1]", value[1])


def _check_kind(name: str, tensor: object, like: Tensor) -> None:
    """A strided tensor on the device and of the dtype of a parameter; autocast may convert it."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.is_nested:
        raise TypeError(f"{name} must be a dense strided tensor, got layout {tensor.layout}")
    if tensor.device != like.device:
        raise ValueError(
            f"{name} must be on the device of the parameters, {like.device}, got {tensor.device}"
        )
    if checks.computed_dtype(tensor) != checks.computed_dtype(like):
        raise TypeError(f"{name} must be {like.dtype} as the parameters, got {tensor.dtype}")


class InteractionAwareAttention(nn.Module):
    """The interaction attention of one scale: Y = rownorm(x W + b), for each frame on its own.

    Stated: the linear map, its (P, P) result, its unit rows. Inferred: the bias, the axis that W acts on.

    Args:
        channels: C.
        positions: P.
        orthonormality: lambda of ``interaction_loss``, >= 0.
        eps: the least norm that a row is divided by.
        device, dtype: where and in what type the parameters are made.

    Parameters: ``weight`` W (C, P) and ``bias`` b (P,), drawn as those of `torch.nn.Linear`.
    """

    def __init__(
        self,
        channels: int,
        positions: int,
        *,
        orthonormality: float = 1.0,
        eps: float = 1e-12,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels = checked_count("channels", channels)
        self.positions = checked_count("positions", positions)
        self.orthonormality = checked_weight("orthonormality", orthonormality)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in checks.FLOATS:
            raise TypeError(f"dtype must be float16, bfloat16, float32 or float64, got {dtype}")
        self.weight = nn.Parameter(torch.empty(channels, positions, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(positions, device=device, dtype=dtype))
        checks.check_eps(eps, double=dtype == torch.float64)
        self.eps = float(eps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw both parameters again, uniform in +-1/sqrt(C)."""
        bound = 1 / math.sqrt(self.channels)
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def _check(self, x: Tensor) -> None:
        _check_kind("x", x, self.weight)
        if x.dim() != 3 or x.shape[1:] != (self.positions, self.channels):
            raise ValueError(
                f"x must have shape (F, P, C) with P = {self.positions} and C = {self.channels}, "
                f"got {tuple(x.shape)}"
            )

    def forward(self, x: Tensor) -> Tensor:
        """The attention map of each frame.

        A row whose norm is below eps is divided by eps.

        Args:
            x: (F, P, C), of the parameters' dtype, or any float but float64 under autocast.

        Returns: Y (F, P, P), rows of unit norm, in float32 (float64 for float64 x).
        Raises: TypeError, ValueError.
        """
        self._check(x)
        products = x @ self.weight
        acc = reference.accumulation_dtype(products.dtype)
        return F.normalize(products.to(acc) + self.bias.to(acc), dim=-1, eps=self.eps)  # Y = rownorm(x W + b)

    def interaction_loss(self, x: Tensor, attention: Tensor) -> Tensor:
        """The interaction loss of each frame.

            loss = -||Y X||^2 / ||X||^2 + lambda ||Y Y^T - I||^2 / P      X = x - its mean over the channels

        Stated: PCA, with the rows of Y as bases and the channels of x as samples, its variance maximised
        under orthonormality. Inferred: that variance as a share of all of it, which makes the term the same
        for x of any scale, the squared Frobenius norm as the Lagrangian's form, and its division by P.

        Orthonormal rows have the loss -1. The least loss over all Y of unit rows, for lambda >= 1/2, is
        -1 - P / (4 lambda) sum_k (r_k - 1/P)^2, r_k the share of the k-th principal component: the bases
        crowd where the variance is, the less so the larger lambda. A frame whose channels are all equal, to
        rounding, has no variance, and a first term of 0.

        Args:
            x: (F, P, C), as for ``forward``.
            attention: Y (F, P, P), of ``forward``.

        Returns: (F,), of the dtype of attention.
        Raises: TypeError, ValueError.
        """
        self._check(x)
        checks.is_tensor("attention", attention)
        p = self.positions
        if attention.shape != (x.size(0), p, p):
            raise ValueError(f"attention must have shape {(x.size(0), p, p)}, got {tuple(attention.shape)}")
        if attention.dtype != (wide := reference.accumulation_dtype(x.dtype)):
            raise TypeError(f"attention must be {wide} for x of {x.dtype}, got {attention.dtype}")
        return self._interaction_loss(x, attention)

    def _interaction_loss(self, x: Tensor, attention: Tensor) -> Tensor:
        with checks.no_autocast(x):
            samples = x.to(attention.dtype)
            centred = samples - samples.mean(-1, keepdim=True)
            # The share does not change with the scale, so that a constant one keeps squares within range.
            spread = centred.detach().abs().amax((1, 2), keepdim=True)
            info = torch.finfo(samples.dtype)
            least = _ROUNDING * info.eps * samples.detach().abs().amax((1, 2), keepdim=True)
            flat = (spread <= least) | (spread < info.tiny)
            centred = torch.where(flat, 0, centred / torch.where(flat, 1, spread))
            total = torch.where(flat[:, 0, 0], 1, centred.square().sum((1, 2)))
            share = (attention @ centred).square().sum((1, 2)) / total
            identity = torch.eye(self.positions, device=x.device, dtype=attention.dtype)
            skew = (attention @ attention.mT - identity).square().sum((1, 2)) / self.positions
            return self.orthonormality * skew - share

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        return f"{self.channels}, {self.positions}, orthonormality={self.orthonormality}"


def diversity_loss(attentions: Sequence[Tensor]) -> Tensor:
    """How alike the scales attend, for each frame: the mean squared cosine of corresponding rows.

    The mean is over the rows and the pairs of scales; one scale alone has 0. Stated: a term that asks the
    scales' attention to differ. Inferred: its form.

    Args:
        attentions: one (F, P, P) for each scale, rows of unit norm.

    Returns: (F,), in 0...1.
    Raises: TypeError for what is no tensor; ValueError for no scale, or shapes that differ.
    """
    if not attentions:
        raise ValueError("attentions must have at least one scale, got none")
    for number, attention in enumerate(attentions):
        checks.is_tensor(f"attentions[{number}]", attention)
        shape = attentions[0].shape
        if attention.dim() != 3 or attention.shape != shape or shape[1] != shape[2]:
            raise ValueError(
                f"attentions must have one shape (F, P, P), got {tuple(attention.shape)} at {number} "
                f"and {tuple(shape)} at 0"
            )
    pairs = list(combinations(attentions, 2))
    total = attentions[0].new_zeros(attentions[0].size(0))
    for first, second in pairs:
        total = total + (first * second).sum(-1).square().mean(-1)
    return total / max(len(pairs), 1)


def resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (F, C, H', W') brought to (F, C, H, W): longer axes averaged, shorter ones interpolated.

    Inferred; the paper only brings them to one size. The average is adaptive where lengths do not divide.
    """
    height, width = (min(has, wanted) for has, wanted in zip(maps.shape[2:], size, strict=True))
    if maps.shape[2:] != (height, width):
        if (
            maps.size(2) % height == 0 and maps.size(3) % width == 0
        ):  # deterministic on GPUs, unlike the other
            maps = F.avg_pool2d(maps, (maps.size(2) // height, maps.size(3) // width))
        else:
            maps = F.adaptive_avg_pool2d(maps, (height, width))
    if (height, width) != size:
        maps = F.interpolate(maps, size, mode="bilinear", align_corners=False)
    return maps


class PyramidOutput(NamedTuple):
    """What `SpatioTemporalPyramidAttention` returns.

    Attributes:
        output: (B, N, C), C the channels of the last layer; 0 for a video without frames.
        interaction_loss: (B,), the mean over a video's frames and all scales; 0 without frames.
        diversity_loss: (B,), the mean over a video's frames and the pairs of scales; 0 without either.
        weights: (B, N, K, H, W), or (N, T, H, W) where maps are packed, 0 where excluded; None if not asked
            for.

    The losses and weights are in float32 (float64 for float64 maps).
    """

    output: Tensor
    interaction_loss: Tensor
    diversity_loss: Tensor
    weights: Tensor | None = None


class SpatioTemporalPyramidAttention(nn.Module):
    """Attention of N units over all positions of all frames of a video, from the maps of several layers.

        scores = sum_i Y_i V_i        weights = softmax of the scores over a video's positions
        output = weights x

    i runs over the layers, the scales of the pyramid; Y_i is `InteractionAwareAttention` of layer i, whose
    map is brought to H x W; x is the last layer's map.

    Stated: the maps of several layers brought to one size, an attention per scale, their fusion into scores
    that weight all positions, any number of frames. Inferred: fusion by V_i (P, N), a sum, the softmax over
    positions and frames together (`fastac.attention_pool`), the last map as what is weighted, more than one
    unit.

    No frame counts more by its place: the order of frames changes nothing, and all parameters serve any K.

    Args:
        channels: the C of each layer, in order.
        size: (H, W).
        cluster_size: N.
        orthonormality: lambda of ``InteractionAwareAttention.interaction_loss``.
        device, dtype: where and in what type the parameters are made.

    Parameters: ``scales.<i>.weight`` (C_i, P) and ``scales.<i>.bias`` (P,); ``score_weight`` (S, P, N), the
    V_i of the S scales, drawn as that of `torch.nn.Linear` with S * P inputs.
    """

    def __init__(
        self,
        channels: Sequence[int],
        size: tuple[int, int],
        *,
        cluster_size: int = 1,
        orthonormality: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if isinstance(channels, str) or not isinstance(channels, Sequence):
            raise TypeError(f"channels must be a sequence of int, got {type(channels).__name__}")
        if not channels:
            raise ValueError("channels must have at least one layer, got none")
        self.channels = tuple(checked_count(f"channels[{i}]", c) for i, c in enumerate(channels))
        self.size = checked_size("size", size)
        self.cluster_size = checked_count("cluster_size", cluster_size)
        p = self.size[0] * self.size[1]
        self.scales = nn.ModuleList(
            InteractionAwareAttention(c, p, orthonormality=orthonormality, device=device, dtype=dtype)
            for c in self.channels
        )
        shape = (len(self.channels), p, cluster_size)
        self.score_weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self._draw_score_weight()

    def reset_parameters(self) -> None:
        """Draw all parameters again."""
        for scale in self._scales():
            scale.reset_parameters()
        self._draw_score_weight()

    def _draw_score_weight(self) -> None:
        bound = 1 / math.sqrt(self.score_weight.size(0) * self.score_weight.size(1))
        nn.init.uniform_(self.score_weight, -bound, bound)

    def _scales(self) -> list[InteractionAwareAttention]:
        return list(self.scales)  # type: ignore[arg-type]

    def _check_maps(self, maps: Sequence[Tensor], packed: bool) -> None:
        if isinstance(maps, Tensor) or not isinstance(maps, Sequence):
            raise TypeError(f"maps must be a sequence of tensors, one per layer, got {type(maps).__name__}")
        if len(maps) != len(self.channels):
            raise ValueError(f"maps must be of {len(self.channels)} layers, got {len(maps)}")
        leading = 1 if packed else 2
        shape = "(T, C, H, W)" if packed else "(B, K, C, H, W)"
        for i, (x, channels) in enumerate(zip(maps, self.channels, strict=True)):
            name = f"maps[{i}]"
            _check_kind(name, x, self.score_weight)
            if x.dim() != leading + 3 or x.size(leading) != channels or 0 in x.shape[leading:]:
                hint = "; packed maps need offsets" if not packed and x.dim() == 4 else ""
                raise ValueError(
                    f"{name} must have shape {shape} with C = {channels}, got {tuple(x.shape)}{hint}"
                )
            if x.shape[:leading] != maps[0].shape[:leading]:
                wanted = tuple(maps[0].shape[:leading])
                raise ValueError(
                    f"{name} must have the frames of maps[0], {wanted}, got {tuple(x.shape[:leading])}"
                )

    def forward(
        self,
        maps: Sequence[Tensor],
        *,
        lengths: Tensor | None = None,
        offsets: Tensor | None = None,
        max_length: int | None = None,
        return_weights: bool = False,
    ) -> PyramidOutput:
        """Weighted positions of each video, and its losses.

        Whatever stands in an excluded frame, NaN and Inf included, has no influence on the result or any
        gradient.

        Args:
            maps: of each layer (B, K, C_i, H_i, W_i); or packed (T, C_i, H_i, W_i), with offsets. Of the
                parameters' dtype, or any float but float64 under autocast.
            lengths: (B,) integer, for maps that are not packed: the first lengths[b] frames of video b are
                valid.
            offsets: (B + 1,) int64 or int32, rising from 0 to at most T: the videos' borders.
            max_length: an upper bound of the frames of a packed video, a hint that spares GPUs a detour.
            return_weights: return the attention weights too, differentiable.

        Raises: TypeError for a wrong type or dtype; ValueError for a wrong number of layers, shape, value or
            device.
        """
        packed = offsets is not None
        self._check_maps(maps, packed)
        nothing = (None,) * 5
        frames = maps[-1].flatten(1 if packed else 2)
        lengths, offsets = checks.check_call(
            frames, *nothing, lengths, None, offsets, max_length, self._scales()[0].eps
        )
        valid = _taking_part(frames, lengths, offsets)
        cleaned = [x if valid is None else torch.where(valid[..., None, None, None], x, 0) for x in maps]
        flat = cleaned if packed else [x.flatten(0, 1) for x in cleaned]
        positions = [resized(x, self.size).flatten(2).transpose(1, 2) for x in flat]  # (F, P, C_i)
        attentions = [y(x) for y, x in zip(self._scales(), positions, strict=True)]
        p, n = self.size[0] * self.size[1], self.cluster_size

        last = positions[-1]
        with checks.no_autocast(last):
            scores = torch.cat(attentions, -1) @ self.score_weight.flatten(0, 1).to(attentions[0].dtype)
            interaction = torch.stack(
                [
                    s._interaction_loss(x, y)
                    for s, x, y in zip(self._scales(), positions, attentions, strict=True)
                ]
            ).mean(0)
            losses = torch.stack([interaction, diversity_loss(attentions)], -1)  # (F, 2)
            if not packed:
                losses = losses.view(*maps[-1].shape[:2], 2)
            of_videos = attention_cluster(  # Eq. 3: the mean over the valid frames
                losses, None, lengths=lengths, offsets=offsets, max_length=max_length
            ).squeeze(1)
        if packed:
            scores = scores.reshape(-1, n).t()  # (N, T * P)
            last = last.reshape(-1, last.size(2))
        else:
            batch, k = maps[-1].shape[:2]
            scores = scores.view(batch, k * p, n).transpose(1, 2)  # (B, N, K * P)
            last = last.reshape(batch, k * p, last.size(2))
        lengths = None if lengths is None else lengths * p
        offsets = None if offsets is None else offsets * p
        output = attention_pool(
            last,
            scores,
            lengths=lengths,
            offsets=offsets,
            max_length=None if max_length is None else max_length * p,
        )
        weights = None
        if return_weights:
            weights = reference.attention_weights(scores, lengths, None, offsets)
            weights = weights.unflatten(-1, (maps[-1].size(0 if packed else 1), *self.size))
        return PyramidOutput(output, of_videos[:, 0], of_videos[:, 1], weights)

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        return f"{self.channels}, {self.size}, cluster_size={self.cluster_size}"


def _taking_part(frames: Tensor, lengths: Tensor | None, offsets: Tensor | None) -> Tensor | None:
    """Which frames take part: bool (B, K) or (T,), None when all do."""
    if offsets is not None:
        if checks.readable(offsets) and int(offsets[-1]) == frames.size(0):
            return None
        return torch.arange(frames.size(0), device=frames.device) < offsets[-1]
    return reference.valid_positions(frames.size(1), lengths, None)
