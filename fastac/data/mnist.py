"""Handwritten digits: MNIST from a folder, the user's cache or the network, or scikit-learn's small set.

The four idx files are accepted only with their published md5 digests, wherever they come from.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

UInt8Array = npt.NDArray[np.uint8]
IntArray = npt.NDArray[np.int64]

MD5 = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}

MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "https://yann.lecun.com/exdb/mnist/",
)


class DigestMismatchError(RuntimeError):
    """A file is not the one its md5 digest names."""


class DownloadError(OSError):
    """No mirror could be reached or none had the file."""


@dataclass(frozen=True)
class Digits:
    """Images of handwritten digits, training and test part.

    ``*_images`` are ``(n, 28, 28)`` uint8 with ink bright on 0, ``*_labels`` are ``(n,)`` int64 in 0…9.
    ``name`` is "mnist" or "digits"; ``source`` says in words where they came from.
    """

    train_images: UInt8Array
    train_labels: IntArray
    test_images: UInt8Array
    test_labels: IntArray
    name: str
    source: str


def cache_dir() -> Path:
    """The folder for downloads and features: ``$XDG_CACHE_HOME/fastac``, else ``~/.cache/fastac``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fastac"


def load_mnist(
    *,
    download: bool = True,
    mirrors: Sequence[str] = MIRRORS,
    timeout: float = 15.0,
    log: Callable[[str], None] = print,
) -> Digits:
    """MNIST, or scikit-learn's digits scaled to 28x28 where MNIST cannot be had.

    Looked for in this order: the folder ``$FASTAC_DATA`` (or its ``mnist`` subfolder), ``shared/data/mnist``
    beside the project's checkout, the cache, the mirrors (what they give is cached), scikit-learn's digits.
    A fall back to the last is announced through ``log``.

    Raises:
        FileNotFoundError: ``FASTAC_DATA`` is set and does not hold the four files.
        DigestMismatchError: a file, local or downloaded, has another md5 digest than MNIST's.
        ImportError: scikit-learn is needed and not installed.
    """
    asked = os.environ.get("FASTAC_DATA")
    if asked:
        for folder in (Path(asked), Path(asked) / "mnist"):
            if _has_all(folder):
                return read_mnist(folder)
        raise FileNotFoundError(
            f"FASTAC_DATA={asked} must hold {', '.join(MD5)} (or have a folder mnist that does)"
        )

    cached = cache_dir() / "mnist"
    for folder in (_beside_checkout(), cached):
        if _has_all(folder):
            return read_mnist(folder)
    if not download:
        reason = "downloading is switched off"
    else:
        try:
            download_mnist(cached, mirrors=mirrors, timeout=timeout, log=log)
            return read_mnist(cached)
        except DownloadError as error:
            reason = str(error)
    log(f"MNIST is not available ({reason}).")
    log("Using scikit-learn's 1,797 digits (8x8, scaled to 28x28) instead: results are not those of MNIST.")
    return load_digits28()


def read_mnist(folder: str | os.PathLike[str]) -> Digits:
    """Reads the four gzipped idx files in ``folder`` after checking their digests."""
    folder = Path(folder)
    arrays = {name: _parse_idx(gzip.decompress(_checked(folder / name)), folder / name) for name in MD5}
    return Digits(
        train_images=arrays["train-images-idx3-ubyte.gz"],
        train_labels=arrays["train-labels-idx1-ubyte.gz"].astype(np.int64),
        test_images=arrays["t10k-images-idx3-ubyte.gz"],
        test_labels=arrays["t10k-labels-idx1-ubyte.gz"].astype(np.int64),
        name="mnist",
        source=f"MNIST ({folder})",
    )


def download_mnist(
    folder: str | os.PathLike[str],
    *,
    mirrors: Sequence[str] = MIRRORS,
    timeout: float = 15.0,
    log: Callable[[str], None] = print,
) -> None:
    """Downloads the files ``folder`` lacks. A file appears there only whole and with the right digest.

    Raises:
        DownloadError: no mirror delivered a file.
        DigestMismatchError: a mirror delivered something else, and no other mirror the right file.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, digest in MD5.items():
        if (folder / name).is_file():
            continue
        mismatch: DigestMismatchError | None = None
        reasons = []
        for mirror in mirrors:
            url = mirror + name
            log(f"downloading {url}")
            try:
                with urllib.request.urlopen(url, timeout=timeout) as response:
                    content = response.read()
            except (OSError, ValueError) as error:
                reasons.append(f"{mirror}: {getattr(error, 'reason', error)}")
                continue
            found = hashlib.md5(content, usedforsecurity=False).hexdigest()
            if found == digest:
                _write_whole(folder / name, content)
                break
            mismatch = DigestMismatchError(f"{url} has md5 {found}, expected {digest}; it was not kept")
        else:
            if mismatch is not None:
                raise mismatch
            raise DownloadError(f"{name} could not be downloaded: {'; '.join(reasons)}")


def load_digits28() -> Digits:
    """scikit-learn's 8x8 digits, scaled bilinearly to 28x28; the last fifth (other writers) is the test part.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("scikit-learn is needed for its digits: pip install 'fastac[train]'") from error
    bunch: Any = load_digits()
    small = np.asarray(bunch.images, dtype=np.float64) * (255.0 / 16.0)  # (n, 8, 8), pixels 0…16
    resize = _bilinear(8, 28)
    images = np.rint(resize @ small @ resize.T).astype(np.uint8)
    labels = np.asarray(bunch.target, dtype=np.int64)
    cut = len(images) * 4 // 5
    return Digits(
        train_images=images[:cut],
        train_labels=labels[:cut],
        test_images=images[cut:],
        test_labels=labels[cut:],
        name="digits",
        source="scikit-learn's digits, 8x8 scaled to 28x28",
    )


def _bilinear(size_in: int, size_out: int) -> npt.NDArray[np.float64]:
    """The matrix ``(size_out, size_in)`` of linear interpolation between pixel centres, constant beyond."""
    centres = (np.arange(size_out) + 0.5) * size_in / size_out - 0.5
    centres = np.clip(centres, 0, size_in - 1)
    return np.maximum(0.0, 1.0 - np.abs(centres[:, None] - np.arange(size_in)[None, :]))


def _beside_checkout() -> Path:
    return Path(__file__).resolve().parents[3] / "shared" / "data" / "mnist"


def _has_all(folder: Path) -> bool:
    return all((folder / name).is_file() for name in MD5)


def _checked(path: Path) -> bytes:
    content = path.read_bytes()
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != MD5[path.name]:
        raise DigestMismatchError(f"{path} has md5 {found}, expected {MD5[path.name]}: remove or replace it")
    return content


def _write_whole(path: Path, content: bytes) -> None:
    """Writes beside ``path`` and renames: an interrupted write leaves no partial file under the name."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _parse_idx(content: bytes, path: Path) -> UInt8Array:
    """An idx file of unsigned bytes: 0 0 8 rank, one big-endian uint32 per dimension, the values."""
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} must be an idx file of unsigned bytes, its first bytes are {content[:4]!r}")
    rank = content[3]
    shape = tuple(np.frombuffer(content, dtype=">u4", count=rank, offset=4).tolist())
    values = np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * rank)
    if values.size != math.prod(shape):
        raise ValueError(f"{path} must hold {shape} values, it holds {values.size}")
    return values.reshape(shape)
