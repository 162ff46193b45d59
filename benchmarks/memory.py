"""Peak memory of a call beyond its inputs, and workspace: what of it is neither y nor a gradient asked for.

Measured from outside the allocator (Linux's peak resident set, reset before the call) in a process of its own
whose C library returns freed blocks at once, so that scratch from any source counts.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from . import machine
from .peers import PEERS, Compiled, Ours, Prepared, reason_of
from .workloads import OVERHEAD, Workload, make_case

PER_THREAD = 4 << 20
"""The "fixed amount per thread" of the limit, in bytes."""

MEASURED_MODES = ("forward", "training", "frozen")

Found = dict[str, dict[str, dict[str, Any]]]

_M_MMAP_THRESHOLD = -3


def available() -> bool:
    return Path("/proc/self/clear_refs").exists()


def limit(operand_bytes: int, cluster_size: int, in_features: int, threads: int) -> int:
    """5 % of x, y and the gradients, plus four float32 (N, M) matrices, plus a fixed amount per thread."""
    return int(0.05 * operand_bytes) + 4 * cluster_size * in_features * 4 + threads * PER_THREAD


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) * 1024


def return_freed_memory() -> None:
    """Have the C library return freed blocks to the kernel at once, all but small ones."""
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 16)


def peak(prepared: Prepared, mode: str, ready: bool) -> dict[str, int]:
    """peak_bytes and workspace_bytes of one call; where `ready`, an earlier one comes first."""
    run = prepared.closure(mode)
    if ready:  # what a first call compiles is no part of it
        run()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts again from the present resident set
    before = _status("VmRSS")
    results = run()
    highest = max(0, _status("VmHWM") - before)
    returned = sum(t.numel() * t.element_size() for t in results)
    return {"peak_bytes": highest, "workspace_bytes": max(0, highest - returned)}


def measure_here(workload: Workload, backend: str, threads: int, names: list[str]) -> Found:
    """Measure in this process, which must be new; ours is always measured, and first.

    What earlier work freed stays resident in the heap, is used again and shows no peak.
    """
    torch.set_num_threads(threads)
    return_freed_memory()
    contenders: dict[str, Any] = {"ours": Ours(backend)}
    contenders |= {name: PEERS[name]() for name in names if name != "ours"}
    found: Found = {}
    for name, contender in contenders.items():
        compiles = isinstance(contender, Compiled)
        try:
            if not compiles:
                warm = contender.prepare(make_case(OVERHEAD))
                for mode in MEASURED_MODES:
                    warm.closure(mode)()
            prepared = contender.prepare(make_case(workload))
        except Exception as error:
            if name == "ours":
                raise
            found[name] = {mode: {"reason": reason_of(error)} for mode in MEASURED_MODES}
            continue
        prepared.x.sum()  # wakes the thread pool
        found[name] = {}
        for mode in MEASURED_MODES:
            try:
                found[name][mode] = peak(prepared, mode, compiles)
            except Exception as error:
                if name == "ours":
                    raise
                found[name][mode] = {"reason": reason_of(error)}
        del prepared
        gc.collect()
    return found


def measure(workload: Workload, backend: str, threads: int, contenders: list[str]) -> Found:
    """By contender and mode: peak_bytes, beyond the inputs, and workspace_bytes; or the reason of neither.

    Raises: RuntimeError if the process fails.
    """
    if not available():
        none = {"reason": "the system does not tell the peak of the resident memory (/proc/self/clear_refs)"}
        return {name: dict.fromkeys(MEASURED_MODES, none) for name in contenders}
    arguments = [json.dumps(asdict(workload)), backend, str(threads), *contenders]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", *arguments],
        cwd=machine.ROOT, env=machine.default_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"measuring the memory of {workload.name} failed:\n{done.stderr}")
    result: Found = json.loads(done.stdout.splitlines()[-1])
    return result


if __name__ == "__main__":
    sizes, backend, threads, *names = sys.argv[1:]
    print(json.dumps(measure_here(Workload(**json.loads(sizes)), backend, int(threads), names)))
