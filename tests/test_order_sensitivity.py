"""Who sees the order of frames: attention clusters and poolings do not, a bi-LSTM does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastac.models.attention_boosted_lstm import POSITIONS, AttentionBoostedLSTM
from fastac.models.base import VideoClassifier
from fastac.models.classifier import AttentionClusterClassifier
from fastac.models.pooling import POOLINGS, PoolingClassifier

M, C, L = 16, 10, 12
LENGTHS = torch.tensor([L, 7, 2, 9, L])


def cluster(weighting: str, **options: Any) -> VideoClassifier:
    modalities = {"rgb": {"in_features": M, "cluster_size": 4, "weighting": weighting, **options}}
    return AttentionClusterClassifier(modalities, C, dtype=torch.float64).eval()


def permuted(x: Tensor) -> Tensor:
    """Each video's own frames in another order; none of them stays where it was."""
    y = x.clone()
    for row, video, n in zip(y, x, LENGTHS.tolist(), strict=True):
        row[:n] = video[:n].roll(1, 0)
    return y


def relative_change(model: VideoClassifier) -> Tensor:
    """For each video, how far the scores move when its frames are permuted, relative to their size."""
    x = torch.randn(len(LENGTHS), L, M, dtype=torch.float64)
    with torch.no_grad():
        before, after = model(x, lengths=LENGTHS), model(permuted(x), lengths=LENGTHS)
    return (after - before).norm(dim=1) / before.norm(dim=1)


@pytest.mark.parametrize("weighting", ["fc1", "fc2", "gated", "average"])
@pytest.mark.parametrize("shift", [True, False])
def test_an_attention_cluster_does_not_see_the_order(weighting: str, shift: bool) -> None:
    assert relative_change(cluster(weighting, shift=shift)).max() < 1e-12


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_pooling_does_not_see_the_order(pooling: str) -> None:
    model = PoolingClassifier(M, C, pooling=pooling, cluster_size=4, dtype=torch.float64).eval()
    assert relative_change(model).max() < 1e-12


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("honor", [True, False])
def test_a_bi_lstm_sees_the_order(position: str, honor: bool) -> None:
    sizes = {"sequence_length": L, "hidden_features": 8, "dense_features": 32}
    model = AttentionBoostedLSTM(
        M, C, position=position, honor_lengths=honor, dtype=torch.float64, **sizes
    ).eval()
    assert relative_change(model).min() > 0.01


def test_a_position_bias_sees_the_order() -> None:
    """What the first test would say of a cluster that counts positions."""
    model = cluster("fc1", position_bias=L)
    torch.nn.init.normal_(model.clusters["rgb"].position_bias)
    assert relative_change(model).min() > 0.01
