"""Table 1 of Long et al. (CVPR 2018): accuracy on Flash-MNIST by weighting function, shift and cluster size.

A cell is one training run. It has a folder of its own, resumes there if it was interrupted, and adds a row to
the results when it is done. Several processes may work on one table: each takes cells that no other has.
"""

from __future__ import annotations

import csv
import json
import logging
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from fastac.models import AttentionClusterClassifier, ClusterConfig
from fastac.models.frame_cnn import FEATURES
from fastac.provenance import commit
from fastac.training import Trainer
from fastac.training.run import RunError, is_run, save_run, write_whole

from .flash_mnist import MODALITY, Prepared, Recipe, authors_training
from .results import alone, append

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
    ("fc1", False): (0.2, 0.4, 2.2, 31.7, 82.3, 83.3, 83.2, 81.8),
    ("fc2", False): (0.2, 0.5, 2.3, 22.5, 82.0, 83.2, 82.4, 80.9),
    ("fc1", True): (51.2, 64.8, 75.9, 80.6, 86.9, 87.1, 87.1, 87.1),
    ("fc2", True): (53.7, 66.8, 76.8, 83.1, 84.9, 85.6, 85.6, 85.7),
}
"""The paper's accuracies in %, one per cluster size."""

ROW = (
    "weighting", "shift", "cluster_size", "seed", "epochs", "accuracy", "seconds", "commit",
    "cnn_epochs", "frame_accuracy", "threads",
)  # fmt: skip
IDENTITY = ("weighting", "shift", "cluster_size", "seed", "cnn_epochs")
"""With ``epochs``, what tells one cell's row from another's."""

EPOCH_ROW = ("weighting", "shift", "cluster_size", "seed", "cnn_epochs", "epoch", "accuracy", "train_loss")
TABLE = (
    "column", "N", "epochs", "CNN epochs", "frame accuracy", "runs", "ours", "spread", "paper", "difference",
)  # fmt: skip
CELL = "cell.json"


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


def make_model(
    weighting: str, cluster_size: int, *, shift: bool, num_classes: int
) -> AttentionClusterClassifier:
    """The classifier of the experiment; "average" repeats the mean so that the last layer keeps its size."""
    cluster = ClusterConfig(in_features=FEATURES, cluster_size=cluster_size, weighting=weighting, shift=shift)
    return AttentionClusterClassifier({MODALITY: cluster}, num_classes, dropout=0.5)


def paper_accuracy(weighting: str, cluster_size: int, *, shift: bool) -> float | None:
    """The paper's accuracy in %, or None where its table has no such cell."""
    column = PAPER.get((weighting, shift))
    if column is None or cluster_size not in CLUSTER_SIZES:
        return None
    return column[CLUSTER_SIZES.index(cluster_size)]


def train_cell(
    cell: Cell, prepared: Prepared, directory: Path, *, device: torch.device | str = "cpu"
) -> list[dict[str, str]]:
    """Trains one cell in its folder, from where it was if interrupted; returns the rows of metrics.csv.

    `fastac.training.run.load_run` then opens the folder.

    Raises:
        RunError: the folder holds a run of other settings or of more epochs.
    """
    torch.manual_seed(cell.seed)
    model = make_model(
        cell.weighting, cell.cluster_size, shift=cell.shift, num_classes=prepared.train.num_classes
    )
    check_same(directory, cell, prepared.digits, prepared.recipe)
    directory.mkdir(parents=True, exist_ok=True)
    settings = _settings(cell, prepared.digits, prepared.recipe)
    write_whole(directory / CELL, json.dumps(settings, indent=1) + "\n")
    save_run(directory, model, prepared.train.class_names, None)
    trainer = Trainer(
        model,
        prepared.train,
        prepared.test,
        authors_training(cell.epochs, cell.seed),
        directory=directory,
        device=device,
    )
    if trainer.resume():
        logger.info("%s: resumes after epoch %d", cell.name, trainer.epoch)
    if trainer.epoch > cell.epochs:
        raise RunError(
            f"{directory} holds a run of {trainer.epoch} epochs, more than the {cell.epochs} asked for"
        )
    trainer.fit()
    with (directory / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


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

    Raises:
        ValueError: data that are not the paper's, whose rows would be taken for those of the paper's; or
            another number of the CNN's epochs than a cell's.
        RunError: results with other columns.
    """
    if not prepared.as_the_authors:
        raise ValueError(
            f"prepared must be the paper's data set for Table 1, got {prepared.digits}, {prepared.recipe}"
        )
    for cell in wanted:
        if cell.cnn_epochs != prepared.recipe.cnn_epochs:
            raise ValueError(
                f"prepared must be of cnn_epochs = {cell.cnn_epochs} for {cell.name}, "
                f"got {prepared.recipe.cnn_epochs}"
            )
    results.parent.mkdir(parents=True, exist_ok=True)
    made_by = commit()  # of the code that runs; the checkout may go on while cells are trained
    for number, cell in enumerate(wanted):
        directory = runs / cell.name
        with alone(directory) as is_alone:
            if not is_alone:
                logger.info("%s: another process is at it", cell.name)
                continue
            done = read(results)
            if has(done, cell):
                logger.info("%s: done before", cell.name)
                continue
            left = sum(not has(done, other) for other in wanted[number:])
            logger.info("%s: cell %d of %d, %d left to train", cell.name, number + 1, len(wanted), left)
            rows = train_cell(cell, prepared, directory, device=device)
            _record(results, cell, rows, prepared.frame_accuracy, made_by)
            logger.info("%s: %.2f %%", cell.name, 100 * float(rows[-1]["validation_accuracy"]))


def _record(
    results: Path, cell: Cell, rows: list[dict[str, str]], frame_accuracy: float, made_by: str
) -> None:
    """Adds a cell's rows: first those of its epochs, so that a cell in the results has all of them."""
    identity = {name: getattr(cell, name) for name in IDENTITY}
    accuracies = [100 * float(row["validation_accuracy"]) for row in rows]
    append(
        epochs_path(results),
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
        # The epochs of a run that was longer are the same: there is no schedule.
        key=(*IDENTITY, "epoch"),
    )
    append(
        results,
        ROW,
        [
            {
                **identity,
                "epochs": cell.epochs,
                "accuracy": f"{accuracies[-1]:.2f}",
                "seconds": f"{sum(float(row['train_seconds']) for row in rows):.0f}",
                "commit": made_by,
                "frame_accuracy": f"{100 * frame_accuracy:.2f}",
                "threads": torch.get_num_threads(),
            }
        ],
        key=(*IDENTITY, "epochs"),
    )


def epochs_path(results: Path) -> Path:
    """The file with one row per epoch that belongs to a file of results."""
    return results.with_name(f"{results.stem}_epochs.csv")


def read(results: Path) -> pd.DataFrame:
    """The rows done so far, with the columns of ``ROW``; none if there is no file.

    Raises:
        RunError: the file has other columns.
    """
    if not results.is_file() or not results.stat().st_size:  # empty: another process is about to write
        none: pd.DataFrame = pd.DataFrame([], columns=list(ROW))
        return none
    done: pd.DataFrame = pd.read_csv(results, dtype={"commit": str})
    if tuple(done.columns) != ROW:
        raise RunError(f"{results} must have the columns {','.join(ROW)}, got {','.join(done.columns)}")
    return done


def has(done: pd.DataFrame, cell: Cell) -> bool:
    """Whether rows that `read` gave have this cell."""
    same = pd.Series(True, index=done.index)
    for name in (*IDENTITY, "epochs"):
        same &= done[name] == getattr(cell, name)
    return bool(same.any())


def table(results: Path) -> pd.DataFrame:
    """Our mean, spread and number of runs beside the paper's accuracy, in %.

    A row per column of the paper's table, cluster size, epochs and epochs of the CNN that were run. The
    spread is the sample's standard deviation, NaN for one run; the paper's accuracy is NaN for another
    cluster size than its own.
    """
    groups: dict[tuple[int, int, int, int], list[tuple[float, float]]] = {}
    order = list(COLUMNS)
    for row in read(results).to_dict("records"):
        column = order.index((str(row["weighting"]), bool(row["shift"])))
        group = (column, int(row["cluster_size"]), int(row["cnn_epochs"]), int(row["epochs"]))
        groups.setdefault(group, []).append((float(row["accuracy"]), float(row["frame_accuracy"])))
    rows = []
    for (column, size, cnn_epochs, epochs), runs in sorted(groups.items()):
        weighting, shift = order[column]
        accuracies = [accuracy for accuracy, _ in runs]
        mean = statistics.fmean(accuracies)
        paper = paper_accuracy(weighting, size, shift=shift)
        rows.append(
            {
                "column": COLUMNS[weighting, shift],
                "N": size,
                "epochs": epochs,
                "CNN epochs": cnn_epochs,
                "frame accuracy": statistics.fmean(frames for _, frames in runs),
                "runs": len(runs),
                "ours": mean,
                "spread": statistics.stdev(accuracies) if len(runs) > 1 else math.nan,
                "paper": math.nan if paper is None else paper,
                "difference": math.nan if paper is None else mean - paper,
            }
        )
    frame: pd.DataFrame = pd.DataFrame(rows, columns=list(TABLE))
    return frame


def as_text(frame: pd.DataFrame) -> str:
    """A `table` to print: one digit after the point, what is not known left blank."""
    formatters = dict.fromkeys(("frame accuracy", "ours", "spread", "paper"), "{:.1f}".format)
    formatters["difference"] = "{:+.1f}".format
    return str(frame.to_string(index=False, na_rep="", formatters=formatters))


def check_same(directory: Path, cell: Cell, digits: str, recipe: Recipe) -> None:
    """Whether a folder is new or of this cell and these data; the epochs alone may differ.

    Raises:
        RunError: what differs.
    """
    path = directory / CELL
    if path.is_file():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RunError(f"{path} cannot be read: {error}") from error
        now = _settings(cell, digits, recipe)
        differing = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
        if differing:
            raise RunError(
                f"{directory} holds a run of other settings, which needs a folder of its own: "
                + ", ".join(f"{name} was {before.get(name)}, is {now.get(name)}" for name in differing)
            )
    elif is_run(directory):
        raise RunError(f"{directory} holds a run of something else: it has no {CELL}")


def _settings(cell: Cell, digits: str, recipe: Recipe) -> dict[str, Any]:
    """What tells a run's folder from another's."""
    data = asdict(recipe)
    data["data_seed"] = data.pop("seed")
    return {**{name: getattr(cell, name) for name in IDENTITY}, "digits": digits, **data}


def read_recipe(directory: Path) -> tuple[str, Recipe]:
    """The digits' name and the recipe of the data that a cell's folder was trained on.

    Raises:
        RunError: the folder is not of a cell.
    """
    try:
        content = json.loads((directory / CELL).read_text(encoding="utf-8"))
        return str(content["digits"]), Recipe(
            seed=content["data_seed"],
            **{name: content[name] for name in ("train_videos", "test_videos", "cnn_frames", "cnn_epochs")},
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{directory} is not the folder of a run of fastac flash-mnist: {CELL}: {error}"
        ) from error
