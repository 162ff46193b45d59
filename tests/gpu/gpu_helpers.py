"""What the GPU tests share: cases on the device, and `check_case` with its peers computed there."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import Case, Results, assert_equal, assert_near, check_case, make_case, run
from tested_backends import Backend
from torch import Tensor
from torch.overrides import TorchFunctionMode

DEVICE = torch.device("cuda")
BACKENDS = tuple(os.environ.get("FASTAC_GPU_BACKENDS", "triton,cuda").split(","))
"""The backends that every test here runs on."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
IDS: dict[str, Any] = {"ids": lambda v: str(v).removeprefix("torch.")}
SEED = 20181


class UnderTest:
    """The backend that a test runs on; a fixture of conftest.py sets its name."""

    def __init__(self) -> None:
        self.name = BACKENDS[0]

    def __call__(self, case: Case) -> Tensor:
        return Backend(self.name)(case)

    def operator(self, kind: str) -> Any:
        """Its operator "inference", "forward" or "backward"."""
        return getattr(torch.ops.fastac, f"{self.name}_{kind}").default


OURS = UnderTest()


class _DrawWhereTheGeneratorIs(TorchFunctionMode):
    """Random numbers of a generator are drawn on its own device, then moved to the default one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        generator = kwargs.get("generator")
        if generator is None:
            return func(*args, **kwargs)
        return func(*args, **{**kwargs, "device": generator.device}).to(DEVICE)


@contextlib.contextmanager
def on_device() -> Iterator[None]:
    """Torch makes its tensors on the GPU: for cases, truth and peers, which name no device.

    The backend under test must not need it, so it runs outside as well (see `check`).
    """
    with DEVICE, _DrawWhereTheGeneratorIs():
        yield


def gpu_case(**sizes: Any) -> Case:
    """`make_case`, drawn on the GPU."""
    with on_device():
        return make_case(**sizes)


def moved(case: Case, device: torch.device | str = DEVICE) -> Case:
    """The same numbers on another device."""
    tensors = {n: t.to(device) for n, t in case.operands().items() if isinstance(t, Tensor)}
    return dataclasses.replace(case, **tensors)


def gradient_of(case: Case) -> Tensor:
    """A random gradient of y, (B, N, M), on the GPU."""
    with on_device():
        return case.dy()


def check(
    case: Case, call: Callable[[Case], Tensor] = OURS, wanted: tuple[str, ...] | None = None, **options: Any
) -> Results:
    """`check_case` on the GPU, the same bits where the default device is the CPU, and y at inference."""
    torch.manual_seed(SEED)
    with on_device():
        held = check_case(call, case, wanted=wanted, **options)
    torch.manual_seed(SEED)
    dy = gradient_of(case)
    assert_equal(run(call, case, dy, wanted), held, "between default devices")
    assert_near(run(call, case), {"y": held["y"]}, case.x.dtype, eps=4)
    return held


def leaves_of(case: Case, wanted: tuple[str, ...] | None = None) -> tuple[Case, list[Tensor]]:
    """The case with leaves that require gradients, and those leaves."""
    names = [n for n in case.floats() if wanted is None or n in wanted]
    leaves = {n: getattr(case, n).detach().clone().requires_grad_() for n in names}
    return case.replace(**leaves), list(leaves.values())


def need_memory(gigabytes: float) -> None:
    """Skip where the device has less free memory."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes:g} GB of free device memory, there are {free / 1e9:.1f}")


def arguments(case: Case) -> tuple[Any, ...]:
    """The leading arguments of the operators, x … eps."""
    floats = (case.x, case.weight, case.scores, case.position_bias, case.alpha, case.beta)
    return (*floats, case.lengths, case.mask, case.offsets, case.eps)
