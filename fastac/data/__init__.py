"""Data sets: the papers' experiments, and features of your own (needs NumPy; install ``fastac[train]``)."""

from __future__ import annotations

from .batch import FeatureBatch
from .feature_array import FeatureArray
from .feature_sets import FeatureSet, FeatureSetDataset
from .flash_mnist import FlashMNIST, NoiseSampler, NoisyDigits
from .mnist import DigestMismatchError, Digits, load_digits28, load_mnist
from .problems import DataProblemsError, Problem
from .sampling import EqualIntervals, RandomSampling

__all__ = [
    "DataProblemsError",
    "DigestMismatchError",
    "Digits",
    "EqualIntervals",
    "FeatureArray",
    "FeatureBatch",
    "FeatureSet",
    "FeatureSetDataset",
    "FlashMNIST",
    "NoiseSampler",
    "NoisyDigits",
    "Problem",
    "RandomSampling",
    "load_digits28",
    "load_mnist",
]
