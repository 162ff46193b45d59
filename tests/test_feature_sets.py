"""FeatureSetDataset: what is found wrong and named, what reaches a batch, and that a long run goes on."""

from __future__ import annotations

import logging
import os
import pickle
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from feature_files import LAYOUTS, make_videos, write_hdf5, write_labels, write_npy, write_npz
from torch.utils.data import DataLoader

import fastac
from fastac.data.batch import FeatureBatch
from fastac.data.feature_sets import FeatureSetDataset
from fastac.data.problems import DataProblemsError
from fastac.data.sampling import EqualIntervals, RandomSampling


def ones(length: int = 4, m: int = 6) -> np.ndarray:
    return np.ones((length, m), np.float32)


def loader(dataset: FeatureSetDataset, **options: Any) -> DataLoader[Any]:
    return DataLoader(dataset, collate_fn=dataset.collate, batch_size=5, **options)  # type: ignore[arg-type]


def whats(dataset_or_error: FeatureSetDataset | DataProblemsError) -> set[tuple[str, str | None, str]]:
    return {(p.video, p.modality, p.what) for p in dataset_or_error.problems}


def check_packed(batch: FeatureBatch, videos: dict[str, dict[str, np.ndarray]], names: list[str]) -> None:
    """The batch holds exactly these videos' rows, one set after the other."""
    for modality, m in (("audio", 3), ("rgb", 6)):
        sets = [videos[name].get(modality, np.zeros((0, m), np.float32)) for name in names]
        assert batch.features[modality].dtype == torch.float32
        assert batch.features[modality].numpy().tobytes() == np.concatenate(sets).tobytes()
        assert batch.features[modality].shape == (sum(map(len, sets)), m)
        assert batch.offsets[modality].dtype == torch.int64
        assert batch.offsets[modality].tolist() == np.cumsum([0, *map(len, sets)]).tolist()
        assert batch.max_length[modality] == max(map(len, sets))


@pytest.mark.parametrize("check", ["full", "shapes", "none"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_batches_are_packed_exactly(tmp_path: Path, layout: str, check: str) -> None:
    videos = make_videos()
    path = LAYOUTS[layout](tmp_path / "features", videos)
    dataset = FeatureSetDataset(path, write_labels(tmp_path / "labels.csv", videos), check=check)
    names = list(reversed(list(videos)))
    assert dataset.names == names
    assert dataset.modalities == {"audio": 3, "rgb": 6}
    assert list(dataset.modalities) == ["audio", "rgb"]
    assert dataset.problems == []
    assert dataset.missing == ({} if check == "none" else {"audio": 3, "rgb": 0})
    assert dataset.class_names == ["class0", "class1", "class2"]
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [0, 1, 2] * 4
    assert dataset.class_counts().tolist() == [4, 4, 4]
    batches = list(loader(dataset))
    assert [len(batch) for batch in batches] == [5, 5, 2]
    for start, batch in zip((0, 5, 10), batches, strict=True):
        check_packed(batch, videos, names[start : start + 5])
        assert batch.index.tolist() == list(range(start, start + len(batch)))
        assert batch.labels.tolist() == dataset.labels[start : start + 5].tolist()
    item = dataset[-1]
    assert (item.name, item.index) == (names[-1], 11)


def test_a_modality_that_no_video_of_the_batch_has(tmp_path: Path) -> None:
    videos = make_videos()
    dataset = FeatureSetDataset(write_npy(tmp_path / "f", videos))
    items = [item for item in (dataset[i] for i in range(len(dataset))) if not len(item.features["audio"])]
    assert len(items) == 3
    batch = dataset.collate(items)
    assert batch.features["audio"].shape == (0, 3)
    assert batch.offsets["audio"].tolist() == [0, 0, 0, 0]
    assert batch.max_length["audio"] == 0
    assert batch.labels is None


def test_batches_go_into_the_operator(tmp_path: Path) -> None:
    videos = make_videos()
    dataset = FeatureSetDataset(write_npy(tmp_path / "f", videos))
    inputs = next(iter(loader(dataset))).inputs()
    weight = torch.randn(2, 6)
    packed = fastac.attention_cluster(
        inputs["features"]["rgb"],
        weight,
        offsets=inputs["offsets"]["rgb"],
        max_length=inputs["max_length"]["rgb"],
    )
    for row, name in zip(packed, dataset.names, strict=False):
        alone = fastac.attention_cluster(torch.from_numpy(videos[name]["rgb"])[None], weight)[0]
        torch.testing.assert_close(row, alone)


def test_without_labels_every_video_is_taken(tmp_path: Path) -> None:
    videos = make_videos()
    dataset = FeatureSetDataset(write_npz(tmp_path / "f", videos), class_names=["a", "b"])
    assert dataset.names == sorted(videos)
    assert dataset.labels is None
    assert dataset.num_classes == 2
    assert dataset[0].label is None
    with pytest.raises(ValueError, match=r"^class counts need labels"):
        dataset.class_counts()


def test_split_and_unlabelled_videos(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    videos = {f"v{i}": {"rgb": ones()} for i in range(5)}
    csv = tmp_path / "labels.csv"
    csv.write_text("video,label,split\nv3,b,train\nv0,a,test\nv1,a,train\n")
    with caplog.at_level(logging.INFO, "fastac"):
        dataset = FeatureSetDataset(write_npy(tmp_path / "f", videos), csv, split="train")
    assert dataset.names == ["v3", "v1"]
    assert dataset.unlabelled == ["v2", "v4"]
    assert "2 videos without labels" in caplog.text
    assert dataset.class_names == ["a", "b"]
    assert dataset[0].label == torch.tensor(1)


def test_multi_label(tmp_path: Path) -> None:
    csv = tmp_path / "labels.csv"
    csv.write_text("video,label\nv0,b;a\nv1,c\nv2,a|c\n")
    videos = {f"v{i}": {"rgb": ones()} for i in range(3)}
    dataset = FeatureSetDataset(write_npy(tmp_path / "f", videos), csv, multi_label=True)
    batch = next(iter(loader(dataset)))
    assert batch.labels.dtype == torch.float32
    assert batch.labels.tolist() == [[1, 1, 0], [0, 0, 1], [1, 0, 1]]
    assert dataset.class_counts().tolist() == [2, 1, 2]
    assert dataset[1].label is not None
    assert dataset[1].label.shape == (3,)


def broken_files(path: Path) -> tuple[Path, set[tuple[str, str | None, str]]]:
    """A tree of .npy files with one of each kind of mistake, and what must be said of them."""
    videos: dict[str, dict[str, Any]] = {f"good{i}": {"rgb": ones(), "audio": ones(2, 3)} for i in range(3)}
    bad: dict[str, tuple[Any, str]] = {
        "vector": (np.ones(6, np.float32), "wrong rank"),
        "scalar": (np.float32(1), "wrong rank"),
        "cube": (np.ones((2, 2, 6)), "wrong rank"),
        "wide": (ones(4, 7), "wrong dimension"),
        "empty": (ones(0), "empty"),
        "text": (np.full((4, 6), "a"), "wrong dtype"),
        "objects": (np.full((4, 6), None), "wrong dtype"),
        "nan": (np.where(np.eye(4, 6) > 0, np.nan, 1), "not finite"),
        "inf": (np.where(np.eye(4, 6) > 0, -np.inf, 1).astype(np.float16), "not finite"),
        "huge": (np.full((4, 6), 1e300), "not finite"),
        "short": (ones(100), "unreadable"),
        "zero": (ones(), "unreadable"),
        "noise": (ones(), "unreadable"),
    }
    for name, (x, _) in bad.items():
        videos[name] = {"rgb": x, "audio": ones(2, 3)}
    videos["hopeless"] = {"rgb": ones(0)}
    videos["silent"] = {"rgb": ones()}
    write_npy(path, videos)
    os.truncate(path / "rgb/short.npy", 1000)
    os.truncate(path / "rgb/zero.npy", 0)
    (path / "rgb/noise.npy").write_bytes(os.urandom(500))
    said: set[tuple[str, str | None, str]] = {(name, "rgb", what) for name, (_, what) in bad.items()}
    return path, said | {("hopeless", "rgb", "empty"), ("hopeless", None, "no usable modality")}


def test_everything_broken_is_reported_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, said = broken_files(tmp_path / "f")
    csv = tmp_path / "labels.csv"
    names = sorted({file.stem for file in path.rglob("*.npy")})
    csv.write_text("video,label\n" + "".join(f"{name},x\n" for name in [*names, "nowhere"]))
    dataset = FeatureSetDataset(path, csv)
    said = said | {("nowhere", None, "missing")}
    assert whats(dataset) == said
    assert len(dataset.problems) == len(said)
    assert sorted(dataset.names) == sorted(set(names) - {"hopeless"})
    assert dataset.labels is not None
    assert len(dataset.labels) == len(dataset.names)
    assert dataset.missing == {"audio": 1, "rgb": 0}
    by_video = {p.video: str(p) for p in dataset.problems}
    assert "4 NaN of 24 values, first in row 0" in by_video["nan"]
    assert "must have M = 6, got 7" in by_video["wide"]
    assert "truncated, it has 872 of 2,400 bytes of data" in by_video["short"]
    assert str(path / "rgb" / "short.npy") in by_video["short"]
    assert "has 16 problems" in caplog.text
    for name in names:
        if name != "hopeless":
            item = dataset[dataset.names.index(name)]
            whole = name.startswith("good") or name == "silent"
            assert len(item.features["rgb"]) == (4 if whole else 0)
            assert len(item.features["audio"]) == (0 if name == "silent" else 2)
    assert whats(dataset) == said  # using them tells nothing twice

    with pytest.raises(DataProblemsError, match="has 16 problems") as caught:
        FeatureSetDataset(path, csv, on_error="raise")
    assert whats(caught.value) == said
    assert all(name in str(caught.value) for name, _, _ in said)


def test_check_shapes_reads_no_data_and_check_none_no_headers(tmp_path: Path) -> None:
    path, said = broken_files(tmp_path / "f")
    shapes = FeatureSetDataset(path, check="shapes")
    assert whats(shapes) == {problem for problem in said if problem[2] != "not finite"}
    nothing = FeatureSetDataset(path, check="none", modalities={"rgb": 6, "audio": 3})
    assert nothing.problems == []
    for dataset in (shapes, nothing):  # what the check left out is found in use, and costs the entry only
        for _ in range(2):
            for batch in loader(dataset):
                assert all(x.isfinite().all() for x in batch.features.values())
        assert whats(dataset) - {("hopeless", None, "no usable modality")} == said - {
            ("hopeless", None, "no usable modality")
        }
        assert len(dataset.problems) == len(whats(dataset))


@pytest.mark.parametrize("layout", ["npz", "hdf5"])
def test_broken_entries_of_the_other_layouts(tmp_path: Path, layout: str) -> None:
    videos: dict[str, dict[str, Any]] = {f"v{i}": {"rgb": ones(), "audio": ones(2, 3)} for i in range(4)}
    videos["nan"] = {"rgb": ones() * np.nan, "audio": ones(2, 3)}
    videos["wide"] = {"rgb": ones(m=7), "audio": ones(2, 3)}
    videos["short"] = {"rgb": ones(), "audio": ones(2, 3)}
    path = LAYOUTS[layout](tmp_path / "f", videos)
    said: set[tuple[str, str | None, str]] = {
        ("nan", "rgb", "not finite"),
        ("wide", "rgb", "wrong dimension"),
    }
    if layout == "npz":
        os.truncate(path / "short.npz", 300)
        said |= {("short", None, "unreadable"), ("short", None, "no usable modality")}
    dataset = FeatureSetDataset(path, modalities=["rgb", "audio"])
    assert whats(dataset) == said
    assert list(dataset.modalities) == ["rgb", "audio"]
    assert ("short" in dataset.names) == (layout == "hdf5")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("layout", ["npy", "npz", "hdf5"])
def test_a_file_that_breaks_later_does_not_end_the_run(tmp_path: Path, layout: str, workers: int) -> None:
    x = np.random.default_rng(0).standard_normal((600, 6), dtype=np.float32)
    videos = {f"v{i}": {"rgb": x, "audio": ones(2, 3)} for i in range(7)}
    options = {"compression": "gzip"} if layout == "hdf5" else {}
    path = LAYOUTS[layout](tmp_path / "f", videos, **options)  # type: ignore[call-arg]
    dataset = FeatureSetDataset(path, modalities=["rgb", "audio"], sampling={"rgb": RandomSampling(2)})
    assert dataset.problems == []
    if layout == "npy":
        (path / "rgb/v1.npy").unlink()
        os.truncate(path / "rgb/v2.npy", 900)
        np.save(path / "rgb/v3.npy", x * np.nan)
        np.save(path / "rgb/v4.npy", x[:, :5])
        expected = {("v1", "rgb"), ("v2", "rgb"), ("v3", "rgb"), ("v4", "rgb")}
    elif layout == "npz":
        (path / "v1.npz").unlink()
        np.savez(path / "v2.npz", audio=ones(2, 3))
        expected = {("v1", "rgb"), ("v1", "audio"), ("v2", "rgb")}
    else:
        with h5py.File(path) as file:
            start = file["v1/rgb"].id.get_chunk_info(0).byte_offset
        with path.open("r+b") as raw:
            raw.seek(start)
            raw.write(b"\xff" * 64)
        expected = {("v1", "rgb")}
    log = logging.FileHandler(tmp_path / "log.txt")  # worker processes write to it too
    logging.getLogger("fastac").addHandler(log)
    try:
        for epoch in range(2):
            dataset.set_epoch(epoch)
            batches = list(loader(dataset, num_workers=workers))
            assert [len(batch) for batch in batches] == [5, 2]
            lengths = torch.cat([batch.offsets["rgb"].diff() for batch in batches]).tolist()
            assert lengths == [0 if (f"v{i}", "rgb") in expected else 2 for i in range(7)]
            assert all(batch.features["rgb"].isfinite().all() for batch in batches)
    finally:
        logging.getLogger("fastac").removeHandler(log)
        log.close()
    assert {(p.video, p.modality) for p in dataset.problems} == expected
    warnings = (tmp_path / "log.txt").read_text().splitlines()
    assert len(warnings) == len({video for video, _ in expected})  # each file once, in two epochs
    assert all("counts as absent: v" in line for line in warnings)
    if workers:
        assert {p.what for p in dataset.problems} == {"broke after the checks"}


def test_an_hdf5_file_that_vanishes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_hdf5(tmp_path / "f", {f"v{i}": {"rgb": ones()} for i in range(3)})
    dataset = FeatureSetDataset(path, modalities=["rgb"])
    path.unlink()
    caplog.clear()
    batch = next(iter(loader(dataset)))
    assert batch.features["rgb"].shape == (0, 6)
    assert len(dataset.problems) == 3
    assert len(caplog.records) == 1  # one file, one warning


@pytest.mark.parametrize("workers", [0, 1])
def test_an_hdf5_file_that_is_cut_short_between_epochs(tmp_path: Path, workers: int) -> None:
    path = write_hdf5(tmp_path / "f", {f"v{i}": {"rgb": ones(4000)} for i in range(5)})
    size = path.stat().st_size
    dataset = FeatureSetDataset(path, modalities=["rgb"], sampling=EqualIntervals(2))
    options = {"num_workers": workers, "persistent_workers": bool(workers)}
    batches = loader(dataset, **options)
    log = logging.FileHandler(tmp_path / "log.txt")
    logging.getLogger("fastac").addHandler(log)
    try:
        assert [len(batch.features["rgb"]) for batch in batches] == [10]
        os.truncate(path, 5000)
        assert [len(batch.features["rgb"]) for batch in batches] == [0]
    finally:
        logging.getLogger("fastac").removeHandler(log)
        log.close()
    assert len(dataset.problems) == 5
    said = f"the file had {size:,} bytes when it was first opened, it has 5,000"
    assert (tmp_path / "log.txt").read_text().count(said) == 5


@pytest.mark.parametrize("workers", [0, 1])
def test_on_error_raise_names_the_file_that_broke(tmp_path: Path, workers: int) -> None:
    path = write_npy(tmp_path / "f", {f"v{i}": {"rgb": ones()} for i in range(3)})
    dataset = FeatureSetDataset(path, on_error="raise")
    os.truncate(path / "rgb/v1.npy", 140)
    batches = iter(loader(dataset, num_workers=workers))
    with pytest.raises(DataProblemsError, match=r"broke after the checks: v1 \[rgb\]: .*rgb/v1\.npy"):
        list(batches)
    if workers:  # left to the garbage collector it waits for 5 s, in whatever test comes next
        batches._shutdown_workers()  # type: ignore[attr-defined]


def test_many_files_that_break_are_all_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_npy(tmp_path / "f", {f"v{i:03}": {"rgb": ones(1, 1)} for i in range(300)})
    dataset = FeatureSetDataset(path)
    for file in path.rglob("*.npy"):
        file.unlink()
    for i in range(300):
        assert len(dataset[i].features["rgb"]) == 0
    assert len(dataset.problems) == 300
    assert len(caplog.records) == 300


def test_long_listings_are_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_npy(tmp_path / "f", {f"v{i:03}": {"rgb": ones(0)} for i in range(300)})
    write_npy(path, {"good": {"rgb": ones()}})
    with pytest.raises(DataProblemsError) as caught:
        FeatureSetDataset(path, on_error="raise")
    assert len(caught.value.problems) == 600
    assert len(str(caught.value).splitlines()) == 601
    FeatureSetDataset(path)
    assert all(f"v{i:03}: no usable modality" in caplog.text for i in range(300))


def test_a_long_check_says_how_far_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, logger="fastac")
    path = write_npy(tmp_path / "f", {f"v{i}": {"rgb": ones()} for i in range(10)})
    FeatureSetDataset(path)
    assert caplog.messages == []
    now = iter(range(0, 10_000, 25))  # seconds
    monkeypatch.setattr("fastac.data.progress.time.monotonic", lambda: next(now))
    monkeypatch.setitem(sys.modules, "tqdm", None)  # it is not needed
    dataset = FeatureSetDataset(path)
    assert caplog.messages[0] == "checking: 3 of 10 videos"
    caplog.clear()
    dataset.feature_moments()
    assert caplog.messages[0] == "mean and deviation of features: 3 of 10 videos"


def test_nothing_usable(tmp_path: Path) -> None:
    path = write_npy(tmp_path / "f", {"v": {"rgb": ones(0)}})
    for check in ("full", "none"):
        with pytest.raises(DataProblemsError, match=r"^no video is usable: "):
            FeatureSetDataset(path, check=check)
    with h5py.File(tmp_path / "empty.h5", "w"):
        pass
    with pytest.raises(DataProblemsError, match=r"^no video is usable: .*empty\.h5 has none"):
        FeatureSetDataset(tmp_path / "empty.h5")


def test_labels_and_features_without_a_common_name(tmp_path: Path) -> None:
    path = write_npy(tmp_path / "f", {f"v{i}": {"rgb": ones()} for i in range(5)})
    csv = tmp_path / "labels.csv"
    csv.write_text("video,label\nv0.avi,x\nv1.avi,x\nv2.avi,x\n")
    with pytest.raises(
        ValueError, match=r"none of the 3 .*'v0\.avi', 'v1\.avi'.* among the 5 .*'v0', 'v1'\)$"
    ):
        FeatureSetDataset(path, csv)


def test_the_usual_m_and_the_one_asked_for(tmp_path: Path) -> None:
    videos = {f"v{i}": {"rgb": ones(m=6 if i < 2 else 7)} for i in range(5)}
    path = write_npy(tmp_path / "f", videos)
    assert FeatureSetDataset(path).modalities == {"rgb": 7}
    dataset = FeatureSetDataset(path, modalities={"rgb": 6, "audio": 3})
    assert dataset.modalities == {"rgb": 6, "audio": 3}
    assert dataset.names == ["v0", "v1"]
    assert dataset.missing == {"rgb": 0, "audio": 2}
    assert next(iter(loader(dataset))).features["audio"].shape == (0, 3)
    with pytest.raises(ValueError, match=r"^no video has the modality audio"):
        dataset.mean_features()


@pytest.mark.parametrize("check", ["full", "none"])
@pytest.mark.parametrize("layout", ["npy", "npz"])
def test_a_modality_that_is_not_there(tmp_path: Path, layout: str, check: str) -> None:
    path = LAYOUTS[layout](tmp_path / "f", {"v": {"rgb": ones(), "audio": ones()}})
    with pytest.raises(DataProblemsError, match=r"\(audio, rgb\); there is no usable entry of flow"):
        FeatureSetDataset(path, modalities=["rgb", "flow"], check=check)


@pytest.mark.parametrize("check", ["full", "shapes", "none"])
def test_mean_features_are_numpys(tmp_path: Path, check: str) -> None:
    videos = make_videos()
    videos["offset"] = {"rgb": 1e4 + make_videos(seed=1)["v0/clip.02"]["rgb"]}
    path = write_npy(tmp_path / "f", videos)
    np.save(path / "rgb/bad.npy", ones() * np.nan)
    dataset = FeatureSetDataset(path, check=check, sampling=EqualIntervals(1))
    means = dataset.mean_features()
    assert list(means) == ["audio", "rgb"]
    for name, mean in means.items():
        rows = np.concatenate([sets[name] for sets in videos.values() if name in sets])
        assert mean.dtype == torch.float32
        np.testing.assert_allclose(mean, rows.mean(0, dtype=np.float64).astype(np.float32), rtol=2e-7)
    assert len(dataset[1].features["rgb"]) == 1  # sampling is back


def drawn(dataset: FeatureSetDataset, **options: Any) -> list[list[float]]:
    """The first column of rgb in every batch: which rows were drawn."""
    return [batch.features["rgb"][:, 0].tolist() for batch in loader(dataset, **options)]


def numbered(count: int = 8) -> dict[str, dict[str, np.ndarray]]:
    """Sets whose rows hold their own number."""
    return {f"v{i}": {"rgb": np.arange(50.0)[:, None] * np.ones(2)} for i in range(count)}


def test_sampling_is_the_same_in_workers_and_in_any_order(tmp_path: Path) -> None:
    path = write_npy(tmp_path / "f", numbered())
    dataset = FeatureSetDataset(path, sampling=RandomSampling(5), seed=3)
    dataset.set_epoch(4)
    here = drawn(dataset)
    assert drawn(dataset, num_workers=2) == here
    assert drawn(FeatureSetDataset(path, sampling=RandomSampling(5), seed=3)) != here  # epoch 0
    assert drawn(FeatureSetDataset(path, sampling=RandomSampling(5), seed=4)) != here
    backwards = [dataset[i].features["rgb"][:, 0].tolist() for i in reversed(range(8))]
    assert list(chain(*reversed(backwards))) == list(chain(*here))
    assert len({tuple(rows) for rows in backwards}) == 8
    assert all(rows == sorted(set(rows)) for rows in backwards)


def test_workers_that_are_kept_see_the_epoch(tmp_path: Path) -> None:
    dataset = FeatureSetDataset(write_npy(tmp_path / "f", numbered()), sampling=RandomSampling(5))
    batches = loader(dataset, num_workers=1, persistent_workers=True)
    for epoch in (0, 1, 2):
        dataset.set_epoch(epoch)
        found = [batch.features["rgb"][:, 0].tolist() for batch in batches]
        assert found == drawn(dataset)


def test_sampling_by_modality(tmp_path: Path) -> None:
    videos = {"v": {"rgb": np.arange(50.0)[:, None] * np.ones(2), "audio": ones(20, 3)}}
    dataset = FeatureSetDataset(write_npy(tmp_path / "f", videos), sampling={"rgb": EqualIntervals(5)})
    assert dataset[0].features["rgb"][:, 0].tolist() == [5, 15, 25, 35, 45]
    assert len(dataset[0].features["audio"]) == 20


def test_spawned_workers(tmp_path: Path) -> None:
    path = write_hdf5(tmp_path / "f", numbered())
    dataset = FeatureSetDataset(path, modalities=["rgb"], sampling=RandomSampling(5))
    dataset.set_epoch(1)
    here = drawn(dataset)  # the file is open here now
    assert drawn(dataset, num_workers=1, multiprocessing_context="spawn") == here


def test_hdf5_in_forked_workers(tmp_path: Path) -> None:
    videos = make_videos(40)
    dataset = FeatureSetDataset(write_hdf5(tmp_path / "f", videos), modalities=["audio", "rgb"])
    dataset[0]  # open here while the workers are forked
    for start, batch in enumerate(loader(dataset, num_workers=2)):
        check_packed(batch, videos, dataset.names[5 * start : 5 * start + 5])
        assert (dataset[start].features["rgb"].numpy() == videos[dataset.names[start]]["rgb"]).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pickling(tmp_path: Path, layout: str) -> None:
    videos = make_videos()
    path = LAYOUTS[layout](tmp_path / "f", videos)
    dataset = FeatureSetDataset(path, modalities=["audio", "rgb"], sampling=RandomSampling(2), seed=5)
    dataset.set_epoch(3)
    dataset[0]
    again = pickle.loads(pickle.dumps(dataset))
    assert drawn(again) == drawn(dataset)
    again.set_epoch(4)
    assert drawn(again) != drawn(dataset)
    assert drawn(again, num_workers=1) == drawn(again)


def test_repr_and_lists_of_indices(tmp_path: Path) -> None:
    dataset = FeatureSetDataset(write_npy(tmp_path / "f", make_videos()), class_names=["a", "b"])
    assert repr(dataset) == "FeatureSetDataset(12 videos, audio 3, rgb 6, 2 classes)"
    for index in (12, -13):
        with pytest.raises(IndexError, match=f"^index must be in 0...11, got {index}$"):
            dataset[index]
    with pytest.raises(ValueError, match=r"^items must hold at least one video"):
        dataset.collate([])


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"on_error": "ignore"}, ValueError, "on_error must be one of report, raise, got 'ignore'"),
        ({"check": "fast"}, ValueError, "check must be one of full, shapes, none, got 'fast'"),
        ({"seed": -1}, ValueError, "seed must be >= 0, got -1"),
        ({"seed": 1.0}, TypeError, "seed must be an int, got float"),
        ({"split": "train"}, ValueError, "split 'train' needs labels"),
        ({"modalities": "rgb"}, TypeError, "modalities must be a sequence of names or a mapping, got str"),
        ({"modalities": []}, ValueError, "modalities must be one or more different names"),
        ({"modalities": ["rgb", "rgb"]}, ValueError, "modalities must be one or more different names"),
        ({"modalities": [1]}, TypeError, "modalities must be names, got a int: 1"),
        (
            {"modalities": {"rgb": 0}},
            ValueError,
            "modalities must map names to M, an int >= 1, got 0 for 'rgb'",
        ),
        ({"sampling": 5}, TypeError, "sampling must be a Sampling such as .*, got int"),
        ({"sampling": {"flow": None}}, ValueError, "sampling must name some .* audio, rgb, got 'flow'"),
        ({"class_names": "ab"}, TypeError, "class_names must be a sequence of str, got str"),
    ],
)
def test_arguments(tmp_path: Path, options: dict[str, Any], error: type[Exception], text: str) -> None:
    path = write_npy(tmp_path / "f", make_videos(4))
    with pytest.raises(error, match=f"^{text}"):
        FeatureSetDataset(path, **options)


@pytest.mark.parametrize(("epoch", "error"), [(-1, ValueError), (1.0, TypeError), (True, TypeError)])
def test_epoch_is_checked(tmp_path: Path, epoch: Any, error: type[Exception]) -> None:
    dataset = FeatureSetDataset(write_npy(tmp_path / "f", make_videos(4)))
    with pytest.raises(error, match=r"^epoch must be "):
        dataset.set_epoch(epoch)


def test_unchecked_archives_name_their_modalities_where_one_can_be_opened(tmp_path: Path) -> None:
    videos = {f"v{i}": {"rgb": ones(), "audio": ones(0 if i < 2 else 2, 3)} for i in range(4)}
    path = write_npz(tmp_path / "f", videos)
    os.truncate(path / "v0.npz", 100)
    dataset = FeatureSetDataset(path, check="none")
    assert dataset.modalities == {"audio": 3, "rgb": 6}
    assert dataset.names == ["v0", "v1", "v2", "v3"]
    assert next(iter(loader(dataset))).offsets["rgb"].tolist() == [0, 0, 4, 8, 12][: len(dataset) + 1]
    assert whats(dataset) == {
        ("v0", "rgb", "unreadable"),
        ("v0", "audio", "unreadable"),
        ("v1", "audio", "empty"),
    }
