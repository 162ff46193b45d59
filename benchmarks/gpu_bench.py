"""What is measured on a GPU: cases, least costs, the gate, and the alternating runs of one group.

A group is one workload at one batch size in one dtype. The contender "ours" is the first of our backends, the
others go by their names. A group's floor is, pass by pass, the longer of two times: a device copy of as many
bytes as the pass must move, timed in the same alternation, and its operations at the rate of a large matrix
product, measured on the same card at the start.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

import fastac
from fastac.explain import Cost

from . import correctness
from .gpu_device import Device, Sample
from .peers import Ours, Prepared, Unavailable
from .timing import Timings
from .workloads import MODES, WORKLOADS, Case, Workload

LARGE_BATCH = 1024
ORDER = (
    "kinetics-rgb", "ucf-resnet", "kinetics-flow", "yt8m-rgb", "mil-bag", "online", "ragged", "yt8m-audio",
    "flash-mnist",
)  # fmt: skip
"""Workloads, the most telling first: a run that is cut short has measured these."""

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

PASSES = {
    "forward": ("forward",),
    "backward": ("backward",),
    "training": ("forward", "backward"),
    "frozen": ("forward", "frozen backward"),
}
"""The passes that each timed mode consists of."""

MODE_TEXT = {**MODES, "backward": "backward alone, x requires grad"}


class OutOfTime(BaseException):
    """The time budget is spent. Not an `Exception`, so that no library on the way takes it for a failure."""


@dataclass(frozen=True)
class Group:
    workload: Workload
    dtype: str

    def __str__(self) -> str:
        return f"{self.workload.name} B={self.workload.batch} {self.dtype}"


def groups(workloads: tuple[str, ...] = ORDER, dtypes: tuple[str, ...] = tuple(DTYPES)) -> list[Group]:
    """Every group, the most important first: the first dtype at both batch sizes, then the others.

    A workload with more than one set is measured with `LARGE_BATCH` sets and with its own number of them.
    """
    chosen = [WORKLOADS[name] for name in ORDER if name in workloads]
    own = [(w, d) for d in dtypes for w in chosen]
    large = [(replace(w, batch=LARGE_BATCH) if w.batch > 1 else w, d) for w, d in own]
    n = len(chosen)
    ordered = [*large[:n], *own[:n], *large[n:], *own[n:]]
    return [Group(w, d) for w, d in dict.fromkeys(ordered)]


class DeviceCase(Case):
    """A case on any device."""

    def padded(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        with self.x.device:
            return super().padded()


def make_case(group: Group, device: str, seed: int = 0) -> DeviceCase:
    """Random operands, drawn on the device. Distributions and shapes are those of `workloads.make_case`."""
    w, dtype = group.workload, DTYPES[group.dtype]
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, scale: Any = 1) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator, device=device) * scale).to(dtype)

    b, length, m, n = w.batch, w.length, w.in_features, w.cluster_size
    offsets = None
    shape: tuple[int, ...] = (b, length, m)
    if w.ragged:
        lengths = torch.randint(1, length + 1, (b,), generator=generator, device=device)
        offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        shape = (int(offsets[-1]), m)
    return DeviceCase(
        w,
        x=normal(*shape),
        mix=normal(b, n, length) if w.scores == "given" else normal(n, m, scale=m**-0.5),
        alpha=normal(n, scale=n**-0.25),
        beta=normal(n, scale=n**-0.25),
        dy=normal(b, n, m),
        offsets=offsets,
    )


# Least costs


@dataclass(frozen=True)
class Pass:
    """Least cost of one pass, and the form of the equations that has it."""

    name: str
    form: str  # "" (there is one), "direct" or "Gram"
    cost: Cost


def forms(case: Case, backend: str | None) -> tuple[dict[str, list[Pass]], Mapping[str, object]]:
    """The forms of every pass of `PASSES` with their costs, and the plan of the call.

    `fastac.explain` has the costs of the forward and of the direct backward. The Gram backward reads no y, so
    it moves (2 L + N) M elements per set instead of (2 L + 2 N) M, and adds products of L x L x M: 4 L^2 M
    operations, 2 L^2 M of them (d d^T) where x is frozen.
    """
    w = case.workload
    named = {"scores" if w.scores == "given" else "weight": case.mix}
    if case.offsets is not None:
        named["offsets"] = case.offsets
        squares = int(case.offsets.diff().square().sum())
    else:
        squares = w.batch * w.length**2
    y_bytes = w.batch * w.cluster_size * w.in_features * case.x.element_size()
    found: dict[str, list[Pass]] = {}
    plan: Mapping[str, object] = {}
    for name, dx in (("frozen backward", False), ("backward", True)):
        x = case.x.detach().requires_grad_(dx)
        said = fastac.explain(x, alpha=case.alpha, beta=case.beta, backend=backend, **named)
        plan = said.plan
        direct = said.backward
        gram = Cost(direct.bytes - y_bytes, direct.operations + (4 if dx else 2) * squares * w.in_features)
        found["forward"] = [Pass("forward", "", said.forward)]
        found[name] = [Pass(name, "direct", direct), Pass(name, "Gram", gram)]
    return found, plan


def least(candidates: list[Pass], bandwidth: float, rate: float) -> Pass:
    """The form with the lowest floor, given bytes and operations per second."""
    return min(candidates, key=lambda p: max(p.cost.bytes / bandwidth, p.cost.operations / rate))


@dataclass(frozen=True)
class Rates:
    """The card's ceilings, measured: bytes per second of a large copy, operations per second by dtype."""

    bandwidth: float
    operations: Mapping[str, float]


def copy_sample(device: str, size: int) -> Sample:
    """A device copy that moves `size` bytes: half of them read, half written."""
    source = torch.randint(0, 256, (max(1, size // 2),), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Sample(lambda _: target.copy_(source))


def measure_rates(device: Device, dtypes: tuple[str, ...], size: int = 8192, copied: int = 2 << 30) -> Rates:
    """Measure the card: a copy of `copied` bytes and, on random data, size x size x size products.

    float16 has the rate of bfloat16.
    """

    def median(sample: Sample, rounds: int = 7) -> float:
        lead = device.warm(sample)
        return statistics.median(device.seconds(sample, lead) for _ in range(rounds))

    bandwidth = copied / median(copy_sample(device.name, copied))
    found: dict[str, float] = {}
    for name in dict.fromkeys("float32" if d == "float32" else "bfloat16" for d in dtypes):
        a, b = (torch.randn(size, size, device=device.name).to(DTYPES[name]) for _ in range(2))
        out = torch.empty_like(a)
        product = Sample(lambda _, a=a, b=b, out=out: torch.mm(a, b, out=out))
        found[name] = 2 * size**3 / median(product)
        del a, b, out, product
    device.release()
    return Rates(bandwidth, {d: found["float32" if d == "float32" else "bfloat16"] for d in dtypes})


# Contenders


def sample(prepared: Prepared, mode: str) -> Sample:
    """One timed mode of a contender; the backward alone starts from a graph that is built untimed."""
    if mode != "backward":
        closure = prepared.closure(mode)
        return Sample(lambda _: closure())
    case = prepared.case
    x, mix, alpha, beta = (t.detach().requires_grad_() for t in (prepared.x, case.mix, case.alpha, case.beta))

    def run(y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(y, (x, mix, alpha, beta), case.dy)

    return Sample(run, lambda: prepared.call(x, mix, alpha, beta))


@dataclass
class Ready:
    """The contenders of one group that compute the right thing, and why the others are not there."""

    case: Case
    prepared: dict[str, Prepared] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    wrong: dict[str, str] = field(default_factory=dict)  # backends of ours that are left out for it


def make_ready(case: Case, contenders: Mapping[str, Any], device: Device) -> Ready:
    """Prepare every contender and hold it against float64.

    Raises: `correctness.Red` if ours is wrong. A peer that is wrong, or lacks memory, is left out with the
    reason; so is another backend of ours, which is held to the bounds of ours.
    """
    ready = Ready(case)
    for name, contender in contenders.items():
        own = isinstance(contender, Ours)
        try:
            prepared = contender.prepare(case)
            lines = correctness.check(case, {name: prepared}, MODES, name if own else "ours")
        except Unavailable as why:
            ready.reasons[name] = str(why)
        except correctness.Red as wrong:
            if name == "ours":
                raise
            ready.reasons[name] = "wrong: " + " ".join(str(wrong).split())
            if own:
                ready.wrong[name] = str(wrong)
        except torch.cuda.OutOfMemoryError:
            if name == "ours":
                raise
            ready.reasons[name] = "not enough device memory"
        except Exception as error:  # whatever a compiler says
            if name == "ours":
                raise
            ready.reasons[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            if own:
                ready.wrong[name] = ready.reasons[name]
        else:
            ready.prepared[name] = prepared
            ready.errors += lines
        device.release()
    return ready


# One group


@dataclass
class Cell:
    """A group in one mode: alternating runs of the contenders and of one copy per pass."""

    group: Group
    mode: str
    rows: int
    passes: list[Pass]
    rate: float  # operations per second
    timings: Timings
    calls: dict[str, float]  # wall-clock seconds of one call among many, by contender
    reasons: dict[str, str]
    backends: dict[str, str] = field(default_factory=dict)  # our contenders -> their backends, "ours" first

    @property
    def floors(self) -> list[float]:
        """The floor of every round, in seconds."""
        copies = [self.timings.seconds[f"copy {p.name}"] for p in self.passes]
        return [
            sum(max(s, p.cost.operations / self.rate) for s, p in zip(each, self.passes, strict=True))
            for each in zip(*copies, strict=True)
        ]

    def contenders(self) -> list[str]:
        return [name for name in self.timings.seconds if not name.startswith("copy ")]

    def share(self, name: str = "ours") -> float:
        """Floor over time: 1 is as fast as the card allows. Median over the rounds."""
        return statistics.median(f / t for f, t in zip(self.floors, self.timings.seconds[name], strict=True))

    def speedup(self, peer: str) -> float | None:
        """The peer's time over ours; None where it did not run."""
        return self.timings.ratio(peer, "ours") if peer in self.timings.seconds else None

    def records(self) -> Iterator[dict[str, Any]]:
        """One record per contender, in SI units; a contender that did not run has its reason only."""
        w = self.group.workload
        size = sum(p.cost.bytes for p in self.passes)
        operations = sum(p.cost.operations for p in self.passes)
        common = {
            "workload": w.name, "dtype": self.group.dtype, "batch": w.batch, "length": w.length,
            "in_features": w.in_features, "cluster_size": w.cluster_size, "rows": self.rows,
            "mode": self.mode, "bytes": size, "operations": operations,
            "form": "/".join(p.form for p in self.passes if p.form),
            "floor_s": statistics.median(self.floors), "matmul_flops": self.rate,
            "copy_s": sum(self.timings.median(f"copy {p.name}") for p in self.passes),
            "rounds": self.timings.rounds,
        }  # fmt: skip
        for name in self.contenders():
            median = self.timings.median(name)
            lower, upper = self.timings.quartiles(name)
            yield common | {
                "contender": name, "median_s": median, "quartile1_s": lower, "quartile3_s": upper,
                "share_of_floor": self.share(name), "time_over_ours": self.timings.ratio(name, "ours"),
                "bytes_per_s": size / median, "flops": operations / median,
                "call_s": self.calls.get(name, ""), "reason": "",
            }  # fmt: skip
        for name, why in self.reasons.items():
            yield common | {"contender": name, "reason": why}


def alternate(device: Device, samples: Mapping[str, Sample], rounds: int, budget: float) -> Timings:
    """Time samples in alternation, in an order that rotates: 5 rounds, and more for `budget` seconds."""
    leads = {name: device.warm(s) for name, s in samples.items()}
    names = list(samples)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    spent = 0.0
    try:
        for turn in range(rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                seconds[name].append(device.seconds(samples[name], leads[name]))
                spent += seconds[name][-1] + 2 * leads[name]
            if turn + 1 >= min(5, rounds) and spent > budget:
                break
    finally:
        gc.enable()
    return Timings(seconds, dict.fromkeys(names, 0.0))


def measure(
    group: Group,
    contenders: Mapping[str, Any],
    device: Device,
    rates: Rates,
    *,
    backend: str | None,
    rounds: int = 15,
    budget: float = 1.0,
    seed: int = 0,
    checked: Callable[[Ready, Mapping[str, Mapping[str, object]]], None] = lambda ready, plans: None,
) -> Iterator[Cell]:
    """Check one group, then time it mode by mode, yielding each as it is done.

    `checked` is told of the contenders, and of the plans of ours by contender, once the gate is open.
    Raises: `correctness.Red` before any figure if ours is wrong; OutOfMemoryError if ours has no room.
    """
    case = make_case(group, device.name, seed)
    ready = make_ready(case, contenders, device)
    candidates, plan = forms(case, backend)
    others = {n: c.backend for n, c in contenders.items() if n != "ours" and isinstance(c, Ours)}
    checked(ready, {"ours": plan} | {n: forms(case, b)[1] for n, b in others.items() if n in ready.prepared})
    rate = rates.operations[group.dtype]
    for mode, names in PASSES.items():
        passes = [least(candidates[name], rates.bandwidth, rate) for name in names]
        samples: dict[str, Sample] = {}
        calls: dict[str, float] = {}
        reasons = dict(ready.reasons)
        for name, prepared in ready.prepared.items():
            timed = sample(prepared, mode)
            try:
                device.warm(timed)
                if mode != "backward":
                    calls[name] = device.back_to_back(timed, 10)
            except torch.cuda.OutOfMemoryError:
                if name == "ours":
                    raise
                reasons[name] = "not enough device memory"
                continue
            samples[name] = timed
        for p in passes:
            samples[f"copy {p.name}"] = copy_sample(device.name, p.cost.bytes)
        timings = alternate(device, samples, rounds, budget)
        backends = {"ours": backend or "automatic", **others}
        yield Cell(group, mode, case.rows, passes, rate, timings, calls, reasons, backends)
        samples.clear()
        device.release()


def races(
    group: Group, ours: Any, device: Device, repeats: int = 100, seed: int = 1
) -> tuple[int, list[str]]:
    """Repeat forward + backward on the same operands and compare bits with the first run.

    Returns: the number of repeats done and the results that differed in any of them.
    """
    prepared = ours.prepare(make_case(group, device.name, seed))
    forward, training = prepared.closure("forward"), prepared.closure("training")
    names = ("y", "dx", "dweight or dscores", "dalpha", "dbeta", "y of the inference")
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}

    def run() -> list[torch.Tensor]:
        return [t.detach().view(bits[t.element_size()]) for t in (*training(), *forward())]

    first = run()
    different: dict[str, None] = {}
    for _ in range(repeats):
        for name, ours_now, before in zip(names, run(), first, strict=True):
            if not torch.equal(ours_now, before):
                different[name] = None
    return repeats, list(different)
