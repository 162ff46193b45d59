"""Data sets of the papers' experiments (needs NumPy; install ``fastac[demo]``)."""

from __future__ import annotations

from .flash_mnist import FlashMNIST, NoiseSampler, NoisyDigits
from .mnist import DigestMismatchError, Digits, load_digits28, load_mnist

__all__ = [
    "DigestMismatchError",
    "Digits",
    "FlashMNIST",
    "NoiseSampler",
    "NoisyDigits",
    "load_digits28",
    "load_mnist",
]
