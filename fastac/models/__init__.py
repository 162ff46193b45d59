"""The systems of the papers, built on the attention cluster."""

from __future__ import annotations

from .classifier import AttentionClusterClassifier, ClusterConfig
from .flash_mnist import FlashMNISTClassifier, FrameCNN

__all__ = ["AttentionClusterClassifier", "ClusterConfig", "FlashMNISTClassifier", "FrameCNN"]
