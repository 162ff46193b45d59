"""Features on disk: a tree of .npy files, a tree of .npz files, or one HDF5 file.

A storage knows which videos it has, and opens one. The opened video says which modalities it has and their
shapes without reading the data, and reads rows. Whatever is wrong with an entry is an `EntryError`. Nothing
is unpickled.
"""

from __future__ import annotations

import math
import os
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

Float32Array = npt.NDArray[np.float32]
Select = Callable[[int], npt.NDArray[np.int64]]
"""Gets the length L of a set, gives the rising row numbers to read."""

ARRANGEMENTS = ("video/modality", "modality/video")
"""Of the data sets in an HDF5 file."""

MOST_MODALITIES = 8
"""More different names than this are taken for videos where nothing else tells them from modalities."""

_ROWS_HDF5 = 16
"""HDF5 reads rows faster than the whole from L >= this times K on, if the data set is not chunked."""


class EntryError(ValueError):
    """An entry that cannot be used.

    Attributes: ``what``, ``found`` and ``where``, as in `fastac.data.Problem`.
    """

    def __init__(self, what: str, found: str, where: str) -> None:
        super().__init__(what, found, where)
        self.what, self.found, self.where = what, found, where

    def __str__(self) -> str:
        return f"{self.where}: {self.what}: {self.found}"


def check_entry(shape: tuple[int, ...], dtype: np.dtype[Any], where: str) -> None:
    """A set is (L, M) with L, M >= 1, of float16, float32, float64 or an integer type.

    Raises: EntryError.
    """
    if dtype.hasobject:
        raise EntryError("wrong dtype", "Python objects, which are never unpickled", where)
    if dtype.kind not in "iu" and not (dtype.kind == "f" and dtype.itemsize <= 8):
        raise EntryError("wrong dtype", f"must be float16, float32, float64 or integer, got {dtype}", where)
    if len(shape) != 2:
        raise EntryError("wrong rank", f"must have shape (L, M), got {shape}", where)
    if 0 in shape:
        raise EntryError("empty", f"must have L, M >= 1, got shape {shape}", where)


def finite_sum(x: Float32Array, where: str) -> npt.NDArray[np.float64]:
    """The sum of the rows. Raises: EntryError for NaN or Inf, which make the sum NaN or Inf."""
    with np.errstate(invalid="ignore"):
        total: npt.NDArray[np.float64] = x.sum(0, dtype=np.float64)
    if not np.isfinite(total).all():
        nans, infs = np.isnan(x), np.isinf(x)
        row = int((nans | infs).any(1).argmax())
        found = " and ".join(
            f"{count:,} {name}" for count, name in ((nans.sum(), "NaN"), (infs.sum(), "Inf")) if count
        )
        raise EntryError("not finite", f"{found} of {x.size:,} values, first in row {row}", where)
    return total


class Video(ABC):
    """One video, opened. Every method raises `EntryError` where the entry is broken."""

    def __init__(self, modalities: Sequence[str]) -> None:
        self.modalities = tuple(modalities)

    @abstractmethod
    def where(self, modality: str) -> str:
        """The entry's file, with its place in the file."""

    @abstractmethod
    def shape(self, modality: str) -> tuple[int, int]:
        """(L, M), from the header; the file is as long as the header says."""

    @abstractmethod
    def read(self, modality: str, select: Select | None = None) -> Float32Array:
        """The features, ``(L, M)`` or ``(K, M)`` float32: all rows, or the K that ``select`` names."""


class Storage(ABC):
    """Where features are. Storages can be pickled; an open file stays behind."""

    path: Path
    layout: str

    @property
    @abstractmethod
    def videos(self) -> list[str]:
        """The names of all videos, sorted."""

    @property
    @abstractmethod
    def modalities(self) -> list[str] | None:
        """The names of all modalities, sorted, or None if only the videos' files know them."""

    @abstractmethod
    def open(self, video: str) -> AbstractContextManager[Video]:
        """Opens one of `videos`. Raises: EntryError if nothing of it can be read."""

    def close(self) -> None:  # noqa: B027 (a storage may have nothing to close)
        """Closes what this process has open; the next read opens it again."""


@contextmanager
def _reading(where: str) -> Iterator[None]:
    """Whatever a parser says of bytes that are not what it expects becomes an EntryError."""
    try:
        yield
    except EntryError:
        raise
    # NumPy, zipfile, zlib and h5py have no common exception, and a corrupt header can raise nearly any.
    except Exception as error:
        text = str(error) or "no reason given"
        raise EntryError("unreadable", f"{type(error).__name__}: {text}", where) from error


def _header(file: IO[bytes], where: str) -> tuple[tuple[int, int], bool, np.dtype[Any]]:
    """Shape, order (True for Fortran's) and dtype of a .npy file; the file then stands at the data."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise EntryError("unreadable", f"version {version} of the .npy format", where)
    check_entry(shape, dtype, where)
    return (shape[0], shape[1]), fortran, dtype


def _check_size(need: int, have: int, where: str) -> None:
    if have < need:
        raise EntryError("unreadable", f"truncated, it has {have:,} of {need:,} bytes of data", where)


def _fill(file: IO[bytes], array: npt.NDArray[Any], where: str) -> None:
    """Reads exactly as much as the array holds."""
    view = memoryview(array.reshape(-1).view(np.uint8).data)  # bytes, since it may be big-endian
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            raise EntryError("unreadable", f"truncated, {len(view) - done:,} bytes are missing", where)
        done += count


def _rows(x: npt.NDArray[Any], rows: npt.NDArray[np.int64] | None) -> Float32Array:
    x = x if rows is None or len(rows) == len(x) else x[rows]
    with np.errstate(over="ignore"):  # an Inf that this makes is found with the others
        return np.ascontiguousarray(x, dtype=np.float32)


class _NpyVideo(Video):
    def __init__(self, files: dict[str, Path]) -> None:
        super().__init__(list(files))
        self._files = files

    def where(self, modality: str) -> str:
        return str(self._files[modality])

    def shape(self, modality: str) -> tuple[int, int]:
        where = self.where(modality)
        with _reading(where), open(self._files[modality], "rb", buffering=0) as file:
            return self._header(file, where)[0]

    @staticmethod
    def _header(file: IO[bytes], where: str) -> tuple[tuple[int, int], bool, np.dtype[Any]]:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            raise EntryError("unreadable", "the file has 0 bytes", where)
        shape, fortran, dtype = _header(file, where)
        _check_size(math.prod(shape) * dtype.itemsize, size - file.tell(), where)
        return shape, fortran, dtype

    def read(self, modality: str, select: Select | None = None) -> Float32Array:
        # Rows are read by position: faster than a memory map (measured, K = 25 of L = 30...1000), and an
        # error of the disk is an exception where a memory map would kill the process.
        where = self.where(modality)
        with _reading(where), open(self._files[modality], "rb", buffering=0) as file:
            shape, fortran, dtype = self._header(file, where)
            rows = None if select is None else select(shape[0])
            if rows is None or fortran or 2 * len(rows) > shape[0]:
                x = np.empty(shape, dtype, order="F" if fortran else "C")
                _fill(file, x.T if fortran else x, where)
                return _rows(x, rows)
            start, x = file.tell(), np.empty((len(rows), shape[1]), dtype)
            for row, out in zip(rows.tolist(), x.view(np.uint8), strict=True):
                file.seek(start + row * len(out))
                if file.readinto(out) != len(out):
                    file.seek(start + row * len(out))
                    _fill(file, out, where)
            return _rows(x, None)


class NpyStorage(Storage):
    """Layout "npy": ``<modality>/<video>.npy``, each ``(L, M)``; a video's name may have sub-folders.

    Args:
        path: the directory.
        files: its .npy files relative to it, where they are known already.

    Raises: ValueError if a .npy file lies outside of a folder named by its modality.
    """

    layout = "npy"

    def __init__(self, path: str | os.PathLike[str], *, files: Iterable[str] | None = None) -> None:
        self.path = Path(path)
        self._entries: dict[str, list[str]] = {}
        loose = []
        modalities = set()
        for relative in _walk(self.path, (".npy",)) if files is None else files:
            modality, _, video = relative[: -len(".npy")].partition("/")
            if video:
                self._entries.setdefault(video, []).append(modality)
                modalities.add(modality)
            else:
                loose.append(relative)
        if loose:
            raise ValueError(
                f"features must be files <modality>/<video>.npy in {self.path};"
                f" {len(loose):,} are in no folder that names their modality: {_two(sorted(loose))}"
            )
        self._modalities = sorted(modalities)
        for names in self._entries.values():
            names.sort()

    @property
    def videos(self) -> list[str]:
        """The names of all videos, sorted."""
        return sorted(self._entries)

    @property
    def modalities(self) -> list[str]:
        """The names of all modalities, sorted."""
        return list(self._modalities)

    @contextmanager
    def open(self, video: str) -> Iterator[Video]:
        """The video's files; nothing is read yet."""
        yield _NpyVideo({name: self.path / name / f"{video}.npy" for name in self._entries[video]})


class _NpzVideo(Video):
    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        members = [name for name in archive.namelist() if name.endswith(".npy")]
        super().__init__(sorted(name[: -len(".npy")] for name in members))
        self._path, self._archive = path, archive

    def where(self, modality: str) -> str:
        return f"{self._path}[{modality}]"

    @contextmanager
    def _open(self, modality: str) -> Iterator[tuple[IO[bytes], tuple[int, int], bool, np.dtype[Any]]]:
        where = self.where(modality)
        with _reading(where):
            member = self._archive.getinfo(f"{modality}.npy")
            with self._archive.open(member) as file:
                shape, fortran, dtype = _header(file, where)
                _check_size(math.prod(shape) * dtype.itemsize, member.file_size - file.tell(), where)
                yield file, shape, fortran, dtype

    def shape(self, modality: str) -> tuple[int, int]:
        with self._open(modality) as (_, shape, _, _):
            return shape

    def read(self, modality: str, select: Select | None = None) -> Float32Array:
        with self._open(modality) as (file, shape, fortran, dtype):
            rows = None if select is None else select(shape[0])
            x = np.empty(shape, dtype, order="F" if fortran else "C")
            _fill(file, x.T if fortran else x, self.where(modality))
            return _rows(x, rows)


class NpzStorage(Storage):
    """Layout "npz": ``<video>.npz``, one ``(L, M)`` array per modality; a video's name may have sub-folders.

    An array is read whole, also where few of its rows are asked for.

    Args:
        path: the directory.
        files: its .npz files relative to it, where they are known already.
    """

    layout = "npz"

    def __init__(self, path: str | os.PathLike[str], *, files: Iterable[str] | None = None) -> None:
        self.path = Path(path)
        files = _walk(self.path, (".npz",)) if files is None else files
        self._videos = sorted(relative[: -len(".npz")] for relative in files)

    @property
    def videos(self) -> list[str]:
        """The names of all videos, sorted."""
        return list(self._videos)

    @property
    def modalities(self) -> None:
        """None: each archive has its own."""
        return

    @contextmanager
    def open(self, video: str) -> Iterator[Video]:
        """Opens the video's archive. Raises: EntryError."""
        path = self.path / f"{video}.npz"
        with _reading(str(path)):
            with open(path, "rb") as file:
                if not file.read(1):
                    raise EntryError("unreadable", "the file has 0 bytes", str(path))
            archive = zipfile.ZipFile(path)
        with archive:
            yield _NpzVideo(path, archive)


class _Hdf5Video(Video):
    def __init__(self, path: Path, keys: dict[str, str], file: Any, size: int) -> None:
        super().__init__(list(keys))
        self._path, self._keys, self._file, self._size = path, keys, file, size

    def where(self, modality: str) -> str:
        return f"{self._path}:/{self._keys[modality]}"

    def _dataset(self, modality: str) -> Any:
        self._check_size(modality)
        found = self._file[self._keys[modality]]
        if not hasattr(found, "shape"):
            raise EntryError("unreadable", "it is no data set any more", self.where(modality))
        check_entry(found.shape or (), found.dtype, self.where(modality))
        return found

    def _check_size(self, modality: str) -> None:
        """An open file that was cut short reads as zeros."""
        size = _size(self._file)
        if size != self._size:
            found = f"the file had {self._size:,} bytes when it was first opened, it has {size:,}"
            raise EntryError("unreadable", found, self.where(modality))

    def shape(self, modality: str) -> tuple[int, int]:
        with _reading(self.where(modality)):
            length, m = self._dataset(modality).shape
            return length, m

    def read(self, modality: str, select: Select | None = None) -> Float32Array:
        with _reading(self.where(modality)):
            dataset = self._dataset(modality)
            rows = None if select is None else select(len(dataset))
            if rows is not None and dataset.chunks is None and len(dataset) >= _ROWS_HDF5 * len(rows):
                x = _rows(dataset[rows], None)
            else:
                x = _rows(dataset[()], rows)
            self._check_size(modality)  # again: it may have been cut short in between
            return x


class Hdf5Storage(Storage):
    """Layout "hdf5": one file with data sets ``<video>/<modality>`` or ``<modality>/<video>``.

    Each is ``(L, M)``. A video's name may have sub-groups. Which of the two arrangements a file has is
    decided by the first of these that tells: the argument; the file's attribute ``arrangement``, one of the
    two texts "video/modality" and "modality/video"; the arrangement that finds more of the expected
    modalities; the one that finds more of the expected videos; the one that has at most 8 modalities where
    the other has more.

    The file is opened anew in each process that reads.

    Args:
        path: the file.
        arrangement: "video/modality" or "modality/video".
        expected_modalities, expected_videos: names that the user gave.

    Raises:
        ImportError: h5py is not installed.
        OSError: the file cannot be opened, because it is truncated for instance.
        ValueError: it has data sets outside of groups, or nothing tells the arrangement.
    """

    layout = "hdf5"

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        arrangement: str | None = None,
        expected_modalities: Collection[str] = (),
        expected_videos: Collection[str] = (),
    ) -> None:
        self.path = Path(path)
        self._file: Any = None
        self._process = -1
        try:
            file = self._opened()
        except OSError as error:
            raise OSError(f"features file {self.path} cannot be opened: {error}") from error
        try:
            self._size = _size(file)
            keys = sorted(_datasets(file, ()))
            stated = file.attrs.get("arrangement")
        finally:
            self.close()
        loose = [key for key in keys if "/" not in key]
        if loose:
            raise ValueError(
                f"features must be data sets <video>/<modality> or <modality>/<video> in {self.path}; these "
                f"are in no group: {_two(loose)}"
            )
        stated = stated.decode() if isinstance(stated, bytes) else stated
        if arrangement is None and stated is not None:
            arrangement = str(stated)
        if arrangement is not None and arrangement not in ARRANGEMENTS:
            raise ValueError(f"arrangement must be one of {', '.join(ARRANGEMENTS)}, got {arrangement!r}")
        read = {name: _arranged(keys, name) for name in ARRANGEMENTS}
        if arrangement is None and keys:
            arrangement = self._arrangement(read, expected_modalities, expected_videos)
        self.arrangement = arrangement or ARRANGEMENTS[0]
        self._entries = read[self.arrangement]
        self._modalities = sorted({name for keys in self._entries.values() for name in keys})

    def _arrangement(
        self,
        read: dict[str, dict[str, dict[str, str]]],
        expected_modalities: Collection[str],
        expected_videos: Collection[str],
    ) -> str:
        videos = {name: set(entries) for name, entries in read.items()}
        modalities = {name: {m for keys in entries.values() for m in keys} for name, entries in read.items()}
        for found, expected in ((modalities, set(expected_modalities)), (videos, set(expected_videos))):
            first, second = (len(found[name] & expected) for name in ARRANGEMENTS)
            if first != second:
                return ARRANGEMENTS[0] if first > second else ARRANGEMENTS[1]
        few = [name for name in ARRANGEMENTS if len(modalities[name]) <= MOST_MODALITIES]
        if len(few) == 1:
            return few[0]
        shown = {name: _two(sorted(modalities[name])) for name in ARRANGEMENTS}
        raise ValueError(
            f"nothing tells videos from modalities in {self.path}: as <video>/<modality> it has the "
            f"modalities {shown[ARRANGEMENTS[0]]}, as <modality>/<video> {shown[ARRANGEMENTS[1]]}; name the "
            f"modalities, or set the file's attribute 'arrangement' to one of "
            f"{', '.join(map(repr, ARRANGEMENTS))}"
        )

    @property
    def videos(self) -> list[str]:
        """The names of all videos, sorted."""
        return sorted(self._entries)

    @property
    def modalities(self) -> list[str]:
        """The names of all modalities, sorted."""
        return list(self._modalities)

    def _opened(self) -> Any:
        """The file, opened by this process: libhdf5's state must not be shared with a forked one."""
        if self._file is not None and self._process != os.getpid():
            self.close()
        if self._file is None:
            self._file, self._process = _h5py().File(self.path, "r"), os.getpid()
        return self._file

    @contextmanager
    def open(self, video: str) -> Iterator[Video]:
        """The video's data sets; nothing is read yet. Raises: EntryError if the file cannot be opened."""
        with _reading(str(self.path)):
            file = self._opened()
        yield _Hdf5Video(self.path, self._entries[video], file, self._size)

    def close(self) -> None:
        """Closes the file in this process."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None, "_process": -1}


def open_storage(
    path: str | os.PathLike[str],
    *,
    expected_modalities: Collection[str] = (),
    expected_videos: Collection[str] = (),
) -> Storage:
    """The storage at a path, recognised from what is there.

    A file must be HDF5, by its first bytes. A directory must have .npy files or .npz files somewhere below
    it, not both. Names that begin with a dot and other files are passed over; links are followed.

    Raises:
        FileNotFoundError: there is nothing at the path.
        ImportError, OSError, ValueError: as `Hdf5Storage` and `NpyStorage`, or the path is none of the three.
    """
    path = Path(path)
    if path.is_dir():
        files = list(_walk(path, (".npy", ".npz")))
        npy, npz = ([name for name in files if name.endswith(suffix)] for suffix in (".npy", ".npz"))
        if npy and npz:
            raise ValueError(f"features must be .npy or .npz files, {path} has both: {npy[0]} and {npz[0]}")
        if not files:
            raise ValueError(f"features must be .npy or .npz files in a directory, {path} has none")
        return NpyStorage(path, files=npy) if npy else NpzStorage(path, files=npz)
    check_there(path)
    with path.open("rb") as file:
        start = file.read(8)
    # The signature stands at 0, or behind a user block at 512, 1024, ...; h5py knows them all.
    if start != b"\x89HDF\r\n\x1a\n" and (path.stat().st_size < 520 or not _h5py().is_hdf5(path)):
        raise ValueError(f"features must be a directory or an HDF5 file, {path} begins with {start!r}")
    return Hdf5Storage(path, expected_modalities=expected_modalities, expected_videos=expected_videos)


def check_there(path: Path) -> None:
    """Raises: FileNotFoundError if there is nothing at the path."""
    if not path.exists():
        raise FileNotFoundError(f"features must be a directory or an HDF5 file, there is nothing at {path}")


def _two(names: Sequence[str]) -> str:
    return ", ".join(names[:2]) + (", ..." if len(names) > 2 else "")


def _size(file: Any) -> int:
    """The bytes that an open HDF5 file has on disk now."""
    return os.fstat(file.id.get_vfd_handle()).st_size


def _h5py() -> Any:
    try:
        import h5py
    except ImportError as error:
        raise ImportError("h5py is needed for features in an HDF5 file: pip install h5py") from error
    return h5py


def _walk(
    root: Path, suffixes: tuple[str, ...], below: str = "", above: tuple[tuple[int, int], ...] = ()
) -> Iterator[str]:
    """Paths relative to the root, with "/", of the files that end in one of the suffixes."""
    folder = root / below
    status = folder.stat()
    identity = (status.st_dev, status.st_ino)
    if identity in above:  # a link to a folder it lies in
        return
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        if entry.name.startswith("."):
            continue
        relative = f"{below}/{entry.name}" if below else entry.name
        if entry.is_dir():
            yield from _walk(root, suffixes, relative, (*above, identity))
        elif entry.name.endswith(suffixes):
            yield relative


def _datasets(group: Any, above: tuple[Any, ...], prefix: str = "") -> Iterator[str]:
    """The paths of all data sets below a group, those behind broken links too: reading them says so."""
    for name in group:
        try:
            found = group[name]
        except (KeyError, OSError):
            yield prefix + name
            continue
        if not hasattr(found, "keys"):
            yield prefix + name
        elif found not in (*above, group):  # a link to a group it lies in
            yield from _datasets(found, (*above, group), f"{prefix}{name}/")


def _arranged(keys: Sequence[str], arrangement: str) -> dict[str, dict[str, str]]:
    """By video and modality, the path of the data set."""
    entries: dict[str, dict[str, str]] = {}
    for key in keys:
        if "/" not in key:
            continue
        if arrangement == "video/modality":
            video, _, modality = key.rpartition("/")
        else:
            modality, _, video = key.partition("/")
        entries.setdefault(video, {})[modality] = key
    return {video: dict(sorted(found.items())) for video, found in entries.items()}
