"""Data sets: the papers' experiments, and features of your own (needs NumPy; install ``fastac[train]``)."""

from __future__ import annotations

from .batch import FeatureBatch
from .feature_array import FeatureArray
from .flash_mnist import FlashMNIST, NoiseSampler, NoisyDigits
from .mnist import DigestMismatchError, Digits, load_digits28, load_mnist

__all__ = [
    "DigestMismatchError",
    "Digits",
    "FeatureArray",
    "FeatureBatch",
    "FlashMNIST",
    "NoiseSampler",
    "NoisyDigits",
    "load_digits28",
    "load_mnist",
]
