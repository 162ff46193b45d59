"""The matrix of workloads, modes and contenders under pytest-benchmark: `pytest benchmarks`.

Ratios to the floor and the targets are in `python -m benchmarks`, which alternates the contenders; here
each is timed by itself. Both run with MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ as set
in the environment. FASTAC_BENCH_BACKEND names the backend measured as ours (default cpu).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from . import correctness, machine
from .peers import PEERS, Ours, Prepared, Unavailable
from .workloads import MODES, WORKLOADS, Case, make_case

BACKEND = os.environ.get("FASTAC_BENCH_BACKEND", "cpu")


@functools.cache
def contenders() -> dict[str, Any]:
    return {"ours": Ours(BACKEND), **{name: peer() for name, peer in PEERS.items()}}


@pytest.fixture(scope="module", autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    if all(name in os.environ for name in machine.KEEP):
        machine.prime()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checked(request: pytest.FixtureRequest) -> tuple[Case, dict[str, Prepared], dict[str, str]]:
    """One workload's case, with the contenders that can run it, each right in every mode."""
    case = make_case(WORKLOADS[request.param])
    ready: dict[str, Prepared] = {}
    reasons: dict[str, str] = {}
    for name, contender in contenders().items():
        try:
            ready[name] = contender.prepare(case)
        except Unavailable as why:
            reasons[name] = str(why)
    correctness.check(case, ready, MODES)
    return case, ready, reasons


@pytest.mark.parametrize("contender", ["ours", *PEERS])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("checked", WORKLOADS, indirect=True, scope="module")
def test_speed(
    benchmark: Any, checked: tuple[Case, dict[str, Prepared], dict[str, str]], mode: str, contender: str
) -> None:
    case, ready, reasons = checked
    if contender in reasons:
        pytest.skip(f"{contender}: {reasons[contender]}")
    workload = case.workload
    operations = workload.operations(case.rows, mode)
    benchmark.group = f"{workload.name}: {MODES[mode]}"
    benchmark.extra_info.update(sizes=workload.describe(), operations=operations, backend=BACKEND)
    large = operations > 10**8
    benchmark.pedantic(
        ready[contender].closure(mode), rounds=7, warmup_rounds=2, iterations=1 if large else 20
    )
