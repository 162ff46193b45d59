"""Features kept in memory are those of the files, which are read once."""

from __future__ import annotations

import logging
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from feature_files import LAYOUTS, make_videos

from fastac.data import EqualIntervals, FeatureSetDataset, RandomSampling
from fastac.data.memory import MemoryStorage
from fastac.data.storage import EntryError, open_storage


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sampling", [None, EqualIntervals(3)])
@pytest.mark.parametrize("modalities", [["rgb", "audio"], ["rgb"]], ids=["all", "some"])
def test_same_features_as_the_files_also_when_these_are_gone(
    layout: str, sampling: EqualIntervals | None, modalities: list[str], tmp_path: Path
) -> None:
    path = LAYOUTS[layout](tmp_path / "features", make_videos())
    expected_data = FeatureSetDataset(path, sampling=sampling, modalities=modalities)
    expected = [expected_data[number] for number in range(len(expected_data))]
    data = FeatureSetDataset(path, sampling=sampling, modalities=modalities, in_memory=True)
    data = pickle.loads(pickle.dumps(data))
    path.unlink() if path.is_file() else shutil.rmtree(path)
    for number, item in enumerate(expected):
        kept = data[number]
        assert kept.name == item.name
        assert kept.features.keys() == item.features.keys()
        for modality, x in item.features.items():
            assert torch.equal(kept.features[modality], x)
    assert not data.problems


def test_changing_what_was_read_does_not_change_what_is_kept(tmp_path: Path) -> None:
    storage = MemoryStorage(open_storage(LAYOUTS["npy"](tmp_path, {"v": {"rgb": np.ones((2, 3))}})))
    for _ in range(2):
        with storage.open("v") as video:
            assert video.shape("rgb") == (2, 3)
            x = video.read("rgb")
            assert (x == 1).all()
            x[:] = 7


def test_a_broken_entry_is_broken_every_time(tmp_path: Path) -> None:
    path = LAYOUTS["npy"](tmp_path, {"v": {"rgb": np.ones((2, 3)), "audio": np.ones((2, 3))}})
    (path / "rgb" / "v.npy").write_bytes(b"no array")
    storage = MemoryStorage(open_storage(path))
    for _ in range(2):
        with storage.open("v") as video:
            assert (video.read("audio") == 1).all()
            with pytest.raises(EntryError, match="unreadable"):
                video.read("rgb")


@pytest.mark.parametrize("layout", ["npy", "npz"])
def test_what_is_wrong_with_a_kept_entry_is_said_with_its_file(
    layout: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Every entry has a row of NaN, which sampling meets in some later epoch only."""
    x = np.ones((20, 3), np.float32)
    x[0] = np.nan
    path = LAYOUTS[layout](tmp_path / "features", {f"v{i}": {"rgb": x} for i in range(3)})
    data = FeatureSetDataset(path, check="none", in_memory=True, sampling=RandomSampling(2))
    with caplog.at_level(logging.WARNING, "fastac"):
        for epoch in range(100):
            data.set_epoch(epoch)
            for number in range(3):
                data[number]
    assert len(data.problems) == 3
    assert len(caplog.records) == 3
    for problem in data.problems:
        assert problem.video in problem.where
        assert str(path) in problem.where
