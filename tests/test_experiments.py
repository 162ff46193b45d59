"""Flash-MNIST's recipe and cache, Table 1 cell by cell, the comparison with plain torch, the command."""

from __future__ import annotations

import csv
import errno
import logging
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastac.cli import flash_mnist as command_module
from fastac.cli import main
from fastac.data import Digits, FeatureArray, FlashMNIST, NoiseSampler, load_digits28
from fastac.data.flash_mnist import NOISE
from fastac.experiments import flash_mnist, results, speed, table1
from fastac.experiments.flash_mnist import MODALITY, Prepared, Recipe, class_names, prepare
from fastac.experiments.table1 import Cell
from fastac.models import AttentionClusterClassifier, FrameCNN
from fastac.training import OptimizerConfig, Trainer, TrainingConfig
from fastac.training.run import RunError, load_run

pytestmark = pytest.mark.xdist_group("experiments")  # what is built once is shared

SETS, LENGTH = 32, 12
"""Of the small data: sets of five digits."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def digits() -> Digits:
    return load_digits28()


def features_of(videos: FlashMNIST) -> np.ndarray:
    """Local features as a good CNN gives them: one unit per digit, a little noise."""
    generator = np.random.default_rng(len(videos))
    values = generator.normal(0, 0.1, (len(videos), videos.length, 50)).astype(np.float32)
    values[..., :11] += 8 * np.eye(11, dtype=np.float32)[videos.frame_labels]
    return torch.from_numpy(values).log_softmax(-1).numpy()


@pytest.fixture(scope="module")
def small(digits: Digits) -> Prepared:
    """Data of five digits that pass for the paper's, with features nobody had to extract."""
    noise = NoiseSampler(digits)
    train, test = (
        FlashMNIST(
            digits.train_images,
            digits.train_labels,
            noise,
            videos_per_set=count,
            seed=seed,
            length=LENGTH,
            num_digits=5,
        )
        for seed, count in ((1, 6), (2, 2))
    )
    arrays = [
        FeatureArray({MODALITY: features_of(videos)}, videos.set_labels, class_names(SETS))
        for videos in (train, test)
    ]
    return Prepared(train, test, arrays[0], arrays[1], 0.97, "mnist", Recipe())


@contextmanager
def watched(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """The package's log goes to caplog, whatever the command line has made of the logger."""
    logger = logging.getLogger("fastac")
    before = logger.level, logger.propagate
    logger.addHandler(caplog.handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(caplog.handler)
        logger.level, logger.propagate = before


# The recipe


def test_the_recipe_is_the_authors() -> None:
    recipe = Recipe()
    assert (recipe.train_videos, recipe.test_videos) == (100, 10)
    assert (recipe.cnn_frames, recipe.cnn_epochs) == (300_000, 1)
    assert not recipe.reduced
    assert "102,400 videos for training, 10,240 for testing" in recipe.describe()
    assert "a full set" in recipe.describe()


@pytest.mark.parametrize("less", [{"train_videos": 99}, {"test_videos": 9}, {"cnn_frames": 299_999}])
def test_less_is_a_reduced_set(less: dict[str, int], small: Prepared) -> None:
    recipe = Recipe(**less)
    assert recipe.reduced
    assert "a reduced set, the paper's has 100 and 10" in recipe.describe()
    assert small.as_the_authors
    changed = Prepared(**{**vars(small), "recipe": recipe})
    assert not changed.as_the_authors


def test_other_digits_or_another_seed_are_not_the_papers_data(small: Prepared) -> None:
    assert Prepared(**{**vars(small), "recipe": Recipe(cnn_epochs=10)}).as_the_authors
    assert not Prepared(**{**vars(small), "recipe": Recipe(seed=2)}).as_the_authors
    assert not Prepared(**{**vars(small), "digits": "digits"}).as_the_authors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_videos": 0}, "train_videos must be at least 1, got 0"),
        ({"cnn_epochs": 0}, "cnn_epochs must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ],
)
def test_counts_out_of_range(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(**change)


def test_names_of_the_sets() -> None:
    assert class_names(8) == ["{}", "{0}", "{1}", "{0 1}", "{2}", "{0 2}", "{1 2}", "{0 1 2}"]
    assert class_names(1024)[1023] == "{0 1 2 3 4 5 6 7 8 9}"


def test_the_frame_cnn_is_the_authors() -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in FrameCNN().state_dict().items()}
    assert shapes == {
        "conv1.weight": (10, 1, 5, 5),
        "conv1.bias": (10,),
        "conv2.weight": (20, 10, 5, 5),
        "conv2.bias": (20,),
        "fc.weight": (50, 320),
        "fc.bias": (50,),
        "head.weight": (11, 50),
        "head.bias": (11,),
    }
    cnn = FrameCNN()
    assert (cnn.drop2d.p, cnn.drop.p) == (0.5, 0.5)


def test_the_classifier_and_its_training_are_the_authors() -> None:
    model = table1.make_model("fc1", 64, shift=True, num_classes=1024)
    assert model.fc.weight.shape == (1024, 50 * 64)
    assert model.dropout.p == 0.5
    config = table1.training_config(Cell("fc1", True, 64, 3, 30))
    assert (config.optimizer.name, config.optimizer.lr, config.optimizer.weight_decay) == ("adam", 1e-3, 0)
    assert (config.batch_size, config.epochs, config.seed) == (64, 30, 3)
    assert config.clip_norm is None
    assert not config.class_weights
    hidden = table1.make_model("fc2", 4, shift=False, num_classes=8).clusters[MODALITY]
    assert hidden.hidden_weight.shape == (4, 10, 50)  # H = 10, independent units


# Making and caching the data


class Calls:
    """Stands in for what takes long, and counts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.epochs: list[list[Any]] = []
        self.extracted: list[int] = []
        monkeypatch.setattr(flash_mnist, "pretrain", self._pretrain)
        monkeypatch.setattr(flash_mnist, "extract_features", self._extract)
        monkeypatch.setattr(flash_mnist, "frame_accuracy", lambda cnn, frames: 0.5)

    def _pretrain(self, cnn: FrameCNN, epochs: list[Any], *, progress: Any) -> float:
        self.epochs.append(epochs)
        cnn.eval()
        return 0.0

    def _extract(self, cnn: FrameCNN, videos: FlashMNIST, *, out: Any, progress: Any) -> np.ndarray:
        self.extracted.append(len(videos))
        shape = (len(videos), videos.length, 50)
        features = np.empty(shape, np.float32) if out is None else out
        assert features.shape == shape
        features[:] = np.arange(len(videos), dtype=np.float32)[:, None, None]
        return features

    def take(self) -> tuple[int, list[int]]:
        """Trainings of the CNN and sizes of what was extracted since the last time."""
        done = (len(self.epochs), self.extracted)
        self.epochs, self.extracted = [], []
        return done


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


SMALL = Recipe(1, 1, 640)


def test_a_second_call_reads_the_cache(digits: Digits, calls: Calls, tmp_path: Path) -> None:
    first = prepare(digits, SMALL, cache=tmp_path / "new")
    assert calls.take() == (1, [1024, 1024])
    second = prepare(digits, SMALL, cache=tmp_path / "new")
    assert calls.take() == (0, [])
    for prepared in (first, second):
        for data in (prepared.train, prepared.test):
            assert isinstance(data._features[MODALITY], np.memmap)
            assert len(data) == 1024
            batch = data.__getitems__([7, 1023])
            assert batch.features[MODALITY][:, 0, 0].tolist() == [7, 1023]
            assert batch.labels is not None
            assert batch.labels.tolist() == [7, 1023]
        assert prepared.frame_accuracy == 0.5
        assert prepared.digits == "digits"
        assert prepared.recipe == SMALL
        assert prepared.train.class_names[6] == "{1 2}"
    assert np.array_equal(first.train_videos.frame_images, second.train_videos.frame_images)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "flash-mnist-digits-cnn640x1-seed1-v2-test1.npy",
        "flash-mnist-digits-cnn640x1-seed1-v2-train1.npy",
        "flash-mnist-digits-cnn640x1-seed1-v2.pt",
    ]


@pytest.mark.parametrize(
    ("other", "made"),
    [
        (Recipe(2, 1, 640), (0, [2048])),
        (Recipe(1, 2, 640), (0, [2048])),
        (Recipe(1, 1, 704), (1, [1024, 1024])),
        (Recipe(1, 1, 640, cnn_epochs=2), (1, [1024, 1024])),
        (Recipe(1, 1, 640, seed=2), (1, [1024, 1024])),
    ],
    ids=["train_videos", "test_videos", "cnn_frames", "cnn_epochs", "seed"],
)
def test_other_parameters_are_another_entry(
    digits: Digits, calls: Calls, tmp_path: Path, other: Recipe, made: tuple[int, list[int]]
) -> None:
    prepare(digits, SMALL, cache=tmp_path)
    calls.take()
    prepare(digits, other, cache=tmp_path)
    assert calls.take() == made
    prepare(digits, SMALL, cache=tmp_path)
    assert calls.take() == (0, [])


def test_epochs_of_the_cnn_are_drawn_anew(digits: Digits, calls: Calls) -> None:
    prepare(digits, Recipe(1, 1, 640, cnn_epochs=3), use_cache=False)
    ((one, two, three),) = calls.epochs
    assert len(one) == 640 + 64
    assert not np.array_equal(one.labels, two.labels)
    assert not np.array_equal(two.labels, three.labels)
    calls.take()
    prepare(digits, SMALL, use_cache=False)
    ((only,),) = calls.epochs
    assert np.array_equal(only.labels, one.labels)


def test_the_splits_show_their_own_images(digits: Digits, calls: Calls) -> None:
    prepared = prepare(digits, SMALL, use_cache=False)
    train, test = prepared.train_videos, prepared.test_videos
    assert train.frame_images.max() < len(digits.train_images)
    assert test.frame_images.max() < len(digits.test_images)
    assert not np.array_equal(train.frame_labels, test.frame_labels)
    number = int(np.flatnonzero(test.set_labels == 1)[0])
    frame = int(np.flatnonzero(test.frame_labels[number] != NOISE)[0])
    ink = digits.test_images[test.frame_images[number, frame]]
    assert (test.video(number)[frame] >= ink).all()


@pytest.mark.parametrize("suffix", [".pt", "-train1.npy"])
@pytest.mark.parametrize("kept", [0, 100, 5000])
def test_a_truncated_file_is_named_and_made_again(
    digits: Digits, calls: Calls, tmp_path: Path, caplog: pytest.LogCaptureFixture, suffix: str, kept: int
) -> None:
    prepare(digits, SMALL, cache=tmp_path)
    calls.take()
    path = tmp_path / f"flash-mnist-digits-cnn640x1-seed1-v2{suffix}"
    content = path.read_bytes()
    path.write_bytes(content[:kept])
    with watched(caplog):
        prepared = prepare(digits, SMALL, cache=tmp_path)
    assert calls.take() == ((1, []) if suffix == ".pt" else (0, [1024]))
    assert f"{path} cannot be read" in caplog.text
    assert prepared.train[7].features[MODALITY].unique().tolist() == [7]
    assert len(path.read_bytes()) == len(content)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_cached_array_of_another_shape_is_made_again(digits: Digits, calls: Calls, tmp_path: Path) -> None:
    path = tmp_path / "flash-mnist-digits-cnn640x1-seed1-v2-test1.npy"
    np.save(path, np.zeros((1024, 24, 50), np.float32))
    prepare(digits, SMALL, cache=tmp_path)
    assert calls.take() == (1, [1024, 1024])
    assert np.load(path, mmap_mode="r").shape == (1024, 25, 50)


def test_without_a_cache_nothing_is_read_or_written(
    digits: Digits, calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def refuse(path: Path, *_: object) -> None:
        raise AssertionError(f"the cache was touched: {path}")

    for name in ("_read_cnn", "_read_features", "_write_whole"):
        monkeypatch.setattr(flash_mnist, name, refuse)
    prepared = prepare(digits, SMALL, use_cache=False)
    assert prepared.train[5].features[MODALITY].shape == (1, 25, 50)
    assert not isinstance(prepared.train._features[MODALITY], np.memmap)
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_does_not_end_the_run(
    digits: Digits, calls: Calls, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("a file stands where the folder should be")
    with watched(caplog):
        prepared = prepare(digits, SMALL, cache=tmp_path / "file" / "cache")
    assert calls.take() == (1, [1024, 1024])
    assert prepared.train[7].features[MODALITY].unique().tolist() == [7]
    assert caplog.text.count("could not be cached") == 3


def test_a_full_disk_is_noticed_before_it_is_written_to(
    digits: Digits,
    calls: Calls,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        assert (offset, length) == (0, 128 + 1024 * 25 * 50 * 4)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(flash_mnist.os, "posix_fallocate", full)
    with watched(caplog):
        prepared = prepare(digits, SMALL, cache=tmp_path)
    assert calls.take() == (1, [1024, 1024])
    assert caplog.text.count("No space left on device") == 2
    assert not isinstance(prepared.test._features[MODALITY], np.memmap)
    assert [path.suffix for path in tmp_path.iterdir()] == [".pt"]


# Table 1


def test_the_papers_table() -> None:
    """As in the paper: N, then average, FC1, FC2, FC1 + shift, FC2 + shift."""
    paper = """
        1    0.2  0.2  0.2  51.2 53.7
        2    0.4  0.4  0.5  64.8 66.8
        4    0.6  2.2  2.3  75.9 76.8
        8    0.9  31.7 22.5 80.6 83.1
        16   1.2  82.3 82.0 86.9 84.9
        32   2.4  83.3 83.2 87.1 85.6
        64   5.0  83.2 82.4 87.1 85.6
        128  8.9  81.8 80.9 87.1 85.7
    """
    columns = [("average", False), ("fc1", False), ("fc2", False), ("fc1", True), ("fc2", True)]
    assert list(table1.COLUMNS) == columns
    for line in paper.strip().splitlines():
        size, *accuracies = line.split()
        assert [table1.paper_accuracy(weighting, int(size), shift=shift) for weighting, shift in columns] == [
            float(accuracy) for accuracy in accuracies
        ]
    assert table1.paper_accuracy("fc1", 3, shift=True) is None
    assert table1.paper_accuracy("average", 64, shift=True) is None


def test_the_cells_of_the_whole_table() -> None:
    cells = table1.cells(table1.COLUMNS, table1.CLUSTER_SIZES)
    assert len(cells) == len(set(cells)) == 5 * (4 * 3 + 4)
    assert [cell.cluster_size for cell in cells] == sorted(cell.cluster_size for cell in cells)
    for cell in cells:
        assert cell.epochs == (30 if cell.shift and cell.cluster_size >= 16 else 100)
        assert cell.cnn_epochs == 1
    assert {cell.seed for cell in cells if cell.cluster_size == 8} == {1, 2, 3}
    assert {cell.seed for cell in cells if cell.cluster_size == 16} == {1}
    assert len({cell.name for cell in cells}) == len(cells)


def test_some_cells() -> None:
    assert table1.cells([("fc1", True)], [64, 1], seeds=2, epochs=5, cnn_epochs=3) == [
        Cell("fc1", True, 1, 1, 5, 3),
        Cell("fc1", True, 1, 2, 5, 3),
        Cell("fc1", True, 64, 1, 5, 3),
        Cell("fc1", True, 64, 2, 5, 3),
    ]
    assert Cell("fc1", True, 64, 2, 5, 3).name == "fc1-shift-n64-seed2-epochs5-cnn3"
    assert Cell("average", False, 1, 1, 5).name == "average-noshift-n1-seed1-epochs5-cnn1"


CELLS = [Cell("fc1", True, 2, 1, 3), Cell("average", False, 2, 1, 2)]
MEASURED = {"seconds", "commit"}


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [{k: v for k, v in row.items() if k not in MEASURED} for row in csv.DictReader(file)]


def test_a_cell_leaves_a_row_its_epochs_and_a_run(small: Prepared, tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.csv"
    table1.run(CELLS, small, path, tmp_path / "runs")
    header = path.read_text().splitlines()[0]
    assert header.startswith("weighting,shift,cluster_size,seed,epochs,accuracy,seconds,commit,")
    first, second = rows_of(path)
    assert (first["weighting"], first["shift"], first["cluster_size"]) == ("fc1", "True", "2")
    assert (first["seed"], first["epochs"], first["cnn_epochs"]) == ("1", "3", "1")
    assert (first["frame_accuracy"], first["threads"]) == ("97.00", "1")
    assert (second["weighting"], second["shift"], second["epochs"]) == ("average", "False", "2")
    epochs = rows_of(table1.epochs_path(path))
    assert [(row["weighting"], row["epoch"]) for row in epochs] == [
        ("fc1", "1"),
        ("fc1", "2"),
        ("fc1", "3"),
        ("average", "1"),
        ("average", "2"),
    ]
    assert first["accuracy"] == epochs[2]["accuracy"]
    with (tmp_path / "runs" / CELLS[0].name / "metrics.csv").open(newline="") as file:
        metrics = list(csv.DictReader(file))
    assert float(first["accuracy"]) == pytest.approx(
        100 * float(metrics[-1]["validation_accuracy"]), abs=0.006
    )
    assert float(epochs[0]["train_loss"]) == pytest.approx(float(metrics[0]["train_loss"]), abs=1e-5)

    run = load_run(tmp_path / "runs" / CELLS[0].name, "last")
    assert run.class_names == class_names(SETS)
    assert run.state["epoch"] == 3
    assert run.model.modalities[MODALITY].cluster_size == 2
    scores = run.model(**small.test.__getitems__(range(len(small.test))).inputs())
    correct = (scores.argmax(-1) == small.test.labels).float().mean().item()
    assert 100 * correct == pytest.approx(float(first["accuracy"]), abs=0.006)


class Interrupted(Exception):
    """Stands for kill -9, at the start of an epoch."""


def test_an_interrupted_table_goes_on_where_it_was(
    small: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, again = tmp_path / "whole.csv", tmp_path / "again.csv"
    table1.run(CELLS, small, whole, tmp_path / "whole")

    begun: list[int] = []

    def interrupt(epoch: int) -> None:
        begun.append(epoch)
        if begun == [1, 2]:
            raise Interrupted

    monkeypatch.setattr(small.train, "set_epoch", interrupt)
    with pytest.raises(Interrupted):
        table1.run(CELLS, small, again, tmp_path / "again")
    assert not again.exists()
    table1.run(CELLS, small, again, tmp_path / "again")
    assert begun == [1, 2, 2, 3, 1, 2]  # not the first epoch again
    assert rows_of(again) == rows_of(whole)
    assert rows_of(table1.epochs_path(again)) == rows_of(table1.epochs_path(whole))
    table1.run(CELLS, small, again, tmp_path / "again")
    assert begun == [1, 2, 2, 3, 1, 2]
    assert len(rows_of(again)) == 2


def test_a_cell_that_was_killed_between_its_two_files_is_whole_in_the_end(
    small: Prepared, tmp_path: Path
) -> None:
    path = tmp_path / "results.csv"
    table1.run(CELLS, small, path, tmp_path)
    expected, epochs = rows_of(path), rows_of(table1.epochs_path(path))
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    table1.run(CELLS, small, path, tmp_path)
    assert rows_of(path) == expected
    assert rows_of(table1.epochs_path(path)) == epochs


def test_two_processes_do_not_do_a_cell_twice(
    small: Prepared, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "results.csv"
    folder = tmp_path / CELLS[0].name
    folder.mkdir()
    program = (
        "import fcntl, sys\n"
        f"file = open({str(folder / 'lock')!r}, 'a')\n"
        "fcntl.flock(file, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == "held\n"
        with watched(caplog):
            table1.run(CELLS, small, path, tmp_path)
        other.stdin.close()
    assert f"{CELLS[0].name}: another process is at it" in caplog.text
    assert [row["weighting"] for row in rows_of(path)] == ["average"]
    table1.run(CELLS, small, path, tmp_path)
    assert [row["weighting"] for row in rows_of(path)] == ["average", "fc1"]


def test_how_many_cells_are_left(small: Prepared, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table1.run(CELLS[1:], small, tmp_path / "results.csv", tmp_path)
    with watched(caplog):
        table1.run(CELLS, small, tmp_path / "results.csv", tmp_path)
    assert f"{CELLS[0].name}: cell 1 of 2, 1 left to train" in caplog.text
    assert f"{CELLS[1].name}: done before" in caplog.text


def test_reduced_data_never_get_into_the_table(small: Prepared, tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    for change in ({"recipe": Recipe(train_videos=20)}, {"digits": "digits"}):
        with pytest.raises(ValueError, match="prepared must be the paper's data set for Table 1"):
            table1.run(CELLS, Prepared(**{**vars(small), **change}), path, tmp_path)
    with pytest.raises(ValueError, match=r"prepared must be of cnn_epochs = 2 for .*-cnn2, got 1"):
        table1.run([Cell("fc1", True, 2, 1, 3, cnn_epochs=2)], small, path, tmp_path)
    assert not path.exists()


def test_a_folder_of_another_run_is_not_gone_on_with(small: Prepared, tmp_path: Path) -> None:
    cell = CELLS[0]
    table1.train_cell(cell, small, tmp_path)
    with pytest.raises(RunError, match=r"other settings, .*: seed was 1, is 2"):
        table1.train_cell(Cell("fc1", True, 2, 2, 3), small, tmp_path)
    other = Prepared(**{**vars(small), "recipe": Recipe(train_videos=7)})
    with pytest.raises(RunError, match=r"other settings, .*: train_videos was 100, is 7"):
        table1.train_cell(cell, other, tmp_path)
    with pytest.raises(RunError, match="holds a run of 3 epochs, more than the 1 asked for"):
        table1.train_cell(Cell("fc1", True, 2, 1, 1), small, tmp_path)
    assert len(table1.train_cell(Cell("fc1", True, 2, 1, 4), small, tmp_path)) == 4
    assert table1.read_recipe(tmp_path) == ("mnist", Recipe())
    (tmp_path / "cell.json").unlink()
    # As a run of fastac train before its first epoch.
    (tmp_path / "checkpoints").rename(tmp_path / "elsewhere")
    with pytest.raises(RunError, match=r"holds a run of something else: it has no cell\.json"):
        table1.train_cell(cell, small, tmp_path)
    with pytest.raises(RunError, match=r"is not the folder of a run of fastac flash-mnist: cell.json"):
        table1.read_recipe(tmp_path)


HEADER = ",".join(table1.ROW) + "\n"
ROWS = """\
fc1,True,1,1,100,50.0,9,abc,1,97.5,2
fc1,True,1,2,100,53.0,9,abc,1,97.5,2
fc1,True,1,3,100,56.0,9,abc,1,97.5,2
fc1,True,1,1,100,60.0,9,abc,10,98.5,2
fc1,False,64,1,100,80.0,9,0123,1,97.5,2
average,False,3,1,100,1.0,9,abc,1,97.5,2
fc2,False,8,1,100,23.0,9,abc,1,97.5,2
"""


def test_the_table_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    path.write_text(HEADER + ROWS)
    frame = table1.table(path)
    assert frame["column"].tolist() == ["average", "FC1", "FC2", "FC1 + shift", "FC1 + shift"]
    assert frame["N"].tolist() == [3, 64, 8, 1, 1]
    assert frame["CNN epochs"].tolist() == [1, 1, 1, 1, 10]
    assert frame["runs"].tolist() == [1, 1, 1, 3, 1]
    nan = math.nan
    np.testing.assert_allclose(frame["ours"], [1.0, 80.0, 23.0, 53.0, 60.0])
    np.testing.assert_allclose(frame["spread"], [nan, nan, nan, 3.0, nan])
    np.testing.assert_allclose(frame["paper"], [nan, 83.2, 22.5, 51.2, 51.2])
    np.testing.assert_allclose(frame["difference"], [nan, -3.2, 0.5, 1.8, 8.8], atol=1e-9)
    lines = table1.as_text(frame).splitlines()
    assert lines[0].split() == [
        "column", "N", "epochs", "CNN", "epochs", "frame", "accuracy", "runs", "ours", "spread", "paper",
        "difference",
    ]  # fmt: skip
    assert lines[1].split() == ["average", "3", "100", "1", "97.5", "1", "1.0"]
    assert lines[2].split() == ["FC1", "64", "100", "1", "97.5", "1", "80.0", "83.2", "-3.2"]
    assert lines[4].split() == [
        "FC1",
        "+",
        "shift",
        "1",
        "100",
        "1",
        "97.5",
        "3",
        "53.0",
        "3.0",
        "51.2",
        "+1.8",
    ]
    assert "nan" not in "".join(lines).lower()


def test_what_is_in_the_results(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    assert not table1.has(table1.read(path), CELLS[0])
    assert table1.table(path).empty
    path.touch()  # as another process leaves it for a moment
    assert not table1.has(table1.read(path), CELLS[0])
    path.write_text(HEADER + ROWS)
    done = table1.read(path)
    assert table1.has(done, Cell("fc1", True, 1, 2, 100))
    assert done["commit"].tolist()[4] == "0123"
    for other in (
        Cell("fc2", True, 1, 2, 100),
        Cell("fc1", False, 1, 2, 100),
        Cell("fc1", True, 2, 2, 100),
        Cell("fc1", True, 1, 4, 100),
        Cell("fc1", True, 1, 2, 30),
        Cell("fc1", True, 1, 2, 100, cnn_epochs=10),
    ):
        assert not table1.has(done, other)
    path.write_text("weighting,shift\nfc1,True\n")
    with pytest.raises(
        RunError, match=r"results.csv must have the columns weighting,.*, got weighting,shift"
    ):
        table1.read(path)


def test_rows_are_added_once(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.csv"
    row = {"a": 1, "b": True, "c": "x"}
    results.append(path, ("a", "b", "c"), [row], key=("a", "b"))
    results.append(path, ("a", "b", "c"), [{**row, "c": "y"}, {**row, "a": 2}], key=("a", "b"))
    assert path.read_text() == "a,b,c\n1,True,x\n2,True,x\n"
    results.append(path, ("a", "b", "c"), [row])
    assert path.read_text() == "a,b,c\n1,True,x\n2,True,x\n1,True,x\n"
    with pytest.raises(RunError, match="must have the columns a,c, got a,b,c"):
        results.append(path, ("a", "c"), [{"a": 1, "c": 2}])


def test_the_commit_of_the_checkout_or_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"ls-files": "", "status": "", "rev-parse": "0123456789ab"}

    def git(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        answer = answers[command[3]]
        if answer == "error":
            raise subprocess.CalledProcessError(1, command)
        return subprocess.CompletedProcess(command, 0, stdout=answer)

    monkeypatch.setattr(subprocess, "run", git)
    assert results.commit() == "0123456789ab"
    answers["status"] = " M fastac/modules.py"
    assert results.commit() == "0123456789ab-dirty"
    answers["ls-files"] = "error"  # installed below somebody else's checkout
    assert re.fullmatch(r"v\d.*", results.commit())


def test_rows_added_to_the_results_change_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = tmp_path / "fastac" / "experiments" / "results.py"
    rows = tmp_path / "benchmarks" / "results" / "rows.csv"
    for path in (code, code.with_name("__init__.py"), rows):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("before")
    who = ("-c", "user.name=a", "-c", "user.email=b", "-c", "commit.gpgsign=false")
    for command in (["init"], ["add", "."], [*who, "commit", "--message", "first"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True, capture_output=True)
    monkeypatch.setattr(results, "__file__", str(code))
    clean = results.commit()
    assert re.fullmatch("[0-9a-f]{12}", clean)
    rows.write_text("after")
    assert results.commit() == clean
    code.write_text("after")
    assert results.commit() == f"{clean}-dirty"


def test_a_row_names_the_commit_that_was_there_when_training_began(
    small: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table1, "commit", lambda: "later" if (tmp_path / CELLS[0].name).exists() else "first")
    table1.run(CELLS, small, tmp_path / "results.csv", tmp_path)
    assert table1.read(tmp_path / "results.csv")["commit"].tolist() == ["first", "first"]


# The picture


def test_figure_5_of_a_test_video(small: Prepared, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = table1.make_model("fc1", 12, shift=True, num_classes=SETS).train()
    path = flash_mnist.draw_test_video(model, small, tmp_path / "video.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert model.training


def test_figure_5_shows_a_rightly_labelled_video(
    small: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, Any] = {}

    def note(frames: np.ndarray, names: list[str], weights: np.ndarray, *, title: str) -> Any:
        drawn.update(frames=frames, names=names, weights=weights, title=title)

    monkeypatch.setattr(flash_mnist.figures, "weights_under_frames", note)
    monkeypatch.setattr(flash_mnist.figures, "save", lambda figure, path: path)
    model = table1.make_model("fc1", 4, shift=True, num_classes=SETS)
    of_five = [n for n, label in enumerate(small.test_videos.set_labels.tolist()) if label == 31]
    assert len(of_five) == 2
    for right in of_five:

        def forward(features: dict[str, torch.Tensor], right: int = right, **_: object) -> torch.Tensor:
            scores = torch.zeros(len(features[MODALITY]), SETS)
            scores[:, 3] = 1
            scores[of_five.index(right), 31] = 2
            return scores

        monkeypatch.setattr(model, "forward", forward)
        flash_mnist.draw_test_video(model, small, tmp_path / "x.png")
        assert drawn["title"] == f"Test video {right}: shows {{0 1 2 3 4}}, recognised {{0 1 2 3 4}}"
        assert np.array_equal(drawn["frames"], small.test_videos.video(right))
        shown = [str(d) if d != NOISE else "" for d in small.test_videos.frame_labels[right].tolist()]
        assert drawn["names"] == shown
        with torch.no_grad():
            expected = model.attention(**small.test[right].inputs())[MODALITY][0]
        np.testing.assert_allclose(drawn["weights"], expected.numpy(), rtol=1e-6)


# Speed


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


# The command


@pytest.fixture
def at_hand(small: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """The small data in the place of the full ones; lists what was asked for."""
    asked: list[Recipe] = []

    def take(digits: Digits, recipe: Recipe, *, use_cache: bool = True) -> Prepared:
        asked.append(recipe)
        return Prepared(**{**vars(small), "recipe": recipe, "digits": digits.name})

    def load(data: str) -> Digits:
        digits = load_digits28()
        return digits if data == "digits" else Digits(**{**vars(digits), "name": "mnist", "source": "MNIST"})

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command_module, "prepare", take)
    monkeypatch.setattr(command_module, "load_digits", load)
    monkeypatch.setattr(results, "folder", lambda: None)
    return asked


def fastac(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    capsys.readouterr()
    status = main(["flash-mnist", *argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_a_single_cell(at_hand: list[Recipe], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    argv = ("--cluster-size", "4", "--epochs", "2", "--output", "run")
    status, out, _ = fastac(capsys, *argv)
    assert status == 0
    assert at_hand == [Recipe()]
    assert "frame accuracy of the CNN: 97.0%" in out
    found = re.search(
        r"fc1 with shift, N = 4, 2 epochs: test accuracy ([\d.]+) % \(paper 75.9 %, difference ([-+.\d]+)\)",
        out,
    )
    assert found is not None
    assert float(found[1]) - 75.9 == pytest.approx(float(found[2]), abs=0.06)
    for name in ("attention.png", "curves.png"):
        assert (tmp_path / "run" / name).read_bytes().startswith(b"\x89PNG")
    assert load_run(tmp_path / "run").state["epoch"] in (1, 2)
    state = (tmp_path / "run" / "checkpoints" / "last" / "state.json").stat().st_mtime_ns
    status, again, _ = fastac(capsys, *argv)
    assert status == 0
    assert found[0] in again
    assert (tmp_path / "run" / "checkpoints" / "last" / "state.json").stat().st_mtime_ns == state
    at_hand.clear()
    status, _, err = fastac(capsys, "--cluster-size", "5", "--output", "run")
    assert status == 1
    assert at_hand == []  # said before the data are made
    assert "other settings" in err
    assert "cluster_size was 4, is 5" in err


def test_a_single_cell_of_a_reduced_set(at_hand: list[Recipe], capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = fastac(
        capsys, "--weighting", "average", "--epochs", "1", "--train-videos", "3", "--data", "digits"
    )
    assert status == 0
    assert at_hand == [Recipe(train_videos=3)]
    assert "a reduced set, the paper's has 100 and 10" in out
    assert "average without shift, N = 64, 1 epochs" in out
    assert "(on digits, a reduced set: not to be compared with the paper's)" in out


def test_the_table(at_hand: list[Recipe], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    argv = (
        "--table1", "--column", "fc1+shift", "--column", "average", "--cluster-sizes", "4,1", "--seeds", "2",
        "--epochs", "1", "--output", "cells",
    )  # fmt: skip
    status, out, err = fastac(capsys, *argv)
    assert status == 0
    assert "8 cells, 8 of them to train; results: cells/flash_mnist.csv" in out
    assert "cell 1 of 8, 8 left to train" in err
    assert "cell 8 of 8, 1 left to train" in err
    rows = [line.split() for line in out.splitlines()[-4:]]
    assert [row[:-6] for row in rows] == [
        ["average", "1", "1", "1", "97.0"][:-1],
        ["average", "4", "1", "1", "97.0"][:-1],
        ["FC1", "+", "shift", "1", "1", "1"],
        ["FC1", "+", "shift", "4", "1", "1"],
    ]
    assert [row[-2] for row in rows] == ["0.2", "0.6", "51.2", "75.9"]
    assert {row[-5] for row in rows} == {"2"}
    written = rows_of(tmp_path / "cells" / "flash_mnist.csv")
    assert len(written) == 8
    assert {row["seed"] for row in written} == {"1", "2"}
    assert at_hand == [Recipe()]
    status, again, _ = fastac(capsys, *argv)
    assert status == 0
    assert "8 cells, 0 of them to train" in again
    assert again.splitlines()[-4:] == out.splitlines()[-4:]
    assert at_hand == [Recipe()]  # no data are needed for that


def test_the_table_is_of_mnist(
    at_hand: list[Recipe], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    status, _, err = fastac(capsys, "--table1", "--data", "digits", "--results", "table.csv")
    assert status == 1
    assert "--table1 needs MNIST, there is only scikit-learn's digits" in err
    assert not (tmp_path / "table.csv").exists()


def test_the_figures(at_hand: list[Recipe], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, out, err = fastac(capsys, "--figures", "pictures")
    assert status == 1
    assert "no Figure 4: runs/flash-mnist/flash_mnist_epochs.csv has no epochs" in out
    assert "no Figure 5: runs/flash-mnist is not the folder of a run" in out
    assert "there is nothing to draw" in err
    fastac(
        capsys, "--table1", "--column", "fc1", "--cluster-sizes", "4", "--seeds", "1", "--epochs", "2",
        "--results", "table.csv",
    )  # fmt: skip
    at_hand.clear()
    cell = "runs/flash-mnist/fc1-noshift-n4-seed1-epochs2-cnn1"
    status, out, _ = fastac(capsys, "--figures", "pictures", "--results", "table.csv", "--output", cell)
    assert status == 0
    assert out.splitlines()[-1] == "pictures: pictures/figure4.png, pictures/figure5.png"
    for name in ("figure4.png", "figure5.png"):
        assert (tmp_path / "pictures" / name).read_bytes().startswith(b"\x89PNG")
    assert at_hand == [Recipe()]
    status, out, _ = fastac(capsys, "--figures", "pictures", "--results", "table.csv", "--cnn-epochs", "7")
    assert status == 1
    assert "has no epochs with a CNN of 7 epoch(s)" in out


def test_the_speed(
    at_hand: list[Recipe],
    quick: None,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    status, out, _ = fastac(capsys, "--speed", "--cluster-size", "4", "--results", "speed.csv")
    assert status == 0
    assert "losses agree" in out
    (row,) = rows_of(tmp_path / "speed.csv")
    assert (row["cluster_size"], row["rounds"], row["steps_per_round"]) == ("4", "9", "3")
    monkeypatch.setattr(speed, "AGREEMENT", -1.0)
    status, out, _ = fastac(capsys, "--speed", "--cluster-size", "4")
    assert status == 1
    assert "losses DO NOT AGREE" in out
    assert list(tmp_path.glob("*.csv")) == [tmp_path / "speed.csv"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--table1", "--speed"], "--table1 and --speed cannot be given together"),
        (["--table1", "--train-videos", "20"], "--train-videos means nothing for --table1"),
        (["--table1", "--cnn-frames", "900"], "--cnn-frames means nothing for --table1"),
        (["--table1", "--seed", "2"], "--seed means nothing for --table1"),
        (["--column", "fc1"], "--column means nothing for a single cell"),
        (["--figures", "x", "--epochs", "3"], "--epochs means nothing for --figures"),
        (["--speed", "--weighting", "fc2"], "--weighting means nothing for --speed"),
        (["--table1", "--cluster-sizes", "1,x"], "must be integers of at least 1, such as 1,4,64, got '1,x'"),
        (["--table1", "--cluster-sizes", "0"], "must be integers of at least 1, such as 1,4,64, got '0'"),
        (["--table1", "--column", "fc3"], "'fc3' is not one of"),
        (["--epochs", "0"], "0 is not in the range x>=1"),
    ],
)
def test_wrong_usage(
    at_hand: list[Recipe], capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    status, _, err = fastac(capsys, *argv)
    assert status == 2
    assert message in " ".join(err.split())
    assert at_hand == []


def test_the_help_stands_alone(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = fastac(capsys, "--help")
    assert status == 0
    for option in ("--table1", "--figures", "--speed", "--column", "--results", "--cnn-epochs"):
        assert option in out
    assert "fastac flash-mnist --table1 --column fc1+shift --cluster-sizes 1,4,8" in out
