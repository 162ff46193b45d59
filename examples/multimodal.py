"""Three modalities, ragged sets, 400 classes: an attention cluster finds what mean pooling cannot.

Every video shows several activities, one after the other, and is labelled with one of them: the one
during which a cue is given (a whistle, a raised hand). Appearance (1536 features), motion (1536) and
sound (512) see the same activities at frame rates of their own, some videos are silent, and all features
are noisy. The mean of a video's features holds all its activities alike, so that a classifier of means
can only guess which was meant. An attention unit can learn the cue.

The features are made up; everything else is what one does with real ones: they are written to an HDF5
file with a CSV file of labels, read by `FeatureSetDataset`, and classifiers are trained on them with the
paper's settings (RMSProp, gradients clipped to norm 5, videos weighted by 1/S), but with dropout 0.5, as
three epochs are few. The first is mean pooling, a cluster of one unit with equal weights: the right label
is among its first five, and no better placed than the others.

    python examples/multimodal.py
"""

from __future__ import annotations

import argparse
import csv
import logging
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
import torch

from fastac.data import FeatureSetDataset
from fastac.models import AttentionClusterClassifier, ClusterConfig
from fastac.training import Trainer, TrainingConfig

MODALITIES = {"rgb": 1536, "flow": 1536, "audio": 512}
CLASSES = 400
TRAIN_VIDEOS, TEST_VIDEOS = 2400, 400
ACTIVITIES = 5
"""Activities in a video; mean pooling cannot be right more often than once in as many."""
SILENT = 0.1
"""The share of videos without sound."""
CLUSTER_SIZE = 4

REACHED, NOT_REACHED = 0.9, 0.4
"""The accuracy that the attention cluster must exceed and that mean pooling must not."""


def make_features(folder: Path, seed: int) -> None:
    """Writes ``features.h5`` with a data set ``<video>/<modality>`` each, and ``labels.csv``."""
    generator = np.random.default_rng(seed)
    patterns, cues = {}, {}
    for modality, dimension in MODALITIES.items():
        # Unit vectors in so many dimensions are all but orthogonal.
        patterns[modality] = _unit(generator.normal(size=(CLASSES, dimension)))
        cues[modality] = _unit(generator.normal(size=dimension))
    with (
        h5py.File(folder / "features.h5", "w") as features,
        (folder / "labels.csv").open("w", newline="") as labels,
    ):
        table = csv.writer(labels)
        table.writerow(("video", "label", "split"))
        for number in range(TRAIN_VIDEOS + TEST_VIDEOS):
            name = f"video-{number:05d}"
            shown = generator.permutation(CLASSES)[:ACTIVITIES]
            meant = generator.integers(ACTIVITIES)
            shown[meant] = number % CLASSES
            silent = generator.random() < SILENT
            for modality, dimension in MODALITIES.items():
                if modality == "audio" and silent:
                    continue
                activity = np.repeat(np.arange(ACTIVITIES), generator.integers(1, 4))  # the frame rate
                x = 10 * patterns[modality][shown[activity]] + 10 * np.outer(
                    activity == meant, cues[modality]
                )
                x += 0.1 * generator.standard_normal((len(activity), dimension), dtype=np.float32)
                features.create_dataset(f"{name}/{modality}", data=x.astype(np.float16))
            split = "train" if number < TRAIN_VIDEOS else "test"
            table.writerow((name, f"activity {number % CLASSES}", split))


def _unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def train(
    name: str, cluster: dict[str, object], data: tuple[FeatureSetDataset, FeatureSetDataset], epochs: int
) -> float:
    """Trains a classifier with the same kind of cluster for every modality; returns its test accuracy."""
    train_data, test_data = data
    torch.manual_seed(1)
    model = AttentionClusterClassifier(
        {
            modality: ClusterConfig(in_features=dimension, **cluster)
            for modality, dimension in train_data.modalities.items()
        },
        train_data.num_classes,
        dropout=0.5,
    )
    model.set_means(train_data.mean_features())  # what a silent video's sound is taken to be
    started = time.perf_counter()
    results = Trainer(model, train_data, test_data, TrainingConfig(epochs=epochs)).fit()
    accuracy = results[-1].values["validation_accuracy"]
    print(f"{name:18s} test accuracy {accuracy:6.1%}  ({time.perf_counter() - started:.0f} s)", flush=True)
    return accuracy


def main() -> int:
    """Runs the example; the exit status is 1 if either accuracy is not what it must be."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        started = time.perf_counter()
        make_features(folder, arguments.seed)
        print(f"features made in {time.perf_counter() - started:.0f} s")
        started = time.perf_counter()
        features, labels = folder / "features.h5", folder / "labels.csv"
        train_data = FeatureSetDataset(
            features, labels, split="train", modalities=list(MODALITIES), in_memory=True
        )
        test_data = FeatureSetDataset(
            features,
            labels,
            split="test",
            modalities=train_data.modalities,
            class_names=train_data.class_names,
            in_memory=True,
        )
        print(
            f"{len(train_data):,} videos to train on, {len(test_data):,} to test on, "
            f"read and checked in {time.perf_counter() - started:.0f} s"
        )
        data = train_data, test_data
        mean_pooling = {"cluster_size": 1, "weighting": "average", "shift": False}
        mean = train("mean pooling", mean_pooling, data, arguments.epochs)
        cluster = train("attention cluster", {"cluster_size": CLUSTER_SIZE}, data, arguments.epochs)
    if cluster > REACHED and mean < NOT_REACHED:
        return 0
    print(f"expected: cluster above {REACHED:.0%}, mean pooling below {NOT_REACHED:.0%}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
