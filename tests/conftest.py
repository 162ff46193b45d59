"""Fixtures of the whole suite: seeded numbers, backends under every instruction set, the report header."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import hypothesis
import interpreter
import pytest
import torch
from tested_backends import BACKENDS, CUDA, ISA_NAMES, KERNELS, NATIVE, PAIRS, PORTABLE, TRITON, Backend

from fastac import _native, backends

if TYPE_CHECKING:
    from fastac.data import Digits
    from fastac.experiments.flash_mnist import Prepared

hypothesis.settings.register_profile(
    "ci",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=40,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile(
    "explore",
    parent=hypothesis.settings.get_profile("ci"),
    derandomize=False,
    max_examples=1000,
    print_blob=True,
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: takes long; run by `make full`")
    config.addinivalue_line("markers", "unguarded: the native allocations are left as users get them")
    gpu = Path(__file__).resolve().parent / "gpu"
    chosen = [(config.invocation_params.dir / arg.split("::")[0]).resolve() for arg in config.args]
    if TRITON and not all(gpu == path or gpu in path.parents for path in chosen):
        interpreter.install()  # tests/gpu alone has Triton's kernels compiled


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Drop what would be the same test again.

    Only half types have kernels for clusters, and only bfloat16 has kernels that sum pairs.
    """

    def repeats(item: pytest.Item) -> bool:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        tested = [p for p in parameters.values() if isinstance(p, Backend)]
        dtype = parameters.get("dtype")
        return (dtype in (torch.float32, torch.float64) and any(b in PORTABLE for b in tested)) or (
            dtype not in (None, torch.bfloat16) and any(b.isa == PAIRS for b in tested)
        )

    dropped = [item for item in items if repeats(item)]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if not repeats(item)]


def pytest_report_header() -> list[str]:
    if _native.available:
        isa = ISA_NAMES[torch.ops.fastac.cpu_isa()]
        native = f"in use {isa}; tested {', '.join(ISA_NAMES[b.isa] for b in NATIVE if b.isa is not None)}"
    elif NATIVE:
        native = f"MISSING, its tests will fail: {_native.why_not}"
    else:
        native = "left out by FASTAC_NATIVE=0, its tests do not run"
    if not TRITON:
        triton = "not installed, its tests do not run"
    else:
        triton = "in its interpreter" if backends.interpreting() else "compiled"
    emulation = "emulated" if CUDA else "left out by FASTAC_NATIVE=0, their tests do not run"
    return [
        f"torch {torch.__version__}, {torch.get_num_threads()} threads",
        f"native kernels: {native}",
        f"triton kernels: {triton}",
        f"CUDA C++ kernels: {emulation}",
    ]


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> None:
    """The same numbers in every run, other ones in every test."""
    torch.manual_seed(zlib.crc32(request.node.name.encode()))


@pytest.fixture(params=BACKENDS, ids=str)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Each backend, the native one under each instruction set, its allocations poisoned and guarded."""
    with request.param.active(guarded="unguarded" not in request.keywords) as active:
        yield active


@pytest.fixture(params=NATIVE, ids=str)
def native(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """The native backend under each instruction set, its allocations poisoned and guarded."""
    with request.param.active(guarded="unguarded" not in request.keywords) as active:
        yield active


@pytest.fixture(params=[*NATIVE, *CUDA, *PORTABLE], ids=str)
def cpp(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Each backend in C++: for what only their operators check, allocate or save."""
    with request.param.active(guarded="unguarded" not in request.keywords) as active:
        yield active


@pytest.fixture(params=[*NATIVE[-1:], *CUDA], ids=str)
def each_cpp(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """The same, the native one with the widest instruction set only: for what lies above the kernels."""
    with request.param.active(guarded="unguarded" not in request.keywords) as active:
        yield active


@pytest.fixture(params=[BACKENDS[0], *KERNELS], ids=str)
def each_backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Each backend, the native one with the widest instruction set only: for what lies above the kernels."""
    with request.param.active(guarded="unguarded" not in request.keywords) as active:
        yield active


@pytest.fixture(params=[BACKENDS[0], *NATIVE[-1:], *CUDA], ids=str)
def quick_backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Each backend but the interpreted one, which has fewer cases of its own beside such a test."""
    with request.param.active(guarded="unguarded" not in request.keywords) as active:
        yield active


@pytest.fixture(params=TRITON, ids=str)
def interpreted(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """The Triton backend, in its interpreter."""
    with request.param.active(guarded="unguarded" not in request.keywords) as active:
        yield active


@pytest.fixture(params=NATIVE[-1:], ids=str)
def widest(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """The native backend with the widest instruction set only."""
    with request.param.active(guarded="unguarded" not in request.keywords) as active:
        yield active


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """One thread, unless a test sets more: on tiny operands a second one spins, which slows a busy machine.

    That results do not depend on the number of threads has tests of its own, so nothing is left out here.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def harness() -> ModuleType:
    """The C++ internals of the CPU kernels; see `native`."""
    from native import load

    return load()


@pytest.fixture(scope="session")
def digits() -> Digits:
    """Scikit-learn's digits, scaled to the size of MNIST's."""
    from fastac.data import load_digits28

    return load_digits28()


@pytest.fixture(scope="session")
def small(digits: Digits) -> Prepared:
    """A small Flash-MNIST that passes for the paper's; see `flash_mnist_data`."""
    from flash_mnist_data import make_small

    return make_small(digits)
