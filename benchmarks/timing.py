"""Alternating runs: in every round each contender runs once, in an order drawn anew.

Ratios are taken inside a round and their median reported: a slow spell of the machine then hits both sides.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .machine import page_faults

GEMM = (4096, 1024, 2048)
"""Sizes (rows, inner, columns) of the torch.mm whose rate is the floor's."""

BLOCK_SECONDS = 0.005
"""A shorter call is repeated until a timed block lasts this long."""


@dataclass
class Staged:
    """A call of which only the second stage is timed: every `run` gets a state that `setup` made for it."""

    setup: Callable[[], Any]
    run: Callable[[Any], Any]

    def __call__(self) -> Any:
        return self.run(self.setup())


@dataclass
class Timings:
    """Seconds per call, one entry per round, in round order."""

    seconds: dict[str, list[float]]
    faults: dict[str, float]
    """Page faults per call, mean over the rounds: not small where memory comes fresh from the kernel."""

    @property
    def rounds(self) -> int:
        return len(next(iter(self.seconds.values())))

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def quartiles(self, name: str) -> tuple[float, float]:
        values = self.seconds[name]
        if len(values) < 2:
            return values[0], values[0]
        lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
        return lower, upper

    def percentile(self, name: str, percent: int) -> float:
        return statistics.quantiles(self.seconds[name], n=100, method="inclusive")[percent - 1]

    def ratio(self, name: str, to: str) -> float:
        """Median over the rounds of name's time over to's."""
        pairs = zip(self.seconds[name], self.seconds[to], strict=True)
        return statistics.median(a / b for a, b in pairs)


class Floor:
    """The matrix product whose rate turns operations into seconds: time = operations / rate."""

    name = "gemm"

    def __init__(self) -> None:
        rows, inner, columns = GEMM
        self.operations = 2 * rows * inner * columns
        self.a = torch.randn(rows, inner)
        self.b = torch.randn(inner, columns)
        self.out = torch.empty(rows, columns)

    def __call__(self) -> None:
        torch.mm(self.a, self.b, out=self.out)

    def gflops(self, timings: Timings) -> float:
        return self.operations / timings.median(self.name) / 1e9

    def seconds(self, timings: Timings, operations: int) -> float:
        return operations / self.operations * timings.median(self.name)

    def share(self, timings: Timings, name: str, operations: int) -> float:
        """Time over floor of a contender, round by round against the product of the same round."""
        return timings.ratio(name, self.name) * self.operations / operations


class Copy:
    """A copy of a block larger than the caches: the rate at which memory gives and takes bytes."""

    name = "copy"

    def __init__(self, megabytes: int = 128) -> None:
        self.source = torch.ones(megabytes << 18)
        self.target = torch.zeros_like(self.source)
        self.bytes = 2 * self.source.numel() * self.source.element_size()

    def __call__(self) -> None:
        self.target.copy_(self.source)

    def gbytes_per_s(self, timings: Timings) -> float:
        """Bytes read and written per second, in 1e9."""
        return self.bytes / timings.median(self.name) / 1e9


def timed(closure: Callable[[], object], count: int) -> tuple[float, int]:
    """Seconds and page faults of `count` calls in a row."""
    result: object = None
    if isinstance(closure, Staged):
        states, run = [closure.setup() for _ in range(count)], closure.run
        before = page_faults()
        start = time.perf_counter()
        for state in states:
            result = run(state)
    else:
        before = page_faults()
        start = time.perf_counter()
        for _ in range(count):
            result = closure()
    taken = time.perf_counter() - start
    del result
    return taken, page_faults() - before


def alternate(
    closures: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 30,
    min_rounds: int = 5,
    budget: float = 6.0,
    block: float = BLOCK_SECONDS,
    patience: float = 0.5,
    failures: dict[str, Exception] | None = None,
) -> Timings:
    """Time closures in alternation.

    Stops after `rounds`, or once `budget` seconds are spent and `min_rounds` are done. Two untimed calls of
    each come first, or one where a call takes longer than `patience` seconds. What a call returns is freed
    before the next contender starts. One that raises at its first call goes into `failures`, if given.
    """
    min_rounds = min(min_rounds, rounds)
    repeats: dict[str, int] = {}
    for name, closure in closures.items():
        try:
            taken, _ = timed(closure, 1)
        except Exception as error:
            if failures is None:
                raise
            failures[name] = error
            continue
        if taken < patience:
            taken, _ = timed(closure, 1)
        repeats[name] = max(1, math.ceil(block / max(taken, 1e-7)))
    names = list(repeats)
    order = random.Random(0)  # in a fixed order one of them would always find the caches full of the copy
    seconds: dict[str, list[float]] = {name: [] for name in names}
    faults = dict.fromkeys(names, 0)
    calls = dict.fromkeys(names, 0)
    gc.collect()
    gc.disable()
    try:
        begin = time.perf_counter()
        for turn in range(rounds):
            for name in order.sample(names, len(names)):
                taken, faulted = timed(closures[name], repeats[name])
                faults[name] += faulted
                calls[name] += repeats[name]
                seconds[name].append(taken / repeats[name])
            if turn + 1 >= min_rounds and time.perf_counter() - begin > budget:
                break
    finally:
        gc.enable()
    return Timings(seconds, {name: faults[name] / calls[name] for name in names})
