"""The systems of the papers, built on the attention cluster."""

from __future__ import annotations

from .classifier import AttentionClusterClassifier, ClusterConfig
from .frame_cnn import FrameCNN

__all__ = ["AttentionClusterClassifier", "ClusterConfig", "FrameCNN"]
