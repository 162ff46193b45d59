"""Flash-MNIST from digits to local features: the frame CNN, trained and frozen, and what it sees in videos.

Everything is made once per set of parameters and kept in the cache, under a name that states them; features
are memory-mapped from there.
"""

from __future__ import annotations

import logging
import os
import pickle
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from fastac import figures
from fastac.data import Digits, FeatureArray, FlashMNIST, NoiseSampler, NoisyDigits
from fastac.data.flash_mnist import NOISE
from fastac.data.mnist import cache_dir
from fastac.models import FrameCNN, VideoClassifier
from fastac.models.base import class_scores
from fastac.models.frame_cnn import FEATURES, extract_features, frame_accuracy, pretrain
from fastac.training import OptimizerConfig, TrainingConfig
from fastac.training.log import Progress

logger = logging.getLogger("fastac")

CACHE_FORMAT = 2
MODALITY = "frames"
SETS = 1024


@dataclass(frozen=True)
class Recipe:
    """What the data are made of; the defaults are the authors'.

    Attributes:
        train_videos, test_videos: videos of each of the 1024 sets of digits.
        cnn_frames: frames with a digit in an epoch of the frame CNN.
        cnn_epochs: its epochs; from the second on every frame's noise and order are drawn anew.
        seed: of all of it.

    Raises:
        ValueError: a count below 1 or a negative seed.
    """

    train_videos: int = 100
    test_videos: int = 10
    cnn_frames: int = 300_000
    cnn_epochs: int = 1
    seed: int = 1

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            least = 0 if name == "seed" else 1
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")

    @property
    def reduced(self) -> bool:
        """Whether it has fewer videos or frames for the CNN than the authors'."""
        full = Recipe()
        return (
            self.train_videos < full.train_videos
            or self.test_videos < full.test_videos
            or self.cnn_frames < full.cnn_frames
        )

    def describe(self) -> str:
        """The videos of both splits in words; a reduced set is called so."""
        return (
            f"{SETS * self.train_videos:,} videos for training, {SETS * self.test_videos:,} for testing "
            f"({self.train_videos} and {self.test_videos} per set of digits; "
            f"{'a reduced set' if self.reduced else 'a full set'}, the paper's has 100 and 10)"
        )


@dataclass
class Prepared:
    """Both splits, described and as features.

    Attributes:
        train_videos, test_videos: the videos.
        train, test: their features, under the modality ``MODALITY``.
        frame_accuracy: the share of single test frames the CNN names rightly.
        digits: the name of the digits, "mnist" or "digits".
        recipe: what was asked for.
        cnn: what made the features, in eval mode and frozen.
    """

    train_videos: FlashMNIST
    test_videos: FlashMNIST
    train: FeatureArray
    test: FeatureArray
    frame_accuracy: float
    digits: str
    recipe: Recipe
    cnn: FrameCNN

    @property
    def as_the_authors(self) -> bool:
        """Whether it is the paper's data set: MNIST, all videos, our seed; the CNN's epochs may differ."""
        return self.digits == "mnist" and replace(self.recipe, cnn_epochs=1) == Recipe()


def class_names(num_sets: int) -> list[str]:
    """The sets of digits as text: "{}", "{0}", "{1}", "{0 1}" and so on."""
    return [
        "{" + " ".join(str(digit) for digit in range(10) if label >> digit & 1) + "}"
        for label in range(num_sets)
    ]


def prepare(
    digits: Digits, recipe: Recipe | None = None, *, cache: Path | None = None, use_cache: bool = True
) -> Prepared:
    """Flash-MNIST as the authors' code makes it (Long et al., section 4), or what the cache has of it.

    A cached file that cannot be read is made again. Where the cache cannot be written, features stay in
    memory (512 MB for the full set) and the next run makes them again; both are said.

    Args:
        digits: the images that flash up.
        recipe: sizes and seed; the authors' unless given.
        cache: the folder that keeps CNN and features; the user's unless given.
        use_cache: False neither reads nor writes it.
    """
    recipe = recipe or Recipe()
    folder = (cache_dir() if cache is None else cache) if use_cache else None
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
    cnn, correct = _frame_cnn(digits, noise, recipe, None if folder is None else folder / f"{stem}.pt")
    names = class_names(train.num_sets)

    def features(videos: FlashMNIST, split: str, count: int) -> FeatureArray:
        path = None if folder is None else folder / f"{stem}-{split}{count}.npy"
        return FeatureArray({MODALITY: _features(cnn, videos, path)}, videos.set_labels, names)

    return Prepared(
        train_videos=train,
        test_videos=test,
        train=features(train, "train", recipe.train_videos),
        test=features(test, "test", recipe.test_videos),
        frame_accuracy=correct,
        digits=digits.name,
        recipe=recipe,
        cnn=cnn,
    )


def authors_training(epochs: int, seed: int) -> TrainingConfig:
    """The authors' settings: Adam with 1e-3, batches of 64, no schedule, no clipping, no weights."""
    return TrainingConfig(
        epochs=epochs,
        batch_size=64,
        optimizer=OptimizerConfig(name="adam", lr=1e-3),
        clip_norm=None,
        class_weights=False,
        seed=seed,
        tensorboard=False,
    )


@torch.no_grad()
def draw_test_video(model: VideoClassifier, prepared: Prepared, output: Path) -> Path:
    """Figure 5 of the paper for a test video of five digits, a rightly labelled one if there is any.

    Args:
        model: of these data, with attention; on the CPU or elsewhere, left in the mode it was in.
        prepared: the data.
        output: the picture.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    labels = prepared.test_videos.set_labels.tolist()
    of_five = [number for number, label in enumerate(labels) if bin(label).count("1") == 5]
    batch = prepared.test.__getitems__(of_five).to(device)
    predicted = class_scores(model(**batch.inputs())).argmax(-1).tolist()
    right = [i for i, p in zip(of_five, predicted, strict=True) if p == labels[i]]
    shown = right or of_five
    number = shown[len(shown) // 2]
    weights = model.attention(**prepared.test[number].to(device).inputs())[MODALITY][0]
    model.train(was_training)
    names = prepared.test.class_names
    frame_labels = prepared.test_videos.frame_labels[number].tolist()
    return figures.save(
        figures.weights_under_frames(
            prepared.test_videos.video(number),
            ["" if label == NOISE else str(label) for label in frame_labels],
            weights.float().cpu().numpy(),
            title=f"Test video {number}: shows {names[labels[number]]}, "
            f"recognised {names[predicted[of_five.index(number)]]}",
        ),
        output,
    )


def _frame_cnn(
    digits: Digits, noise: NoiseSampler, recipe: Recipe, path: Path | None
) -> tuple[FrameCNN, float]:
    """The CNN, trained or from the cache, and its accuracy on single test frames."""
    if path is not None and path.is_file():
        try:
            return _read_cnn(path)
        except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
            logger.warning("the cached frame CNN %s cannot be read (%s): making it again", path, error)
    torch.manual_seed(recipe.seed)
    cnn = FrameCNN()
    # (seed, 2) is the authors' one epoch; the ones after it may not repeat the streams of the videos' seeds.
    epochs = [
        NoisyDigits(
            digits.train_images,
            digits.train_labels,
            noise,
            count=recipe.cnn_frames,
            seed=(4 * recipe.seed + 2) + 2**32 * epoch,
        )
        for epoch in range(recipe.cnn_epochs)
    ]
    count = sum(len(epoch) for epoch in epochs)
    logger.info("training the frame CNN, %d epoch(s), %s frames", recipe.cnn_epochs, f"{count:,}")
    with Progress("frame CNN", count, "frames") as progress:
        pretrain(cnn, epochs, progress=progress.advance)
    test_frames = NoisyDigits(
        digits.test_images, digits.test_labels, noise, count=len(digits.test_images), seed=4 * recipe.seed + 3
    )
    correct = frame_accuracy(cnn, test_frames)

    def write(part: Path) -> None:
        torch.save({"cnn": cnn.state_dict(), "frame_accuracy": correct}, part)

    if path is not None:
        _try_to_cache(path, write)
    return cnn, correct


def _read_cnn(path: Path) -> tuple[FrameCNN, float]:
    cnn = FrameCNN()
    saved = torch.load(path, weights_only=True)
    cnn.load_state_dict(saved["cnn"])
    cnn.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    cnn.eval().requires_grad_(False)
    return cnn, float(saved["frame_accuracy"])


def _features(cnn: FrameCNN, videos: FlashMNIST, path: Path | None) -> npt.NDArray[np.float32]:
    """The features of all videos ``(V, L, 50)``, memory-mapped from ``path``, made there if need be."""
    shape = (len(videos), videos.length, FEATURES)
    if path is not None and path.is_file():
        try:
            features = _read_features(path, shape)
        except (OSError, EOFError, ValueError) as error:
            logger.warning("the cached features %s cannot be read (%s): making them again", path, error)
        else:
            logger.info("reusing the features of an earlier run: %s", path)
            return features
    logger.info("extracting the features of %s videos", f"{len(videos):,}")

    def extract(out: npt.NDArray[np.float32] | None) -> npt.NDArray[np.float32]:
        with Progress("features", len(videos), "videos") as progress:
            return extract_features(cnn, videos, out=out, progress=progress.advance)

    def write(part: Path) -> None:
        array = np.lib.format.open_memmap(part, mode="w+", dtype=np.float32, shape=shape)
        with part.open("r+b") as file:  # a disk that fills up while pages are written would kill the process
            os.posix_fallocate(file.fileno(), 0, part.stat().st_size)
        extract(array)
        array.flush()

    if path is not None and _try_to_cache(path, write):
        return _read_features(path, shape)
    return extract(None)


def _read_features(path: Path, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    features: npt.NDArray[np.float32] = np.load(path, mmap_mode="r")
    if features.shape != shape or features.dtype != np.float32:
        raise ValueError(f"it holds {features.shape} {features.dtype}, expected {shape} float32")
    return features


def _try_to_cache(path: Path, write: Callable[[Path], None]) -> bool:
    """Whether ``write`` could fill the file. A full disk or a read-only home does not stop this run."""
    try:
        _write_whole(path, write)
    except (OSError, RuntimeError) as error:  # torch.save raises the latter on a full disk
        logger.warning("%s could not be cached (%s): the next run makes it again", path, error)
        return False
    return True


def _write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Lets ``write`` fill a file beside ``path`` and renames it: what is there under ``path`` is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(descriptor)
    try:
        write(Path(name))
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
