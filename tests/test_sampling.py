"""Sampling of K features (Long et al., section 5.3)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastac.data.sampling import EqualIntervals, RandomSampling, Sampling, sampling_generator


def test_equal_intervals_are_the_middles() -> None:
    assert EqualIntervals(5).indices(100).tolist() == [10, 30, 50, 70, 90]
    assert EqualIntervals(3).indices(10).tolist() == [1, 5, 8]
    assert EqualIntervals(1).indices(7).tolist() == [3]


@given(k=st.integers(1, 400), length=st.integers(1, 10_000))
def test_equal_intervals_follow_the_formula(k: int, length: int) -> None:
    found = EqualIntervals(k).indices(length)
    if length <= k:
        assert found.tolist() == list(range(length))
    else:
        assert found.tolist() == [math.floor((i + 0.5) * length / k) for i in range(k)]


@given(k=st.integers(1, 50), length=st.integers(1, 200), seed=st.integers(0, 1000))
def test_random_samples_are_rising_and_distinct(k: int, length: int, seed: int) -> None:
    found = RandomSampling(k).indices(length, np.random.default_rng(seed))
    assert found.dtype == np.int64
    assert len(found) == min(k, length)
    assert (np.diff(found) > 0).all()
    assert found[0] >= 0
    assert found[-1] < length


def test_every_subset_is_equally_likely() -> None:
    generator = np.random.default_rng(3)
    draws = 20_000
    codes = [int((1 << RandomSampling(2).indices(5, generator)).sum()) for _ in range(draws)]
    counts = np.array([codes.count(code) for code in sorted(set(codes))])
    assert len(counts) == math.comb(5, 2)
    chi2 = ((counts - draws / 10) ** 2 / (draws / 10)).sum()
    assert chi2 < 27.9  # 99.9 % of chi-squared with 9 degrees of freedom


def test_the_generator_depends_on_each_argument() -> None:
    def drawn(seed: int = 1, epoch: int = 2, index: int = 3, modality: str = "rgb") -> list[int]:
        return RandomSampling(20).indices(1000, sampling_generator(seed, epoch, index, modality)).tolist()

    assert drawn() == drawn()
    others = [drawn(seed=9), drawn(epoch=9), drawn(index=9), drawn(modality="flow"), drawn(epoch=3, index=2)]
    assert all(other != drawn() for other in others)


@pytest.mark.parametrize("rule", [RandomSampling, EqualIntervals])
@pytest.mark.parametrize(
    ("k", "error", "text"),
    [
        (0, ValueError, "got 0"),
        (-1, ValueError, "got -1"),
        (2.0, TypeError, "float"),
        (True, TypeError, "bool"),
    ],
)
def test_k_is_checked(rule: Any, k: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=rf"^k must be .*{text}"):
        rule(k)


def test_rules_are_samplings_and_compare() -> None:
    assert isinstance(RandomSampling(3), Sampling)
    assert isinstance(EqualIntervals(3), Sampling)
    assert RandomSampling(3) == RandomSampling(3) != EqualIntervals(3)
