"""What every argument must be; one clear error for each way it can be wrong.

Shapes, dtypes, devices and layouts are always checked. Values (lengths, offsets) are read only where that
costs no
synchronisation: on CPU tensors, or anywhere with FASTAC_CHECK=1; never while torch.compile traces.
"""

from __future__ import annotations

import math
import os
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.compiler import is_compiling

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

# Smallest normal number of the accumulation type: a smaller eps would be flushed to 0 and divide by it.
SMALLEST_EPS = {True: torch.finfo(torch.float64).tiny, False: torch.finfo(torch.float32).tiny}


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def is_tensor(name: str, value: object) -> None:
    """TypeError unless value is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def _companion(name: str, tensor: Tensor, x: Tensor) -> None:
    """A tensor, strided, on the device of x."""
    is_tensor(name, tensor)
    if tensor.is_nested or tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense strided tensor, got layout {tensor.layout}")
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on the device of x, {x.device}, got {tensor.device}")


def _same_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype and tensor.dtype != torch.float32:
        wanted = f"{dtype} (the dtype of x)"
        wanted += "" if dtype == torch.float32 else " or torch.float32"
        raise TypeError(f"{name} must be {wanted}, got {tensor.dtype}")


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for x: it is for every floating type but float64."""
    device = x.device.type
    if x.dtype not in FLOATS or x.dtype == torch.float64 or not torch.amp.is_autocast_available(device):
        return False
    return torch.is_autocast_enabled(device)


def computed_dtype(x: Tensor) -> torch.dtype:
    """The dtype x is computed in: the autocast dtype where autocast is on, else its own."""
    return torch.get_autocast_dtype(x.device.type) if autocasts(x) else x.dtype


def no_autocast(x: Tensor) -> AbstractContextManager[object]:
    """A context without autocast on the device of x."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def only_reference(backend: str | None) -> str:
    """The backend argument of the functions of `fastac.reference`: None or "reference"."""
    if backend not in (None, "reference"):
        raise ValueError(f'backend must be None or "reference" in fastac.reference, got {backend!r}')
    return "reference"


def check_x(x: Tensor, packed: bool) -> None:
    """x: floating, dense, (B, L, M), or (T, M) when offsets are given."""
    is_tensor("x", x)
    if x.layout != torch.strided:
        raise TypeError(f"x must be a dense strided or a jagged nested tensor, got layout {x.layout}")
    if packed and x.dim() != 2:
        raise ValueError(f"x must have shape (T, M) when offsets are given, got {_shape(x)}")
    if not packed and x.dim() != 3:
        hint = "; a packed x of shape (T, M) needs offsets" if x.dim() == 2 else ""
        raise ValueError(f"x must have shape (B, L, M), got {_shape(x)}{hint}")
    if x.dtype not in FLOATS:
        raise TypeError(f"x must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.size(-1) < 1:
        raise ValueError(f"x must have at least one feature (M >= 1), got shape {_shape(x)}")


def check_features(x: Tensor, in_features: int) -> None:
    """The last dimension of x is the in_features a module was made for."""
    if x.size(-1) != in_features:
        raise ValueError(f"x must have {in_features} features in its last dimension, got shape {_shape(x)}")


def _check_weight(weight: Tensor, x: Tensor) -> None:
    _companion("weight", weight, x)
    m = x.size(-1)
    if weight.dim() != 2 or weight.size(1) != m:
        raise ValueError(f"weight must have shape (N, M) with M = {m} as in x, got {_shape(weight)}")
    if weight.size(0) < 1:
        raise ValueError(f"weight must have at least one unit (N >= 1), got shape {_shape(weight)}")
    if autocasts(x):
        if weight.dtype not in FLOATS:
            raise TypeError(f"weight must be a floating type under autocast, got {weight.dtype}")
    elif weight.dtype != x.dtype:
        raise TypeError(f"weight must be {x.dtype} (the dtype of x), got {weight.dtype}")


def _check_scores(scores: Tensor, x: Tensor, dtype: torch.dtype, packed: bool) -> None:
    _companion("scores", scores, x)
    if packed:
        if scores.dim() != 2 or scores.size(1) != x.size(0):
            raise ValueError(f"scores must have shape (N, T) with T = {x.size(0)}, got {_shape(scores)}")
    elif scores.dim() != 3 or scores.size(0) != x.size(0) or scores.size(2) != x.size(1):
        b, length = x.size(0), x.size(1)
        raise ValueError(
            f"scores must have shape (B, N, L) with B = {b} and L = {length}, got {_shape(scores)}"
        )
    if scores.size(-2) < 1:
        raise ValueError(f"scores must have at least one unit (N >= 1), got shape {_shape(scores)}")
    _same_dtype("scores", scores, dtype)


def check_position_bias(
    position_bias: Tensor, x: Tensor, units: int, dtype: torch.dtype, packed: bool
) -> None:
    """position_bias: (N, L_max), L_max no smaller than the longest padded set."""
    _companion("position_bias", position_bias, x)
    if position_bias.dim() != 2 or position_bias.size(0) != units or position_bias.size(1) < 1:
        raise ValueError(
            f"position_bias must have shape (N, L_max) with N = {units}, got {_shape(position_bias)}"
        )
    _same_dtype("position_bias", position_bias, dtype)
    if not packed and x.size(1) > position_bias.size(1):
        raise ValueError(
            f"position_bias must cover every position of x (L = {x.size(1)}), "
            f"got L_max = {position_bias.size(1)}"
        )


def _check_shift(alpha: Tensor, beta: Tensor, x: Tensor, units: int | None, dtype: torch.dtype) -> None:
    _companion("alpha", alpha, x)
    _companion("beta", beta, x)
    for name, tensor in (("alpha", alpha), ("beta", beta)):
        n = alpha.numel() if units is None else units
        if tensor.dim() != 1 or tensor.size(0) != n or n < 1:
            raise ValueError(f"{name} must have shape (N,) with N = {max(n, 1)}, got {_shape(tensor)}")
        _same_dtype(name, tensor, dtype)


def check_eps(eps: float, double: bool) -> None:
    """eps: a finite number > 0 that does not vanish in the accumulation type."""
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps must be a number, got {type(eps).__name__}")
    if not 0 < eps < math.inf:
        raise ValueError(f"eps must be finite and > 0, got {eps}")
    if eps < SMALLEST_EPS[double]:
        kind = "float64" if double else "float32"
        raise ValueError(f"eps must be at least {SMALLEST_EPS[double]:.3g} in {kind} accumulation, got {eps}")


def readable(tensor: Tensor) -> bool:
    """Whether values may be looked at: nothing is being traced, and no device must be waited for."""
    if is_compiling() or type(tensor) is not Tensor:
        return False
    return tensor.is_cpu or (os.environ.get("FASTAC_CHECK") == "1" and tensor.device.type != "meta")


def _check_lengths(lengths: Tensor, x: Tensor) -> Tensor:
    _companion("lengths", lengths, x)
    if lengths.dtype not in INTEGERS:
        raise TypeError(f"lengths must be an integer tensor, got {lengths.dtype}")
    if lengths.dim() != 1 or lengths.size(0) != x.size(0):
        raise ValueError(f"lengths must have shape (B,) with B = {x.size(0)}, got {_shape(lengths)}")
    if lengths.numel() and readable(lengths):
        low, high = (int(v) for v in torch.aminmax(lengths))
        if low < 0 or high > x.size(1):
            raise ValueError(f"lengths must lie in 0...L with L = {x.size(1)}, got values in {low}...{high}")
    return lengths.to(torch.int64)


def _check_mask(mask: Tensor, x: Tensor) -> None:
    _companion("mask", mask, x)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be torch.bool (True = takes part), got {mask.dtype}")
    if mask.dim() != 2 or mask.size(0) != x.size(0) or mask.size(1) != x.size(1):
        raise ValueError(f"mask must have shape (B, L) = {tuple(x.shape[:2])}, got {_shape(mask)}")


def _check_offsets(
    offsets: Tensor, x: Tensor, position_bias: Tensor | None, max_length: int | None
) -> Tensor:
    _companion("offsets", offsets, x)
    if offsets.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"offsets must be int64 or int32, got {offsets.dtype}")
    if offsets.dim() != 1 or offsets.size(0) < 1:
        raise ValueError(f"offsets must have shape (B + 1,), got {_shape(offsets)}")
    if readable(offsets):
        first, last = int(offsets[0]), int(offsets[-1])
        counts = offsets[1:] - offsets[:-1]
        shortest, longest = (int(v) for v in torch.aminmax(counts)) if counts.numel() else (0, 0)
        if first != 0:
            raise ValueError(f"offsets must rise from 0, got offsets[0] = {first}")
        if shortest < 0:
            raise ValueError(f"offsets must not fall, got a step of {shortest}")
        if last > x.size(0):
            raise ValueError(f"offsets must end at T = {x.size(0)} or before, got offsets[-1] = {last}")
        if max_length is not None and longest > max_length:
            raise ValueError(
                f"max_length must bound every set, got {max_length} and a set of length {longest}"
            )
        if position_bias is not None and longest > position_bias.size(1):
            raise ValueError(
                f"position_bias must cover every position of x (longest set {longest}), "
                f"got L_max = {position_bias.size(1)}"
            )
    return offsets.to(torch.int64)


def check_max_length(max_length: int | None) -> None:
    """max_length: None or an int >= 0."""
    if max_length is None:
        return
    if isinstance(max_length, bool) or not isinstance(max_length, (int, torch.SymInt)):
        raise TypeError(f"max_length must be an int, got {type(max_length).__name__}")
    if max_length < 0:
        raise ValueError(f"max_length must be >= 0, got {max_length}")


def one_layout(lengths: Tensor | None, mask: Tensor | None, offsets: Tensor | None, nested: bool) -> None:
    """At most one of lengths, mask, offsets; none with a nested x."""
    given = [n for n, t in (("lengths", lengths), ("mask", mask), ("offsets", offsets)) if t is not None]
    if nested and given:
        raise ValueError(f"{given[0]} must not be given with a nested x, which carries its own lengths")
    if len(given) > 1:
        raise ValueError(f"at most one of lengths, mask and offsets may be given, got {' and '.join(given)}")


def check_call(
    x: Tensor,
    weight: Tensor | None,
    scores: Tensor | None,
    position_bias: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    offsets: Tensor | None,
    max_length: int | None,
    eps: float,
    *,
    units: int | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Check every argument of an operator call on a dense x; the errors are those of the module docstring.

    The arguments are those of the operator, and units: N, where scores are still to be made.

    Returns: lengths and offsets as int64.
    Raises: TypeError for a wrong type, dtype or layout; ValueError for anything else.
    """
    packed = offsets is not None
    one_layout(lengths, mask, offsets, nested=False)
    check_x(x, packed)
    dtype = computed_dtype(x)
    check_eps(eps, double=dtype == torch.float64)
    check_max_length(max_length)
    if weight is not None:
        _check_weight(weight, x)
        units = weight.size(0)
    elif scores is not None:
        _check_scores(scores, x, dtype, packed)
        units = scores.size(-2)
    if (alpha is None) != (beta is None):
        missing = "beta" if beta is None else "alpha"
        raise ValueError(f"alpha and beta must be given together, {missing} is missing")
    if alpha is not None and beta is not None:
        _check_shift(alpha, beta, x, units, dtype)
    if position_bias is not None:
        if units is None:
            raise ValueError("position_bias needs weight: it is added to the scores that weight makes")
        check_position_bias(position_bias, x, units, dtype, packed)
    if lengths is not None:
        lengths = _check_lengths(lengths, x)
    if mask is not None:
        _check_mask(mask, x)
    if offsets is not None:
        offsets = _check_offsets(offsets, x, position_bias, max_length)
    return lengths, offsets


def check_softmax_weight(x: Tensor, scores: Tensor, lengths: Tensor | None) -> Tensor | None:
    """Check every argument of `softmax_weight`; the errors are those of the module docstring.

    Returns: lengths as int64.
    Raises: TypeError for a wrong type, dtype or layout; ValueError for anything else.
    """
    is_tensor("x", x)
    if x.is_nested or x.layout != torch.strided:
        raise TypeError(f"x must be a dense strided tensor, got layout {x.layout}")
    if x.dim() != 3:
        raise ValueError(f"x must have shape (B, L, M), got {_shape(x)}")
    check_x(x, packed=False)
    _companion("scores", scores, x)
    if scores.shape != x.shape:
        raise ValueError(f"scores must have the shape of x, (B, L, M) = {_shape(x)}, got {_shape(scores)}")
    _same_dtype("scores", scores, x.dtype)
    return None if lengths is None else _check_lengths(lengths, x)
