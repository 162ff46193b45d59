"""`fastac.explain`: which backend and plan a call would run on, why not the others, and what it must cost."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import _cuda, _native, backends, checks, functional, ops


@dataclass(frozen=True)
class Cost:
    """Least work of one pass: bytes to and from memory (the parameters stay in cache), and operations."""

    bytes: int
    operations: int

    def __str__(self) -> str:
        return f"{_scaled(self.bytes)}B must move, {_scaled(self.operations)}FLOP"


@dataclass(frozen=True)
class Explanation:
    """What `fastac.attention_cluster` or `attention_pool` would do with a call."""

    backend: str
    weighting: str  # "fc1", "scores" or "average"
    layout: str  # "padded", "lengths", "mask" or "packed"
    dtype: torch.dtype
    device: torch.device
    batch: int  # B
    positions: int  # valid positions of all sets together
    in_features: int  # M
    cluster_size: int  # N
    forward: Cost
    backward: Cost
    input_grad: bool  # whether the backward includes dX
    reasons: dict[str, str] = field(default_factory=dict)  # why the other backends would not run
    plan: dict[str, object] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [
            f"backend    {self.backend}",
            f"call       {self.weighting}, {self.layout}, {self.dtype} on {self.device}",
            f"sizes      B = {self.batch}, {self.positions} positions, "
            f"M = {self.in_features}, N = {self.cluster_size}",
            f"forward    {self.forward}",
            f"backward   {self.backward}{'' if self.input_grad else ' (x needs no gradient)'}",
        ]
        lines += [f"plan       {name}: {value}" for name, value in self.plan.items()]
        lines += [f"not {name:<6} {reason}" for name, reason in self.reasons.items()]
        return "\n".join(lines)


def _scaled(value: float) -> str:
    for prefix in ("", "k", "M", "G"):
        if value < 1000:
            return f"{value:.3g} {prefix}"
        value /= 1000
    return f"{value:.3g} T"


def _set_lengths(x: Tensor, lengths: Tensor | None, mask: Tensor | None, offsets: Tensor | None) -> list[int]:
    """Valid positions of every set."""
    counts = lengths
    if mask is not None:
        counts = mask.sum(-1)
    if offsets is not None:
        counts = offsets.diff()
    return [x.size(1)] * x.size(0) if counts is None else [int(n) for n in counts.tolist()]


def _costs(
    weighting: str, p: int, b: int, m: int, n: int, size: int, kept: bool, dx: bool
) -> tuple[Cost, Cost]:
    """Forward and backward. Per product of a set: 2 * L * M * N operations; p = B * L positions, b sets."""
    product = 2 * p * m * n
    score_bytes = p * n * size if weighting == "scores" else 0
    y_bytes = b * n * m * size
    if weighting == "average":  # one mean, whatever N is
        product = 2 * p * m
    scored = weighting == "fc1"
    forward = Cost(p * m * size + y_bytes + score_bytes, product * (2 if scored else 1))

    products = 0
    if weighting != "average":
        products += 1  # e = dU x^T
    if scored:
        products += 1 if kept else 2  # dW = dS x; s = W x again
    if dx:
        products += 2 if scored else 1  # dX = a^T dU + dS^T W
    moved = p * m * size * (2 if dx else 1) + 2 * y_bytes + 2 * score_bytes
    return forward, Cost(moved, product * products)


def explain(
    x: Tensor,
    weight: Tensor | None = None,
    alpha: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    scores: Tensor | None = None,
    position_bias: Tensor | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    offsets: Tensor | None = None,
    max_length: int | None = None,
    eps: float = 1e-12,
    backend: str | None = None,
) -> Explanation:
    """What a call of `attention_cluster`, or with scores of `attention_pool`, would run. Computes nothing.

    Takes the arguments of those functions and raises their errors; reads lengths, mask or offsets to count
    positions.

    Returns: an `Explanation`; print it.
    """
    if weight is not None and scores is not None:
        raise ValueError("at most one of weight and scores may be given, got both")
    x, offsets, max_length = functional.unnest(x, lengths, mask, offsets, max_length)
    lengths, offsets = checks.check_call(
        x,
        weight,
        scores,
        position_bias,
        alpha,
        beta,
        lengths,
        mask,
        offsets,
        max_length,
        eps,
    )
    chosen = backends.choose(x, backend)
    given = [k for k, t in (("lengths", lengths), ("mask", mask), ("packed", offsets)) if t is not None]
    weighting = "fc1" if weight is not None else "average" if scores is None else "scores"
    b, n, m = ops.sizes(x, weight, scores, alpha, offsets)
    dtype = checks.computed_dtype(x)
    set_lengths = _set_lengths(x, lengths, mask, offsets)
    positions = sum(set_lengths)
    kept = ops.keeps_scores(x, weight, dtype)
    forward, backward = _costs(weighting, positions, b, m, n, dtype.itemsize, kept, x.requires_grad)
    reasons = {}
    for name in backends.PREDICATES:
        if name != chosen:
            reasons[name] = backends.passed_over(name, x) or (
                "could run this call, another backend was asked for"
                if backend or backends.current
                else f"could run this call, {chosen} is preferred"
            )
    plan: dict[str, object] = {}
    if chosen == "cpu":
        plan = _native.plan(set_lengths, n, m)
    elif chosen == "cuda":
        layout = given[0] if given else "padded"
        length = x.size(-2)
        longest = length if offsets is None or max_length is None else min(max_length, length)
        limits = _cuda.limits(x.device.index) if x.is_cuda else _cuda.ASSUMED
        grad_weight = weight is not None and weight.requires_grad
        sizes = (b, length, longest, m, n, dtype.itemsize)
        call = (layout, weighting, alpha is not None, kept, x.requires_grad, grad_weight)
        # The gradient of y is taken to be contiguous, with rows of as many features as x.
        aligned = (
            _cuda.in_vectors(x, dtype),
            weight is not None and _cuda.in_vectors(weight, dtype),
            m * dtype.itemsize % 16 == 0,
        )
        plan = _cuda.describe(*_cuda.plan(*sizes, *call, *aligned, *limits), grad_weight)
    elif chosen == "triton":
        planner = importlib.import_module(f"{__package__}.kernels.plan")
        bound = None if offsets is None else max_length
        arguments = (x, weight, scores, alpha, lengths, mask, offsets, bound)
        plan = planner.describe(planner.problem(*arguments, kept, dtype))
    return Explanation(
        backend=chosen,
        weighting=weighting,
        layout=given[0] if given else "padded",
        dtype=dtype,
        device=x.device,
        batch=b,
        positions=positions,
        in_features=m,
        cluster_size=n,
        forward=forward,
        backward=backward,
        input_grad=x.requires_grad,
        reasons=reasons,
        plan=plan,
    )
