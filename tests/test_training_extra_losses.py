"""The engine with a model that has losses beside those of its scores: they are learned and reported."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastac.data import FeatureArray
from fastac.models import PyramidClassifier
from fastac.models.base import VideoClassifier
from fastac.training import OptimizerConfig, Trainer, TrainingConfig, evaluate, predict
from fastac.training.engine import class_weights

LENGTH, SIDE, CLASSES = 3, 8, 3
LR = 0.05


@pytest.fixture(scope="module")
def data() -> FeatureArray:
    """Videos of noise in the pixels' own type, as many of each class as its number and four."""
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(CLASSES), np.arange(CLASSES) + 4)
    frames = generator.integers(0, 256, (len(labels), LENGTH, SIDE * SIDE), dtype=np.uint8)
    return FeatureArray({"frames": frames}, labels, ["a", "b", "c"])


@pytest.fixture
def model() -> PyramidClassifier:
    torch.manual_seed(0)
    return PyramidClassifier(
        "small",
        CLASSES,
        frame_shape=(1, SIDE, SIDE),
        channels=[3, 4],
        pixel_mean=128.0,
        pixel_std=64.0,
        dropout=0.0,
        interaction_weight=0.7,
        diversity_weight=0.3,
    )


def config(data: FeatureArray, **changes: Any) -> TrainingConfig:
    """One step of gradient descent, all videos."""
    given = {"epochs": 1, "batch_size": len(data), "clip_norm": None, "class_weights": False}
    optimizer = OptimizerConfig(name="sgd", lr=LR)
    return TrainingConfig(**{**given, "tensorboard": False, "optimizer": optimizer, **changes})


def losses_by_hand(model: PyramidClassifier, data: FeatureArray) -> Tensor:
    batch = data.__getitems__(range(len(data)))
    output = model(**batch.inputs())
    scores = torch.nn.functional.cross_entropy(output.scores, batch.labels, reduction="none")
    assert output.interaction_loss.abs().min() > 0.01
    assert output.diversity_loss.abs().min() > 0.001
    return scores + 0.7 * output.interaction_loss + 0.3 * output.diversity_loss


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_step_follows_all_losses(
    model: PyramidClassifier, data: FeatureArray, accumulation: int, weighted: bool
) -> None:
    by_hand = copy.deepcopy(model)
    losses = losses_by_hand(by_hand, data)
    if weighted:
        losses = losses * class_weights(data.class_counts())[data.labels]
    expected = losses.mean()
    expected.backward()
    settings = config(data, accumulation=accumulation, class_weights=weighted)
    (result,) = Trainer(model, data, None, settings, show_progress=False).fit()
    assert result.values["train_loss"] == pytest.approx(expected.item(), rel=1e-5)
    for (name, parameter), before in zip(model.named_parameters(), by_hand.parameters(), strict=True):
        assert before.grad is not None and before.grad.abs().max() > 0, name
        torch.testing.assert_close(parameter, before - LR * before.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_an_evaluation_reports_all_losses_and_the_scores_metrics(
    model: PyramidClassifier, data: FeatureArray
) -> None:
    model.eval()
    with torch.no_grad():
        losses = losses_by_hand(model, data)
        scores = model(**data.__getitems__(range(len(data))).inputs()).scores
    found = evaluate(model, data, batch_size=4)
    assert found["loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
    right = (scores.argmax(1) == data.labels).double().mean()
    assert found["accuracy"] == pytest.approx(float(right))
    given = torch.cat([probabilities for _, probabilities in predict(model, data, batch_size=4)])
    torch.testing.assert_close(given, scores.softmax(1))
    # Scores alone have their own loss.
    alone = VideoClassifier.losses(model, scores, data.labels)
    torch.testing.assert_close(model.losses(scores, data.labels), alone)
