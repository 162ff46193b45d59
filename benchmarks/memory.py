"""Workspace: peak memory of a call beyond its inputs, y and the gradients asked for.

Measured from outside the allocator (Linux's peak resident set, reset before the call) in a process of its own
whose C library returns freed blocks at once, so that scratch from any source counts.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from . import machine
from .peers import PEERS, Ours, Prepared
from .workloads import MODES, OVERHEAD, WORKLOADS, Workload, make_case

PER_THREAD = 4 << 20
"""The "fixed amount per thread" of the limit, in bytes."""

_M_MMAP_THRESHOLD = -3


def available() -> bool:
    return Path("/proc/self/clear_refs").exists()


def limit(operand_bytes: int, cluster_size: int, in_features: int, threads: int) -> int:
    """5 % of x, y and the gradients, plus four float32 (N, M) matrices, plus a fixed amount per thread."""
    return int(0.05 * operand_bytes) + 4 * cluster_size * in_features * 4 + threads * PER_THREAD


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) * 1024


def _workspace(prepared: Prepared, mode: str) -> dict[str, int]:
    run = prepared.closure(mode)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts again from the present resident set
    before = _status("VmRSS")
    results = run()
    peak = _status("VmHWM") - before
    returned = sum(t.numel() * t.element_size() for t in results)
    operands = returned + prepared.x.numel() * prepared.x.element_size()
    return {"workspace": max(0, peak - returned), "operands": operands}


def _measure_here(workload: Workload, backend: str, threads: int, names: list[str]) -> None:
    torch.set_num_threads(threads)
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 16)
    contenders: dict[str, Any] = {"ours": Ours(backend)}
    contenders |= {name: PEERS[name]() for name in names if name != "ours"}
    found: dict[str, dict[str, dict[str, int]]] = {}
    for name, contender in contenders.items():
        if name not in names:
            continue
        warm = contender.prepare(make_case(OVERHEAD))
        for mode in MODES:
            warm.closure(mode)()
        prepared = contender.prepare(make_case(workload))
        prepared.x.sum()  # wakes the thread pool
        found[name] = {mode: _workspace(prepared, mode) for mode in MODES}
    print(json.dumps(found))


def measure(
    workload: str, backend: str, threads: int, contenders: list[str], *, divide_batch: int = 1
) -> dict[str, dict[str, dict[str, int]]]:
    """By contender and mode: {"workspace": bytes, "operands": bytes of x, y and gradients}."""
    arguments = [workload, str(divide_batch), backend, str(threads), *contenders]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", *arguments],
        cwd=machine.ROOT, env=machine.default_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"measuring the memory of {workload} failed:\n{done.stderr}")
    result: dict[str, dict[str, dict[str, int]]] = json.loads(done.stdout.splitlines()[-1])
    return result


if __name__ == "__main__":
    name, divisor, backend, threads, *names = sys.argv[1:]
    _measure_here(WORKLOADS[name].reduced(int(divisor)), backend, int(threads), names)
