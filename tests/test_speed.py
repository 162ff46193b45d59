"""Training with the fused cluster beside plain torch: the same steps, compared."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from flash_mnist_data import SETS, rows_of

from fastac.experiments import speed, table1
from fastac.experiments.flash_mnist import (
    MODALITY,
    Prepared,
)
from fastac.models import AttentionClusterClassifier
from fastac.training import OptimizerConfig, Trainer, TrainingConfig

pytestmark = pytest.mark.xdist_group("experiments")  # what is built once is shared


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "PASSES", 20)


def fresh_model(size: int = 8) -> AttentionClusterClassifier:
    torch.manual_seed(0)
    return table1.make_model("fc1", size, shift=True, num_classes=SETS)


CONFIG = TrainingConfig(
    batch_size=32, optimizer=OptimizerConfig(name="adam", lr=1e-2), clip_norm=None, class_weights=False
)


def test_the_comparison_trains_the_same_twice(small: Prepared, quick: None) -> None:
    model = fresh_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    comparison = speed.compare(model, small.train, CONFIG, rounds=3, steps=4)
    assert (comparison.rounds, comparison.steps, comparison.cluster_size) == (3, 4, 8)
    assert len(comparison.losses) == 12
    assert comparison.difference < 1e-4
    assert comparison.agrees
    assert "losses agree" in comparison.report()
    # Three rounds are what three epochs of one run are.
    trainer = Trainer(fresh_model(), small.train.head(128), None, CONFIG.model_copy(update={"epochs": 3}))
    expected = [result.values["train_loss"] for result in trainer.fit()]
    losses = np.array(comparison.losses).reshape(3, 4, 2).mean(axis=1)
    np.testing.assert_allclose(losses, np.stack([expected, expected], axis=1), rtol=1e-5)
    assert len(set(expected)) == 3
    assert comparison.steps_per_epoch == 6
    assert comparison.epoch.plain == pytest.approx(6 * comparison.step.plain)
    assert min(comparison.step.ours, comparison.cluster.ours, comparison.cluster.plain) > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert isinstance(model.clusters[MODALITY], speed.AttentionCluster)


def test_a_round_is_never_longer_than_the_data(small: Prepared, quick: None) -> None:
    assert speed.compare(fresh_model(), small.train, CONFIG, rounds=2, steps=1000).steps == 6


def test_the_comparison_notices_a_wrong_cluster(
    small: Prepared, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unshifted(self: speed.PlainAttentionCluster, x: torch.Tensor, **_: object) -> torch.Tensor:
        return (torch.nn.functional.linear(x, self.weight).softmax(dim=1).mT @ x).flatten(1)

    monkeypatch.setattr(speed.PlainAttentionCluster, "forward", unshifted)
    wrong = speed.compare(fresh_model(), small.train, CONFIG, rounds=2, steps=4)
    assert wrong.difference > speed.AGREEMENT
    assert not wrong.agrees
    assert "losses DO NOT AGREE" in wrong.report()


def test_only_what_plain_torch_repeats_is_compared(small: Prepared) -> None:
    for weighting, shift in (("fc2", True), ("fc1", False)):
        model = table1.make_model(weighting, 4, shift=shift, num_classes=SETS)
        with pytest.raises(ValueError, match="cluster must be an AttentionCluster with fc1 and shift"):
            speed.compare(model, small.train, CONFIG)
    with pytest.raises(ValueError, match="rounds must be at least 2 and steps at least 1, got 1 and 5"):
        speed.compare(fresh_model(), small.train, CONFIG, rounds=1, steps=5)


def comparison_of(losses: list[tuple[float, float]]) -> speed.Comparison:
    return speed.Comparison("cpu", speed.Times(2e-3, 3e-3), speed.Times(1e-3, 4e-3), losses, 64, 3, 100, 1600)


def test_a_loss_that_is_not_finite_is_no_agreement() -> None:
    assert comparison_of([(1.0, 1.0), (math.nan, 1.0), (1.0, 1.0)]).difference == math.inf
    assert comparison_of([(1.0, 1.0), (1.5, 1.0)]).difference == 0.5
    assert not comparison_of([(1.0, 1.0), (1.0, math.inf)]).agrees


def test_the_report_and_its_row(tmp_path: Path) -> None:
    comparison = comparison_of([(1.0, 1.0)])
    report = comparison.report()
    assert "cluster, forward + backward  fused   1.00 ms   plain   4.00 ms   4.00 x" in report
    assert "whole training step          fused   2.00 ms   plain   3.00 ms   1.50 x" in report
    assert "epoch of 1600 steps  fused 3.2 s   plain 4.8 s" in report
    path = tmp_path / "speed.csv"
    for _ in range(2):
        speed.record(path, comparison, CONFIG, data="some")
    first, second = rows_of(path)
    assert first == second
    assert (first["data"], first["batch_size"], first["cluster_size"]) == ("some", "32", "64")
    assert (first["step_ratio"], first["cluster_ratio"], first["plain_epoch_seconds"]) == (
        "1.500",
        "4.000",
        "4.8",
    )
    assert (first["threads"], first["torch"]) == ("1", torch.__version__)
