"""fastac: fused attention clusters for PyTorch."""

from . import functional, ops, reference
from ._version import __version__
from .AttentionCluster import AttentionCluster
from .backends import backend
from .explain import explain
from .functional import attention_cluster, attention_pool, softmax_weight

__all__ = [
    "AttentionCluster",
    "__version__",
    "attention_cluster",
    "attention_pool",
    "backend",
    "explain",
    "functional",
    "ops",
    "reference",
    "softmax_weight",
]
