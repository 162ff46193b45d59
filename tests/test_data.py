"""Flash-MNIST and its digits: the paper's definition, and what happens to a wrong or missing file."""

from __future__ import annotations

import gzip
import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest

from fastac.data import (
    DigestMismatchError,
    Digits,
    FlashMNIST,
    NoiseSampler,
    NoisyDigits,
    load_digits28,
    load_mnist,
)
from fastac.data import mnist as mnist_module
from fastac.data.flash_mnist import NOISE


@pytest.fixture(scope="module")
def digits() -> Digits:
    return load_digits28()


@pytest.fixture(scope="module")
def noise(digits: Digits) -> NoiseSampler:
    return NoiseSampler(digits)


@pytest.fixture(scope="module")
def videos(digits: Digits, noise: NoiseSampler) -> FlashMNIST:
    return FlashMNIST(digits.train_images, digits.train_labels, noise, videos_per_set=2, seed=5)


def test_every_set_of_digits_is_equally_frequent(videos: FlashMNIST) -> None:
    assert len(videos) == 2048
    assert np.array_equal(np.bincount(videos.set_labels, minlength=1024), np.full(1024, 2))


def test_a_video_shows_the_digits_of_its_label_once_or_twice(videos: FlashMNIST) -> None:
    counts = np.stack([(videos.frame_labels == digit).sum(axis=1) for digit in range(10)], axis=1)
    in_set = (videos.set_labels[:, None] >> np.arange(10) & 1).astype(bool)
    assert np.array_equal(counts > 0, in_set)
    assert counts.max() == 2
    twice = (counts[in_set] == 2).mean()  # 10,240 fair coins: a standard deviation is 0.005
    assert abs(twice - 0.5) < 0.03
    assert videos.frame_labels.shape == (2048, 25)


def test_the_empty_set_is_noise_only(videos: FlashMNIST) -> None:
    empty = np.flatnonzero(videos.set_labels == 0)
    assert len(empty) == 2
    assert (videos.frame_labels[empty] == NOISE).all()


def test_two_frames_of_one_digit_are_different_images(videos: FlashMNIST) -> None:
    ordered = np.sort(videos.frame_images, axis=1)
    assert not ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()


def test_frames_are_shuffled(videos: FlashMNIST) -> None:
    shows_digit = (videos.frame_labels != NOISE).mean(
        axis=0
    )  # per position; mean 0.3, standard deviation 0.01
    assert shows_digit.min() > 0.25
    assert shows_digit.max() < 0.35


def test_a_frame_is_the_maximum_of_its_image_and_noise(digits: Digits, videos: FlashMNIST) -> None:
    video, index = videos.video(1023), videos.frame_images[1023]
    for frame, image in zip(video, index, strict=True):
        if image < 0:
            continue
        ink = digits.train_images[image]
        assert (frame >= ink).all()
        assert (frame[ink == 255] == 255).all()
        assert (frame != ink).any(), "the noise is missing"


def test_videos_come_out_the_same_alone_and_in_blocks(videos: FlashMNIST) -> None:
    first, second = videos.block(0), videos.block(1)
    assert first.shape[1:] == (25, 28, 28)
    assert first.dtype == np.uint8
    assert np.array_equal(videos.video(3), first[3])
    assert np.array_equal(videos.video(len(first)), second[0])
    assert not np.array_equal(first, second)
    with pytest.raises(IndexError, match="number must be in 0…2047, got 2048"):
        videos.video(2048)


def test_the_seed_fixes_everything(digits: Digits, noise: NoiseSampler) -> None:
    def make(seed: int) -> FlashMNIST:
        return FlashMNIST(
            digits.test_images, digits.test_labels, noise, videos_per_set=3, seed=seed, num_digits=2, length=6
        )

    one, same, other = make(1), make(1), make(2)
    assert np.array_equal(one.frame_images, same.frame_images)
    assert np.array_equal(one.block(0), same.block(0))
    assert not np.array_equal(one.frame_images, other.frame_images)
    assert not np.array_equal(one.block(0), other.block(0))
    assert one.num_blocks == 1
    assert len(one.block(0)) == len(one) == 12


def test_noise_follows_the_histogram_of_all_images(digits: Digits, noise: NoiseSampler) -> None:
    pixels = np.concatenate([digits.train_images.reshape(-1), digits.test_images.reshape(-1)])
    expected = np.bincount(pixels, minlength=256) / pixels.size
    np.testing.assert_allclose(noise.probabilities, expected, rtol=0, atol=1e-15)
    count = 4_000_000
    drawn = np.bincount(noise.draw(np.random.default_rng(3), (count,)), minlength=256)
    deviation = np.sqrt(expected * (1 - expected) * count)
    assert (np.abs(drawn - expected * count) <= 5 * deviation).all()


def test_noise_table_and_remainder_are_the_histogram_exactly(noise: NoiseSampler) -> None:
    filled = noise._table[: noise._filled]
    probability = np.bincount(filled, minlength=256) / 65536 + (65536 - noise._filled) / 65536 * noise._rest
    np.testing.assert_allclose(probability, noise.probabilities, rtol=0, atol=1e-12)


def test_frames_for_the_cnn(digits: Digits, noise: NoiseSampler) -> None:
    count = 2 * len(digits.train_images)
    frames = NoisyDigits(digits.train_images, digits.train_labels, noise, count=count, seed=1)
    assert len(frames) == count + count // 10
    expected = np.append(2 * np.bincount(digits.train_labels, minlength=10), count // 10)
    assert np.array_equal(np.bincount(frames.labels, minlength=11), expected)
    batches = list(frames.batches(100))
    assert [len(images) for images, _ in batches] == [100] * (len(frames) // 100) + [len(frames) % 100]
    assert all(len(images) == len(labels) for images, labels in batches)
    assert np.array_equal(np.concatenate([labels for _, labels in batches]), frames.labels)
    again = next(
        iter(NoisyDigits(digits.train_images, digits.train_labels, noise, count=count, seed=1).batches(100))
    )
    assert np.array_equal(batches[0][0], again[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"videos_per_set": 0}, "videos_per_set must be at least 1, got 0"),
        ({"num_digits": 11}, "num_digits must be in 1…10, got 11"),
        ({"length": 19}, r"length must be at least 2 \* num_digits = 20, got 19"),
    ],
)
def test_counts_out_of_range(
    digits: Digits, noise: NoiseSampler, change: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        FlashMNIST(digits.test_images, digits.test_labels, noise, **{"videos_per_set": 1, **change})


def test_a_digit_needs_two_images(digits: Digits, noise: NoiseSampler) -> None:
    with pytest.raises(ValueError, match="at least two images of each digit, got 1 of digit 0"):
        FlashMNIST(digits.test_images[:1], np.zeros(1, np.int64), noise, videos_per_set=1, num_digits=1)


def test_scaled_digits(digits: Digits) -> None:
    assert digits.name == "digits"
    assert len(digits.train_images) + len(digits.test_images) == 1797
    assert digits.train_images.shape[1:] == (28, 28)
    assert digits.train_images.max() == 255
    assert set(digits.test_labels.tolist()) == set(range(10))


# Files: a tiny MNIST of our own stands for the real one, its digests taking the place of the real ones.


def _idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return gzip.compress(header + array.astype(np.uint8).tobytes(), mtime=0)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tiny MNIST whose digests are the expected ones; no other source is in reach."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name in mnist_module.MD5:
        count = 7 if name.startswith("train") else 3
        shape = (count, 28, 28) if "images" in name else (count,)
        content = _idx(generator.integers(0, 10, shape))
        (folder / name).write_bytes(content)
        monkeypatch.setitem(mnist_module.MD5, name, hashlib.md5(content).hexdigest())
    monkeypatch.delenv("FASTAC_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(mnist_module, "_beside_checkout", lambda: tmp_path / "nowhere")
    return folder


def test_reads_a_named_folder(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTAC_DATA", str(tiny))
    data = load_mnist(download=False)
    assert (data.name, data.train_images.shape, data.test_labels.shape) == ("mnist", (7, 28, 28), (3,))
    expected = np.random.default_rng(0).integers(0, 10, (7, 28, 28))
    assert np.array_equal(data.train_images, expected)
    assert data.train_labels.dtype == np.int64


def test_a_named_folder_without_the_files(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTAC_DATA", str(tmp_path / "empty"))
    with pytest.raises(FileNotFoundError, match=r"FASTAC_DATA=.*empty must hold train-images"):
        load_mnist()


def test_a_file_with_another_digest_is_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "train-labels-idx1-ubyte.gz"
    (tiny / name).write_bytes(_idx(np.zeros(7)))
    monkeypatch.setenv("FASTAC_DATA", str(tiny))
    with pytest.raises(DigestMismatchError, match=rf"{name} has md5 \w+, expected {mnist_module.MD5[name]}"):
        load_mnist()


def test_downloads_once_into_the_cache(tiny: Path, tmp_path: Path) -> None:
    dead, alive = (tmp_path / "dead").as_uri() + "/", tiny.as_uri() + "/"
    lines: list[str] = []
    first = load_mnist(mirrors=(dead, alive), log=lines.append)
    assert first.name == "mnist"
    assert sum(line.startswith(f"downloading {alive}") for line in lines) == 4
    assert {path.name for path in (tmp_path / "cache/fastac/mnist").iterdir()} == set(mnist_module.MD5)
    lines.clear()
    second = load_mnist(mirrors=(dead,), log=lines.append)
    assert lines == []
    assert np.array_equal(first.test_images, second.test_images)


def test_a_wrong_download_is_not_kept(tiny: Path, tmp_path: Path) -> None:
    name = "train-images-idx3-ubyte.gz"
    (tiny / name).write_bytes(b"<html>please log in</html>")
    with pytest.raises(DigestMismatchError, match=rf"{name} has md5 \w+, expected \w+; it was not kept"):
        load_mnist(mirrors=(tiny.as_uri() + "/",), log=lambda line: None)
    assert list((tmp_path / "cache/fastac/mnist").iterdir()) == []


def test_without_a_mirror_the_small_digits_are_used_and_named(tiny: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    data = load_mnist(mirrors=((tmp_path / "dead").as_uri() + "/",), log=lines.append)
    assert data.name == "digits"
    assert "MNIST is not available (train-images-idx3-ubyte.gz could not be downloaded" in lines[-2]
    assert "scikit-learn's 1,797 digits" in lines[-1]


def test_a_file_that_is_not_idx(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be an idx file of unsigned bytes"):
        mnist_module._parse_idx(b"\x00\x00\x0d\x01\x00\x00\x00\x00", tmp_path / "x")
    with pytest.raises(ValueError, match=r"must hold \(2,\) values, it holds 1"):
        mnist_module._parse_idx(b"\x00\x00\x08\x01\x00\x00\x00\x02\x05", tmp_path / "x")
