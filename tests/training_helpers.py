"""Small data for the training engine, and runs of it in processes of their own.

``python training_helpers.py train DIRECTORY [KILL_AT]`` trains with dropout and checkpoints; ``KILL_AT`` is
``epoch`` or ``checkpoint``, where the process sends itself SIGKILL. ``python training_helpers.py processes
DIRECTORY`` is what torchrun starts: every case of `CASES`, each in a folder of its own. ``python
training_helpers.py wait DIRECTORY [WORKERS]`` stands still in the second epoch.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastac.data import FeatureBatch
from fastac.models import AttentionClusterClassifier, ClusterConfig
from fastac.training import (
    OptimizerConfig,
    RunLockedError,
    Trainer,
    TrainingConfig,
    checkpoint,
    distributed,
    predict,
)

EPOCHS = 4
KILL_EPOCH, KILL_STEP = 2, 3
CLASSES = 7
MODALITIES = {"rgb": 6, "audio": 5}


class RaggedFeatures:
    """Videos with 1 to 9 features of rgb and 0 to 4 of audio; the class is planted in their means."""

    def __init__(
        self, count: int, *, seed: int = 0, multi_label: bool = False, without: Sequence[str] = ()
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.multi_label, self.num_classes = multi_label, CLASSES
        self.modalities = MODALITIES
        self.class_names = [f"class {number}" for number in range(CLASSES)]
        self.names = [f"video {number}" for number in range(count)]
        planted = {m: torch.randn(CLASSES, d, generator=generator) for m, d in MODALITIES.items()}
        classes = torch.randint(CLASSES, (count,), generator=generator)
        self.labels: Tensor | None = classes
        if multi_label:
            other = torch.randint(CLASSES, (count,), generator=generator)
            self.labels = torch.zeros(count, CLASSES)
            self.labels[torch.arange(count), classes] = 1
            self.labels[torch.arange(count), other] = 1
        self.videos = []
        for number in range(count):
            lengths = {
                "rgb": int(torch.randint(1, 10, (), generator=generator)),
                "audio": int(torch.randint(0, 5, (), generator=generator)),
            }
            self.videos.append(
                {
                    m: planted[m][classes[number]]
                    + torch.randn(0 if m in without else lengths[m], d, generator=generator)
                    for m, d in MODALITIES.items()
                }
            )
        self.epochs: list[int] = []

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, number: int) -> int:
        return number

    def collate(self, numbers: Sequence[int]) -> FeatureBatch:
        assert numbers, "FeatureSetDataset refuses to make a batch of nothing, too"
        index = torch.tensor(numbers, dtype=torch.int64)
        batch = FeatureBatch({}, None if self.labels is None else self.labels[index], index)
        for m, d in MODALITIES.items():
            sets = [self.videos[number][m] for number in numbers]
            lengths = torch.tensor([0, *map(len, sets)])
            batch.features[m] = torch.cat([torch.empty(0, d), *sets])
            batch.offsets[m] = lengths.cumsum(0)
            batch.max_length[m] = int(lengths.max())
        return batch

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def mean_features(self) -> dict[str, Tensor]:
        return {m: torch.cat([video[m] for video in self.videos]).mean(0) for m in MODALITIES}

    def class_counts(self) -> Tensor:
        assert self.labels is not None
        return self.labels.sum(0).long() if self.multi_label else self.labels.bincount(minlength=CLASSES)


def make_model(
    *, seed: int = 1, dropout: float = 0.5, multi_label: bool = False, cluster_size: int = 3
) -> AttentionClusterClassifier:
    """The real model, whose mean features are known."""
    torch.manual_seed(seed)
    clusters = {m: ClusterConfig(in_features=d, cluster_size=cluster_size) for m, d in MODALITIES.items()}
    model = AttentionClusterClassifier(clusters, CLASSES, dropout=dropout, multi_label=multi_label)
    model.set_means({m: torch.linspace(-0.5, 1, d) for m, d in MODALITIES.items()})
    return model


def state_of(directory: Path, which: str = "last") -> dict[str, Tensor]:
    """The parameters of a checkpoint in a run's folder."""
    model = make_model(seed=99)
    checkpoint.load_model(directory / "checkpoints", model, which)
    return model.state_dict()


def run_settings(**changes: Any) -> TrainingConfig:
    """Of the run that is killed; odd sizes, two pieces a batch."""
    settings: dict[str, Any] = {"epochs": EPOCHS, "batch_size": 9, "accumulation": 2, "seed": 3}
    return TrainingConfig(**{**settings, **changes})


def run_data() -> tuple[RaggedFeatures, RaggedFeatures]:
    """Of the run that is killed."""
    return RaggedFeatures(41, seed=5), RaggedFeatures(13, seed=6)


class KilledInEpoch(RaggedFeatures):
    """Data that end the process in the middle of an epoch."""

    def collate(self, numbers: Sequence[int]) -> FeatureBatch:
        self.asked = getattr(self, "asked", 0) + (self.epochs[-1] == KILL_EPOCH)
        if self.asked == KILL_STEP:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().collate(numbers)


def kill_in_checkpoint(epoch: int) -> None:
    """The process ends when the optimizer's state of ``epoch`` is half written."""
    whole = Path.write_bytes

    def half(path: Path, content: Any) -> int:
        if path.name == checkpoint.OPTIMIZER and f"{epoch:04d}" in str(path):
            whole(path, content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(path, content)

    Path.write_bytes = half


def train(directory: Path, kill_at: str | None) -> None:
    """Trains, or goes on to train, up to the last epoch or the kill."""
    train_data, validation_data = run_data()
    if kill_at == "epoch":
        train_data.__class__ = KilledInEpoch
    elif kill_at == "checkpoint":
        kill_in_checkpoint(KILL_EPOCH + 1)
    trainer = Trainer(make_model(), train_data, validation_data, run_settings(), directory=directory)
    trainer.resume()
    trainer.fit()


class Waits(RaggedFeatures):
    """Data that nobody gets in the second epoch; the file then has the number of the process that waits."""

    def __init__(self, file: Path) -> None:
        super().__init__(41, seed=5)
        self.file = file

    def collate(self, numbers: Sequence[int]) -> FeatureBatch:
        if self.epochs[-1] == 2:
            written = self.file.with_suffix(".part")
            written.write_text(str(os.getpid()))
            written.rename(self.file)
            time.sleep(600)
        return super().collate(numbers)


def wait(directory: Path, workers: int) -> None:
    """Trains for an epoch and waits for ever; ``waiting`` beside the folder says that it is so far."""
    settings = run_settings(workers=workers, tensorboard=False)
    data = Waits(directory.with_name("waiting"))
    Trainer(make_model(), data, run_data()[1], settings, directory=directory).fit()


@dataclass(frozen=True)
class Case:
    """A run that one process and several must agree on."""

    train_videos: int
    validation_videos: int
    multi_label: bool = False
    without: tuple[str, ...] = ()
    settings: tuple[tuple[str, Any], ...] = ()
    epochs: tuple[int, ...] = (3,)
    seed: int = 1


CASES = {
    # 7 does not divide by 2, and the last batch, of 1 video, leaves one process without any.
    "odd": Case(29, 1, settings=(("batch_size", 7),)),
    "pieces": Case(29, 12, settings=(("batch_size", 7), ("accumulation", 3))),
    "other seed": Case(29, 12, settings=(("batch_size", 7), ("accumulation", 3)), seed=2),
    # A set of one, the mean, gives its scores no gradient but rounding, which RMSProp would make steps of.
    "no audio": Case(
        12,
        3,
        without=("audio",),
        settings=(
            ("batch_size", 6),
            ("accumulation", 3),
            ("optimizer", OptimizerConfig(name="sgd", lr=0.1, momentum=0.5)),
        ),
    ),
    "multi-label": Case(16, 1, multi_label=True, settings=(("batch_size", 5),)),
    "resumed": Case(20, 9, settings=(("batch_size", 8),), epochs=(1, 3)),
    "two batches": Case(20, 9, settings=(("batch_size", 8), ("evaluation_batch_size", 2), ("workers", 1))),
}


def run_case(case: Case, directory: Path) -> dict[str, Any]:
    """Trains, evaluates and predicts; what came out, as JSON can hold it."""
    data = [
        RaggedFeatures(count, seed=5 + number, multi_label=case.multi_label, without=case.without)
        for number, count in enumerate((case.train_videos, case.validation_videos))
    ]
    rank = distributed.current().rank
    values = []
    for stop in case.epochs:
        # Each process starts from another model: rank 0's counts.
        model = make_model(seed=case.seed + 10 * rank, dropout=0, multi_label=case.multi_label)
        if rank:
            model.set_means({m: torch.zeros(d) for m, d in MODALITIES.items()})
        optimizer = OptimizerConfig(name="rmsprop", momentum=0.5)
        settings: dict[str, Any] = {"optimizer": optimizer, "seed": case.seed, **dict(case.settings)}
        config = TrainingConfig(epochs=stop, tensorboard=False, **settings)
        trainer = Trainer(model, data[0], data[1], config, directory=directory, show_progress=False)
        resumed = trainer.resume()
        assert resumed == (stop != case.epochs[0])
        values += [result.values for result in trainer.fit()]
    for row in values:
        del row["train_seconds"]
    predicted = {
        int(number): p.tolist()
        for batch, scores in predict(model, data[1])
        for number, p in zip(batch.index, scores, strict=True)
    }
    state = {name: tensor.tolist() for name, tensor in model.state_dict().items()}
    return {"values": values, "state": state, "predicted": predicted}


def processes(directory: Path) -> None:
    """Every case, in a group of processes."""
    with distributed.process_group(torch.device("cpu")) as group:
        for name, case in CASES.items():
            result = run_case(case, directory / name)
            (directory / f"{name}.{group.rank}.json").write_text(json.dumps(result))


class OneFails(RaggedFeatures):
    """Data that the process of rank 1 cannot read from the second epoch on."""

    def collate(self, numbers: Sequence[int]) -> FeatureBatch:
        if distributed.current().rank == 1 and self.epochs[-1] == 2:
            raise OSError("the disk of process 1 is gone")
        return super().collate(numbers)


def one_fails(directory: Path) -> None:
    """Process 1 fails in the second epoch, after one where it was told to resume what it does not see."""
    with distributed.process_group(torch.device("cpu")) as group:
        data = RaggedFeatures(12)
        config = TrainingConfig(epochs=2, batch_size=4, tensorboard=False)
        Trainer(make_model(), data, None, config.model_copy(update={"epochs": 1}), directory=directory).fit()
        elsewhere = directory if group.first else directory / "elsewhere"
        try:
            Trainer(make_model(), data, None, config, directory=elsewhere).resume()
        except checkpoint.CheckpointError as error:
            (directory / f"refused.{group.rank}").write_text(str(error))
        trainer = Trainer(make_model(), OneFails(12), None, config, directory=directory)
        trainer.resume()
        trainer.fit()


def refused(directory: Path) -> None:
    """Every process writes down why it may not train in ``run``."""
    with distributed.process_group(torch.device("cpu")) as group:
        config = TrainingConfig(epochs=1, tensorboard=False)
        trainer = Trainer(make_model(), RaggedFeatures(12), None, config, directory=directory / "run")
        try:
            trainer.fit()
        except RunLockedError as error:
            (directory / f"refused.{group.rank}").write_text(str(error))


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    command, folder, *more = sys.argv[1:]
    if command == "train":
        train(Path(folder), more[0] if more else None)
    elif command == "processes":
        processes(Path(folder))
    elif command == "one-fails":
        one_fails(Path(folder))
    elif command == "refused":
        refused(Path(folder))
    elif command == "wait":
        wait(Path(folder), int(more[0]) if more else 0)
    else:
        raise SystemExit(f"no command {command}")
