"""The public functions: check the arguments, pick a backend, call its operator."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import _native, backends, checks, ops, reference, softmax_weight_ops

_cpu_inference = ops.operator("cpu", "inference")
_cpu_function: Any = ops.fast_function("cpu")
_cpu_softmax_weight = softmax_weight_ops.operator("cpu")
_cpu_softmax_weight_function: Any = softmax_weight_ops.fast_function("cpu")


class Dense(NamedTuple):
    """A call's features without nesting."""

    x: Tensor
    offsets: Tensor | None
    max_length: int | None


def unnest(
    x: Tensor, lengths: Tensor | None, mask: Tensor | None, offsets: Tensor | None, max_length: int | None
) -> Dense:
    """A jagged nested x (B, j, M) as packed values (T, M) and offsets (B + 1,); anything else as it is.

    Raises: ValueError if lengths, mask or offsets come with a nested x, or if its values have holes;
        TypeError if x is nested with another layout.
    """
    if not isinstance(x, Tensor) or not x.is_nested:
        return Dense(x, offsets, max_length)
    checks.one_layout(lengths, mask, offsets, nested=True)
    if x.layout != torch.jagged:
        raise TypeError(f"x must have layout torch.jagged when nested, got {x.layout}")
    if x.dim() != 3 or x._ragged_idx != 1:  # type: ignore[attr-defined]
        raise ValueError(
            f"x must have shape (B, j, M) with the ragged dimension second, got {tuple(x.shape)}"
        )
    if x.lengths() is not None:  # type: ignore[attr-defined]
        raise ValueError("x must be a nested tensor whose values have no holes: call x.contiguous() first")
    if max_length is None:
        max_length = x._maybe_max_seqlen  # type: ignore[attr-defined]
    return Dense(x.values(), x.offsets(), max_length)  # type: ignore[attr-defined]


def _is_plain(
    x: Tensor, weight: Tensor | None, alpha: Tensor | None, beta: Tensor | None, eps: float
) -> bool:
    """A cheap sufficient test that a padded, unmasked call is right and runs on the CPU kernels.

    False only means that the full checks decide.
    """
    if type(x) is not Tensor or weight is None or type(eps) is not float or not 1e-37 < eps < 1e37:
        return False
    try:
        shape, weight_shape, dtype = x.shape, weight.shape, x.dtype
        if (
            len(shape) != 3
            or len(weight_shape) != 2
            or weight_shape[1] != shape[2]
            or 0 in weight_shape
            or weight.dtype is not dtype
            or dtype not in checks.FLOATS
            or not (x.is_cpu and weight.is_cpu)
            or not (x.layout is torch.strided is weight.layout)
            or torch.is_autocast_enabled("cpu")
        ):
            return False
        if alpha is None or beta is None:
            return alpha is beta
        return (
            alpha.shape == beta.shape == weight_shape[:1]
            and alpha.dtype is beta.dtype is dtype
            and alpha.is_cpu
            and beta.is_cpu
            and alpha.layout is torch.strided is beta.layout
        )
    except (AttributeError, RuntimeError):  # no tensor, or one without sizes, such as a nested one
        return False


def _needs_grad(*tensors: Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def _run(
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
    backend: str | None,
) -> Tensor:
    """Check, choose, call."""
    x, offsets, max_length = unnest(x, lengths, mask, offsets, max_length)
    lengths, offsets = checks.check_call(
        x, weight, scores, position_bias, alpha, beta, lengths, mask, offsets, max_length, eps
    )
    stem = backends.choose(x, backend)
    if stem == "reference" and checks.autocasts(x):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), None if weight is None else weight.to(dtype)
    inputs = (x, weight, scores, position_bias, alpha, beta, lengths, mask, offsets, float(eps))
    if stem == "reference":
        with checks.no_autocast(x):
            return reference.forward(*inputs, max_length=max_length).y
    y: Tensor
    bound = None if offsets is None else max_length  # padded sets are bounded by L
    needs_grad = _needs_grad(x, weight, scores, position_bias, alpha, beta)
    if needs_grad or is_compiling():
        save_scores = needs_grad and ops.keeps_scores(x, weight, checks.computed_dtype(x))
        y, *_ = ops.operator(stem, "forward")(*inputs, save_scores, bound)
    else:
        y = ops.operator(stem, "inference")(*inputs, bound)
    return y


def attention_cluster(
    x: Tensor,
    weight: Tensor | None,
    alpha: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    position_bias: Tensor | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    offsets: Tensor | None = None,
    max_length: int | None = None,
    eps: float = 1e-12,
    backend: str | None = None,
) -> Tensor:
    """An attention cluster with linear (Eq. 4) or equal (Eq. 3) scores, shifted (Eq. 7) or not.

        a = softmax over L of (W x_l + position_bias)        z = a x
        y = (alpha z + beta) / (sqrt(N) max(||alpha z + beta||, eps)), or z without alpha and beta

    Long et al., *Attention Clusters*, CVPR 2018. Whatever stands in an excluded position, NaN and Inf
    included, has no influence on y or on any gradient. A set with no valid position has z = 0.

    Args:
        x: local features, (B, L, M); or packed, (T, M), with offsets; or a jagged nested tensor (B, j, M).
            float16, bfloat16 (both accumulate in float32), float32 or float64.
        weight: (N, M), x.dtype; None for the average, whose N comes from alpha, else is 1.
        alpha, beta: (N,), x.dtype or float32; both or neither.
        position_bias: (N, L_max), x.dtype or float32; added to the scores, by position inside each set.
        lengths: (B,) integer: the first lengths[b] positions of set b are valid.
        mask: (B, L) bool, True = takes part. At most one of lengths, mask and offsets; none with a nested x.
        offsets: (B + 1,) int64 or int32, rising from 0 to at most T; rows from offsets[-1] on are excluded.
        max_length: an upper bound of the set lengths, for backends that would otherwise have to ask the
            device.
        eps: > 0; compared with ||u|| in the accumulation type. Below it y is linear in u.
        backend: "cpu", "triton", "cuda" or "reference"; None for the one in force, or the best that can.

    Returns: y, (B, N, M), x.dtype.
    Raises: TypeError for a wrong type, dtype or layout; ValueError for a wrong shape, size, value, device or
        combination, or a backend that cannot run the call.
    """
    if (
        not is_compiling()
        and position_bias is None
        and lengths is None
        and mask is None
        and offsets is None
        and max_length is None
        and backend is None
        and backends.current is None
        and _native.available
        and not backends.transforming()
        and _is_plain(x, weight, alpha, beta, eps)
    ):
        y: Tensor
        if _needs_grad(x, weight, alpha, beta):
            y = _cpu_function.apply(x, weight, alpha, beta, eps, ops.keeps_scores(x, weight, x.dtype))
        else:
            y = _cpu_inference(x, weight, None, None, alpha, beta, None, None, None, eps)
        return y
    return _run(x, weight, None, position_bias, alpha, beta, lengths, mask, offsets, max_length, eps, backend)


def attention_pool(
    x: Tensor,
    scores: Tensor,
    alpha: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    offsets: Tensor | None = None,
    max_length: int | None = None,
    eps: float = 1e-12,
    backend: str | None = None,
) -> Tensor:
    """An attention cluster with scores of your own: a = softmax over L of scores, then as
    `attention_cluster`.

    A score of -inf has weight 0 and gradient 0; a unit whose scores are all -inf has z = 0.

    Args:
        scores: (B, N, L); or packed, (N, T), with offsets or a nested x. x.dtype or float32, any strides.

    The other arguments, the result and the errors are those of `attention_cluster`.
    """
    checks.is_tensor("scores", scores)
    return _run(x, None, scores, None, alpha, beta, lengths, mask, offsets, max_length, eps, backend)


def _is_plain_weighting(x: Tensor, scores: Tensor) -> bool:
    """A cheap sufficient test that a call without lengths is right and runs on the CPU kernels."""
    if type(x) is not Tensor or type(scores) is not Tensor:
        return False
    try:
        shape, dtype = x.shape, x.dtype
        return (
            len(shape) == 3
            and shape == scores.shape
            and shape[2] > 0
            and dtype in checks.FLOATS
            and (scores.dtype is dtype or scores.dtype is torch.float32)
            and x.is_cpu
            and scores.is_cpu
            and x.layout is torch.strided is scores.layout
        )
    except RuntimeError:  # one without sizes, such as a nested one
        return False


def softmax_weight(
    x: Tensor, scores: Tensor, *, lengths: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """Features weighted by a softmax over the positions of their set, one softmax per feature.

        a = softmax over L of scores        y = x a

    The attention block of You & Korhonen, *Attention Boosted Deep Networks for Video Classification*, ICIP
    2020: their weights have the shape of the features, and nothing is summed over the positions here.

    Whatever stands in an excluded position, NaN and Inf included, has no influence; y and all gradients are 0
    there. The same holds for a score of -inf. Where no position of a feature takes part its y is 0.

    Args:
        x: local features, (B, L, M), any strides. float16, bfloat16 (both computed in float32), float32 or
            float64. B and L may be 0.
        scores: (B, L, M), any strides, x.dtype or float32. Under autocast a float32 x goes with scores of the
            half types too, which are brought to float32.
        lengths: (B,) integer: the first lengths[b] positions of set b are valid.
        backend: "cpu", "triton" or "reference"; None for the one in force, or the best that can.

    Returns: y, (B, L, M), x.dtype.
    Raises: TypeError for a wrong type, dtype or layout; ValueError for a wrong shape, value, device, or a
        backend that cannot run the call, as "cuda" cannot.
    """
    y: Tensor
    if (
        not is_compiling()
        and lengths is None
        and backend is None
        and backends.current is None
        and _native.available
        and not backends.transforming()
        and _is_plain_weighting(x, scores)
    ):
        if _needs_grad(x, scores):
            y = _cpu_softmax_weight_function.apply(x, scores)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                y, _ = _cpu_softmax_weight(x, scores, None)
        return y
    checks.is_tensor("x", x)
    if (
        isinstance(scores, Tensor)
        and x.dtype == torch.float32
        and scores.dtype in (torch.float16, torch.bfloat16)
        and checks.autocasts(x)
    ):
        scores = scores.to(torch.float32)
    lengths = checks.check_softmax_weight(x, scores, lengths)
    stem = backends.choose(x, backend, "softmax_weight")
    if stem == "reference":
        with checks.no_autocast(x):
            return reference.weight_by_softmax(x, scores, lengths)
    y, _ = softmax_weight_ops.operator(stem)(x, scores, lengths)
    return y
