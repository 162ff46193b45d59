"""`FeatureArray`: what it refuses, the batches it makes, means and counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from fastac.data import FeatureArray

V, L, M = 7, 3, 4


def arrays() -> dict[str, Any]:
    generator = np.random.default_rng(0)
    return {
        "features": {
            "rgb": generator.standard_normal((V, L, M)).astype(np.float32),
            "audio": generator.standard_normal((V, 1, 2)).astype(np.float32),
        },
        "labels": np.array([0, 2, 1, 2, 2, 0, 1], dtype=np.int64),
        "class_names": ["a", "b", "c", "d"],
    }


def test_a_batch_is_the_videos_asked_for() -> None:
    given = arrays()
    data = FeatureArray(**given)
    assert len(data) == V
    assert data.modalities == {"rgb": M, "audio": 2}
    assert data.num_classes == 4
    assert data.names == ["0", "1", "2", "3", "4", "5", "6"]
    assert not data.multi_label
    loader = DataLoader(data, batch_sampler=[[5, 0, 5], [6]], collate_fn=data.collate)
    first, second = loader
    assert first.index.tolist() == [5, 0, 5]
    assert first.labels is not None
    assert first.labels.tolist() == [0, 0, 0]
    assert second.labels is not None
    assert second.labels.tolist() == [1]
    for modality, array in given["features"].items():
        assert np.array_equal(first.features[modality].numpy(), array[[5, 0, 5]])
    assert first.inputs()["offsets"] == {}
    assert len(data[3]) == 1
    assert np.array_equal(data[3].features["rgb"].numpy(), given["features"]["rgb"][3:4])
    with pytest.raises(IndexError):
        data[V]


def test_a_batch_is_a_copy() -> None:
    given = arrays()
    data = FeatureArray(**given)
    data[0].features["rgb"].zero_()
    assert given["features"]["rgb"][0].any()


def test_a_file_is_read_as_it_is_asked_for(tmp_path: Path) -> None:
    given = arrays()
    path = tmp_path / "rgb.npy"
    np.save(path, given["features"]["rgb"])
    mapped = np.load(path, mmap_mode="r")
    data = FeatureArray({"rgb": mapped}, given["labels"], given["class_names"])
    batch = data.__getitems__([1, 4]).features["rgb"]
    assert torch.equal(batch, torch.from_numpy(given["features"]["rgb"][[1, 4]]))
    batch.zero_()  # the file is read-only, the batch is not
    assert np.shares_memory(data.head(2)._features["rgb"], mapped)


def test_means_and_counts() -> None:
    given = arrays()
    data = FeatureArray(**given)
    means = data.mean_features()
    for modality, array in given["features"].items():
        assert means[modality].dtype == torch.float32
        np.testing.assert_allclose(means[modality].numpy(), array.mean(axis=(0, 1)), rtol=1e-5, atol=1e-6)
    assert data.class_counts().tolist() == [2, 2, 3, 0]


def test_means_are_summed_in_double() -> None:
    """Single precision would lose the small value beside the large ones, in more than one piece of videos."""
    values = np.full((3000, 1, 1), 2.0**24, dtype=np.float32)
    values[::2] = -(2.0**24)
    values[-1] += 2  # the next float32
    data = FeatureArray({"x": values}, np.zeros(3000, dtype=np.int64), ["a"])
    assert data.mean_features()["x"].item() == pytest.approx(2 / 3000)


def test_the_first_videos() -> None:
    given = arrays()
    data = FeatureArray(**given, names=list("tuvwxyz"))
    head = data.head(3)
    assert len(head) == 3
    assert head.names == ["t", "u", "v"]
    assert head.num_classes == 4
    assert head.labels.tolist() == [0, 2, 1]
    assert torch.equal(head[2].features["rgb"], data[2].features["rgb"])
    for count in (0, V + 1):
        with pytest.raises(ValueError, match=rf"count must be in 1…7, got {count}"):
            data.head(count)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features": {}}, ValueError, "features must have at least one modality, got none"),
        (
            {"features": {"rgb": torch.zeros(V, L, M)}},
            TypeError,
            r"features\['rgb'\] must be a numpy.ndarray, got Tensor",
        ),
        (
            {"features": {"rgb": np.zeros((V, M), np.float32)}},
            ValueError,
            r"features\['rgb'\] must have shape \(7, L, M\), got \(7, 4\)",
        ),
        (
            {"features": {"rgb": np.zeros((V + 1, L, M), np.float32)}},
            ValueError,
            r"features\['rgb'\] must have shape \(7, L, M\), got \(8, 3, 4\)",
        ),
        (
            {"features": {"rgb": np.zeros((V, L, M))}},
            TypeError,
            r"features\['rgb'\] must be float32 or uint8, got float64",
        ),
        ({"labels": [0] * V}, TypeError, "labels must be a numpy.ndarray, got list"),
        ({"labels": np.zeros((V, 1), np.int64)}, ValueError, r"labels must have shape \(V,\), got \(7, 1\)"),
        ({"labels": np.zeros(V, np.int32)}, TypeError, "labels must be int64, got int32"),
        ({"labels": np.full(V, 4, np.int64)}, ValueError, "labels must be in 0…3, got 4…4"),
        ({"labels": np.full(V, -1, np.int64)}, ValueError, "labels must be in 0…3, got -1…-1"),
        ({"names": ["a"]}, ValueError, "names must be 7, got 1"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FeatureArray(**{**arrays(), **change})


def test_pixels_are_given_as_float32() -> None:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (3, 2, 4), dtype=np.uint8)
    data = FeatureArray({"frames": pixels}, np.zeros(3, dtype=np.int64), ["a"])
    batch = data.__getitems__([2, 0])
    assert batch.features["frames"].dtype == torch.float32
    assert np.array_equal(batch.features["frames"].numpy(), pixels[[2, 0]])
    assert data.mean_lengths() == {"frames": 2.0}
    expected = torch.from_numpy(pixels.reshape(-1, 4).mean(0)).float()
    torch.testing.assert_close(data.mean_features()["frames"], expected)
