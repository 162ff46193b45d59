"""What a figure was measured on, and the C library's habit of returning freed memory.

Blocks above the mmap threshold (32 MB at most by default) are given back to the kernel when freed and come
back as zero pages; their page faults then cost every contender more than the arithmetic. The comparison
therefore runs in a process whose C library keeps freed memory, and reports the default once.
"""

from __future__ import annotations

import datetime
import os
import platform
import resource
import sys
from pathlib import Path

import torch

from fastac.provenance import commit, cpu_model

# Above every peak: a trim at the threshold would return the whole free top of the heap.
KEEP = {"MALLOC_MMAP_THRESHOLD_": str(64 << 30), "MALLOC_TRIM_THRESHOLD_": str(64 << 30)}
ROOT = Path(__file__).resolve().parent.parent


def keeping_environment() -> dict[str, str]:
    return {**os.environ, **KEEP}


def default_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in KEEP}


def reexecute(default_malloc: bool, module: str = "benchmarks") -> None:
    """Restart this process, `python -m module`, if the C library's settings are not the wanted ones.

    They are read at its start.
    """
    if (
        any(n in os.environ for n in KEEP)
        if default_malloc
        else any(os.environ.get(n) != KEEP[n] for n in KEEP)
    ):
        environment = default_environment() if default_malloc else keeping_environment()
        os.execve(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], environment)


def prime(gigabytes: int = 3) -> None:
    """Fault in a large free top of the heap once.

    Freed aligned blocks seldom fit the next request of their size exactly, so that a young heap still grows,
    and faults, for some rounds although nothing is returned to the kernel.
    """
    torch.empty(gigabytes << 28).fill_(0)


def page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def keeps_freed_memory(megabytes: int = 64) -> bool:
    """Whether blocks are reused without page faults: measured, since some C libraries cap the threshold."""
    before = page_faults()
    for _ in range(4):
        torch.empty(megabytes << 18).fill_(1)
    return page_faults() - before < megabytes  # fresh blocks cost twice as many even in 2 MB pages


def isa() -> str:
    """Instruction-set variant the native kernels use."""
    from fastac import _native

    if not _native.available:
        return "none (no native library)"
    return _native.isa()


def describe(backend: str) -> dict[str, object]:
    """Everything a reader needs to compare the figures with others."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "backend": backend,
        "isa": isa(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average_at_start": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "malloc": {name: os.environ.get(name) for name in KEEP},
        "malloc_keeps_freed_memory": keeps_freed_memory(),
    }
