"""What `python -m fastac info` lists: versions, native library, backends, limits, environment."""

from __future__ import annotations

import os
import platform

import torch

from . import _native, backends
from ._version import __version__

LIMITS = {
    "dtypes": "float16, bfloat16, float32 (accumulated in float32), float64",
    "sizes": "M, N >= 1; B, L, T >= 0; offsets into every tensor are 64-bit",
    "lengths": "any integer type, on the device of x",
    "offsets": "int64 or int32, on the device of x",
    "second derivatives": "in eager mode; under torch.compile they raise an error",
}

ENVIRONMENT = {
    "FASTAC_BACKEND": "backend of every call: " + ", ".join(backends.PREDICATES),
    "FASTAC_CPU_ISA": "instruction set of the cpu backend: " + ", ".join(_native.ISA_NAMES),
    "FASTAC_CHECK": "1: check the values of lengths and offsets on every device (on the CPU they always are)",
    "FASTAC_NATIVE": "when building: 0 leaves the native library out",
}


def _native_lines() -> list[str]:
    if not _native.available:
        return [f"not available: {_native.why_not}"]
    lines = [str(_native.PATH)]
    try:
        lines.append(f"instruction set in use: {_native.isa()}")
    except RuntimeError as error:
        lines.append(f"instruction set in use: none, {str(error).splitlines()[0]}")
    return [*lines, f"this CPU can run: {', '.join(_native.supported_isas())}"]


def sections() -> dict[str, list[str]]:
    """The lines of each section."""
    x = torch.empty(0)
    names = backends.PREDICATES
    can = {name: backends.why_not(name, x) for name in names}
    forced = f" (forced: {backends.current})" if backends.current else ""
    return {
        "versions": [
            f"fastac {__version__}",
            f"torch {torch.__version__}",
            f"Python {platform.python_version()} on {platform.platform()}",
        ],
        "native library": _native_lines(),
        f"backends for CPU tensors, best first{forced}": [
            f"{name}: {'available' if reason is None else reason}" for name, reason in can.items()
        ],
        "limits": [f"{name}: {text}" for name, text in LIMITS.items()],
        "environment": [f"{name}={os.environ.get(name, '')}  {text}" for name, text in ENVIRONMENT.items()],
    }


def report() -> str:
    """All sections as text."""
    return "\n".join(
        "\n".join([f"{title}:", *(f"  {line}" for line in lines)]) for title, lines in sections().items()
    )
