"""Cases of `softmax_weight`: operands, the truth in extended precision, plain torch, and the comparison."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from helpers import HALF, Results, check
from torch import Tensor


def operands(
    B: int, L: int, M: int, dtype: torch.dtype = torch.float32, scores_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Random x, scores and dy (B, L, M)."""
    x, scores, dy = torch.randn(3, B, L, M, dtype=torch.float64)
    return x.to(dtype), (2 * scores).to(scores_dtype or dtype), dy.to(dtype)


def plain(x: Tensor, scores: Tensor, lengths: Tensor | None = None) -> Tensor:
    """The formula in plain torch; a column where nothing takes part is set aside before the softmax."""
    taking_part = scores != float("-inf")
    if lengths is not None:
        taking_part = taking_part & (torch.arange(x.size(1)) < lengths[:, None]).unsqueeze(-1)
    some = taking_part.any(1, keepdim=True)
    scores = torch.where(taking_part, scores, torch.where(some, float("-inf"), 0.0).to(scores.dtype))
    return torch.where(taking_part, x, 0) * (scores.softmax(1) * some).to(x.dtype)


def truth(x: Tensor, scores: Tensor, dy: Tensor, lengths: Tensor | None = None) -> Results:
    """The formulas in extended precision, rounded to float64: what float64 too is held against."""
    taking_part = (scores != float("-inf")).numpy()
    if lengths is not None:
        taking_part = taking_part & (np.arange(x.size(1)) < lengths.numpy()[:, None])[..., None]
    x_, s, g = (
        np.where(taking_part, t.detach().double().numpy(), 0).astype(np.longdouble) for t in (x, scores, dy)
    )
    s = np.where(taking_part, s, -np.inf)
    greatest = s.max(1, keepdims=True, initial=-np.inf)
    e = np.where(taking_part, np.exp(s - np.where(taking_part.any(1, keepdims=True), greatest, 0)), 0)
    total = e.sum(1, keepdims=True)
    a = e / np.where(total == 0, 1, total)
    found = {"y": x_ * a, "dx": a * g, "dscores": a * (g * x_ - (a * g * x_).sum(1, keepdims=True))}
    return {name: torch.from_numpy(t.astype(np.float64)) for name, t in found.items()}


def results(
    call: Callable[..., Tensor], x: Tensor, scores: Tensor, dy: Tensor, lengths: Tensor | None = None
) -> Results:
    """y, dx and dscores."""
    x, scores = x.detach().requires_grad_(), scores.detach().requires_grad_()
    y = call(x, scores, lengths=lengths)
    dx, dscores = torch.autograd.grad(y, (x, scores), dy.to(y.dtype))
    return {"y": y.detach(), "dx": dx, "dscores": dscores}


def underflow(exact: Results, dtype: torch.dtype) -> Results:
    """As `terms` of `check`: results as small as the smallest normal numbers may be flushed to 0."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    return dict.fromkeys(
        exact, torch.tensor(torch.finfo(acc).tiny / torch.finfo(dtype).eps, dtype=torch.float64)
    )


def verify(
    call: Callable[..., Tensor], x: Tensor, scores: Tensor, dy: Tensor, lengths: Tensor | None
) -> Results:
    """Hold a call against the truth, with plain torch in the same dtype and in float32 as the peers."""
    ours = results(call, x, scores, dy, lengths)
    exact = truth(x, scores, dy, lengths)
    peers = [results(plain, x, scores, dy, lengths)]
    if x.dtype in HALF:
        single = results(plain, x.float(), scores.float(), dy.float(), lengths)
        peers.append({name: t.to(ours[name].dtype) for name, t in single.items()})
    for name, dtype in (("y", x.dtype), ("dx", x.dtype), ("dscores", scores.dtype)):
        assert ours[name].dtype == dtype
    for dtype, names in ((x.dtype, ["y", "dx"]), (scores.dtype, ["dscores"])):
        # Scores in float32 beside a half x have a gradient in float32, from products with halves.
        some = [{n: r[n] for n in names} for r in (ours, exact, *peers)]
        check(some[0], some[1], some[2:], dtype, terms=underflow(some[1], dtype))
    return ours
