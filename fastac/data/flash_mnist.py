"""Flash-MNIST (Long et al., CVPR 2018, section 4): videos of noise in which digits flash up.

A video has 25 frames of 28x28; its label is the set of digits seen, one of 1024, the empty set included,
written as a bit mask (bit d for digit d). Each digit of the set stands in one or two frames, every time
another image.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from .mnist import Digits, IntArray, UInt8Array

NOISE = 10
"""The frame class of a frame without a digit."""

BLOCK = 64
"""Videos drawn from one random stream: a video's pixels depend on the seed and its number only."""


class NoiseSampler:
    """Draws pixels independently from the histogram of all images, training and test.

    A table of 65,536 entries answers a 16-bit random number with one look-up. A pixel value owns the
    whole entries its probability fills; the entries left over are answered by a second draw from what the
    rounding left, so that the distribution is the histogram's exactly.
    """

    def __init__(self, digits: Digits) -> None:
        counts = sum(
            np.bincount(images.reshape(-1), minlength=256)
            for images in (digits.train_images, digits.test_images)
        )
        self.probabilities: npt.NDArray[np.float64] = np.asarray(counts, dtype=np.float64) / np.sum(counts)
        share = self.probabilities * 65536
        whole = np.floor(share).astype(np.int64)
        self._table = np.zeros(65536, dtype=np.uint8)
        self._filled = int(whole.sum())
        self._table[: self._filled] = np.repeat(np.arange(256, dtype=np.uint8), whole)
        rest = share - whole
        self._rest = rest / rest.sum() if self._filled < 65536 else rest

    def draw(self, generator: np.random.Generator, shape: tuple[int, ...]) -> UInt8Array:
        """Pixels of the given shape, uint8."""
        numbers = generator.integers(0, 65536, size=shape, dtype=np.uint16)
        pixels = self._table[numbers]
        if self._filled < 65536:
            again = np.flatnonzero(numbers.reshape(-1) >= self._filled)
            pixels.reshape(-1)[again] = generator.choice(256, size=again.size, p=self._rest)
        return pixels


class NoisyDigits:
    """Single frames for the feature CNN: digits on noise, and a tenth as many of noise alone (class 10).

    The paper's training set is ``count=300_000`` over MNIST's 60,000 training images (each with five noises)
    and 30,000 frames of noise; its test set is each test image once and 1,000 frames of noise.

    Args:
        images: ``(n, 28, 28)`` uint8.
        labels: ``(n,)`` int64, 0…9.
        noise: the pixel distribution.
        count: frames with a digit; the images are used in turn, equally often.
        seed: fixes the order and every pixel.
    """

    def __init__(
        self, images: UInt8Array, labels: IntArray, noise: NoiseSampler, *, count: int, seed: int = 0
    ) -> None:
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        self._images, self._noise, self._seed = images, noise, seed
        index = np.concatenate([np.arange(count) % len(images), np.full(count // 10, -1)])
        self._index = np.random.default_rng([seed, 0]).permutation(index)
        self.labels: IntArray = np.where(self._index < 0, NOISE, labels[self._index])

    def __len__(self) -> int:
        return len(self._index)

    def batches(self, batch_size: int) -> Iterator[tuple[UInt8Array, IntArray]]:
        """Every frame once: ``(b, 28, 28)`` uint8 and the classes ``(b,)``; the last batch may be smaller."""
        block = max(1, 2048 // batch_size) * batch_size
        for first in range(0, len(self), block):
            index = self._index[first : first + block]
            generator = np.random.default_rng([self._seed, 1, first])
            frames = _overlay(self._images, index, self._noise.draw(generator, (len(index), 28, 28)))
            for start in range(0, len(index), batch_size):
                stop = start + batch_size
                yield frames[start:stop], self.labels[first + start : first + min(stop, len(index))]


class FlashMNIST:
    """The videos of one split, described at once and rendered on demand.

    Args:
        images: ``(n, 28, 28)`` uint8, the digits that may appear: training images for training, test
            images for testing.
        labels: ``(n,)`` int64, 0…9.
        noise: the pixel distribution.
        videos_per_set: videos of each set of digits; the paper has 100 for training, 10 for testing.
        seed: fixes everything; give the two splits different ones.
        length: frames in a video.
        num_digits: classes used, 0…num_digits-1; there are 2**num_digits sets.

    Attributes:
        set_labels: ``(V,)`` int64, the set of each video as a bit mask; V = videos_per_set * 2**num_digits.
        frame_labels: ``(V, length)`` int64, the digit in each frame or ``NOISE``.
        frame_images: ``(V, length)`` int64, which image it is, or -1.

    Raises:
        ValueError: a count out of range, or a digit with fewer than two images.
    """

    def __init__(
        self,
        images: UInt8Array,
        labels: IntArray,
        noise: NoiseSampler,
        *,
        videos_per_set: int,
        seed: int = 0,
        length: int = 25,
        num_digits: int = 10,
    ) -> None:
        if videos_per_set < 1:
            raise ValueError(f"videos_per_set must be at least 1, got {videos_per_set}")
        if not 1 <= num_digits <= 10:
            raise ValueError(f"num_digits must be in 1…10, got {num_digits}")
        if length < 2 * num_digits:
            raise ValueError(f"length must be at least 2 * num_digits = {2 * num_digits}, got {length}")
        self._images, self._noise, self._seed = images, noise, seed
        self.length, self.num_sets = length, 2**num_digits
        self.set_labels: IntArray = np.tile(np.arange(self.num_sets, dtype=np.int64), videos_per_set)
        generator = np.random.default_rng([seed, 0])
        videos = len(self.set_labels)
        slots = np.full((videos, length), -1, dtype=np.int64)
        for digit in range(num_digits):
            of_digit = np.flatnonzero(labels == digit)
            count = len(of_digit)
            if count < 2:
                raise ValueError(
                    f"labels must have at least two images of each digit, got {count} of digit {digit}"
                )
            present = (self.set_labels >> digit & 1).astype(bool)
            twice = present & (generator.random(videos) < 0.5)
            first = generator.integers(0, count, videos)
            second = (first + generator.integers(1, count, videos)) % count
            slots[present, 2 * digit] = of_digit[first[present]]
            slots[twice, 2 * digit + 1] = of_digit[second[twice]]
        self.frame_images: IntArray = generator.permuted(slots, axis=1)
        self.frame_labels: IntArray = np.where(self.frame_images < 0, NOISE, labels[self.frame_images])

    def __len__(self) -> int:
        return len(self.set_labels)

    @property
    def num_blocks(self) -> int:
        """How many blocks the videos make."""
        return -(-len(self) // BLOCK)

    def block(self, number: int) -> UInt8Array:
        """Videos ``number * BLOCK`` and on, ``(b, length, 28, 28)`` uint8, at most ``BLOCK``.

        Safe to call from several threads.
        """
        index = self.frame_images[number * BLOCK : (number + 1) * BLOCK]
        generator = np.random.default_rng([self._seed, 1, number])
        noise = self._noise.draw(generator, (index.size, 28, 28))
        return _overlay(self._images, index.reshape(-1), noise).reshape(*index.shape, 28, 28)

    def video(self, number: int) -> UInt8Array:
        """One video, ``(length, 28, 28)`` uint8, the same pixels as in its block."""
        if not 0 <= number < len(self):
            raise IndexError(f"number must be in 0…{len(self) - 1}, got {number}")
        frames: UInt8Array = self.block(number // BLOCK)[number % BLOCK]
        return frames


def _overlay(images: UInt8Array, index: IntArray, noise: UInt8Array) -> UInt8Array:
    """The pixelwise maximum of noise ``(b, 28, 28)`` and image ``index[b]``, in place; -1 is noise alone."""
    shown = np.flatnonzero(index >= 0)
    noise[shown] = np.maximum(noise[shown], images[index[shown]])
    return noise
