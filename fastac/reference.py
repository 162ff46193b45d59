"""Attention clusters in plain torch: the equations, readable next to the paper.

Long et al., *Attention Clusters*, CVPR 2018 (arXiv 1711.09550); the equation numbers below are theirs.

    B sets, L local features each (x_l), M features, N attention units, H hidden cells
    a = softmax over L of the scores        z = a x        u = alpha z + beta        y = u / (sqrt(N) ||u||)

This is the oracle of the tests, the `reference` backend, and what second derivatives differentiate.
Everything is twice differentiable. float16 and bfloat16 inputs are computed in float32 and rounded once, at
the end.

An excluded position is replaced by zeros (features) or minus infinity (scores) before it meets any
arithmetic, so NaN or Inf there cannot reach a value or a gradient.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import functional as F

from . import checks

_MINUS_INF = float("-inf")


class Forward(NamedTuple):
    """What a forward pass yields; `acc` is float64 for float64 inputs, else float32."""

    y: Tensor  # (B, N, M), x.dtype
    lse: Tensor  # (B, N), acc: log-sum-exp of the scores over the valid positions, -inf for an empty set
    norm: Tensor  # (B, N), acc: ||u||; shape (0,) without shift
    weights: Tensor  # (B, N, L) padded or (N, T) packed, acc: attention weights, 0 where excluded


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for every other floating type."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# Weighting functions: features (..., L, M) -> scores (..., N, L)


def fc1_scores(x: Tensor, weight: Tensor) -> Tensor:
    """Eq. 4 without its bias: one linear map. x (..., L, M), weight (N, M) -> (..., N, L)."""
    return F.linear(x, weight).transpose(-1, -2)  # s = W x


def fc2_scores(x: Tensor, hidden_weight: Tensor, hidden_bias: Tensor, score_weight: Tensor) -> Tensor:
    """Eq. 5: s = w2 . tanh(W1 x + b1), without its last bias, which cancels in the softmax.

    Args:
        x: (..., L, M).
        hidden_weight: W1, (N, H, M) for independent units or (H, M) shared by all.
        hidden_bias: b1, (N, H) or (H,).
        score_weight: w2, (N, H).

    Returns: (..., N, L).
    """
    if hidden_weight.dim() == 2:
        hidden = torch.tanh(F.linear(x, hidden_weight, hidden_bias))  # (..., L, H)
        return F.linear(hidden, score_weight).transpose(-1, -2)
    n, h, _ = hidden_weight.shape
    hidden = torch.tanh(F.linear(x, hidden_weight.flatten(0, 1), hidden_bias.flatten()))  # (..., L, N * H)
    products: Tensor = hidden.unflatten(-1, (n, h)) * score_weight
    return products.sum(-1).transpose(-1, -2)


def gated_scores(x: Tensor, tanh_weight: Tensor, gate_weight: Tensor, score_weight: Tensor) -> Tensor:
    """Gated attention (Ilse et al. 2018): s = w2 . (tanh(V x) * sigmoid(U x)), V and U shared by the units.

    x (..., L, M), tanh_weight V and gate_weight U (H, M), score_weight w2 (N, H) -> (..., N, L).
    """
    hidden = torch.tanh(F.linear(x, tanh_weight)) * torch.sigmoid(F.linear(x, gate_weight))
    return F.linear(hidden, score_weight).transpose(-1, -2)


# From scores to the output


def valid_positions(length: int, lengths: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Which of the L padded positions take part: bool (B, L), or None when all do."""
    if lengths is not None:
        return torch.arange(length, device=lengths.device) < lengths.unsqueeze(1)
    return mask


def masked_softmax(scores: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax over the valid positions.

    Args:
        scores: (B, N, L).
        valid: bool, (B, L); None when every position is valid.

    Returns:
        weights (B, N, L), 0 where excluded or where the score is -inf, all 0 for an empty set; and their
        log-sum-exp (B, N), -inf for an empty set.
    """
    taking_part = scores != _MINUS_INF
    if valid is not None:
        taking_part = taking_part & valid.unsqueeze(-2)
    scores = torch.where(taking_part, scores, 0)
    if scores.size(-1) == 0:
        peak = scores.new_zeros((*scores.shape[:-1], 1))
    else:
        peak = torch.where(taking_part, scores.detach(), _MINUS_INF).amax(-1, keepdim=True)
        peak = torch.where(peak == _MINUS_INF, 0, peak)
    e = torch.where(taking_part, torch.exp(torch.where(taking_part, scores - peak, 0)), 0)
    total = e.sum(-1, keepdim=True)
    empty = total == 0
    total = torch.where(empty, 1, total)
    lse = torch.where(empty, _MINUS_INF, peak + torch.log(total))
    return e / total, lse.squeeze(-1)  # a_l = exp(s_l) / sum_k exp(s_k)


def shift(z: Tensor, alpha: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Eq. 7: y = u / (sqrt(N) max(||u||, eps)) with u = alpha z + beta, alpha and beta one scalar per unit.

    Where ||u|| < eps this is the linear map u / (sqrt(N) eps), and so is its gradient.
    z (B, N, M), alpha and beta (N,) -> y (B, N, M) and ||u|| (B, N).
    """
    u = alpha.unsqueeze(-1) * z + beta.unsqueeze(-1)
    squares = u.square().sum(-1, keepdim=True)
    norm = squares.detach().sqrt()
    normalised = norm >= eps
    # sqrt is given 1 where its value goes unused: its derivative at 0 is infinite and 0 * inf is NaN.
    divisor = torch.where(normalised, torch.where(normalised, squares, 1).sqrt(), eps)
    return u / (math.sqrt(z.size(-2)) * divisor), norm.squeeze(-1)


# Packed layout


def row_sets(offsets: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where every row of a packed x stands.

    Args:
        offsets: (B + 1,) int64, B >= 1.
        rows: T.

    Returns: set index (T,), position inside the set (T,), and whether the row belongs to any set (T,) bool.
    """
    row = torch.arange(rows, device=offsets.device)
    index = torch.searchsorted(offsets, row, right=True) - 1
    index = index.clamp(0, offsets.numel() - 2)
    return index, row - offsets[index], (row >= offsets[0]) & (row < offsets[-1])


def _pad(offsets: Tensor, rows: int, max_length: int | None) -> tuple[Tensor, Tensor]:
    """Row index (B, L) that unpacks T rows to padded form, and which of its entries are valid (B, L) bool."""
    counts = (offsets[1:] - offsets[:-1]).clamp(min=0)
    if max_length is not None:
        longest = min(max_length, rows)
    elif is_compiling() or type(counts) is not Tensor:
        longest = rows  # while tracing, the longest set is not known; T bounds it
    else:
        longest = int(counts.max()) if counts.numel() else 0
    position = torch.arange(longest, device=offsets.device)
    valid = position < counts.unsqueeze(1)
    row = offsets[:-1].unsqueeze(1) + position
    return torch.where(valid, row, 0), valid


def pack_weights(weights: Tensor, offsets: Tensor, rows: int) -> Tensor:
    """Padded (B, N, L) to packed (N, T), 0 in rows that belong to no set."""
    if weights.size(0) == 0 or weights.size(2) == 0:
        return weights.new_zeros(weights.size(1), rows)
    index, position, covered = row_sets(offsets, rows)
    picked = weights[index, :, torch.where(covered, position, 0)]  # (T, N)
    return torch.where(covered.unsqueeze(-1), picked, 0).t()


def attention_weights(
    scores: Tensor, lengths: Tensor | None = None, mask: Tensor | None = None, offsets: Tensor | None = None
) -> Tensor:
    """The weights alone: softmax over the valid positions of each set, 0 where excluded.

    scores (B, N, L) padded -> (B, N, L), or (N, T) packed -> (N, T); lengths, mask, offsets as in `forward`.
    """
    if offsets is None:
        return masked_softmax(scores, valid_positions(scores.size(-1), lengths, mask))[0]
    rows = scores.size(1)
    offsets = offsets.clamp(0, rows)
    row, valid = _pad(offsets, rows, None)
    weights, _ = masked_softmax(scores[:, row].movedim(0, 1), valid)
    return pack_weights(weights, offsets, rows)


# The whole operator


def forward(
    x: Tensor,
    weight: Tensor | None,
    scores: Tensor | None,
    position_bias: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    offsets: Tensor | None,
    eps: float,
    *,
    max_length: int | None = None,
) -> Forward:
    """The operator on checked arguments, in the order of the native operators (see `fastac.ops`).

    weight given is fc1 (Eq. 4), scores given is attention_pool, neither is the average (Eq. 3).
    """
    acc = accumulation_dtype(x.dtype)
    features = x.to(acc)
    pool = None if scores is None else scores.to(acc)
    rows = x.size(0)
    valid: Tensor | None
    if offsets is not None:
        offsets = offsets.clamp(0, rows)
        row, valid = _pad(offsets, rows, max_length)
        features = features[row]  # (T, M) -> (B, L, M)
        pool = None if pool is None else pool[:, row].movedim(0, 1)  # (N, T) -> (B, N, L)
    else:
        valid = valid_positions(x.size(1), lengths, mask)
    if valid is not None:
        features = torch.where(valid.unsqueeze(-1), features, 0)
    batch, length, _ = features.shape

    if weight is not None:
        pool = fc1_scores(features, weight.to(acc))
        if position_bias is not None:
            position = torch.arange(length, device=x.device).clamp(max=position_bias.size(1) - 1)
            pool = pool + position_bias.to(acc)[:, position]
    elif pool is None:
        units = 1 if alpha is None else alpha.numel()
        pool = features.new_zeros(()).expand(batch, units, length)  # Eq. 3: equal scores

    weights, lse = masked_softmax(pool, valid)
    z = weights @ features  # Eq. 2: z = sum_l a_l x_l
    norm = z.new_empty(0)
    if alpha is not None and beta is not None:
        z, norm = shift(z, alpha.to(acc), beta.to(acc), eps)
    if offsets is not None:
        weights = pack_weights(weights, offsets, rows)
    return Forward(z.to(x.dtype), lse, norm, weights)


def weight_by_softmax(x: Tensor, scores: Tensor, lengths: Tensor | None) -> Tensor:
    """`softmax_weight` on checked arguments: y = x a, a = softmax over L of scores, per set and feature.

    x and scores (B, L, M), lengths (B,) int64 or None -> (B, L, M), x.dtype.
    """
    acc = accumulation_dtype(x.dtype)
    scores = scores.to(acc)
    valid = valid_positions(x.size(1), lengths, None)
    taking_part = scores != _MINUS_INF
    if valid is not None:
        taking_part = taking_part & valid.unsqueeze(-1)
    weights, _ = masked_softmax(scores.transpose(1, 2), valid)  # a softmax over L for every feature
    # Zeros on both sides of the product: neither a value there nor its gradient is touched by the other.
    features = torch.where(taking_part, x.to(acc), 0)
    y = torch.where(taking_part, features * weights.transpose(1, 2), 0)
    return y.to(x.dtype)


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
    """`fastac.attention_cluster` in plain torch: same arguments, same errors, same result."""
    from . import functional

    return functional.attention_cluster(
        x, weight, alpha, beta, position_bias=position_bias, lengths=lengths, mask=mask, offsets=offsets,
        max_length=max_length, eps=eps, backend=checks.only_reference(backend),
    )  # fmt: skip


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
    """`fastac.attention_pool` in plain torch: same arguments, same errors, same result."""
    from . import functional

    return functional.attention_pool(
        x, scores, alpha, beta, lengths=lengths, mask=mask, offsets=offsets, max_length=max_length, eps=eps,
        backend=checks.only_reference(backend),
    )  # fmt: skip


def softmax_weight(
    x: Tensor, scores: Tensor, *, lengths: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """`fastac.softmax_weight` in plain torch: same arguments, same errors, same result."""
    from . import functional

    return functional.softmax_weight(x, scores, lengths=lengths, backend=checks.only_reference(backend))
