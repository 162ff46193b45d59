"""The contenders: this package, and what a user would write in torch instead.

Every contender computes y = u / (sqrt(N) ||u||), u = alpha z + beta, from the same operands. A contender that
cannot run a workload raises `Unavailable` with the reason, which the table prints.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .workloads import Case

Closure = Callable[[], tuple[Tensor, ...]]


class Unavailable(Exception):
    """The contender cannot run this workload; the message says why."""


@dataclass
class Prepared:
    """A contender made ready for one case: layout and masks are built here, outside the timed region."""

    case: Case
    call: Callable[
        [Tensor, Tensor, Tensor, Tensor], Tensor
    ]  # (x, weight or scores, alpha, beta) -> y (B, N, M)
    x: Tensor  # in the layout the contender takes
    mask: Tensor | None = None  # of the rows of x that take part, where x is padded

    def closure(self, mode: str) -> Closure:
        """One run of a mode: () -> (y,) or (y, dx unless frozen, dweight or dscores, dalpha, dbeta)."""
        case, call = self.case, self.call
        learns = mode != "forward"
        x = self.x.detach().requires_grad_(mode == "training")
        mix, alpha, beta = (t.detach().requires_grad_(learns) for t in (case.mix, case.alpha, case.beta))
        if not learns:
            return lambda: (call(x, mix, alpha, beta),)
        wanted = [t for t in (x, mix, alpha, beta) if t.requires_grad]

        def run() -> tuple[Tensor, ...]:
            y = call(x, mix, alpha, beta)
            return (y, *torch.autograd.grad(y, wanted, case.dy))

        return run

    def comparable(self, mode: str, results: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Results by name; dx as the rows of x that take part, (T, M), whatever the layout."""
        names = {
            "forward": ["y"],
            "training": ["y", "dx", "dmix", "dalpha", "dbeta"],
            "frozen": ["y", "dmix", "dalpha", "dbeta"],
        }[mode]
        named = dict(zip(names, results, strict=True))
        if "dx" in named:
            dx = named["dx"]
            named["dx"] = dx.flatten(0, -2) if self.mask is None else dx[self.mask]
        return named


def shifted(z: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    u = alpha.unsqueeze(-1) * z + beta.unsqueeze(-1)
    return F.normalize(u, dim=-1) / math.sqrt(z.size(1))


def plain_cluster(
    x: Tensor, weight: Tensor, alpha: Tensor, beta: Tensor, mask: Tensor | None = None
) -> Tensor:
    """What a user writes: x (B, L, M), weight (N, M), mask (B, L) -> (B, N, M)."""
    scores = x @ weight.T  # (B, L, N)
    if mask is not None:
        scores = scores.masked_fill(~mask.unsqueeze(-1), float("-inf"))
    weights = scores.softmax(dim=1)
    return shifted(torch.bmm(weights.transpose(1, 2), x), alpha, beta)


def plain_pool(x: Tensor, scores: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """What a user writes: x (B, L, M), scores (B, N, L) -> (B, N, M)."""
    return shifted(torch.bmm(scores.softmax(dim=-1), x), alpha, beta)


def sdpa_cluster(
    x: Tensor, weight: Tensor, alpha: Tensor, beta: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Attention with learned queries: queries = W, keys = values = x, one head, scale 1."""
    features = x.unsqueeze(1)  # (B, 1, L, M)
    queries = weight.expand(x.size(0), 1, -1, -1)
    chosen = None if mask is None else mask[:, None, None, :]
    z = F.scaled_dot_product_attention(queries, features, features, attn_mask=chosen, scale=1.0)
    return shifted(z.squeeze(1), alpha, beta)


def _padded(case: Case, cluster: Callable[..., Tensor], pool: Callable[..., Tensor] | None) -> Prepared:
    x, mask = case.padded()
    if case.workload.scores == "given":
        if pool is None:
            raise Unavailable("scores are given, SDPA computes its own from queries")
        return Prepared(case, pool, x)
    if mask is None:
        return Prepared(case, cluster, x)
    return Prepared(case, lambda x, w, a, b: cluster(x, w, a, b, mask), x, mask)


class Eager:
    name = "eager"
    note = "plain torch: x @ W.T, softmax, bmm, shift, F.normalize"

    def prepare(self, case: Case) -> Prepared:
        return _padded(case, plain_cluster, plain_pool)


class Compiled:
    name = "compile"
    note = "torch.compile (default mode) of the eager function"

    def __init__(self) -> None:
        self.why_not: str | None = None
        try:
            torch.compile(lambda t: t.sin() + 1)(torch.zeros(8))
        except Exception as error:  # whatever the toolchain lacks, the table says it
            lines = str(error).strip().splitlines()
            self.why_not = f"{type(error).__name__}: {lines[0] if lines else ''}"

    def prepare(self, case: Case) -> Prepared:
        if self.why_not is not None:
            raise Unavailable(f"torch.compile does not work here: {self.why_not}")
        torch._dynamo.reset()  # shapes of an earlier workload would make this one dynamic
        return _padded(case, torch.compile(plain_cluster), torch.compile(plain_pool))


class Sdpa:
    name = "sdpa"
    note = "F.scaled_dot_product_attention with learned queries (queries = W, scale 1), then the shift"

    def prepare(self, case: Case) -> Prepared:
        return _padded(case, sdpa_cluster, None)


class Ours:
    """fastac through its public functions.

    `backend` "cpu" insists that the native library is there and then calls without naming a backend, as a
    user does; any other name is passed on.
    """

    name = "ours"

    def __init__(self, backend: str = "cpu") -> None:
        import fastac

        self.arguments: dict[str, str] = {}
        if backend == "cpu":
            from fastac import _native

            if not _native.available:
                raise SystemExit(
                    f"The native kernels are not there ({_native.why_not}); build them, or name another "
                    "backend to measure with --backend, for example --backend reference."
                )
        else:
            self.arguments["backend"] = backend
        self.backend = backend
        self.note = f"fastac, backend {backend}"
        self.cluster = fastac.attention_cluster
        self.pool = fastac.attention_pool

    def prepare(self, case: Case) -> Prepared:
        function = self.pool if case.workload.scores == "given" else self.cluster
        arguments: dict[str, Any] = dict(self.arguments)
        if case.offsets is not None:
            arguments["offsets"] = case.offsets
        if not arguments:
            return Prepared(case, function, case.x)
        return Prepared(case, lambda x, mix, a, b: function(x, mix, a, b, **arguments), case.x)


PEERS = {"eager": Eager, "compile": Compiled, "sdpa": Sdpa}
