"""Which local features of a set are used (Long et al., CVPR 2018, section 5.3: feature-set augmentation).

The paper trains on K features drawn at random from each set, anew in every epoch, and tests on K features at
equal intervals; K is 15 in training and 20 in testing on UCF101 and HMDB51, 20 and 25 on Kinetics.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


@runtime_checkable
class Sampling(Protocol):
    """A rule that picks features from a set."""

    def indices(self, length: int, generator: np.random.Generator) -> IntArray:
        """The rows to take from a set of ``length`` features: rising, each at most once, int64."""
        ...


def _check_k(k: object) -> None:
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k must be an int, got {type(k).__name__}")
    if k < 1:
        raise ValueError(f"k must be >= 1, got {k}")


@dataclass(frozen=True)
class RandomSampling:
    """K features drawn uniformly without replacement, in their order; a set of K or fewer is taken whole.

    The paper says that features are "randomly sampled" (5.3); without replacement, and the sets that are
    taken whole, are inferred.

    Raises: TypeError or ValueError if k is not an int >= 1.
    """

    k: int

    def __post_init__(self) -> None:
        _check_k(self.k)

    def indices(self, length: int, generator: np.random.Generator) -> IntArray:
        """``min(k, length)`` rising row numbers."""
        if length <= self.k:
            return np.arange(length, dtype=np.int64)
        return np.sort(generator.choice(length, self.k, replace=False, shuffle=False)).astype(np.int64)


@dataclass(frozen=True)
class EqualIntervals:
    """The middle feature of each of K equal parts, ``floor((i + 1/2) L / K)``; K or fewer are taken whole.

    The paper takes features "at equal intervals" (5.3); the middles of the intervals are inferred. Nothing is
    drawn from the generator.

    Raises: TypeError or ValueError if k is not an int >= 1.
    """

    k: int

    def __post_init__(self) -> None:
        _check_k(self.k)

    def indices(self, length: int, generator: np.random.Generator | None = None) -> IntArray:
        """``min(k, length)`` rising row numbers."""
        if length <= self.k:
            return np.arange(length, dtype=np.int64)
        return (2 * np.arange(self.k, dtype=np.int64) + 1) * length // (2 * self.k)


def sampling_generator(seed: int, epoch: int, index: int, modality: str) -> np.random.Generator:
    """The random stream of one set in one epoch: a function of the four arguments and nothing else."""
    return np.random.default_rng((seed, epoch, index, zlib.crc32(modality.encode())))


def sampling_of(sampling: Any, modalities: Iterable[str]) -> dict[str, Sampling | None]:
    """The sampling of each modality."""
    given = sampling if isinstance(sampling, Mapping) else dict.fromkeys(modalities, sampling)
    unknown = [name for name in given if name not in modalities]
    if unknown:
        raise ValueError(
            f"sampling must name some of the modalities {', '.join(modalities)}, got {unknown[0]!r}"
        )
    for rule in given.values():
        if rule is not None and not isinstance(rule, Sampling):
            raise TypeError(
                f"sampling must be a Sampling such as RandomSampling(k), got {type(rule).__name__}"
            )
    return {name: given.get(name) for name in modalities}
