"""The training engine in one process: shares, steps, what goes wrong, evaluation."""

from __future__ import annotations

import math
import multiprocessing
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from training_helpers import CLASSES, RaggedFeatures, make_model

from fastac.data import FeatureArray, FeatureBatch
from fastac.training import (
    OptimizerConfig,
    Trainer,
    TrainingConfig,
    TrainingError,
    checkpoint,
    evaluate,
    predict,
)
from fastac.training.distributed import Processes, choose_device, current
from fastac.training.engine import class_weights
from fastac.training.metrics import compute, make_metrics, update
from fastac.training.sampler import BatchSampler, mixed_seed


def settings(**changes: Any) -> TrainingConfig:
    return TrainingConfig(**{"epochs": 2, "batch_size": 8, "tensorboard": False, **changes})


def fitted(
    data: RaggedFeatures | None = None, *, model: nn.Module | None = None, **changes: Any
) -> tuple[nn.Module, list[dict[str, float]]]:
    """A model after training, and the values of the epochs without the seconds."""
    model = make_model(dropout=0) if model is None else model
    data = RaggedFeatures(21) if data is None else data
    results = Trainer(model, data, None, settings(**changes), show_progress=False).fit()
    return model, [
        {name: v for name, v in result.values.items() if name != "train_seconds"} for result in results
    ]


def distance(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs)


# Which videos make which batch


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("count", "batch_size"), [(0, 4), (1, 4), (4, 4), (23, 5), (23, 100), (7, 1)])
def test_shares_put_together_are_the_batches(count: int, batch_size: int, shuffle: bool) -> None:
    def order(pieces: int, world_size: int) -> list[list[int]]:
        shares = [
            list(
                BatchSampler(
                    count, batch_size, shuffle=shuffle, pieces=pieces, rank=rank, world_size=world_size
                )
            )
            for rank in range(world_size)
        ]
        assert len({len(share) for share in shares}) == 1  # one with less would leave the others waiting
        steps = [[*chain(*step)] for step in zip(*shares, strict=True)]
        for step in zip(*shares, strict=True):
            sizes = [len(share) for share in step]
            assert max(sizes) - min(sizes) <= 1
        return [[*chain(*steps[i : i + pieces])] for i in range(0, len(steps), pieces)]

    batches = order(1, 1)
    assert sorted(chain(*batches)) == list(range(count))
    assert [len(batch) for batch in batches] == BatchSampler(count, batch_size, shuffle=True).batch_sizes()
    for pieces, world_size in ((3, 1), (1, 2), (3, 2), (8, 3)):
        assert order(pieces, world_size) == batches


def test_order_depends_on_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        sampler = BatchSampler(50, 50, shuffle=True, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1, 1) == order(1, 1)
    assert len({str(order(*each)) for each in ((1, 1), (1, 2), (2, 1), (2, 2))}) == 4
    assert len({mixed_seed(*parts) for parts in ((0, 0), (0, 1), (1, 0), (1, 1))}) == 4
    assert all(0 <= mixed_seed(seed) < 2**63 for seed in range(100))


# Steps


@pytest.mark.parametrize("name", ["rmsprop", "adam", "adamw", "sgd"])
def test_steps_are_those_of_plain_torch(name: str) -> None:
    """The paper's recipe written out: 1/S weights, clipping to a norm, one step per batch."""
    data, optimizer = RaggedFeatures(21), OptimizerConfig(name=name, lr=0.02, weight_decay=0.01)
    model, values = fitted(data, optimizer=optimizer, clip_norm=0.3, seed=5)

    wanted = make_model(dropout=0)
    tuned = {
        "rmsprop": torch.optim.RMSprop,
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
        "sgd": torch.optim.SGD,
    }[name](wanted.parameters(), lr=0.02, weight_decay=0.01)
    sampler = BatchSampler(21, 8, shuffle=True, seed=mixed_seed(5, 1))
    assert data.labels is not None
    counts = data.labels.bincount(minlength=CLASSES)
    weights = 1 / counts[data.labels]
    weights = weights / weights.mean()
    for epoch, row in enumerate(values, start=1):
        sampler.set_epoch(epoch)
        total, norms = 0.0, []
        for index in sampler:
            batch = data.collate(index)
            tuned.zero_grad()
            scores = wanted(**batch.inputs())
            losses = nn.functional.cross_entropy(scores, data.labels[index], reduction="none")
            loss = (losses * weights[index]).mean()
            loss.backward()
            norms.append(float(nn.utils.clip_grad_norm_(wanted.parameters(), 0.3)))
            tuned.step()
            total += loss.item() * len(index)
        assert max(norms) > 0.3
        assert row["train_loss"] == pytest.approx(total / 21, rel=1e-6)
    assert distance(model, wanted) < 1e-6
    assert distance(model, make_model(dropout=0)) > 1e-3


def test_pieces_change_rounding_only() -> None:
    sgd = OptimizerConfig(name="sgd", lr=0.1)
    whole, values = fitted(optimizer=sgd)
    for accumulation in (2, 3, 8):  # the last batch has 5 videos: some of 8 pieces are empty
        pieces, values_pieces = fitted(optimizer=sgd, accumulation=accumulation)
        assert distance(whole, pieces) < 1e-5
        assert values_pieces == [{"train_loss": pytest.approx(row["train_loss"], abs=1e-5)} for row in values]
    assert distance(whole, fitted(optimizer=sgd, batch_size=7)[0]) > 1e-3


def test_clipping_and_class_weights_can_be_left_out() -> None:
    sgd = OptimizerConfig(name="sgd", lr=0.1)
    model = fitted(optimizer=sgd, clip_norm=1e-2)[0]
    assert distance(model, fitted(optimizer=sgd, clip_norm=None)[0]) > 1e-3
    model = fitted(optimizer=sgd)[0]
    assert distance(model, fitted(optimizer=sgd, class_weights=False)[0]) > 1e-3


def test_class_weights() -> None:
    """1/S (paper 5.4) times a constant, by hand: 4 videos in 2 classes."""
    weights = class_weights(torch.tensor([1, 0, 3]))
    assert weights.tolist() == pytest.approx([2, 0, 2 / 3])
    assert float(weights @ torch.tensor([1.0, 0.0, 3.0])) == pytest.approx(4)
    assert class_weights(torch.tensor([0, 0])).tolist() == [0, 0]


def test_bfloat16_computes_in_it_and_keeps_float32_weights() -> None:
    seen: list[torch.dtype] = []

    def look(module: nn.Module, inputs: object, output: Tensor) -> None:
        seen.append(output.dtype)

    def hooked() -> nn.Module:
        model = make_model(dropout=0)
        model.fc.register_forward_hook(look)
        return model

    data = RaggedFeatures(21)
    half, values = fitted(data, model=hooked(), precision="bfloat16")
    assert set(seen) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in half.parameters())
    seen.clear()
    _, values_full = fitted(data, model=hooked())
    assert set(seen) == {torch.float32}
    for row, full in zip(values, values_full, strict=True):
        assert row["train_loss"] == pytest.approx(full["train_loss"], rel=0.02)
        assert row["train_loss"] != full["train_loss"]
    assert evaluate(half, data, precision="bfloat16")["loss"] == pytest.approx(
        evaluate(half, data)["loss"], rel=0.02
    )


def test_training_learns() -> None:
    data = RaggedFeatures(120, seed=3)
    model = make_model(cluster_size=8)
    before = evaluate(model, data)["accuracy"]
    fitted(data, model=model, epochs=15, optimizer=OptimizerConfig(lr=1e-2))
    assert before < 0.4 < 0.8 < evaluate(model, data)["accuracy"]


def test_workers_change_nothing_and_go() -> None:
    def trained(workers: int) -> tuple[nn.Module, list[dict[str, float]]]:
        model, data = make_model(dropout=0.5), RaggedFeatures(21)
        trainer = Trainer(model, data, data, settings(workers=workers), show_progress=False)
        results = trainer.fit()
        assert multiprocessing.active_children() == []
        return model, [{**r.values, "train_seconds": 0} for r in results]

    alone, values = trained(0)
    helped, values_helped = trained(2)
    assert values == values_helped
    assert distance(alone, helped) == 0
    for _ in predict(alone, RaggedFeatures(21), batch_size=4, workers=2):
        assert len(multiprocessing.active_children()) == 2
        break
    assert multiprocessing.active_children() == []


def test_seeds_of_the_whole_run() -> None:
    one, values = fitted(model=make_model())
    torch.randn(7)  # what the generator was at does not matter
    again, values_again = fitted(model=make_model())
    assert distance(one, again) == 0
    assert values == values_again
    assert distance(one, fitted(model=make_model(), seed=2)[0]) > 1e-4


def test_the_data_hear_of_epochs() -> None:
    data = RaggedFeatures(5)
    fitted(data, epochs=3)
    assert data.epochs == [1, 2, 3]


def test_a_set_of_equal_lengths_trains() -> None:
    from fastac.models import AttentionClusterClassifier, ClusterConfig

    x = np.random.default_rng(1).standard_normal((10, 4, 6), dtype=np.float32)
    data = FeatureArray({"frames": x}, np.arange(10) % 3, ["a", "b", "c"])
    model = AttentionClusterClassifier({"frames": ClusterConfig(6, 2)}, 3, dropout=0)
    result = Trainer(model, data, data, settings(batch_size=4, accumulation=3), show_progress=False).fit()
    assert list(result[0].values) == [
        "train_loss",
        "train_seconds",
        "validation_loss",
        "validation_accuracy",
    ]


# What goes wrong


class Spoiled(RaggedFeatures):
    """Features that are not finite from the second epoch on."""

    def collate(self, numbers: Sequence[int]) -> FeatureBatch:
        batch = super().collate(numbers)
        if self.epochs[-1] == 2:
            batch.features["rgb"][-1] = math.nan
        return batch


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    trainer = Trainer(
        make_model(), Spoiled(21), RaggedFeatures(9), settings(), directory=tmp_path, show_progress=False
    )
    with pytest.raises(TrainingError, match="the loss of epoch 2 is not finite: a smaller learning rate"):
        trainer.fit()
    assert checkpoint.read_state(tmp_path / "checkpoints")["epoch"] == 1
    kept = make_model(seed=5)
    checkpoint.load_model(tmp_path / "checkpoints", kept)
    assert all(p.isfinite().all() for p in kept.parameters())
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 2


def test_a_last_step_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    """Its loss was finite; what it left is not."""
    model = make_model()
    model.fc.bias.register_hook(lambda gradient: gradient * math.inf)
    one_step = settings(batch_size=100, clip_norm=None, optimizer=OptimizerConfig(name="sgd"))
    trainer = Trainer(model, RaggedFeatures(9), None, one_step, directory=tmp_path, show_progress=False)
    with pytest.raises(TrainingError, match="the last step of epoch 1 is not finite"):
        trainer.fit()
    assert not checkpoint.exists(tmp_path / "checkpoints")


def without_labels(count: int) -> RaggedFeatures:
    data = RaggedFeatures(count)
    data.labels = None
    return data


def test_data_that_do_not_fit_are_refused() -> None:
    good, config = RaggedFeatures(3), settings()
    for bad, message in (
        (without_labels(3), "must have labels, got a data set without"),
        (RaggedFeatures(0), "must have at least one video, got none"),
    ):
        with pytest.raises(ValueError, match=f"^train_data {message}"):
            Trainer(make_model(), bad, None, config)
        with pytest.raises(ValueError, match=f"^validation_data {message}"):
            Trainer(make_model(), good, bad, config)
        with pytest.raises(ValueError, match=f"^data {message}"):
            evaluate(make_model(), bad)
    with pytest.raises(ValueError, match="validation_data must have multi_label False as train_data, got"):
        Trainer(make_model(), good, RaggedFeatures(3, multi_label=True), config)
    more = RaggedFeatures(3)
    more.num_classes = 9
    with pytest.raises(ValueError, match="validation_data must have num_classes 7 as train_data, got 9"):
        Trainer(make_model(), good, more, config)


def test_tensorboard_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    trainer = Trainer(
        make_model(), RaggedFeatures(3), None, settings(tensorboard=True), directory=tmp_path / "run"
    )
    with pytest.raises(ImportError, match=r"pip install 'fastac\[train\]'"):
        trainer.fit()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["training.lock"]


def test_best_survives_a_metric_that_is_not_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reached = [(1.0, value) for value in (math.nan, 0.2, math.nan, 0.1, 0.3, math.nan)]
    assert best_epochs(tmp_path, monkeypatch, reached) == [1, 2, 2, 2, 5, 5]


def test_of_equal_accuracies_the_lowest_loss_is_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each epoch in a trainer of its own: what is to be compared is in the checkpoint."""
    reached = [(1.8, 0.9), (1.7, 1.0), (0.4, 1.0), (0.5, 1.0), (0.1, 0.9), (math.nan, 1.0), (0.3, 1.0)]
    assert best_epochs(tmp_path, monkeypatch, reached) == [1, 2, 3, 3, 3, 3, 7]
    reached = [(math.nan, 0.5), (math.inf, 0.5), (2.0, 0.5)]
    assert best_epochs(tmp_path / "not finite", monkeypatch, reached) == [1, 1, 3]


def best_epochs(
    directory: Path, monkeypatch: pytest.MonkeyPatch, reached: list[tuple[float, float]]
) -> list[int]:
    """The best epoch after each, where the evaluations give these losses and accuracies."""
    results = iter(reached)
    monkeypatch.setattr(
        "fastac.training.engine.evaluate",
        lambda *_, **__: dict(zip(("loss", "accuracy"), next(results), strict=True)),
    )
    bests = []
    for epochs in range(1, len(reached) + 1):
        trainer = Trainer(
            make_model(),
            RaggedFeatures(3),
            RaggedFeatures(3),
            settings(epochs=epochs),
            directory=directory,
            show_progress=False,
        )
        trainer.resume()
        trainer.fit()
        bests.append(checkpoint.read_state(directory / "checkpoints", "best")["epoch"])
    return bests


# Evaluation


@pytest.mark.parametrize("batch_size", [1, 4, 1024])
def test_evaluation_against_plain_torch(batch_size: int) -> None:
    data, model = RaggedFeatures(30, seed=2), make_model()
    assert data.labels is not None
    model.train()
    result = evaluate(model, data, batch_size=batch_size)
    assert model.training
    with torch.no_grad():
        scores = model.eval()(**data.collate(range(30)).inputs())
    assert list(result) == ["loss", "accuracy", "top5"]
    assert result["loss"] == pytest.approx(float(nn.functional.cross_entropy(scores, data.labels)))
    assert result["accuracy"] == pytest.approx(float((scores.argmax(1) == data.labels).float().mean()))
    top = (scores.topk(5).indices == data.labels.unsqueeze(1)).any(1).float().mean()
    assert result["top5"] == pytest.approx(float(top))
    assert 0 < result["accuracy"] < result["top5"] < 1


def average_precision(scores: Tensor, labels: Tensor) -> float:
    """Mean over the positives of the share of positives among what scores at least as high."""
    above = (scores.unsqueeze(0) >= scores.unsqueeze(1)).double()
    precision = (above @ labels.double()) / above.sum(1)
    return float(precision[labels.bool()].mean())


@pytest.mark.parametrize("batch_size", [3, 1024])
def test_multi_label_evaluation_against_plain_torch(batch_size: int) -> None:
    data, model = RaggedFeatures(30, seed=2, multi_label=True), make_model(multi_label=True)
    assert data.labels is not None
    data.labels[:, 4] = 0  # a class that no video has
    result = evaluate(model, data, batch_size=batch_size)
    with torch.no_grad():
        scores = model.eval()(**data.collate(range(30)).inputs())
    loss = nn.functional.binary_cross_entropy_with_logits(scores, data.labels)
    assert list(result) == ["loss", "map", "micro_ap"]
    assert result["loss"] == pytest.approx(float(loss))
    classes = [average_precision(scores[:, c], data.labels[:, c]) for c in range(CLASSES) if c != 4]
    assert result["map"] == pytest.approx(sum(classes) / len(classes))
    assert result["micro_ap"] == pytest.approx(average_precision(scores.flatten(), data.labels.flatten()))


def test_average_precision_of_scores_that_look_like_probabilities() -> None:
    """A batch all of whose scores lie in 0…1 is not one of probabilities, and far scores stay apart."""
    scores = torch.tensor([[0.9, 0.1], [0.95, -2.0], [30.0, 28.0], [29.0, 27.0]])
    labels = torch.tensor([[0.0, 1], [1, 0], [0, 1], [1, 0]])
    metrics = make_metrics(2, multi_label=True)
    for batch in ([0], [1, 2], [], [3]):
        update(metrics, scores[batch], labels[batch], multi_label=True)
    wanted = [average_precision(scores[:, c], labels[:, c]) for c in range(2)]
    assert compute(metrics)["map"] == pytest.approx(sum(wanted) / 2)
    assert compute(metrics)["micro_ap"] == pytest.approx(
        average_precision(scores.flatten(), labels.flatten())
    )


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("multi_label", [False, True])
def test_metrics_of_nothing_warn_nobody(multi_label: bool) -> None:
    """A process may have no share of the videos; no video one of the classes."""
    metrics = make_metrics(CLASSES, multi_label=multi_label)
    labels = torch.zeros(3, CLASSES) if multi_label else torch.zeros(0, dtype=torch.int64)
    update(metrics, torch.zeros(len(labels), CLASSES), labels, multi_label=multi_label)
    values = compute(metrics)
    assert list(values) == (["map", "micro_ap"] if multi_label else ["accuracy", "top5"])
    assert not multi_label or math.isnan(values["map"])


def test_predictions_are_in_order_and_need_no_labels() -> None:
    data, model = without_labels(11), make_model()
    seen: list[int] = []
    for batch, probabilities in predict(model, data, batch_size=4):
        assert not model.training
        assert not probabilities.requires_grad
        assert probabilities.sum(1).tolist() == pytest.approx([1] * len(batch))
        wanted = model(**data.collate(batch.index.tolist()).inputs()).softmax(1)
        torch.testing.assert_close(probabilities, wanted)
        seen += batch.index.tolist()
    assert seen == list(range(11))
    assert model.training
    labels = make_model(multi_label=True)
    for _, probabilities in predict(labels, RaggedFeatures(3, multi_label=True)):
        assert probabilities.sum(1).tolist() != pytest.approx([1] * 3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"precision": "float16"}, "precision must be float32 or bfloat16, got 'float16'"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
    ],
)
def test_evaluation_refuses_what_it_cannot_do(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(make_model(), RaggedFeatures(3), **wrong)
    with pytest.raises(ValueError, match=message):
        next(iter(predict(make_model(), RaggedFeatures(3), **wrong)))


def test_leaving_predictions_early_restores_the_mode() -> None:
    model = make_model()
    predictions = predict(model, RaggedFeatures(11), batch_size=4)
    next(predictions)
    assert not model.training
    del predictions
    assert model.training


# Processes and devices


def test_alone() -> None:
    assert current() == Processes(0, 1, 0)
    assert current().first
    assert current().gather("one") == ["one"]
    current().barrier()


def test_devices_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="must be one that torch knows, such as cpu or cuda, got 'abacus'"):
        choose_device("abacus")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device() == torch.device("cpu")
    with pytest.raises(ValueError, match="got 'cuda': torch sees no CUDA device"):
        choose_device("cuda")
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device() == choose_device("cuda") == torch.device("cuda", 1)
    assert choose_device("cuda:0") == torch.device("cuda", 0)
    assert len(chosen) == 3
    with pytest.raises(ValueError, match="one of this machine's 2 CUDA devices, got cuda:2"):
        choose_device("cuda:2")
