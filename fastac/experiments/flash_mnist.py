"""Flash-MNIST from digits to local features: the frame CNN, trained and frozen, and its features of all videos.

Everything is made once per set of parameters and kept in the cache, under a name that states them; features
are memory-mapped from there.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from fastac.data import Digits, FeatureArray, FlashMNIST, NoiseSampler, NoisyDigits
from fastac.data.mnist import cache_dir
from fastac.models import FrameCNN
from fastac.models.flash_mnist import FEATURES, extract_features, frame_accuracy, pretrain
from fastac.training.log import Progress

logger = logging.getLogger("fastac")

CACHE_FORMAT = 2
MODALITY = "frames"


@dataclass(frozen=True)
class Recipe:
    """What the data are made of; the defaults are the authors'.

    Attributes:
        train_videos, test_videos: videos of each of the 1024 sets of digits.
        cnn_frames: frames with a digit in an epoch of the frame CNN.
        cnn_epochs: its epochs; from the second on every frame's noise and order are drawn anew.
        seed: of all of it.
    """

    train_videos: int = 100
    test_videos: int = 10
    cnn_frames: int = 300_000
    cnn_epochs: int = 1
    seed: int = 1


@dataclass
class Prepared:
    """Both splits, described and as features, and how many single test frames the CNN names rightly."""

    train_videos: FlashMNIST
    test_videos: FlashMNIST
    train: FeatureArray
    test: FeatureArray
    frame_accuracy: float


def class_names(num_sets: int) -> list[str]:
    """The sets of digits as text: "{}", "{0}", "{1}", "{0 1}" and so on."""
    return [
        "{" + " ".join(str(digit) for digit in range(10) if label >> digit & 1) + "}"
        for label in range(num_sets)
    ]


def prepare(digits: Digits, recipe: Recipe | None = None, *, cache: Path | None = None) -> Prepared:
    """Flash-MNIST as the authors' code makes it (Long et al., section 4), or what the cache has of it.

    Args:
        digits: the images that flash up.
        recipe: sizes and seed; the authors' unless given.
        cache: the folder that keeps CNN and features; the user's unless given.

    Raises:
        OSError: the cache cannot be written.
    """
    recipe = recipe or Recipe()
    cache = cache_dir() if cache is None else cache
    cache.mkdir(parents=True, exist_ok=True)
    noise = NoiseSampler(digits)
    train, test = (
        FlashMNIST(images, labels, noise, videos_per_set=count, seed=4 * recipe.seed + split)
        for split, (images, labels, count) in enumerate(
            (
                (digits.train_images, digits.train_labels, recipe.train_videos),
                (digits.test_images, digits.test_labels, recipe.test_videos),
            )
        )
    )
    stem = (
        f"flash-mnist-{digits.name}-cnn{recipe.cnn_frames}x{recipe.cnn_epochs}"
        f"-seed{recipe.seed}-v{CACHE_FORMAT}"
    )
    cnn, correct = _frame_cnn(digits, noise, recipe, cache / f"{stem}.pt")
    names = class_names(train.num_sets)
    features = [
        _features(cnn, videos, cache / f"{stem}-{split}{count}.npy")
        for split, videos, count in (
            ("train", train, recipe.train_videos),
            ("test", test, recipe.test_videos),
        )
    ]
    return Prepared(
        train,
        test,
        *(
            FeatureArray({MODALITY: array}, videos.set_labels, names)
            for array, videos in zip(features, (train, test), strict=True)
        ),
        correct,
    )


def _frame_cnn(digits: Digits, noise: NoiseSampler, recipe: Recipe, path: Path) -> tuple[FrameCNN, float]:
    """The CNN, trained or from the cache, and its accuracy on single test frames."""
    cnn = FrameCNN()
    if path.is_file():
        saved = torch.load(path, weights_only=True)
        cnn.load_state_dict(saved["cnn"])
        cnn.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        cnn.eval().requires_grad_(False)
        return cnn, float(saved["frame_accuracy"])
    torch.manual_seed(recipe.seed)
    cnn = FrameCNN()
    # (seed, 2) is the authors' one epoch; the ones after it may not repeat the streams of the videos' seeds.
    seeds = [4 * recipe.seed + 2] + [
        (4 * recipe.seed + 2) + 2**32 * epoch for epoch in range(1, recipe.cnn_epochs)
    ]
    epochs = [
        NoisyDigits(digits.train_images, digits.train_labels, noise, count=recipe.cnn_frames, seed=seed)
        for seed in seeds
    ]
    count = sum(len(epoch) for epoch in epochs)
    logger.info("training the frame CNN, %d epoch(s), %s frames", recipe.cnn_epochs, f"{count:,}")
    with Progress("frame CNN", count, "frames") as progress:
        pretrain(cnn, epochs, progress=progress.advance)
    test_frames = NoisyDigits(
        digits.test_images, digits.test_labels, noise, count=len(digits.test_images), seed=4 * recipe.seed + 3
    )
    correct = frame_accuracy(cnn, test_frames)
    logger.info("frame accuracy on %s test frames: %.1f %%", f"{len(test_frames):,}", 100 * correct)

    def write(part: Path) -> None:
        torch.save({"cnn": cnn.state_dict(), "frame_accuracy": correct}, part)

    _write_whole(path, write)
    return cnn, correct


def _features(cnn: FrameCNN, videos: FlashMNIST, path: Path) -> npt.NDArray[np.float32]:
    """The features of all videos ``(V, L, 50)``, memory-mapped from ``path``, where they are made if need be."""
    if not path.is_file():
        logger.info("extracting the features of %s videos", f"{len(videos):,}")

        def write(part: Path) -> None:
            shape = (len(videos), videos.length, FEATURES)
            array = np.lib.format.open_memmap(part, mode="w+", dtype=np.float32, shape=shape)
            with Progress("features", len(videos), "videos") as progress:
                extract_features(cnn, videos, out=array, progress=progress.advance)
            array.flush()

        _write_whole(path, write)
    features: npt.NDArray[np.float32] = np.load(path, mmap_mode="r")
    return features


def _write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Lets ``write`` fill a file beside ``path`` and renames it: what is there under ``path`` is complete."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(descriptor)
    try:
        write(Path(name))
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
