"""Features on disk in every layout, for the tests of FeatureSetDataset."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

Videos = Mapping[str, Mapping[str, Any]]


def write_npy(path: Path, videos: Videos) -> Path:
    for video, sets in videos.items():
        for modality, x in sets.items():
            file = path / modality / f"{video}.npy"
            file.parent.mkdir(parents=True, exist_ok=True)
            np.save(file, x)
    return path


def write_npz(path: Path, videos: Videos) -> Path:
    for video, sets in videos.items():
        file = path / f"{video}.npz"
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(file, **sets)
    return path


def write_hdf5(path: Path, videos: Videos, key: str = "{video}/{modality}", **options: Any) -> Path:
    path = path.with_suffix(".h5")
    with h5py.File(path, "w") as file:
        for video, sets in videos.items():
            for modality, x in sets.items():
                file.create_dataset(key.format(video=video, modality=modality), data=x, **options)
    return path


def write_hdf5_by_modality(path: Path, videos: Videos) -> Path:
    return write_hdf5(path, videos, "{modality}/{video}")


LAYOUTS: dict[str, Callable[[Path, Videos], Path]] = {
    "npy": write_npy,
    "npz": write_npz,
    "hdf5": write_hdf5,
    "hdf5-by-modality": write_hdf5_by_modality,
}


def make_videos(count: int = 12, *, seed: int = 0) -> dict[str, dict[str, np.ndarray]]:
    """Ragged sets of rgb (M = 6) and audio (M = 3); every fourth video has no audio; names with folders."""
    generator = np.random.default_rng(seed)
    videos = {}
    for i in range(count):
        sets = {"rgb": generator.standard_normal((1 + 5 * i % 17, 6), dtype=np.float32)}
        if i % 4:
            sets["audio"] = generator.standard_normal((1 + 3 * i % 7, 3), dtype=np.float32)
        videos[f"v{i % 2}/clip.{i:02}"] = sets
    return dict(sorted(videos.items()))


def write_labels(path: Path, videos: Videos, classes: int = 3) -> Path:
    """A CSV file in which the videos stand in reversed order."""
    lines = [f"{name},class{i % classes}\n" for i, name in enumerate(reversed(list(videos)))]
    path.write_text("video,label\n" + "".join(lines))
    return path
