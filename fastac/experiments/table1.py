"""Table 1 of Long et al. (CVPR 2018): accuracy on Flash-MNIST by weighting function, shift and cluster size.

A cell is one training run. It has a folder of its own, resumes there if it was interrupted, and adds a row to
the results when it is done. Several processes may work on one table: each takes cells that no other has.
"""

from __future__ import annotations

import csv
import fcntl
import logging
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from fastac import __version__
from fastac.models import AttentionClusterClassifier, ClusterConfig
from fastac.models.flash_mnist import FEATURES
from fastac.training import Trainer, TrainingConfig
from fastac.training.config import OptimizerConfig
from fastac.training.log import MetricsLog

from .flash_mnist import MODALITY, Prepared

logger = logging.getLogger("fastac")

CLUSTER_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
COLUMNS = {
    ("average", False): "average",
    ("fc1", False): "FC1",
    ("fc2", False): "FC2",
    ("fc1", True): "FC1 + shift",
    ("fc2", True): "FC2 + shift",
}
"""The columns of the table by (weighting, shift), with the paper's names."""

PAPER = {
    ("average", False): (0.2, 0.4, 0.6, 0.9, 1.2, 2.4, 5.0, 8.9),
    ("fc1", False): (0.2, 0.2, 2.2, 31.7, 82.3, 83.3, 83.2, 81.8),
    ("fc2", False): (0.2, 0.5, 2.3, 22.5, 82.0, 83.2, 82.4, 80.9),
    ("fc1", True): (51.2, 64.8, 75.9, 80.6, 86.9, 87.1, 87.1, 87.1),
    ("fc2", True): (53.7, 66.8, 76.8, 83.1, 84.9, 85.6, 85.6, 85.7),
}
"""The paper's accuracies in %, one per cluster size."""

ROW = (
    "weighting", "shift", "cluster_size", "seed", "epochs", "accuracy", "seconds", "commit",
    "cnn_epochs", "frame_accuracy", "threads",
)  # fmt: skip
EPOCH_ROW = ("weighting", "shift", "cluster_size", "seed", "cnn_epochs", "epoch", "accuracy", "train_loss")


@dataclass(frozen=True)
class Cell:
    """One training run of the table."""

    weighting: str
    shift: bool
    cluster_size: int
    seed: int
    epochs: int
    cnn_epochs: int = 1

    @property
    def name(self) -> str:
        """The name of its folder."""
        shift = "shift" if self.shift else "noshift"
        return (
            f"{self.weighting}-{shift}-n{self.cluster_size}-seed{self.seed}-epochs{self.epochs}"
            f"-cnn{self.cnn_epochs}"
        )


def default_epochs(cluster_size: int, *, shift: bool) -> int:
    """100 as in the paper, but 30 for 16 and more units with shift, which have settled by then."""
    return 30 if shift and cluster_size >= 16 else 100


def default_seeds(cluster_size: int) -> int:
    """Three seeds for up to 8 units, whose results differ a lot from run to run; else one."""
    return 3 if cluster_size <= 8 else 1


def cells(
    columns: Iterable[tuple[str, bool]],
    cluster_sizes: Iterable[int],
    *,
    seeds: int | None = None,
    epochs: int | None = None,
    cnn_epochs: int = 1,
) -> list[Cell]:
    """The runs of some columns and rows, the quick ones first."""
    sizes = sorted(cluster_sizes)
    columns = list(columns)
    return [
        Cell(weighting, shift, size, seed, epochs or default_epochs(size, shift=shift), cnn_epochs)
        for size in sizes
        for weighting, shift in columns
        for seed in range(1, (seeds or default_seeds(size)) + 1)
    ]


def training_config(cell: Cell) -> TrainingConfig:
    """The authors' settings: Adam with 1e-3, batches of 64, no schedule, no clipping, no weights."""
    return TrainingConfig(
        epochs=cell.epochs,
        batch_size=64,
        optimizer=OptimizerConfig(name="adam", lr=1e-3),
        clip_norm=None,
        class_weights=False,
        seed=cell.seed,
        tensorboard=False,
    )


def make_model(
    weighting: str, cluster_size: int, *, shift: bool, num_classes: int
) -> AttentionClusterClassifier:
    """The classifier of the experiment; "average" repeats the mean so that the last layer keeps its size."""
    cluster = ClusterConfig(in_features=FEATURES, cluster_size=cluster_size, weighting=weighting, shift=shift)
    return AttentionClusterClassifier({MODALITY: cluster}, num_classes, dropout=0.5)


def run(
    wanted: Sequence[Cell],
    prepared: Prepared,
    results: Path,
    runs: Path,
    *,
    device: torch.device | str = "cpu",
) -> None:
    """Trains the cells that ``results`` lacks and no other process is at.

    Args:
        wanted: the cells.
        prepared: the data, made with the cells' ``cnn_epochs``.
        results: a CSV file, one row per cell; beside it, ``*_epochs.csv`` gets one row per epoch.
        runs: a folder for the runs' own folders.
        device: where to train.
    """
    results.parent.mkdir(parents=True, exist_ok=True)
    for cell in wanted:
        directory = runs / cell.name
        directory.mkdir(parents=True, exist_ok=True)
        with _alone(directory / "lock") as alone:
            if not alone:
                logger.info("%s: another process is at it", cell.name)
            elif _has(results, cell):
                logger.info("%s: done before", cell.name)
            else:
                logger.info("%s", cell.name)
                _run_cell(cell, prepared, results, directory, device)


def _run_cell(
    cell: Cell, prepared: Prepared, results: Path, directory: Path, device: torch.device | str
) -> None:
    torch.manual_seed(cell.seed)
    model = make_model(
        cell.weighting, cell.cluster_size, shift=cell.shift, num_classes=prepared.train.num_classes
    )
    config = training_config(cell)
    trainer = Trainer(model, prepared.train, prepared.test, config, directory=directory, device=device)
    if trainer.resume():
        logger.info("%s: resumes after epoch %d", cell.name, trainer.epoch)
    trainer.fit()
    rows = MetricsLog(directory, epochs_done=cell.epochs, tensorboard=False).rows
    accuracies = [100 * float(row["validation_accuracy"]) for row in rows]
    identity = {
        "weighting": cell.weighting,
        "shift": cell.shift,
        "cluster_size": cell.cluster_size,
        "seed": cell.seed,
        "cnn_epochs": cell.cnn_epochs,
    }
    _append(
        results.with_name(f"{results.stem}_epochs.csv"),
        EPOCH_ROW,
        [
            {
                **identity,
                "epoch": row["epoch"],
                "accuracy": f"{accuracy:.2f}",
                "train_loss": f"{float(row['train_loss']):.5f}",
            }
            for row, accuracy in zip(rows, accuracies, strict=True)
        ],
    )
    _append(
        results,
        ROW,
        [
            {
                **identity,
                "epochs": cell.epochs,
                "accuracy": f"{accuracies[-1]:.2f}",
                "seconds": f"{sum(float(row['train_seconds']) for row in rows):.0f}",
                "commit": commit(),
                "frame_accuracy": f"{100 * prepared.frame_accuracy:.2f}",
                "threads": torch.get_num_threads(),
            }
        ],
    )
    logger.info("%s: %.2f %%", cell.name, accuracies[-1])


def read(results: Path) -> pd.DataFrame:
    """The rows done so far, with the columns of ``ROW``; none if there is no file."""
    if not results.is_file():
        return pd.DataFrame(columns=list(ROW))
    return pd.read_csv(results, dtype={"commit": str})


def table(results: Path) -> pd.DataFrame:
    """Our mean, spread and number of runs beside the paper's accuracy, a row per cell that was run or asked for.

    The spread is the sample's standard deviation, absent for one run.
    """
    rows = []
    done = read(results)
    groups = done.groupby(["weighting", "shift", "cluster_size", "cnn_epochs", "epochs"], sort=True)
    for (weighting, shift, size, cnn_epochs, epochs), group in groups:
        paper = PAPER[weighting, bool(shift)][CLUSTER_SIZES.index(size)] if size in CLUSTER_SIZES else None
        mean = group["accuracy"].mean()
        rows.append(
            {
                "column": COLUMNS[weighting, bool(shift)],
                "N": size,
                "epochs": epochs,
                "CNN epochs": cnn_epochs,
                "frame accuracy": group["frame_accuracy"].iloc[0],
                "runs": len(group),
                "ours": mean,
                "spread": group["accuracy"].std(),
                "paper": paper,
                "difference": None if paper is None else mean - paper,
            }
        )
    order = {name: number for number, name in enumerate(COLUMNS.values())}
    frame = pd.DataFrame(rows)
    return (
        frame
        if frame.empty
        else frame.sort_values(["column", "N"], key=lambda s: s.map(order) if s.name == "column" else s)
    )


def commit() -> str:
    """The commit of the checkout this runs from, "-dirty" if it was changed; outside one, the version."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = bool(git("status", "--porcelain", "--untracked-files=no"))
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return f"v{__version__}"


def _has(results: Path, cell: Cell) -> bool:
    done = read(results)
    same = pd.Series(True, index=done.index)
    for name in ("weighting", "shift", "cluster_size", "seed", "epochs", "cnn_epochs"):
        same &= done[name] == getattr(cell, name)
    return bool(same.any())


def _append(path: Path, columns: Sequence[str], rows: Sequence[dict[str, object]]) -> None:
    """Adds rows to a CSV file, with its header if it is new; no other process writes meanwhile."""
    with path.open("a", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(rows)


@contextmanager
def _alone(path: Path) -> Iterator[bool]:
    """Whether this process is the only one that holds ``path``; it holds it meanwhile, and no longer."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
