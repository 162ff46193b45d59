"""The temporal attention block of You & Korhonen (ICIP 2020) in numpy, one number at a time."""

from __future__ import annotations

import numpy as np

from fastac.models.attention_boosted_lstm import TemporalAttention


def block_by_hand(block: TemporalAttention, x: np.ndarray, valid: int) -> tuple[np.ndarray, np.ndarray]:
    """Outputs and weights (T, D) for one sequence (T, D), of which the first ``valid`` positions count."""
    weight, bias = block.weight.detach().numpy(), block.bias.detach().numpy()
    y, weights = np.zeros_like(x), np.zeros_like(x)
    for d in range(x.shape[1]):
        scores = [sum(weight[s, t] * x[s, d] for s in range(valid)) + bias[t] for t in range(valid)]
        e = np.exp(np.array(scores) - max(scores))
        for t in range(valid):
            weights[t, d] = e[t] / e.sum()
            y[t, d] = x[t, d] * weights[t, d]
    return y, weights


def padded_to(x: np.ndarray, length: int) -> np.ndarray:
    return np.concatenate([x[:length], np.zeros((max(0, length - len(x)), x.shape[1]))])
