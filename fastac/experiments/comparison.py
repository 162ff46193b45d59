"""The three systems and the usual ways of pooling side by side: Flash-MNIST, one engine, one budget.

Each system is trained in a folder of its own and resumes there if it was interrupted. The step times are
taken afterwards, all systems in turn in one process. Systems on features get those of the frame CNN, trained
on single frames; the pyramid gets the raw frames, and that CNN as its backbone, which goes on learning.
"""

from __future__ import annotations

import csv
import json
import logging
import os
import platform
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from fastac.data import FeatureArray, FlashMNIST
from fastac.data.flash_mnist import BLOCK
from fastac.models import PyramidClassifier, VideoClassifier
from fastac.provenance import commit, cpu_model
from fastac.training import Trainer
from fastac.training.log import Progress, quiet
from fastac.training.run import RunError, is_run, save_run, write_whole
from fastac.training.systems import (
    AttentionBoostedLSTMSettings,
    AttentionClusterSettings,
    ClusterSettings,
    PoolingSettings,
    PyramidSettings,
    SystemSettings,
)

from .flash_mnist import MODALITY, Prepared, authors_training
from .results import alone

logger = logging.getLogger("fastac")

UNITS = 64
"""Attention units, clusters, queries or score maps of every system that has a number of them."""

MEAN, STD = 0.1307, 0.3081
"""Of MNIST's pixels in [0, 1]: what the frame CNN's inputs are normalised with."""


def _lstm(position: Literal["none", "before", "after"]) -> AttentionBoostedLSTMSettings:
    return AttentionBoostedLSTMSettings(position=position, sequence_length=25, standardize=True)


def _pooling(pooling: Literal["mean", "netvlad", "sdpa"]) -> PoolingSettings:
    return PoolingSettings(pooling=pooling, cluster_size=UNITS, standardize=True)


# The features are log-probabilities, -7.5 on average. The cluster takes them as its authors do. They saturate
# the gates of an LSTM, whose dense layer then dies within an epoch: what is not a cluster standardizes them.
SYSTEMS: dict[str, SystemSettings] = {
    "attention cluster": AttentionClusterSettings(dropout=0.5, cluster=ClusterSettings(cluster_size=UNITS)),
    "bi-LSTM": _lstm("none"),
    "attention, bi-LSTM": _lstm("before"),
    "bi-LSTM, attention": _lstm("after"),
    "mean pooling": _pooling("mean"),
    "NetVLAD": _pooling("netvlad"),
    "learned queries (SDPA)": _pooling("sdpa"),
    "pyramid attention": PyramidSettings(
        frame_shape=[1, 28, 28],
        pixel_mean=255 * MEAN,
        pixel_std=255 * STD,
        backbone="frame-cnn",
        cluster_size=UNITS,
    ),
}
"""The rows of the table."""

ROW = (
    "system", "accuracy", "parameters", "step_ms", "epochs", "batch_size", "seed", "train_videos",
    "test_videos", "digits", "frame_accuracy", "train_seconds", "train_threads", "commit", "timed_commit",
    "date", "device", "cpu", "threads", "torch", "python", "load_average",
)  # fmt: skip
ENTRY, DONE = "system.json", "done.json"


@dataclass(frozen=True)
class Budget:
    """What every system gets.

    Attributes:
        epochs: passes over the training videos.
        seed: of initial values, order and dropout.
    """

    epochs: int = 3
    seed: int = 1


def folder_name(system: str) -> str:
    """The name of a system's folder."""
    return "".join(c if c.isalnum() else "-" for c in system.lower()).strip("-").replace("--", "-")


def takes_frames(settings: SystemSettings) -> bool:
    """Whether a system takes raw frames rather than features."""
    return isinstance(settings, PyramidSettings)


def render(videos: FlashMNIST) -> npt.NDArray[np.uint8]:
    """All frames of a split, ``(V, L, 784)`` uint8: 2 GB for the full training set."""
    frames = np.empty((len(videos), videos.length, 784), dtype=np.uint8)

    def fill(number: int) -> int:
        block = videos.block(number)
        frames[number * BLOCK : number * BLOCK + len(block)] = block.reshape(*block.shape[:2], 784)
        return len(block)

    with (
        Progress("frames", len(videos), "videos") as progress,
        ThreadPoolExecutor(torch.get_num_threads()) as pool,
    ):
        for done in pool.map(fill, range(videos.num_blocks)):
            progress.advance(done)
    return frames


class Data:
    """Both splits of Flash-MNIST as features, and as frames once they are asked for."""

    def __init__(self, prepared: Prepared) -> None:
        self.prepared = prepared
        self._frames: tuple[FeatureArray, FeatureArray] | None = None

    def of(self, settings: SystemSettings) -> tuple[FeatureArray, FeatureArray]:
        """What a system trains and is tested on."""
        prepared = self.prepared
        if not takes_frames(settings):
            return prepared.train, prepared.test
        if self._frames is None:
            train, test = (
                FeatureArray({MODALITY: render(videos)}, videos.set_labels, prepared.train.class_names)
                for videos in (prepared.train_videos, prepared.test_videos)
            )
            self._frames = train, test
        return self._frames


def make_model(settings: SystemSettings, data: Data, seed: int) -> VideoClassifier:
    """The untrained model; the pyramid's backbone begins as the CNN that made the others' features."""
    torch.manual_seed(seed)
    model = settings.build(data.of(settings)[0])
    if isinstance(model, PyramidClassifier):
        cnn = data.prepared.cnn.state_dict()
        model.backbone.load_state_dict({name: cnn[name] for name in model.backbone.state_dict()})
    return model


def run(
    systems: Sequence[str],
    data: Data,
    budget: Budget,
    runs: Path,
    *,
    device: torch.device | str = "cpu",
) -> list[str]:
    """Trains the systems that are not done and that no other process is at; returns those that are done.

    Args:
        systems: names, of `SYSTEMS`.
        data: what to train on.
        budget: of every system.
        runs: a folder for the systems' own folders.
        device: where to train.

    Raises:
        RunError: a folder holds a run of other settings or of more epochs.
    """
    made_by = commit()  # of the code that runs; the checkout may go on meanwhile
    done = []
    for system in systems:
        directory = runs / folder_name(system)
        with alone(directory) as is_alone:
            if not is_alone:
                logger.info("%s: another process is at it", system)
                continue
            if _is_done(directory, system, data.prepared, budget):
                logger.info("%s: done before", system)
            else:
                _train(directory, system, data, budget, device, made_by)
            done.append(system)
    return done


def _entry(system: str, prepared: Prepared, budget: Budget) -> dict[str, Any]:
    """What tells a system's run from others; a run of more epochs is the same, gone on with."""
    recipe = {f"data_{name}": value for name, value in asdict(prepared.recipe).items()}
    settings = SYSTEMS[system].model_dump(mode="json")
    return {"system": system, "seed": budget.seed, "digits": prepared.digits, **recipe, "settings": settings}


def _is_done(directory: Path, system: str, prepared: Prepared, budget: Budget) -> bool:
    """Whether a folder has the finished run. Raises: RunError if it has another one, or a longer one."""
    now = _entry(system, prepared, budget)
    path = directory / ENTRY
    if path.is_file():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RunError(f"{path} cannot be read: {error}") from error
        differing = [name for name in now if before.get(name) != now[name]]
        if differing:
            raise RunError(
                f"{directory} holds a run of other settings, which needs another --output: "
                + ", ".join(f"{name} was {before.get(name)}, is {now[name]}" for name in differing)
            )
    elif is_run(directory):
        raise RunError(f"{directory} holds a run of something else: it has no {ENTRY}")
    else:
        write_whole(path, json.dumps(now, indent=1) + "\n")
    path = directory / DONE
    epochs = json.loads(path.read_text(encoding="utf-8"))["epochs"] if path.is_file() else 0
    if epochs > budget.epochs:
        raise RunError(f"{directory} holds a run of {epochs} epochs, more than the {budget.epochs} asked for")
    return bool(epochs == budget.epochs)


def _train(
    directory: Path, system: str, data: Data, budget: Budget, device: torch.device | str, made_by: str
) -> None:
    settings = SYSTEMS[system]
    train, test = data.of(settings)
    model = make_model(settings, data, budget.seed)
    save_run(directory, model, train.class_names, None)
    config = authors_training(budget.epochs, budget.seed)
    trainer = Trainer(model, train, test, config, directory=directory, device=device)
    if trainer.resume():
        logger.info("%s: resumes after epoch %d", system, trainer.epoch)
    logger.info("%s: %s parameters", system, f"{_parameters(model):,}")
    trainer.fit()
    with (directory / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    outcome = {
        "epochs": budget.epochs,
        "accuracy": 100 * float(rows[-1]["validation_accuracy"]),
        "train_seconds": sum(float(row["train_seconds"]) for row in rows),
        "commit": made_by,
        "threads": torch.get_num_threads(),
    }
    write_whole(directory / DONE, json.dumps(outcome, indent=1) + "\n")
    logger.info("%s: %.2f %%", system, outcome["accuracy"])


def _parameters(model: VideoClassifier) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def step_seconds(
    systems: Sequence[str],
    data: Data,
    *,
    rounds: int = 6,
    steps: int = 20,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Median seconds of a training step of each system, in rounds in which all take their turn.

    A round is an epoch of the engine on the first ``steps`` batches (or all, if they are fewer), reading them
    included. The first one
    warms up and is not timed. The order turns around from round to round.

    Raises:
        ValueError: a count out of range.
    """
    if rounds < 2 or steps < 1:
        raise ValueError(f"rounds must be at least 2 and steps at least 1, got {rounds} and {steps}")
    trainers, taken = {}, {}
    for system in systems:
        train, _ = data.of(SYSTEMS[system])
        batch_size = authors_training(1, 1).batch_size
        head = train.head(min(steps * batch_size, len(train)))
        taken[system] = -(-len(head) // batch_size)
        trainers[system] = Trainer(
            make_model(SYSTEMS[system], data, 1),
            head,
            None,
            authors_training(1, 1),
            device=device,
            show_progress=False,
        )
    seconds: dict[str, list[float]] = {system: [] for system in systems}
    with quiet(), Progress("step times", rounds * len(systems), "rounds") as progress:
        for number in range(1, rounds + 1):
            for system in systems if number % 2 else reversed(systems):
                trainer = trainers[system]
                trainer.config = trainer.config.model_copy(update={"epochs": number})
                (result,) = trainer.fit()
                seconds[system].append(result.values["train_seconds"] / taken[system])
                progress.advance(1)
    return {system: statistics.median(times[1:]) for system, times in seconds.items()}


def record(
    results: Path,
    systems: Sequence[str],
    data: Data,
    budget: Budget,
    runs: Path,
    times: dict[str, float],
    *,
    device: torch.device | str = "cpu",
) -> pd.DataFrame:
    """Writes one row per system that was trained, in the order of `SYSTEMS`; returns them.

    Args:
        results: a CSV file, which is replaced.
        systems: done, as `run` returned them.
        data, budget, runs: of the training.
        times: of `step_seconds`.
        device: where they were taken.
    """
    device = torch.device(device)
    prepared = data.prepared
    rows = []
    for system in (name for name in SYSTEMS if name in systems):
        outcome = json.loads((runs / folder_name(system) / DONE).read_text(encoding="utf-8"))
        model = make_model(SYSTEMS[system], data, budget.seed)
        rows.append(
            {
                "system": system,
                "accuracy": round(outcome["accuracy"], 2),
                "parameters": _parameters(model),
                "step_ms": round(1e3 * times[system], 2),
                "epochs": budget.epochs,
                "batch_size": authors_training(1, 1).batch_size,
                "seed": budget.seed,
                "train_videos": len(prepared.train),
                "test_videos": len(prepared.test),
                "digits": prepared.digits,
                "frame_accuracy": round(100 * prepared.frame_accuracy, 2),
                "train_seconds": round(outcome["train_seconds"]),
                "train_threads": outcome["threads"],
                "commit": outcome["commit"],
                "timed_commit": commit(),
                "date": time.strftime("%Y-%m-%d"),
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
                "cpu": cpu_model(),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "python": platform.python_version(),
                "load_average": round(os.getloadavg()[0], 1),
            }
        )
    table: pd.DataFrame = pd.DataFrame(rows, columns=list(ROW))
    results.parent.mkdir(parents=True, exist_ok=True)
    write_whole(results, table.to_csv(index=False, lineterminator="\n"))
    return table


def as_text(table: pd.DataFrame) -> str:
    """The columns that are compared, to print."""
    shown = table[["system", "accuracy", "parameters", "step_ms"]]
    formatters: dict[str, Any] = {"parameters": "{:,}".format, "accuracy": "{:.1f}".format}
    formatters["step_ms"] = "{:.1f}".format
    return str(shown.to_string(index=False, formatters=formatters))
