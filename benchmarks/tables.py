"""The printed form of a run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

import pandas as pd

from .records import Record, Report, of_suite
from .suites import SUITES, SWEEP
from .timing import GEMM
from .workloads import MODES, OVERHEAD, WORKLOADS

MEGA = 1e6

TITLES = {
    "overhead": "Call overhead: means of many calls in a row",
    "latency": "Single calls",
    "layouts": "Sets of different lengths",
    "dtypes": "Dtypes",
    "step": "A whole training step, x frozen",
}
"""Suites whose records one table of the same form shows."""


def _times(value: float | None) -> str:
    return "-" if value is None or pd.isna(value) else f"{value:.2f}x"


def _table(lines: list[dict[str, object]]) -> str:
    return str(pd.DataFrame(lines).to_string(index=False, na_rep="-"))


def reasons(records: list[Record]) -> list[str]:
    """Why contenders have no figure, with where that is."""
    found: dict[tuple[str, str], list[str]] = {}
    for r in records:
        if r["reason"]:
            where = f"{r['workload']} {r['mode']}"
            found.setdefault((r["contender"], r["reason"]), []).append(where)
    return [f"  n/a: {name} ({', '.join(where)}): {why}" for (name, why), where in found.items()]


def speed_table(records: list[Record]) -> str:
    """One line per workload and mode: our time, the floor, each peer's time over ours."""
    lines: list[dict[str, object]] = []
    frame = pd.DataFrame(records)
    for (workload, mode), group in frame.groupby(["workload", "mode"], sort=False):
        by_name = group.set_index("contender")
        ours = by_name.loc["ours"]
        line: dict[str, object] = {
            "workload": workload,
            "mode": mode,
            "ours ms": f"{1e3 * ours['median_s']:.3f}",
            "floor ms": f"{1e3 * ours['floor_s']:.3f}",
            "ours/floor": _times(ours["time_over_floor"]),
            "GFLOP/s": f"{ours['gflops']:.0f}",
            "GB/s": f"{ours['gbytes_per_s']:.1f}",
        }
        for peer in by_name.index.drop("ours"):
            absent = by_name.loc[peer, "reason"] != ""
            line[f"{peer}/ours"] = "n/a" if absent else _times(by_name.loc[peer, "time_over_ours"])
        lines.append(line | {"faults": f"{ours['page_faults']:.0f}", "rounds": f"{ours['rounds']:.0f}"})
    return _table(lines)


def flat_table(records: list[Record]) -> str:
    """One line per record: times and ratios."""
    lines: list[dict[str, object]] = []
    for r in records:
        unit, scale = ("us", 1e6) if r["workload"] in ("online", OVERHEAD.name) else ("ms", 1e3)
        line: dict[str, object] = {
            "workload": r["workload"], "mode": r["mode"], "dtype": r["dtype"], "layout": r["layout"],
            "contender": r["contender"],
        }  # fmt: skip
        if not r["reason"]:
            for column in ("median_s", "quartile1_s", "quartile3_s", "p95_s"):
                value = r[column]
                line[column.removesuffix("_s")] = "-" if value is None else f"{scale * value:.3f} {unit}"
            line["time over ours"] = _times(r["time_over_ours"])
            line["rounds"] = r["rounds"]
        lines.append(line)
    return _table(lines)


def memory_table(records: list[Record]) -> str:
    lines: list[dict[str, object]] = [
        {
            "workload": r["workload"], "mode": r["mode"], "contender": r["contender"],
            "peak MB": f"{r['peak_bytes'] / MEGA:.1f}", "workspace MB": f"{r['workspace_bytes'] / MEGA:.1f}",
        }
        for r in records if not r["reason"]
    ]  # fmt: skip
    return _table(lines)


def sections(report: Report) -> Iterator[str]:
    """The lines of the report."""
    yield from ("Machine", *(f"  {key}: {value}" for key, value in report.machine.items()))
    yield from ("", "Contenders")
    yield from (f"  {name} ({c['computes']}): {c['note']}" for name, c in report.contenders.items())
    seen = dict.fromkeys(r["workload"] for r in report.records if r["workload"] in WORKLOADS)
    shown = [WORKLOADS[name] for name in seen]
    yield from ("", "Workloads", *(f"  {w.name}: {w.describe()}; {w.stands_for}" for w in shown))
    reduced = {r["batch"]: r["full_batch"] for r in report.records if r["batch"] != r["full_batch"]}
    yield from (f"  B reduced from {full} to {batch}" for batch, full in reduced.items())
    yield from ("", "Modes", *(f"  {mode}: {text}" for mode, text in MODES.items()))
    yield from ("", "Largest relative error against float64")
    yield from (f"  {name}, {line}" for name, lines in report.errors.items() for line in lines)
    for suite in SUITES:
        records = of_suite(report.records, suite)
        figures = [r for r in records if not r["reason"]]
        if not figures:
            continue
        if suite in ("speed", "default-malloc"):
            rates = [r["gemm_gflops"] for r in figures if r["gemm_gflops"] is not None]
            copies = [r["copy_gbytes_per_s"] for r in figures if r["copy_gbytes_per_s"] is not None]
            title = "Speed" if suite == "speed" else "Speed with the C library's default malloc settings"
            yield from (
                "",
                f"{title}, float32: medians of alternating runs, ratios taken round by round.",
                f"Floor = operations / rate of torch.mm ({'x'.join(map(str, GEMM))}), {min(rates):.0f} to "
                f"{max(rates):.0f} GFLOP/s over the run.",
                f"A copy of a block larger than the caches: {min(copies):.1f} to {max(copies):.1f} GB/s.",
                speed_table(records),
            )
        elif suite == "memory":
            yield from (
                "",
                "Memory: peak beyond the inputs; workspace: beyond y and the gradients asked for as well",
                memory_table(records),
            )
        else:
            yield from ("", TITLES[suite], flat_table(records))
        yield from reasons(records)
    if report.exponents:
        yield from ("", "Exponents of cost over size", _table(report.exponents))
        yield from reasons(of_suite(report.records, SWEEP))
    yield from ("", "Targets", _table([asdict(figure) for figure in report.targets]))


def render(report: Report) -> str:
    """The printed report."""
    return "\n".join(sections(report))
