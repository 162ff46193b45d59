"""`fastac compare`: every system trained on the same small videos, timed in turn, one table."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flash_mnist_data import LENGTH, SETS, rows_of, watched

from fastac.cli import compare as command_module
from fastac.cli import main
from fastac.data import Digits
from fastac.experiments import comparison, results
from fastac.experiments.comparison import SYSTEMS, Budget, Data, folder_name, make_model
from fastac.experiments.flash_mnist import MODALITY, Prepared
from fastac.models import PyramidClassifier
from fastac.models.frame_cnn import normalised
from fastac.training.run import RunError, load_run

pytestmark = pytest.mark.xdist_group("experiments")

QUICK = ["attention cluster", "mean pooling"]


@pytest.fixture(scope="module")
def data(small: Prepared) -> Data:
    return Data(small)


def test_the_systems_are_those_of_the_papers_and_the_usual_poolings(data: Data) -> None:
    """At the published sizes, dropout 0.5 everywhere."""
    models = {name: make_model(settings, data, 1) for name, settings in SYSTEMS.items()}
    assert [type(model).__name__ for model in models.values()] == [
        "AttentionClusterClassifier",
        *["AttentionBoostedLSTM"] * 3,
        *["PoolingClassifier"] * 3,
        "PyramidClassifier",
    ]
    assert {model.config["dropout"] for model in models.values()} == {0.5}
    positions = [m.config["position"] for m in models.values() if "position" in m.config]
    assert positions == ["none", "before", "after"]
    sizes = [m.config.get("sequence_length") for m in models.values()]
    assert sizes == [None, 25, 25, 25, None, None, None, None]
    poolings = [m.config["pooling"] for m in models.values() if "pooling" in m.config]
    assert poolings == ["mean", "netvlad", "sdpa"]
    assert len({folder_name(name) for name in SYSTEMS}) == len(SYSTEMS)
    assert folder_name("bi-LSTM, attention") == "bi-lstm-attention"
    assert folder_name("learned queries (SDPA)") == "learned-queries-sdpa"


def test_the_pyramid_gets_the_frames_and_the_cnn_of_the_features(data: Data, small: Prepared) -> None:
    train, _ = data.of(SYSTEMS["pyramid attention"])
    assert data.of(SYSTEMS["pyramid attention"])[0] is train
    assert data.of(SYSTEMS["bi-LSTM"])[0] is small.train
    batch = train.__getitems__([3, 70])
    frames = batch.features[MODALITY]
    assert frames.shape == (2, LENGTH, 784)
    assert frames.dtype == torch.float32
    for row, number in enumerate((3, 70)):
        video = small.train_videos.video(number)
        assert np.array_equal(frames[row].numpy(), video.reshape(LENGTH, 784))
    model = make_model(SYSTEMS["pyramid attention"], data, 1)
    assert isinstance(model, PyramidClassifier)
    assert torch.equal(model.backbone.get_parameter("conv1.weight"), small.cnn.conv1.weight)
    assert all(parameter.requires_grad for parameter in model.backbone.parameters())
    # What the CNN was trained on: the pixels as it normalises them.
    pixels = small.train_videos.video(3)
    expected = normalised(pixels).flatten(1)
    found = (torch.from_numpy(pixels).float().flatten(1) - model.pixel_mean) / model.pixel_std
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_systems_are_trained_once_and_the_table_has_a_row_each(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = Budget(epochs=2)
    monkeypatch.setattr(comparison, "commit", lambda: "trained")
    done = comparison.run(QUICK, data, budget, tmp_path)
    monkeypatch.setattr(comparison, "commit", lambda: "timed")
    assert done == QUICK
    opened = load_run(tmp_path / "attention-cluster", "last")
    assert opened.state["epoch"] == 2
    times = {name: (tmp_path / folder_name(name) / "metrics.csv").stat().st_mtime_ns for name in QUICK}
    assert comparison.run(QUICK, data, budget, tmp_path) == QUICK
    assert times == {
        name: (tmp_path / folder_name(name) / "metrics.csv").stat().st_mtime_ns for name in QUICK
    }
    seconds = comparison.step_seconds(QUICK, data, rounds=2, steps=1)
    assert all(value > 0 for value in seconds.values())
    path = tmp_path / "made" / "comparison.csv"
    for _ in range(2):
        table = comparison.record(path, QUICK, data, budget, tmp_path, seconds)
    rows = rows_of(path)
    assert list(rows[0]) == list(comparison.ROW)
    assert [row["system"] for row in rows] == QUICK
    for row, name in zip(rows, QUICK, strict=True):
        with (tmp_path / folder_name(name) / "metrics.csv").open() as file:
            last = list(csv.DictReader(file))[-1]
        assert float(row["accuracy"]) == pytest.approx(100 * float(last["validation_accuracy"]), abs=0.006)
        parameters = sum(p.numel() for p in make_model(SYSTEMS[name], data, 1).parameters())
        assert row["parameters"] == str(parameters)
        assert float(row["step_ms"]) == pytest.approx(1e3 * seconds[name], abs=0.006)
        assert (row["epochs"], row["train_videos"], row["digits"]) == ("2", str(6 * SETS), "mnist")
        assert (row["commit"], row["timed_commit"], row["device"]) == ("trained", "timed", "cpu")
    text = comparison.as_text(table)
    assert "attention cluster" in text
    assert f"{int(rows[0]['parameters']):,}" in text


def test_a_step_s_time_is_that_of_the_steps_taken(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    """192 videos are three steps, however many are asked for; the first round does not count."""
    seconds = iter([99.0, 3.0, 6.0, 4.5])

    class Timed(comparison.Trainer):
        def fit(self) -> list[Any]:
            (result,) = super().fit()
            result.values["train_seconds"] = next(seconds)
            return [result]

    monkeypatch.setattr(comparison, "Trainer", Timed)
    times = comparison.step_seconds(["mean pooling"], data, rounds=4, steps=20)
    assert times == {"mean pooling": 1.5}


@pytest.mark.parametrize("system", [name for name in SYSTEMS if name not in QUICK])
def test_every_other_system_takes_a_step(system: str, data: Data) -> None:
    assert comparison.step_seconds([system], data, rounds=2, steps=1)[system] > 0


def test_the_order_of_a_round_turns_around(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    order = []

    class Watched(comparison.Trainer):
        def fit(self) -> list[comparison.EpochResult]:  # type: ignore[name-defined]
            order.append(type(self.model).__name__)
            return super().fit()

    monkeypatch.setattr(comparison, "Trainer", Watched)
    comparison.step_seconds(QUICK, data, rounds=3, steps=1)
    first, second = "AttentionClusterClassifier", "PoolingClassifier"
    assert order == [first, second, second, first, first, second]
    for rounds, steps in ((1, 1), (2, 0)):
        with pytest.raises(ValueError, match="rounds must be at least 2 and steps at least 1"):
            comparison.step_seconds(QUICK, data, rounds=rounds, steps=steps)


def test_an_interrupted_run_goes_on(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    budget = Budget(epochs=3)
    comparison.run(["mean pooling"], data, budget, whole)

    class Interrupted(Exception):
        pass

    original = comparison.Trainer._epoch

    def until_the_third(self: comparison.Trainer) -> object:
        if self.epoch == 2:
            raise Interrupted
        return original(self)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(comparison.Trainer, "_epoch", until_the_third)
        comparison.run(["mean pooling"], data, budget, cut)
    assert not (cut / "mean-pooling" / "done.json").exists()
    comparison.run(["mean pooling"], data, budget, cut)
    losses = [
        [
            (row["train_loss"], row["validation_loss"])
            for row in rows_of(path / "mean-pooling" / "metrics.csv")
        ]
        for path in (whole, cut)
    ]
    assert len(set(losses[0])) == 3
    assert losses[0] == losses[1]


def test_a_folder_of_another_run_is_not_taken(data: Data, tmp_path: Path) -> None:
    comparison.run(["mean pooling"], data, Budget(epochs=1), tmp_path)
    with pytest.raises(RunError, match="seed was 1, is 2"):
        comparison.run(["mean pooling"], data, Budget(epochs=1, seed=2), tmp_path)
    comparison.run(["mean pooling"], data, Budget(epochs=2), tmp_path)
    assert len(rows_of(tmp_path / "mean-pooling" / "metrics.csv")) == 2
    with pytest.raises(RunError, match="holds a run of 2 epochs, more than the 1 asked for"):
        comparison.run(["mean pooling"], data, Budget(epochs=1), tmp_path)
    entry = tmp_path / "mean-pooling" / "system.json"
    entry.write_text("{")
    with pytest.raises(RunError, match=r"system\.json cannot be read"):
        comparison.run(["mean pooling"], data, Budget(epochs=1), tmp_path)
    entry.unlink()
    with pytest.raises(RunError, match=r"holds a run of something else: it has no system\.json"):
        comparison.run(["mean pooling"], data, Budget(epochs=1), tmp_path)


def test_two_processes_do_not_train_a_system_twice(
    data: Data, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with results.alone(tmp_path / "mean-pooling") as alone, watched(caplog):
        assert alone
        assert comparison.run(["mean pooling"], data, Budget(epochs=1), tmp_path) == []
    assert "mean pooling: another process is at it" in caplog.text
    assert not (tmp_path / "mean-pooling" / "metrics.csv").exists()


# The command


@pytest.fixture
def at_hand(small: Prepared, digits: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    """The small data, whatever is asked for."""
    monkeypatch.setattr(command_module, "load_digits", lambda data: digits)
    monkeypatch.setattr(command_module, "prepare", lambda *args, **kwargs: small)


def test_the_command(at_hand: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, path = tmp_path / "runs", tmp_path / "two.csv"
    chosen = [argument for name in reversed(QUICK) for argument in ("--system", name)]
    arguments = ["compare", *chosen, "--epochs", "1", "--output", str(output), "--threads", "1"]
    assert main([*arguments, "--train-only"]) == 0
    assert {file.name for file in tmp_path.rglob("*.csv")} == {"metrics.csv"}
    capsys.readouterr()
    assert main([*arguments, "--results", str(path)]) == 0
    out = capsys.readouterr().out
    assert "1 epochs each" in out
    assert out.index("attention cluster") < out.index("mean pooling")
    assert [row["system"] for row in rows_of(path)] == QUICK
    # Some systems only: not the checkout's table.
    assert main(arguments) == 0
    assert [row["system"] for row in rows_of(output / "comparison.csv")] == QUICK
    with results.alone(output / "mean-pooling"):
        assert main([*arguments, "--results", str(path)]) == 1
    assert "another process is at mean pooling" in capsys.readouterr().err


def test_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--system", "lstm"]) == 2
    assert "'lstm' is not one of 'attention cluster'" in capsys.readouterr().err
