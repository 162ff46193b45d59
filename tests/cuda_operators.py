"""The operators of csrc/cuda on CPU tensors: the same sources, their kernels in the emulation.

`load` builds the library on first use; from then on the backend "cuda" takes CPU tensors where it is asked
for by name.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import torch
from cuda_emulation import Emulation, build
from native import ROOT

import fastac  # noqa: F401  defines the schemas

TARGET = "0x020a000000000000ULL"  # torch 2.10, as in setup.py
GPUS = {80: (163 << 10, 80), 86: (99 << 10, 86), 90: (227 << 10, 90)}
"""What operators are planned for: shared memory of a block and capability, by capability; 90 at first."""


def build_operators() -> Path:
    """The library, built if its sources are new."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    sources = [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), ROOT / "csrc" / "guard.cpp"]
    return build(
        "operators",
        sources,
        definitions=[f"TORCH_TARGET_VERSION={TARGET}"],
        link=[f"-L{Path(spec.origin).parent / 'lib'}", "-ltorch_cpu"],
        optimize="-O1",
    )


@functools.cache
def load() -> Emulation:
    """Registers the operators; what is returned steers the emulation they run in."""
    library = build_operators()
    torch.ops.load_library(str(library))
    return Emulation(library)
