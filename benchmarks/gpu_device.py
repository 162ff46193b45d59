"""The GPU as a stopwatch: one timed run with a cold second-level cache, and what the machine is.

Times are the device's: every launch of a run is queued while the device is kept busy, so that the time
between the two events holds no waiting for the host. The time a caller sees is `back_to_back`.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from . import machine

LEAST_LEAD = 200e-6
MOST_LEAD = 20e-3
"""Seconds for which the device is kept busy while the host queues a run."""


@dataclass
class Sample:
    """One thing to time: `run` is timed on what `prepare` returns, which is made anew for every run."""

    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None


class Device(Protocol):
    """What the benchmark asks of the machine it measures; the tests of its logic have one without a GPU."""

    name: str  # of the torch device

    def warm(self, sample: Sample) -> float:
        """Run twice, untimed; return the seconds the host needs to queue one run."""

    def seconds(self, sample: Sample, lead: float) -> float:
        """Device time of one run with a cold cache; `lead` is what `warm` returned."""

    def back_to_back(self, sample: Sample, count: int) -> float:
        """Wall-clock seconds per call of `count` calls in a row, the host and a warm cache included."""

    def release(self) -> None:
        """Return cached memory."""


class Cuda:
    """The current CUDA device."""

    name = "cuda"

    def __init__(self) -> None:
        level2 = torch.cuda.get_device_properties(0).L2_cache_size
        self.scratch = torch.empty(max(4 * level2, 128 << 20) // 4, dtype=torch.int32, device=self.name)
        self.start = torch.cuda.Event(enable_timing=True)
        self.stop = torch.cuda.Event(enable_timing=True)
        cycles = 20_000_000
        torch.cuda._sleep(cycles)
        self.start.record()
        torch.cuda._sleep(cycles)
        self.stop.record()
        self.stop.synchronize()
        self.cycles_per_second = cycles / (self.start.elapsed_time(self.stop) / 1e3)

    def flush(self) -> None:
        """Fill the second-level cache with clean lines of a buffer nobody uses.

        The buffer is written, then read: lines left dirty would be written back during the timed run.
        """
        self.scratch.zero_()
        self.scratch.max()

    def warm(self, sample: Sample) -> float:
        queued = 0.0
        for _ in range(2):
            state = sample.prepare()
            torch.cuda.synchronize()
            begin = time.perf_counter()
            sample.run(state)
            queued = time.perf_counter() - begin
            torch.cuda.synchronize()
        return queued

    def seconds(self, sample: Sample, lead: float) -> float:
        state = sample.prepare()
        self.flush()
        torch.cuda._sleep(int(min(max(2 * lead, LEAST_LEAD), MOST_LEAD) * self.cycles_per_second))
        self.start.record()
        result = sample.run(state)
        self.stop.record()
        self.stop.synchronize()
        del result
        return self.start.elapsed_time(self.stop) / 1e3

    def back_to_back(self, sample: Sample, count: int) -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(count):
            sample.run(None)
        torch.cuda.synchronize()
        return (time.perf_counter() - begin) / count

    def release(self) -> None:
        torch.cuda.empty_cache()


def why_no_gpu() -> str | None:
    """Why this Python cannot measure an NVIDIA GPU; None if it can."""
    if torch.version.hip is not None:
        return f"torch {torch.__version__} is built for AMD GPUs, on which nothing was ever measured"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds none (is the driver loaded, and CUDA_VISIBLE_DEVICES right?)"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return f"{torch.cuda.get_device_name()} has compute capability {capability}, 8.0 is needed"
    return None


def capability() -> int:
    """Of the current CUDA device, 10 major + minor."""
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def driver() -> str:
    """Version of the NVIDIA driver, "unknown" where no one says it."""
    try:
        said = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, check=False, timeout=20,
        )  # fmt: skip
        if said.returncode == 0 and said.stdout.strip():
            return said.stdout.split()[0]
    except (OSError, subprocess.TimeoutExpired):
        pass
    version = Path("/proc/driver/nvidia/version")
    if version.exists():
        words = version.read_text().split("\n", 1)[0].split()
        return next((word for word in words if word[0].isdigit()), "unknown")
    return "unknown"


def version_of(*distributions: str) -> str:
    """Version of the first distribution that is installed, without importing it."""
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "not installed"


def describe(backend: str, commit: str | None) -> dict[str, object]:
    """What a reader needs to compare the figures with others.

    Args:
        backend: the backend measured as ours.
        commit: commit of the sources; None asks git, or is the version where there is none.
    """
    properties = torch.cuda.get_device_properties(0)
    if commit is None:
        commit = machine.commit()
    now = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
    return {
        "date": now,
        "commit": commit,
        "backend": backend,
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "l2_mb": round(properties.L2_cache_size / 1e6, 1),
        "driver": driver(),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": version_of("triton", "pytorch-triton"),
        "python": platform.python_version(),
        "cpu": machine.cpu_model(),
        "cores": os.cpu_count(),
    }
