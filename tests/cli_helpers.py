"""Data and a run of `fastac` for the tests of the command line."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import feature_files
import numpy as np

from fastac.cli import main

SETTINGS = ["training.batch_size=8", "training.optimizer.lr=1e-2", "training.tensorboard=false"]


class Result(NamedTuple):
    status: int
    out: str
    err: str


def fastac(*arguments: object) -> Result:
    """What `fastac` gives, run in this process."""
    out, err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(argument) for argument in arguments])
        out.flush()
    return Result(status, out.buffer.getvalue().decode(), err.getvalue())  # type: ignore[attr-defined]


def start(*arguments: object, launcher: tuple[str, ...] = ("-m",)) -> subprocess.Popen[str]:
    """`fastac` in a process of its own; it gets SIGINT even if this one was started in the background."""
    return subprocess.Popen(
        [sys.executable, *launcher, "fastac", *(str(argument) for argument in arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


class Data(NamedTuple):
    """24 videos of 3 classes, a third of them without audio; every fourth is for validation."""

    videos: dict[str, dict[str, np.ndarray]]
    features: Path
    labels: Path

    @property
    def settings(self) -> list[str]:
        return [f"data.features={self.features}", f"data.labels={self.labels}", *SETTINGS]


def make_data(folder: Path) -> Data:
    generator = np.random.default_rng(0)
    videos, rows = {}, []
    for i in range(24):
        rgb = generator.standard_normal((3 + i % 5, 6), dtype=np.float32)
        rgb[i % 3, i % 3] += 8
        videos[f"clip {i:02}"] = {"rgb": rgb}
        if i % 3:
            videos[f"clip {i:02}"]["audio"] = generator.standard_normal((4, 3), dtype=np.float32)
        label = ("größe", "ñandú", "c")[i % 3]
        rows.append(f"clip {i:02},{label},{'train' if i % 4 else 'validation'}\n")
    labels = folder / "labels.csv"
    labels.write_text("video,label,split\n" + "".join(rows), encoding="utf-8")
    return Data(videos, feature_files.write_npy(folder / "features", videos), labels)


def make_run(data: Data, run: Path) -> Path:
    """A run of four epochs."""
    result = fastac("train", *data.settings, "training.epochs=4", "--output", run)
    assert result.status == 0, result.err
    assert "best checkpoint" in result.out and "accuracy" in result.out
    assert "18 videos for training, 6 for validation; 3 classes" in result.err
    assert "\r" not in result.err  # no bars where there is no terminal
    assert {path.name for path in run.iterdir()} == {
        "attention.png",
        "checkpoints",
        "config.yaml",
        "curves.png",
        "evaluation.json",
        "metrics.csv",
        "model.json",
        "training.lock",
    }
    return run


def losses(run: Path) -> list[tuple[str, str]]:
    with (run / "metrics.csv").open() as file:
        return [(row["train_loss"], row["validation_loss"]) for row in csv.DictReader(file)]
