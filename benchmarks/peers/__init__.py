"""The contenders: this package, and what a user would write or take instead.

`same_function` computes y = u / (sqrt(N) ||u||), u = alpha z + beta, from the same operands. `other_poolings`
are what people use in its place: given the same x, they give about as many numbers.
"""

from __future__ import annotations

from .base import ANOTHER, SAME, Closure, Prepared, PreparedPooling, Unavailable, padded, reason_of
from .other_poolings import Mean, NetVlad, SetTransformer, TimmStyle, latent_attention
from .ours import Ours
from .same_function import (
    Compiled,
    Eager,
    Flex,
    MaxAutotune,
    Sdpa,
    plain_cluster,
    plain_pool,
    sdpa_cluster,
    shifted,
)

PEERS = {
    c.name: c for c in (Eager, Compiled, MaxAutotune, Sdpa, Flex, TimmStyle, SetTransformer, NetVlad, Mean)
}

__all__ = [
    "ANOTHER",
    "PEERS",
    "SAME",
    "Closure",
    "Compiled",
    "Eager",
    "Flex",
    "MaxAutotune",
    "Mean",
    "NetVlad",
    "Ours",
    "Prepared",
    "PreparedPooling",
    "Sdpa",
    "SetTransformer",
    "TimmStyle",
    "Unavailable",
    "latent_attention",
    "padded",
    "plain_cluster",
    "plain_pool",
    "reason_of",
    "sdpa_cluster",
    "shifted",
]
