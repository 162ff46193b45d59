"""The figures to reach on a CPU (two cores, float32 unless said), each with what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from .memory import limit
from .workloads import Workload

Records = Iterable[Mapping[str, Any]]


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


def value(records: Records, column: str, **wanted: Any) -> float | None:
    """A column of the first record with these values and a figure; None where there is none."""
    wanted = {"contender": "ours", "dtype": "float32"} | wanted
    for found in records:
        if found[column] is not None and all(found[name] == what for name, what in wanted.items()):
            return float(found[column])
    return None


def speed(records: Records) -> Iterator[Figure]:
    """Shares of the floor, and ratios to eager and torch.compile."""

    def of(column: str, workload: str, mode: str, contender: str = "ours") -> float | None:
        return value(records, column, suite="speed", workload=workload, mode=mode, contender=contender)

    for name in ("kinetics-rgb", "yt8m-rgb", "kinetics-flow"):
        yield at_most(f"{name} forward / floor", 1.10, of("time_over_floor", name, "forward"), "x")
    name = "kinetics-rgb"
    for mode, share, eager, compiled in (
        ("forward", None, 2.0, 1.4),
        ("training", 1.35, 2.8, 1.6),
        ("frozen", 1.35, 2.8, 1.6),
    ):
        if share is not None:
            yield at_most(f"{name} {mode} / floor", share, of("time_over_floor", name, mode), "x")
        yield at_least(f"{name} {mode}, eager / ours", eager, of("time_over_ours", name, mode, "eager"))
        yield at_least(
            f"{name} {mode}, compile / ours", compiled, of("time_over_ours", name, mode, "compile")
        )


def nowhere_slower(records: Records, workloads: Iterable[str]) -> Iterator[Figure]:
    """No workload slower than eager or torch.compile: the closest call of each workload."""
    mine = [
        r
        for r in records
        if r["suite"] == "speed"
        and r["contender"] in ("eager", "compile")
        and r["time_over_ours"] is not None
    ]
    for name in workloads:
        calls = [
            (r["time_over_ours"], f"{r['mode']}, {r['contender']}") for r in mine if r["workload"] == name
        ]
        if not calls:
            yield at_least(f"{name} not slower", 1.0, None)
            continue
        ratio, where = min(calls)
        yield at_least(f"{name} not slower ({where})", 1.0, ratio)


def bfloat16(records: Records, native: bool) -> Iterator[Figure]:
    """float32 time over bfloat16 time, both ours; a target only where the kernels have a bf16 dot product."""
    for mode in ("forward", "training", "frozen"):
        single, half = (
            value(records, "median_s", suite="dtypes", workload="kinetics-rgb", mode=mode, dtype=dtype)
            for dtype in ("float32", "bfloat16")
        )
        ratio = None if single is None or half is None else single / half
        figure = at_least(f"kinetics-rgb {mode}, bf16 against float32", 1.6, ratio)
        if ratio is not None and not native:
            figure.target, figure.verdict = "-", "no AVX512-BF16 in use"
        yield figure


def overhead(records: Records) -> Iterator[Figure]:
    median = value(records, "median_s", suite="overhead", mode="forward")
    yield at_most("call overhead, nothing requires grad", 10, None if median is None else 1e6 * median, " us")


def workspace(records: Records, workloads: Mapping[str, Workload], threads: int) -> Iterator[Figure]:
    """Peak memory beyond x, y and the gradients asked for, in MB, against the limit of the same sizes."""
    for name in workloads:
        found = [
            r
            for r in records
            if r["suite"] == "memory"
            and r["workload"] == name
            and r["contender"] == "ours"
            and r["workspace_bytes"] is not None
        ]
        if not found:
            yield Figure(f"{name}, workspace", "5 % and a fixed part", "-", "not measured")
        for r in found:
            w = replace(workloads[name], batch=r["batch"])
            allowed = limit(w.operand_bytes(r["rows"], r["mode"], 4), w.cluster_size, w.in_features, threads)
            yield at_most(
                f"{name} {r['mode']}, workspace",
                round(allowed / 1e6, 1),
                round(r["workspace_bytes"] / 1e6, 2),
                " MB",
            )


def figures(
    records: Records,
    workloads: Mapping[str, Workload],
    *,
    isa: str,
    threads: int,
) -> list[Figure]:
    """All but those of the sweeps; what the records do not hold is not measured."""
    records = list(records)
    return [
        *speed(records),
        *nowhere_slower(records, workloads),
        *overhead(records),
        *bfloat16(records, isa.startswith("avx512_bf16")),
        *workspace(records, workloads, threads),
    ]
