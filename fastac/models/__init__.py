"""The systems of the papers, built on the attention cluster, and the baselines they are compared with."""

from __future__ import annotations

from .attention_boosted_lstm import AttentionBoostedLSTM, TemporalAttention
from .base import VideoClassifier
from .classifier import AttentionClusterClassifier, ClusterConfig
from .frame_cnn import FrameCNN
from .layer_taps import LayerTaps
from .pooling import PoolingClassifier
from .pyramid_attention import InteractionAwareAttention, PyramidOutput, SpatioTemporalPyramidAttention
from .pyramid_classifier import PyramidClassifier, PyramidScores, attach_pyramid

__all__ = [
    "AttentionBoostedLSTM",
    "AttentionClusterClassifier",
    "ClusterConfig",
    "FrameCNN",
    "InteractionAwareAttention",
    "LayerTaps",
    "PoolingClassifier",
    "PyramidClassifier",
    "PyramidOutput",
    "PyramidScores",
    "SpatioTemporalPyramidAttention",
    "TemporalAttention",
    "VideoClassifier",
    "attach_pyramid",
]
