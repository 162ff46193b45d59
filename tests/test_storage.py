"""Readers of .npy, .npz and HDF5: layouts, dtypes, rows, and what a broken entry is called."""

from __future__ import annotations

import contextlib
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from feature_files import LAYOUTS, make_videos, write_hdf5, write_hdf5_by_modality, write_npy, write_npz
from hypothesis import given
from hypothesis import strategies as st

from fastac.data.storage import EntryError, Hdf5Storage, NpyStorage, NpzStorage, Storage, open_storage


def single(tmp_path: Path, layout: str, x: Any) -> Storage:
    """Storage with one video "v" that has the modality "rgb"."""
    path = LAYOUTS[layout](tmp_path / "features", {"v": {"rgb": x}})
    return open_storage(path, expected_modalities=["rgb"])


def read(storage: Storage, video: str = "v", modality: str = "rgb", rows: Any = None) -> np.ndarray:
    with storage.open(video) as opened:
        return opened.read(modality, None if rows is None else lambda length: np.asarray(rows))


def refused(
    storage: Storage, video: str = "v", modality: str = "rgb"
) -> tuple[EntryError, EntryError | None]:
    """The error of reading, and that of asking for the shape if there is one."""
    with pytest.raises(EntryError) as caught:
        read(storage, video, modality)
    try:
        with storage.open(video) as opened:
            opened.shape(modality)
    except EntryError as error:
        return caught.value, error
    return caught.value, None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_everything_comes_back(tmp_path: Path, layout: str) -> None:
    videos = make_videos()
    storage = open_storage(LAYOUTS[layout](tmp_path / "features", videos), expected_videos=list(videos))
    assert storage.layout == layout.split("-")[0]
    assert storage.videos == list(videos)
    assert storage.modalities in (None, ["audio", "rgb"])
    for video, sets in videos.items():
        with storage.open(video) as opened:
            assert opened.modalities == tuple(sorted(sets))
            for modality, x in sets.items():
                assert opened.shape(modality) == x.shape
                found = opened.read(modality)
                assert found.dtype == np.float32
                assert found.flags.writeable
                assert (found == x).all()
    storage.close()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4", ">f8", "i1", "u1", "i4", "u8", ">i2"])
def test_numbers_become_float32(tmp_path: Path, layout: str, dtype: str) -> None:
    x = (np.arange(60) % 100).reshape(20, 3).astype(dtype)
    storage = single(tmp_path, layout, x)
    for found, expected in ((read(storage), x), (read(storage, rows=[2, 19]), x[[2, 19]])):
        assert found.dtype == np.float32
        assert (found == expected.astype(np.float32)).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("rows", [[0], [39], [3, 7, 30], list(range(0, 40, 2)), list(range(40))])
def test_rows(tmp_path: Path, layout: str, order: Any, rows: list[int]) -> None:
    x = np.asarray(np.random.default_rng(0).standard_normal((40, 5)), order=order)
    storage = single(tmp_path, layout, x)
    assert (read(storage, rows=rows) == x.astype(np.float32)[rows]).all()


def test_rows_of_compressed_and_chunked_data(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((400, 5), dtype=np.float32)
    np.savez_compressed(tmp_path / "v.npz", rgb=x)
    path = write_hdf5(tmp_path / "f", {"v": {"rgb": x}}, chunks=(16, 5), compression="gzip")
    for storage in (open_storage(tmp_path), Hdf5Storage(path, arrangement="video/modality")):
        assert (read(storage, rows=[1, 300]) == x[[1, 300]]).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("x", "what", "text"),
    [
        (np.zeros(5, np.float32), "wrong rank", "got (5,)"),
        (np.float32(1), "wrong rank", "got ()"),
        (np.zeros((2, 3, 4), np.float32), "wrong rank", "got (2, 3, 4)"),
        (np.zeros((0, 4), np.float32), "empty", "got shape (0, 4)"),
        (np.zeros((4, 0), np.float32), "empty", "got shape (4, 0)"),
        (np.zeros((4, 2), np.complex64), "wrong dtype", "complex64"),
        (np.zeros((4, 2), bool), "wrong dtype", "bool"),
        (np.zeros((4, 2), "S3"), "wrong dtype", "S3"),
    ],
)
def test_wrong_arrays(tmp_path: Path, layout: str, x: Any, what: str, text: str) -> None:
    error, unread = refused(single(tmp_path, layout, x))
    assert (error.what, unread and unread.what) == (what, what)
    assert text in error.found
    assert "features" in error.where
    assert "rgb" in error.where


class Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("unpickled",)


@pytest.mark.parametrize("layout", ["npy", "npz"])
def test_nothing_is_unpickled(tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    error, _ = refused(single(tmp_path, layout, np.array([[Bomb()]], dtype=object)))
    assert error.what == "wrong dtype"
    assert "never unpickled" in error.found
    assert not (tmp_path / "unpickled").exists()


def test_strings_in_hdf5_are_no_numbers(tmp_path: Path) -> None:
    error, _ = refused(single(tmp_path, "hdf5", np.array([["a", "b"]], dtype=h5py.string_dtype())))
    assert error.what == "wrong dtype"


@pytest.mark.parametrize("layout", ["npy", "npz"])
@pytest.mark.parametrize("size", [0, 1, 5, 20, 127, 128, 500, -300, -1])
def test_truncated_files(tmp_path: Path, layout: str, size: int) -> None:
    storage = single(tmp_path, layout, np.ones((30, 5), np.float32))
    file = next((tmp_path / "features").rglob(f"*.{layout}"))
    os.truncate(file, size if size >= 0 else file.stat().st_size + size)
    error, unread = refused(storage)
    assert error.what == "unreadable"
    assert unread is not None  # no data was read to find it
    assert unread.what == "unreadable"
    assert str(file) in error.where
    if layout == "npy" and size in (128, 500, -300, -1):
        assert "truncated, it has" in error.found


@pytest.mark.parametrize(
    "content", [b"\x93NUMPY", b"hello, world" * 30, b"\x93NUMPY\x01\x00\xff\xff{", b"PK\x03\x04"]
)
@pytest.mark.parametrize("layout", ["npy", "npz"])
def test_files_of_something_else(tmp_path: Path, layout: str, content: bytes) -> None:
    storage = single(tmp_path, layout, np.ones((30, 5), np.float32))
    next((tmp_path / "features").rglob(f"*.{layout}")).write_bytes(content)
    assert refused(storage)[0].what == "unreadable"


def test_a_header_that_promises_too_much_is_not_believed(tmp_path: Path) -> None:
    storage = single(tmp_path, "npy", np.ones((30, 5), np.float32))
    with (tmp_path / "features/rgb/v.npy").open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (3_000_000_000_000, 5)}
        np.lib.format.write_array_header_1_0(file, header)
    assert refused(storage)[0].found == "truncated, it has 0 of 60,000,000,000,000 bytes of data"


def test_a_flipped_bit_in_an_archive_fails_its_checksum(tmp_path: Path) -> None:
    storage = single(tmp_path, "npz", np.ones((300, 50), np.float32))
    file = tmp_path / "features/v.npz"
    content = bytearray(file.read_bytes())
    content[30_000] ^= 1
    file.write_bytes(content)
    error, unread = refused(storage)
    assert "CRC" in error.found
    assert unread is None


def test_the_checksum_of_compressed_data_is_compared(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "v.npz", rgb=np.ones((3000, 50), np.float32))
    with zipfile.ZipFile(tmp_path / "v.npz") as archive:
        checksum = archive.getinfo("rgb.npy").CRC
    content = (tmp_path / "v.npz").read_bytes()
    stored = checksum.to_bytes(4, "little")
    assert content.count(stored) == 2
    (tmp_path / "v.npz").write_bytes(content.replace(stored, (checksum ^ 1).to_bytes(4, "little")))
    assert "CRC" in refused(NpzStorage(tmp_path))[0].found


@given(data=st.data(), layout=st.sampled_from(["npy", "npz"]))
def test_corrupt_bytes_never_raise_anything_else(
    data: st.DataObject, layout: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tmp_path = tmp_path_factory.mktemp("corrupt")
    storage = single(tmp_path, layout, np.ones((4, 3), np.float32))
    file = next((tmp_path / "features").rglob(f"*.{layout}"))
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    with contextlib.suppress(EntryError):
        assert read(storage).ndim == 2


def test_missing_file(tmp_path: Path) -> None:
    storage = single(tmp_path, "npy", np.ones((3, 2)))
    (tmp_path / "features/rgb/v.npy").unlink()
    error, _ = refused(storage)
    assert "FileNotFoundError" in error.found


def test_what_is_passed_over(tmp_path: Path) -> None:
    path = write_npy(tmp_path / "f", {"v": {"rgb": np.ones((3, 2))}})
    for name in ("rgb/._v.npy", ".cache/x/y.npy", "README.txt", "rgb/notes.csv"):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(b"?")
    assert open_storage(path).videos == ["v"]


def test_links_are_followed_once(tmp_path: Path) -> None:
    path = write_npy(tmp_path / "f", {"v": {"rgb": np.ones((3, 2))}})
    (path / "rgb" / "loop").symlink_to(path)
    (path / "again").symlink_to(path / "rgb")
    assert open_storage(path).modalities == ["again", "rgb"]
    assert open_storage(path).videos == ["v"]


def test_layouts_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"^features must be a directory or an HDF5 file, there is nothing"
    ):
        open_storage(tmp_path / "none")
    with pytest.raises(
        ValueError, match=r"^features must be \.npy or \.npz files in a directory, .* has none"
    ):
        open_storage(tmp_path)
    np.save(tmp_path / "v1.npy", np.ones((3, 2)))
    with pytest.raises(ValueError, match=r"^features must be files <modality>/<video>.*: v1\.npy$"):
        open_storage(tmp_path)
    write_npz(tmp_path, {"v2": {"rgb": np.ones((3, 2))}})
    with pytest.raises(ValueError, match=r"has both: v1\.npy and v2\.npz"):
        open_storage(tmp_path)
    with pytest.raises(ValueError, match=r"^features must be a directory or an HDF5 file, .* begins with"):
        open_storage(tmp_path / "v1.npy")


def test_truncated_hdf5(tmp_path: Path) -> None:
    path = write_hdf5(tmp_path / "f", make_videos())
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(OSError, match=r"^features file .*f\.h5 cannot be opened: .*truncated"):
        open_storage(path)


def test_hdf5_arrangement_is_told_by(tmp_path: Path) -> None:
    few = {f"v{i}": {"rgb": np.ones((3, 2)), "flow": np.ones((3, 2))} for i in range(3)}
    many = {f"v{i}": {"rgb": np.ones((3, 2)), "flow": np.ones((3, 2))} for i in range(9)}
    for write, arrangement in ((write_hdf5, "video/modality"), (write_hdf5_by_modality, "modality/video")):
        path = write(tmp_path / "few", few)
        told = [
            open_storage(path, expected_modalities=["flow"]),
            open_storage(path, expected_videos=["v2", "other"]),
            Hdf5Storage(path, arrangement=arrangement),
            open_storage(write(tmp_path / "many", many)),
        ]
        for storage in told:
            assert isinstance(storage, Hdf5Storage)
            assert storage.arrangement == arrangement
            assert storage.modalities == ["flow", "rgb"]
            assert "v2" in storage.videos
        with pytest.raises(ValueError, match=r"nothing tells videos from modalities .*'arrangement'"):
            open_storage(path)
        with h5py.File(path, "a") as file:
            file.attrs["arrangement"] = arrangement
        assert open_storage(path).modalities == ["flow", "rgb"]
        with h5py.File(path, "a") as file:
            file.attrs["arrangement"] = "video"
        with pytest.raises(
            ValueError, match=r"^arrangement must be one of video/modality, modality/video, got 'video'"
        ):
            open_storage(path)


def test_hdf5_links_and_loose_data_sets(tmp_path: Path) -> None:
    path = write_hdf5(tmp_path / "f", {"v": {"rgb": np.ones((3, 2))}})
    with h5py.File(path, "a") as file:
        file["v/loop"] = file["/"]
        file["v/broken"] = h5py.SoftLink("/nowhere")
        file["w"] = h5py.SoftLink("/v")
    storage = Hdf5Storage(path, arrangement="video/modality")
    assert storage.videos == ["v", "w"]
    assert refused(storage, "v", "broken")[0].what == "unreadable"
    assert (read(storage, "w") == 1).all()
    storage.close()
    with h5py.File(path, "a") as file:
        file["labels"] = np.ones(3)
    with pytest.raises(ValueError, match=r"these are in no group: labels$"):
        open_storage(path)


def test_hdf5_chunk_that_cannot_be_decompressed(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((400, 5), dtype=np.float32)
    path = write_hdf5(tmp_path / "f", {"v": {"rgb": x, "flow": x}}, chunks=(400, 5), compression="gzip")
    with h5py.File(path) as file:
        start = file["v/rgb"].id.get_chunk_info(0).byte_offset
    with path.open("r+b") as raw:
        raw.seek(start)
        raw.write(b"\xff" * 64)
    storage = Hdf5Storage(path, arrangement="video/modality")
    error, unread = refused(storage)
    assert error.what == "unreadable"
    assert error.where.endswith("f.h5:/v/rgb")
    assert unread is None
    assert (read(storage, "v", "flow") == x).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_storages_can_be_pickled_while_open(tmp_path: Path, layout: str) -> None:
    storage = single(tmp_path, layout, np.ones((3, 2)))
    read(storage)
    again = pickle.loads(pickle.dumps(storage))
    assert (read(again) == read(storage)).all()


def test_hdf5_is_opened_by_each_process(tmp_path: Path) -> None:
    storage = single(tmp_path, "hdf5", np.ones((3, 2)))
    assert isinstance(storage, Hdf5Storage)
    read(storage)
    opened = storage._file
    child = os.fork()
    if not child:
        right = (read(storage) == 1).all() and storage._file is not opened and not opened
        os._exit(0 if right else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert (read(storage) == 1).all()
    assert storage._file is opened


def test_archives_of_other_things(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "v.npz", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with NpzStorage(tmp_path).open("v") as opened:
        assert opened.modalities == ()
    assert NpyStorage(tmp_path).videos == []
