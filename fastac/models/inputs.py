"""The inputs of classifiers of one modality: checked, and padded where a model needs positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastac import checks
from fastac.functional import unnest


class Sets(NamedTuple):
    """B sets of local features, checked.

    Attributes:
        x: (B, L, M), or packed (T, M).
        lengths: (B,) int64 of a dense x, or None: all positions are valid.
        offsets: (B + 1,) int64 of a packed x, else None.
        max_length: an upper bound of the lengths of packed sets, if one is known.
    """

    x: Tensor
    lengths: Tensor | None
    offsets: Tensor | None
    max_length: int | None


def of_modality(what: str, given: object, modality: str) -> Any:
    """The entry of ``modality`` in an argument by modality, or the argument itself if it is bare; else None.

    Raises: ValueError for a mapping with other modalities.
    """
    if not isinstance(given, Mapping):
        return given
    unknown = [name for name in given if name != modality]
    if unknown:
        raise ValueError(f"{what} must be of the modality {modality!r}, got {unknown[0]!r}")
    return given.get(modality)


def one_modality(
    features: Any,
    lengths: Any,
    offsets: Any,
    max_length: Any,
    *,
    modality: str,
    in_features: int,
    like: Tensor,
) -> Sets:
    """The arguments of a ``forward``, bare or by modality, checked.

    Args:
        features: (B, L, M); packed (T, M) with offsets; or a jagged nested tensor (B, j, M).
        lengths: (B,) integer, for dense features.
        offsets: (B + 1,) int64 or int32, for packed features.
        max_length: an upper bound of the lengths of packed sets.
        modality: the name of the one modality.
        in_features: M.
        like: a parameter of the model; features must have its device, and its dtype or, under autocast, any
            float but float64.

    Raises: TypeError, ValueError.
    """
    x = of_modality("features", features, modality)
    if x is None:
        raise ValueError(f"features must have the modality {modality!r}, got none")
    what = f"features[{modality!r}]"
    checks.is_tensor(what, x)
    if x.device != like.device:
        raise ValueError(f"{what} must be on the device of the model, {like.device}, got {x.device}")
    if checks.computed_dtype(x) != checks.computed_dtype(like):
        raise TypeError(f"{what} must be {like.dtype} as the model, got {x.dtype}")
    lengths = of_modality("lengths", lengths, modality)
    offsets = of_modality("offsets", offsets, modality)
    max_length = of_modality("max_length", max_length, modality)
    if is_compiling():
        return _checked(x, lengths, offsets, max_length, in_features)
    try:
        return _checked(x, lengths, offsets, max_length, in_features)
    except (TypeError, ValueError) as error:
        raise type(error)(f"modality {modality!r}: {error}") from None


def _checked(
    x: Tensor, lengths: Tensor | None, offsets: Tensor | None, max_length: int | None, in_features: int
) -> Sets:
    x, offsets, max_length = unnest(x, lengths, None, offsets, max_length)
    lengths, offsets = checks.check_call(
        x, None, None, None, None, None, lengths, None, offsets, max_length, eps=1.0
    )
    checks.check_features(x, in_features)
    return Sets(x, lengths, offsets, max_length)


def padded(sets: Sets) -> tuple[Tensor, Tensor | None]:
    """The sets as x (B, L, M) and lengths (B,) int64 or None; the rows that pad packed sets are 0.

    Without ``max_length`` the longest of packed sets is looked up, for which a GPU is waited for.
    """
    x, lengths, offsets, max_length = sets
    if offsets is None:
        return x, lengths
    lengths = offsets.diff()
    if max_length is None:
        max_length = int(lengths.max()) if len(lengths) else 0
    lengths = lengths.clamp(max=max_length)
    positions = torch.arange(max_length, device=x.device)
    rows = offsets[:-1, None] + positions  # (B, L)
    valid = positions < lengths[:, None]
    if not x.size(0):
        return x.new_zeros(*rows.shape, x.size(1)), lengths
    gathered = x[rows.clamp(max=x.size(0) - 1)]
    return torch.where(valid[..., None], gathered, 0.0), lengths


def without_excluded(x: Tensor, lengths: Tensor | None) -> Tensor:
    """x (B, L, D), 0 where lengths (B,) exclude a position; NaN there reaches no gradient either."""
    if lengths is None:
        return x
    positions = torch.arange(x.size(1), device=x.device)
    return torch.where((positions < lengths[:, None])[..., None], x, 0.0)
