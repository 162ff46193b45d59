"""What `fastac info` lists: versions, native library, backends, limits, environment."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

from . import _cuda, _native, backends
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
    "FASTAC_AUTOTUNE": "1: time a few neighbouring Triton configurations at the first call of each shape",
    "TRITON_INTERPRET": "1, set before Triton is imported: its kernels run in its interpreter, without a GPU",
    "FASTAC_DATA": "folder of the MNIST files that demo and flash-mnist read",
    "XDG_CACHE_HOME": "downloads go to its folder fastac; ~/.cache unless set",
    "FASTAC_TRACEBACK": "1: a command that fails shows its traceback",
    "WORLD_SIZE": "how many processes train together; torchrun sets it",
    "LOCAL_RANK": "which of this machine's processes, and GPUs, this is; torchrun sets it",
    "FASTAC_NATIVE": "when building: 0 leaves the native library out",
    "FASTAC_CUDA": "when building: 1 builds the CUDA kernels, 0 does not; where nvcc is found, unless set",
    "FASTAC_CUDA_ARCHS": 'when building: the GPUs they are compiled for, such as "80;90"; six, unless set',
    "FASTAC_SANITIZE": "when building: 1 adds AddressSanitizer and UndefinedBehaviorSanitizer",
    "FASTAC_BUILD_JOBS": "when building: files compiled at a time; the processors, at most 4, unless set",
    "CXX": "when building: the C++ compiler; c++, g++ or clang++, the first one found, unless set",
    "CUDA_HOME": "when building: the CUDA toolkit; that of the nvcc on the path, unless set",
    "NVCC_APPEND_FLAGS": "when building: more options of nvcc",
}


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "is not installed"


def _native_lines() -> list[str]:
    if not _native.available:
        return [f"not available: {_native.why_not}"]
    lines = [str(_native.PATH)]
    try:
        lines.append(f"instruction set in use: {_native.isa()}")
    except RuntimeError as error:
        lines.append(f"instruction set in use: none, {str(error).splitlines()[0]}")
    return [*lines, f"this CPU can run: {', '.join(_native.supported_isas())}"]


def _backend_lines(device: str) -> list[str]:
    x = torch.empty(0, 0, 1, device=device)
    can = {name: backends.passed_over(name, x) for name in backends.PREDICATES}
    return [f"{name}: {'available' if reason is None else reason}" for name, reason in can.items()]


def sections() -> dict[str, list[str]]:
    """The lines of each section."""
    unknown = "" if backends.current in backends.PREDICATES else ", which is no backend"
    forced = f" (forced: {backends.current}{unknown})" if backends.current else ""
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return {
        "versions": [
            f"fastac {__version__}",
            f"torch {torch.__version__}",
            f"triton {backends.triton_version() or 'is not installed'}",
            f"numpy {_version('numpy')}",
            f"Python {platform.python_version()} on {platform.platform()}",
        ],
        "native library": _native_lines(),
        "CUDA library": [str(_cuda.PATH) if _cuda.why_not is None else f"not available: {_cuda.why_not}"],
        **{
            f"backends for {device.upper()} tensors, best first{forced}": _backend_lines(device)
            for device in devices
        },
        "limits": [f"{name}: {text}" for name, text in LIMITS.items()],
        "environment": [f"{name}={os.environ.get(name, '')}  {text}" for name, text in ENVIRONMENT.items()],
    }


def report() -> str:
    """All sections as text."""
    return "\n".join(
        "\n".join([f"{title}:", *(f"  {line}" for line in lines)]) for title, lines in sections().items()
    )
