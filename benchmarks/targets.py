"""The figures to reach on a CPU (two cores, float32 unless said), each with what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from .memory import limit
from .timing import Floor, Timings
from .workloads import Workload


@dataclass
class Cell:
    """One workload in one mode: the alternating runs of all contenders, and of the floor's matrix product."""

    workload: Workload
    mode: str
    dtype: str
    rows: int
    timings: Timings
    floor: Floor
    element_size: int
    reasons: dict[str, str]
    """Why a contender is absent."""

    @property
    def operations(self) -> int:
        return self.workload.operations(self.rows, self.mode)

    @property
    def bytes_moved(self) -> int:
        return self.workload.bytes_moved(self.rows, self.mode, self.element_size)

    def share(self, name: str = "ours") -> float:
        """Time over floor."""
        return self.floor.share(self.timings, name, self.operations)

    def speedup(self, peer: str) -> float | None:
        """The peer's time over ours; None where it did not run."""
        return self.timings.ratio(peer, "ours") if peer in self.timings.seconds else None


@dataclass
class Figure:
    """One line of the table of targets."""

    figure: str
    target: str
    measured: str
    verdict: str


def at_most(figure: str, target: float, measured: float | None, unit: str = "") -> Figure:
    if measured is None:
        return Figure(figure, f"<= {target:g}{unit}", "-", "not measured")
    verdict = "met" if measured <= target else f"missed by {100 * (measured / target - 1):.0f} %"
    return Figure(figure, f"<= {target:g}{unit}", f"{measured:.3g}{unit}", verdict)


def at_least(figure: str, target: float, measured: float | None, unit: str = "x") -> Figure:
    if measured is None:
        return Figure(figure, f">= {target:g}{unit}", "-", "not measured")
    verdict = "met" if measured >= target else f"missed by {100 * (1 - measured / target):.0f} %"
    return Figure(figure, f">= {target:g}{unit}", f"{measured:.3g}{unit}", verdict)


Cells = Mapping[tuple[str, str], Cell]


def speed(cells: Cells) -> Iterator[Figure]:
    """Shares of the floor, and ratios to eager and torch.compile."""
    for name in ("kinetics-rgb", "yt8m-rgb", "kinetics-flow"):
        cell = cells.get((name, "forward"))
        yield at_most(f"{name} forward / floor", 1.10, cell.share() if cell else None, "x")
    for mode, share, eager, compiled in (
        ("forward", None, 2.0, 1.4),
        ("training", 1.35, 2.8, 1.6),
        ("frozen", 1.35, 2.8, 1.6),
    ):
        cell = cells.get(("kinetics-rgb", mode))
        if share is not None:
            yield at_most(f"kinetics-rgb {mode} / floor", share, cell.share() if cell else None, "x")
        yield at_least(f"kinetics-rgb {mode}, eager / ours", eager, cell.speedup("eager") if cell else None)
        yield at_least(
            f"kinetics-rgb {mode}, compile / ours", compiled, cell.speedup("compile") if cell else None
        )


def nowhere_slower(cells: Cells) -> Iterator[Figure]:
    """No workload slower than eager or torch.compile: the closest call of each workload."""
    for name in dict.fromkeys(workload for workload, _ in cells):
        calls = [
            (ratio, f"{mode}, {peer}")
            for (workload, mode), cell in cells.items()
            if workload == name
            for peer in ("eager", "compile")
            if (ratio := cell.speedup(peer)) is not None
        ]
        if not calls:
            yield at_least(f"{name} not slower", 1.0, None)
            continue
        ratio, where = min(calls)
        yield at_least(f"{name} not slower ({where})", 1.0, ratio)


def bfloat16(cells: Mapping[str, Timings], native: bool) -> Iterator[Figure]:
    """float32 time over bfloat16 time, both ours; a target only where the kernels have a bf16 dot product."""
    for mode, timings in cells.items():
        figure = at_least(
            f"kinetics-rgb {mode}, bf16 against float32", 1.6, timings.ratio("ours", "ours bf16")
        )
        if not native:
            figure.target, figure.verdict = "-", "no AVX512-BF16 in use"
        yield figure


def overhead(timings: Timings) -> Iterator[Figure]:
    yield at_most("call overhead, nothing requires grad", 10, 1e6 * timings.median("ours"), " us")


def workspace(
    found: Mapping[str, Mapping[str, Mapping[str, int]]], workloads: Mapping[str, Workload], threads: int
) -> Iterator[Figure]:
    """Peak memory beyond x, y and the gradients asked for, in MB, against the limit of the same sizes."""
    for name, modes in found.items():
        w = workloads[name]
        for mode, numbers in modes.items():
            allowed = limit(numbers["operands"], w.cluster_size, w.in_features, threads) / 1e6
            yield at_most(
                f"{name} {mode}, workspace", round(allowed, 1), round(numbers["workspace"] / 1e6, 2), " MB"
            )
