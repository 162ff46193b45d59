"""A small Flash-MNIST with features that nobody had to extract; reading results and the package's log."""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from fastac.data import Digits, FeatureArray, FlashMNIST, NoiseSampler
from fastac.experiments.flash_mnist import MODALITY, Prepared, Recipe, class_names
from fastac.models import FrameCNN

SETS, LENGTH = 32, 12
"""Of the small data: sets of five digits, frames."""


def features_of(videos: FlashMNIST) -> np.ndarray:
    """Local features as a good CNN gives them: one unit per digit, a little noise."""
    generator = np.random.default_rng(len(videos))
    values = generator.normal(0, 0.1, (len(videos), videos.length, 50)).astype(np.float32)
    values[..., :11] += 8 * np.eye(11, dtype=np.float32)[videos.frame_labels]
    return torch.from_numpy(values).log_softmax(-1).numpy()


def make_small(digits: Digits) -> Prepared:
    """Data of five digits that pass for the paper's."""
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
    return Prepared(train, test, arrays[0], arrays[1], 0.97, "mnist", Recipe(), FrameCNN().eval())


def rows_of(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


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
