"""The matrix of workloads, modes and contenders under pytest-benchmark: `pytest benchmarks/test_bench.py`.

Ratios to the floor and the targets are in `python -m benchmarks`, which alternates the contenders; here
each is timed by itself. Both run with MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ as set
in the environment. FASTAC_BENCH_BACKEND names the backend measured as ours (default cpu).

A contender is made ready, and held against float64 in the mode, when a test first asks for it.
"""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from . import correctness, machine
from .peers import PEERS, Ours, Prepared, Unavailable
from .suites import calls, dtypes, layouts, step
from .timing import Staged
from .workloads import MODES, OVERHEAD, WORKLOADS, Case, Workload, make_case

BACKEND = os.environ.get("FASTAC_BENCH_BACKEND", "cpu")
LARGE = 10**8
"""Operations from which on a call is timed alone."""


@functools.cache
def contender(name: str) -> Any:
    return Ours(BACKEND) if name == "ours" else PEERS[name]()


@pytest.fixture(scope="module", autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    if all(name in os.environ for name in machine.KEEP):
        machine.prime()
    yield
    torch.set_num_threads(before)


class Bench:
    """One case at a time: its contenders as they are asked for."""

    def __init__(self) -> None:
        self.key: tuple[Workload, torch.dtype] | None = None
        self.case: Case | None = None
        self.prepared: dict[str, Prepared] = {}

    def closure(self, workload: Workload, dtype: torch.dtype, name: str, mode: str) -> Callable[[], object]:
        """A checked call; skips, with the reason, where the contender cannot run."""
        if self.key != (workload, dtype):
            self.case, self.prepared = None, {}
            gc.collect()
            self.key, self.case = (workload, dtype), make_case(workload, dtype)
        assert self.case is not None
        failures: dict[tuple[str, str], str] = {}
        try:
            if name not in self.prepared:
                made = layouts.InLayout(contender("ours"), name) if name in layouts.OURS else contender(name)
                self.prepared[name] = made.prepare(self.case)
            correctness.check(self.case, {name: self.prepared[name]}, [mode], failures=failures)
        except Unavailable as why:
            pytest.skip(f"{name}: {why}")
        if failures:
            pytest.skip(f"{name}: {failures[name, mode]}")
        return self.prepared[name].closure(mode)


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    one = Bench()
    yield one
    one.prepared, one.case = {}, None


def measure(benchmark: Any, call: Callable[[], object], operations: int, *, single: bool = False) -> None:
    benchmark.extra_info.update(operations=operations, backend=BACKEND)
    if isinstance(call, Staged):
        setup, run = call.setup, call.run
        benchmark.pedantic(run, setup=lambda: ((setup(),), {}), rounds=7, warmup_rounds=2)
        return
    iterations = 1 if single or operations > LARGE else 20
    benchmark.pedantic(call, rounds=200 if single else 7, warmup_rounds=2, iterations=iterations)


def timed(
    benchmark: Any, bench: Bench, suite: str, workload: Workload, dtype: torch.dtype, name: str, mode: str
) -> None:
    call = bench.closure(workload, dtype, name, mode)
    assert bench.case is not None
    benchmark.group = f"{suite}: {workload.name}, {MODES[mode]}"
    benchmark.extra_info["sizes"] = workload.describe()
    operations = workload.operations(bench.case.rows, mode)
    measure(benchmark, call, operations, single=suite == "latency")


@pytest.mark.parametrize("name", ["ours", *PEERS])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("workload", WORKLOADS)
def test_speed(benchmark: Any, bench: Bench, workload: str, mode: str, name: str) -> None:
    timed(benchmark, bench, "speed", WORKLOADS[workload], torch.float32, name, mode)


@pytest.mark.parametrize("name", ["ours", *dtypes.CONTENDERS])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", dtypes.DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("workload", dtypes.WORKLOAD_NAMES)
def test_dtypes(
    benchmark: Any, bench: Bench, workload: str, dtype: torch.dtype, mode: str, name: str
) -> None:
    timed(benchmark, bench, "dtypes", WORKLOADS[workload], dtype, name, mode)


@pytest.mark.parametrize("name", [*layouts.OURS, *layouts.PEER_NAMES])
@pytest.mark.parametrize("mode", MODES)
def test_layouts(benchmark: Any, bench: Bench, mode: str, name: str) -> None:
    timed(benchmark, bench, "layouts", WORKLOADS[layouts.WORKLOAD_NAME], torch.float32, name, mode)


@pytest.mark.parametrize("name", ["ours", *calls.PEER_NAMES])
@pytest.mark.parametrize("mode", calls.MODES)
@pytest.mark.parametrize("workload", [WORKLOADS["online"], OVERHEAD], ids=lambda w: w.name)
def test_latency(benchmark: Any, bench: Bench, workload: Workload, mode: str, name: str) -> None:
    timed(benchmark, bench, "latency", workload, torch.float32, name, mode)


@pytest.mark.parametrize("name", ["ours", *step.PEER_NAMES])
@pytest.mark.parametrize("workload", step.CLASSES)
def test_step(benchmark: Any, workload: str, name: str) -> None:
    chosen, classes = WORKLOADS[workload], step.CLASSES[workload]
    names = list(dict.fromkeys(["ours", name]))
    case, ready, reasons, _ = step.checked_steps(chosen, classes, names, BACKEND)
    if name in reasons:
        pytest.skip(f"{name}: {reasons[name]}")
    benchmark.group = f"step: {workload}, {classes} classes"
    measure(benchmark, ready[name], step.operations(chosen, case.rows, classes))
