"""The same function from the same operands, as a user would write it in torch."""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..workloads import Case
from .base import SAME, Prepared, Unavailable, forget_other_cases, padded, reason_of


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


def _of_padded(case: Case, cluster: Callable[..., Tensor], pool: Callable[..., Tensor] | None) -> Prepared:
    x, mask = padded(case)
    if case.workload.scores == "given":
        if pool is None:
            raise Unavailable("scores are given, it computes its own from queries")
        return Prepared(case, pool, x)
    if mask is None:
        return Prepared(case, cluster, x)
    return Prepared(case, lambda x, w, a, b: cluster(x, w, a, b, mask), x, mask)


class Eager:
    name = "eager"
    note = "plain torch: x @ W.T, softmax, bmm, shift, F.normalize"
    computes = SAME

    def prepare(self, case: Case) -> Prepared:
        return _of_padded(case, plain_cluster, plain_pool)


class Sdpa:
    name = "sdpa"
    note = "F.scaled_dot_product_attention with learned queries (queries = W, scale 1), then the shift"
    computes = SAME

    def prepare(self, case: Case) -> Prepared:
        return _of_padded(case, sdpa_cluster, None)


class Compiled:
    """torch.compile, of the whole function or not at all.

    Without `fullgraph`, what cannot be compiled in one mode runs uncompiled from then on, in every mode.
    """

    name = "compile"
    note = "torch.compile (default mode) of the eager function"
    computes = SAME
    mode: str | None = None

    def __init__(self) -> None:
        self.why_not: str | None = None
        try:
            torch.compile(lambda t: t.sin() + 1)(torch.zeros(8))
        except Exception as error:  # whatever the toolchain lacks, the table says it
            self.why_not = reason_of(error)

    def compiled(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        compiled: Callable[..., Tensor] = torch.compile(function, mode=self.mode, fullgraph=True)
        return compiled

    def prepare(self, case: Case) -> Prepared:
        if self.why_not is not None:
            raise Unavailable(f"torch.compile does not work here: {self.why_not}")
        forget_other_cases(case)
        return _of_padded(case, self.compiled(plain_cluster), self.compiled(plain_pool))


class MaxAutotune(Compiled):
    """torch.compile with its matrix products chosen by trial.

    `budget` bounds the seconds that all workloads of a run together may compile for: once they are spent, the
    next ones say so instead.
    """

    name = "compile-max-autotune"
    note = "torch.compile(mode='max-autotune') of the eager function"
    mode = "max-autotune"

    def __init__(self, budget: float = 300.0) -> None:
        super().__init__()
        self.budget, self.spent = budget, 0.0

    def prepare(self, case: Case) -> Prepared:
        """Compiles all modes at once, to know what that takes."""
        if self.spent >= self.budget:
            raise Unavailable(f"not compiled: the {self.budget:.0f} s a run has for tuning are spent")
        prepared = super().prepare(case)
        import torch._inductor.config as inductor

        start = time.perf_counter()
        quiet = inductor.patch(autotune_num_choices_displayed=0, max_autotune_report_choices_stats=False)
        with quiet, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for mode in ("forward", "training", "frozen"):
                try:
                    prepared.closure(mode)()
                except Exception as error:  # a mode that fails leaves the others
                    prepared.reasons[mode] = reason_of(error)
        if "training" in prepared.reasons:
            prepared.reasons["backward"] = prepared.reasons["training"]
        took = time.perf_counter() - start
        self.spent += took
        print(f"  {self.name}: compiling and tuning took {took:.1f} s", file=sys.stderr, flush=True)
        return prepared


class Flex(Compiled):
    """FlexAttention with learned queries: compiled, as it is meant to be used; the shift in plain torch."""

    name = "flex"
    note = (
        "flex_attention, compiled, with learned queries (queries = W, scale 1), then the shift in plain torch"
    )

    def prepare(self, case: Case) -> Prepared:
        if self.why_not is not None:
            raise Unavailable(f"torch.compile does not work here: {self.why_not}")
        if case.workload.scores == "given":
            raise Unavailable("scores are given, it computes its own from queries")
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        forget_other_cases(case)
        attend: Any = self.compiled(flex_attention)
        x, mask = padded(case)
        chosen = None
        if mask is not None:
            lengths = mask.sum(1)

            def valid(b: Tensor, head: Tensor, unit: Tensor, position: Tensor) -> Tensor:
                return position < lengths[b]

            sizes = (x.size(0), None, case.workload.cluster_size, x.size(1))
            chosen = create_block_mask(valid, *sizes, device=str(x.device))

        def cluster(x: Tensor, weight: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
            features = x.unsqueeze(1)
            queries = weight.expand(x.size(0), 1, -1, -1)
            z = attend(queries, features, features, block_mask=chosen, scale=1.0)
            return shifted(z.squeeze(1), alpha, beta)

        return Prepared(case, cluster, x, mask)
