"""Flash-MNIST's recipe and cache: the authors' data, made once."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flash_mnist_data import watched

from fastac.data import Digits, FlashMNIST
from fastac.data.flash_mnist import NOISE
from fastac.experiments import flash_mnist, table1
from fastac.experiments.flash_mnist import (
    MODALITY,
    Prepared,
    Recipe,
    authors_training,
    class_names,
    prepare,
)
from fastac.models import FrameCNN

pytestmark = pytest.mark.xdist_group("experiments")  # what is built once is shared


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
    config = authors_training(30, 3)
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
