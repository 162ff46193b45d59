"""What the training engine says: metrics.csv, progress, a line per epoch."""

from __future__ import annotations

import csv
import io
import logging
import math
import sys
from pathlib import Path

import pytest
from training_helpers import RaggedFeatures, make_model

from fastac.training import CheckpointError, Trainer, TrainingConfig
from fastac.training.log import MetricsLog, Progress


def test_metrics_are_read_back_exactly(tmp_path: Path) -> None:
    rows = MetricsLog(tmp_path, epochs_done=0, tensorboard=False)
    rows.add(1, {"train_loss": 0.1, "train_seconds": 1.0})
    rows.add(2, {"train_loss": 1 / 3, "train_seconds": 1.0, "validation_loss": math.nan})
    with (tmp_path / "metrics.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [float(row["train_loss"]) for row in read] == [0.1, 1 / 3]
    assert read[0]["validation_loss"] == ""
    assert [row["epoch"] for row in MetricsLog(tmp_path, epochs_done=1, tensorboard=False).rows] == ["1"]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_another_table_is_not_overwritten(tmp_path: Path) -> None:
    for text in ("a,b\n1,2\n", "epoch,loss\nfirst,2\n"):
        (tmp_path / "metrics.csv").write_text(text)
        with pytest.raises(CheckpointError, match=r"metrics\.csv must have the number of an epoch"):
            MetricsLog(tmp_path, epochs_done=0, tensorboard=False)
        assert (tmp_path / "metrics.csv").read_text() == text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_in_a_log_file_is_a_line_a_minute(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    now = [1000.0]
    monkeypatch.setattr("fastac.data.progress.time.monotonic", lambda: now[0])
    caplog.set_level(logging.INFO, logger="fastac")
    with Progress("epoch 3", 10_000, "videos") as progress:
        for _ in range(100):
            progress.advance(100)
            now[0] += 1.5
    assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]
    assert caplog.messages == [
        "epoch 3: 4,200 of 10,000 videos",
        "epoch 3: 8,300 of 10,000 videos",
    ]
    caplog.clear()
    with Progress("epoch 3", 10_000, "videos", show=False) as progress:
        now[0] += 1000
        progress.advance(100)
    assert caplog.messages == []


def test_progress_on_a_terminal_is_a_bar_that_goes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="fastac")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress("epoch 3", 200, "videos") as progress:
        progress.advance(200)
    written = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert "epoch 3" in written
    assert "\n" not in written
    assert written.endswith("\r")
    assert caplog.messages == []


def test_a_run_says_a_line_per_epoch(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="fastac")
    config = TrainingConfig(epochs=2, batch_size=8, tensorboard=False)
    Trainer(make_model(), RaggedFeatures(9), RaggedFeatures(9), config).fit()
    lines = [line for line in caplog.messages if line.startswith("epoch")]
    assert [line.split("  ")[0] for line in lines] == ["epoch 1/2", "epoch 2/2"]
    assert "validation_accuracy 0." in lines[0]
