"""What a call allocates: y and the gradients asked for, and little else."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import make_case
from tested_backends import Backend

pytestmark = pytest.mark.unguarded

PER_THREAD = 4 * 2**20
"""The fixed workspace a thread may use, in bytes."""

MEASURE = """
import ctypes, json, sys
import torch, fastac

B, L, M, N, frozen, layout, weighting, dtype = json.loads(sys.argv[1])
torch.set_num_threads(2)
dtype = getattr(torch, dtype)
ctypes.CDLL(None).mallopt(-3, 65536)  # M_MMAP_THRESHOLD: freed blocks go back, so a peak is a peak

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) * 1024

def peak(function):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts again from here
    before = status("VmRSS")
    result = function()
    return status("VmHWM") - before, result

def operands(B, L):
    given = {}
    if layout == "packed":
        x = torch.randn(B * L, M).to(dtype)
        given["offsets"] = torch.arange(B + 1) * L
    else:
        x = torch.randn(B, L, M).to(dtype)
    second = torch.randn(N, M) / M**0.5 if weighting == "fc1" else torch.randn(B, N, L)
    tensors = [x, second.to(dtype), torch.randn(N).to(dtype), torch.randn(N).to(dtype)]
    for i, t in enumerate(tensors):
        t.requires_grad_(not (frozen and i == 0))
    return tensors, given

call = fastac.attention_cluster if weighting == "fc1" else fastac.attention_pool
for size in (min(2, B), B):  # a first round wakes the threads and loads what is loaded once
    tensors, given = operands(size, L if size == B else 3)
    with torch.no_grad():
        inference, y = peak(lambda: call(*tensors, **given, backend="cpu"))
    del y
    forward, y = peak(lambda: call(*tensors, **given, backend="cpu"))
    dy = torch.randn(y.shape).to(dtype)
    wanted = [t for t in tensors if t.requires_grad]
    backward, grads = peak(lambda: torch.autograd.grad(y, wanted, dy))
nbytes = lambda *ts: sum(t.numel() * t.element_size() for t in ts)
sizes = dict(x=nbytes(tensors[0]), y=nbytes(y), grads=nbytes(*grads))
print(json.dumps(dict(inference=inference, forward=forward, backward=backward) | sizes))
"""


@functools.cache
def measure(*arguments: object) -> dict[str, int]:
    """Peaks and sizes in bytes, from a process of its own."""
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]))
    found = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps(arguments)],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    numbers: dict[str, int] = json.loads(found.stdout)
    return numbers


linux = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc"
)


@linux
@pytest.mark.usefixtures("widest")
@pytest.mark.parametrize(
    ("B", "L", "M", "N", "layout", "weighting", "dtype"),
    [
        (96, 25, 1536, 64, "padded", "fc1", "float32"),
        (96, 25, 1536, 64, "packed", "fc1", "bfloat16"),
        (24, 300, 1024, 64, "padded", "fc1", "float32"),
        (24, 300, 1024, 64, "padded", "scores", "float32"),
        (1, 30000, 512, 8, "padded", "fc1", "float32"),
    ],
)
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_peak_memory(
    B: int, L: int, M: int, N: int, layout: str, weighting: str, dtype: str, frozen: bool
) -> None:
    """Beyond x, y and the gradients asked for: at most 5 % of them, 4·N·M, and a fixed amount per thread."""
    used = measure(B, L, M, N, frozen, layout, weighting, dtype)
    fixed = 4 * N * M * 4 + 2 * PER_THREAD
    assert used["inference"] <= used["y"] + 0.05 * (used["x"] + used["y"]) + fixed, used
    assert used["forward"] <= used["y"] + 0.05 * (used["x"] + used["y"]) + fixed, used
    assert used["backward"] <= used["grads"] + 0.05 * (used["x"] + used["y"] + used["grads"]) + fixed, used


@linux
@pytest.mark.usefixtures("widest")
def test_the_measurement_sees_a_gradient_of_x() -> None:
    """The control: asking for dx costs dx, so a frozen x that computed it would be noticed."""
    sizes = (96, 25, 1536, 64)
    frozen = measure(*sizes, True, "padded", "fc1", "float32")
    trained = measure(*sizes, False, "padded", "fc1", "float32")
    assert trained["backward"] - frozen["backward"] > 0.8 * trained["x"]
    assert frozen["inference"] > 0.8 * frozen["y"]


def allocations(function: object) -> list[int]:
    """Sizes in bytes of what torch's allocator gave out and did not take back at once."""
    with torch.profiler.profile(profile_memory=True) as profile:
        kept = function()  # type: ignore[operator]
    sizes = [e.self_cpu_memory_usage for e in profile.events() if e.self_cpu_memory_usage > 0]
    del kept
    return sizes


def test_inference_allocates_y_only(each_cpp: Backend) -> None:
    """No copy of x, no lse, no weights: one tensor leaves the allocator."""
    case = make_case(B=8, L=25, M=256, N=16)
    sizes = [n for n in allocations(lambda: each_cpp(case)) if n > 4096]
    assert sizes == [8 * 16 * 256 * 4], sizes
