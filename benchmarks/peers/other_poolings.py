"""What people use in place of attention clusters: given the same x, they give about as many numbers.

Each is a module with random parameters of its own, in eager torch. Where scores are given they go unused.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..workloads import Case
from .base import ANOTHER, PreparedPooling, Unavailable, padded


def latent_attention(
    x: Tensor, latents: Tensor, query: nn.Linear, key_value: nn.Linear, projection: nn.Linear, heads: int,
    mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """N latents attend to a set, in `heads` heads.

    x (B, L, M), latents (N, M), query (M -> M), key_value (M -> 2 M), projection (M -> M), mask (B, L),
    True = takes part -> (B, N, M).
    """
    batch, length, m = x.shape
    q = query(latents).view(-1, heads, m // heads).transpose(0, 1).expand(batch, -1, -1, -1)
    k, v = key_value(x).view(batch, length, 2, heads, m // heads).permute(2, 0, 3, 1, 4)  # (B, heads, L, D)
    chosen = None if mask is None else mask[:, None, None, :]
    pooled = F.scaled_dot_product_attention(q, k, v, attn_mask=chosen)
    y: Tensor = projection(pooled.transpose(1, 2).flatten(2))
    return y


class LatentPooling(nn.Module):
    """The parameters of `latent_attention`."""

    def __init__(self, in_features: int, latents: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.latents = nn.Parameter(torch.randn(latents, in_features) / math.sqrt(in_features))
        self.query = nn.Linear(in_features, in_features)
        self.key_value = nn.Linear(in_features, 2 * in_features)
        self.projection = nn.Linear(in_features, in_features)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return latent_attention(
            x, self.latents, self.query, self.key_value, self.projection, self.heads, mask
        )


class _Pooling:
    """A contender whose module is drawn from a fixed seed."""

    computes = ANOTHER

    def module(self, in_features: int, units: int) -> nn.Module:
        raise NotImplementedError

    @staticmethod
    def call(module: Any, x: Tensor, mask: Tensor | None) -> Tensor:
        y: Tensor = module(x, mask)
        return y

    def prepare(self, case: Case) -> PreparedPooling:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = self.module(case.workload.in_features, case.workload.cluster_size)
        x, mask = padded(case)
        return PreparedPooling(case, self.call, x, mask, {}, module.to(x.device, x.dtype))


class TimmStyle(_Pooling):
    name = "timm-style"
    note = (
        "N learned latents attend to x: linear q, k, v, 8 heads (or as many as divide M), projection, as "
        "timm's AttentionPoolLatent without its MLP; eager"
    )

    def module(self, in_features: int, units: int) -> nn.Module:
        return LatentPooling(in_features, units, math.gcd(8, in_features))


class SetTransformer(_Pooling):
    name = "set-transformer"
    note = "PoolingByMultiheadAttention of torch_geometric, N seeds, one head (its default); eager"

    def module(self, in_features: int, units: int) -> nn.Module:
        try:
            from torch_geometric.nn.aggr.utils import PoolingByMultiheadAttention
        except ImportError as error:
            if not (error.name or "").startswith("torch_geometric"):
                raise Unavailable(f"torch-geometric does not work here: {error}") from None
            raise Unavailable("torch-geometric is not installed (pip install 'fastac[peers]')") from None
        block: nn.Module = PoolingByMultiheadAttention(in_features, units)
        return block


class NetVlad(_Pooling):
    name = "netvlad"
    note = "fastac.models.NetVLAD with N clusters, plain torch"

    def module(self, in_features: int, units: int) -> nn.Module:
        from fastac.models.pooling import NetVLAD

        return NetVLAD(in_features, units)

    @staticmethod
    def call(module: Any, x: Tensor, mask: Tensor | None) -> Tensor:
        y: Tensor = module(x, None if mask is None else mask.sum(1))
        return y


class Mean(_Pooling):
    name = "mean"
    note = "the mean feature in plain torch, (B, M): what reading x costs; no parameters"

    def module(self, in_features: int, units: int) -> nn.Module:
        return nn.Identity()

    def prepare(self, case: Case) -> PreparedPooling:
        prepared = super().prepare(case)
        prepared.reasons["frozen"] = "it has no parameters: with x frozen there is no gradient"
        return prepared

    @staticmethod
    def call(module: Any, x: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            return x.mean(1)
        rows = mask.to(x.dtype)
        return torch.bmm(rows.unsqueeze(1), x).squeeze(1) / rows.sum(1, keepdim=True)
