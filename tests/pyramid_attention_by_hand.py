"""The pyramid attention of Du et al. (ECCV 2018) in numpy, a frame and a position at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from fastac.models.pyramid_attention import SpatioTemporalPyramidAttention


def numpy_resized(x: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(C, H', W') with axes that divide or are shorter: means over blocks, linear interpolation."""
    for axis, wanted in ((1, size[0]), (2, size[1])):
        has = x.shape[axis]
        moved = np.moveaxis(x, axis, 0)
        if has > wanted:
            moved = moved.reshape(wanted, has // wanted, *moved.shape[1:]).mean(1)
        elif has < wanted:
            centres = (np.arange(wanted) + 0.5) * has / wanted - 0.5
            lower = np.clip(np.floor(centres).astype(int), 0, has - 1)
            upper = np.clip(lower + 1, 0, has - 1)
            share = np.clip(centres, 0, has - 1) - lower
            share = share.reshape(-1, *[1] * (moved.ndim - 1))
            moved = (1 - share) * moved[lower] + share * moved[upper]
        x = np.moveaxis(moved, 0, axis)
    return x


def numpy_attention(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """(P, C) -> (P, P)."""
    rows = []
    for features in x:
        row = sum(features[c] * weight[c] for c in range(len(features))) + bias
        rows.append(row / np.sqrt((row**2).sum()))
    return np.stack(rows)


def numpy_interaction(x: np.ndarray, y: np.ndarray, strength: float) -> float:
    p, channels = x.shape
    samples = [x[:, c] - x.mean(1) for c in range(channels)]
    captured = sum(float(base @ sample) ** 2 for base in y for sample in samples)
    total = sum(float(sample @ sample) for sample in samples)
    skew = sum((float(y[i] @ y[j]) - (i == j)) ** 2 for i in range(p) for j in range(p))
    return -captured / total + strength * skew / p


def numpy_diversity(attentions: list[np.ndarray]) -> float:
    values = []
    for i in range(len(attentions)):
        for j in range(i):
            cosines = [a @ b for a, b in zip(attentions[i], attentions[j], strict=True)]
            values.append(np.mean(np.square(cosines)))
    return float(np.mean(values)) if values else 0.0


def numpy_video(model: SpatioTemporalPyramidAttention, video: list[Tensor]) -> tuple[Any, ...]:
    """Output (N, C), losses and weights (N, K, H, W) of one video of at least one frame."""
    v = model.score_weight.detach().numpy()
    scores, positions, interaction, diversity = [], [], [], []
    for frame in range(video[0].size(1)):
        attentions = []
        score = np.zeros((v.shape[1], v.shape[2]))
        for i, scale in enumerate(model.scales):
            state = {name: p.detach().numpy() for name, p in scale.named_parameters()}
            x = numpy_resized(video[i][0, frame].numpy(), model.size)
            x = x.reshape(x.shape[0], -1).T
            y = numpy_attention(x, state["weight"], state["bias"])
            interaction.append(numpy_interaction(x, y, scale.orthonormality))
            attentions.append(y)
            score += y @ v[i]
        diversity.append(numpy_diversity(attentions))
        scores.append(score)
        positions.append(x)
    s, x = np.concatenate(scores), np.concatenate(positions)
    e = np.exp(s - s.max(0))
    weights = (e / e.sum(0)).T
    return (
        weights @ x,
        np.mean(interaction),
        np.mean(diversity),
        weights.reshape(len(weights), -1, *model.size),
    )
