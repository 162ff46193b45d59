"""The authoritative comparison: all contenders in one process, alternating, correctness first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from . import correctness, machine, memory, targets
from .peers import PEERS, Closure, Eager, Ours, Prepared, Unavailable
from .targets import Cell, Figure
from .timing import GEMM, Floor, Timings, alternate
from .workloads import MODES, OVERHEAD, WORKLOADS, Workload, make_case

MEGA = 1e6


@dataclass
class Options:
    workloads: list[str]
    peers: list[str]
    rounds: int = 30
    budget: float = 6.0
    """Seconds one workload in one mode may be timed for, once five rounds are done."""
    threads: int = 2
    backend: str = "cpu"
    divide_batch: int = 1
    extras: bool = True
    """bfloat16, workspace and the default C library settings."""
    default_malloc: bool = False


@dataclass
class Report:
    machine: dict[str, object]
    contenders: dict[str, str]
    cells: dict[tuple[str, str], Cell] = field(default_factory=dict)
    errors: dict[str, list[str]] = field(default_factory=dict)
    overhead: Timings | None = None
    half: dict[str, Timings] = field(default_factory=dict)
    workspace: dict[str, dict[str, dict[str, dict[str, int]]]] = field(default_factory=dict)
    """workload -> contender -> mode -> bytes."""
    default_malloc: list[dict[str, Any]] = field(default_factory=list)
    threads: int = 2

    def records(self) -> list[dict[str, Any]]:
        """One record per workload, mode and contender, in SI units."""
        rows = []
        for cell in self.cells.values():
            w = cell.workload
            common = {
                "workload": w.name, "batch": w.batch, "full_batch": w.full_batch or w.batch,
                "length": w.length,
                "in_features": w.in_features, "cluster_size": w.cluster_size, "rows": cell.rows,
                "mode": cell.mode, "dtype": cell.dtype, "operations": cell.operations,
                "bytes": cell.bytes_moved, "gemm_gflops": cell.floor.gflops(cell.timings),
                "floor_s": cell.floor.seconds(cell.timings, cell.operations), "rounds": cell.timings.rounds,
            }  # fmt: skip
            for name in cell.timings.seconds:
                if name == Floor.name:
                    continue
                median = cell.timings.median(name)
                lower, upper = cell.timings.quartiles(name)
                rows.append(
                    common
                    | {"contender": name, "median_s": median,
                       "quartile1_s": lower, "quartile3_s": upper,
                       "time_over_ours": cell.timings.ratio(name, "ours"),
                       "time_over_floor": cell.share(name),
                       "gflops": cell.operations / median / 1e9,
                       "gbytes_per_s": cell.bytes_moved / median / 1e9,
                       "page_faults": cell.timings.faults[name],
                       "reason": ""}
                )  # fmt: skip
            rows += [common | {"contender": name, "reason": why} for name, why in cell.reasons.items()]
        return rows

    def figures(self) -> list[Figure]:
        found = [*targets.speed(self.cells), *targets.nowhere_slower(self.cells)]
        if self.overhead is not None:
            found += targets.overhead(self.overhead)
        if self.half:
            found += targets.bfloat16(self.half, self.machine["isa"] == "avx512_bf16")
        ours = {name: contenders["ours"] for name, contenders in self.workspace.items()}
        found += targets.workspace(ours, WORKLOADS, self.threads)
        return found


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def prepare(workload: Workload, contenders: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    """(case, what can run by name, reasons of what cannot)."""
    case = make_case(workload, dtype)
    ready: dict[str, Prepared] = {}
    reasons: dict[str, str] = {}
    for name, contender in contenders.items():
        try:
            ready[name] = contender.prepare(case)
        except Unavailable as why:
            reasons[name] = str(why)
    return case, ready, reasons


def time_workload(report: Report, workload: Workload, contenders: dict[str, Any], options: Options) -> None:
    case, ready, reasons = prepare(workload, contenders)
    say(f"{workload.name}: {workload.describe()}; checking ...")
    report.errors[workload.name] = correctness.check(case, ready, MODES)
    for mode in MODES:
        floor = Floor()
        closures: dict[str, Any] = {name: prepared.closure(mode) for name, prepared in ready.items()}
        timings = alternate(closures | {Floor.name: floor}, rounds=options.rounds, budget=options.budget)
        cell = Cell(workload, mode, "float32", case.rows, timings, floor, case.x.element_size(), reasons)
        report.cells[workload.name, mode] = cell
        say(
            f"  {mode}: ours {1e3 * timings.median('ours'):.3f} ms, {cell.share():.2f} x floor, "
            f"{timings.rounds} rounds"
        )


def time_overhead(ours: Ours) -> Timings:
    case = make_case(OVERHEAD)
    contenders: dict[str, Prepared] = {"ours": ours.prepare(case), "eager": Eager().prepare(case)}
    correctness.check(case, contenders, MODES)
    return alternate({n: p.closure("forward") for n, p in contenders.items()}, rounds=50, budget=2.0)


def time_half(ours: Ours, workload: Workload, options: Options) -> dict[str, Timings]:
    """Time ours in float32 and bfloat16, and eager in bfloat16, on the same numbers."""
    single, half = make_case(workload), make_case(workload, torch.bfloat16)
    correctness.check(half, {"ours": ours.prepare(half)}, MODES)
    found = {}
    for mode in MODES:
        closures: dict[str, Closure] = {
            "ours": ours.prepare(single).closure(mode),
            "ours bf16": ours.prepare(half).closure(mode),
            "eager bf16": Eager().prepare(half).closure(mode),
        }
        found[mode] = alternate(closures, rounds=options.rounds, budget=options.budget)
    return found


def with_default_malloc(options: Options, workload: str) -> list[dict[str, Any]]:
    """Records of one workload from a process with the C library's default settings."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "benchmarks", "--default-malloc", "--no-extras", "--workload", workload,
            "--peers", ",".join(options.peers), "--rounds", str(min(options.rounds, 10)),
            "--threads", str(options.threads), "--backend", options.backend,
            "--divide-batch", str(options.divide_batch), "--output", folder,
        ]  # fmt: skip
        done = subprocess.run(command, cwd=machine.ROOT, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"the run with default malloc settings failed:\n{done.stderr}")
        records: list[dict[str, Any]] = json.loads(next(Path(folder).glob("*.json")).read_text())["records"]
        return records


def run(options: Options) -> Report:
    """Measure. Raises `correctness.Red` before any figure of a workload whose results are wrong."""
    torch.set_num_threads(options.threads)
    if not options.default_malloc:
        machine.prime()
    ours = Ours(options.backend)
    contenders: dict[str, Any] = {"ours": ours, **{name: PEERS[name]() for name in options.peers}}
    report = Report(
        machine.describe(options.backend), {n: c.note for n, c in contenders.items()}, threads=options.threads
    )
    chosen = [WORKLOADS[name].reduced(options.divide_batch) for name in options.workloads]
    for workload in chosen:
        time_workload(report, workload, contenders, options)
    report.machine["load_average_at_end"] = round(os.getloadavg()[0], 2)
    say("call overhead ...")
    report.overhead = time_overhead(ours)
    if not options.extras:
        return report
    rgb = WORKLOADS["kinetics-rgb"].reduced(options.divide_batch)
    say("bfloat16 on kinetics-rgb ...")
    report.half = time_half(ours, rgb, options)
    if memory.available():
        for workload in chosen:
            say(f"workspace of {workload.name} ...")
            report.workspace[workload.name] = memory.measure(
                workload.name,
                options.backend,
                options.threads,
                ["ours", "eager"],
                divide_batch=options.divide_batch,
            )
    if not options.default_malloc:
        say("kinetics-rgb with the C library's default malloc settings ...")
        report.default_malloc = with_default_malloc(options, "kinetics-rgb")
    return report


def _times(value: float | None) -> str:
    return "-" if value is None or pd.isna(value) else f"{value:.2f}x"


def speed_table(records: Iterable[dict[str, Any]], peers: Iterable[str]) -> pd.DataFrame:
    """One line per workload and mode: our time, the floor, each peer's time over ours and the floor."""
    lines = []
    frame = pd.DataFrame(records)
    for (workload, mode), group in frame.groupby(["workload", "mode"], sort=False):
        by_name = group.set_index("contender")
        ours = by_name.loc["ours"]
        line = {
            "workload": workload,
            "mode": mode,
            "ours ms": f"{1e3 * ours['median_s']:.3f}",
            "floor ms": f"{1e3 * ours['floor_s']:.3f}",
            "ours/floor": _times(ours["time_over_floor"]),
            "GFLOP/s": f"{ours['gflops']:.0f}",
            "GB/s": f"{ours['gbytes_per_s']:.1f}",
        }
        for peer in peers:
            absent = by_name.loc[peer, "reason"] != ""
            line[f"{peer}/ours"] = "n/a" if absent else _times(by_name.loc[peer, "time_over_ours"])
            line[f"{peer}/floor"] = "n/a" if absent else _times(by_name.loc[peer, "time_over_floor"])
        lines.append(line | {"faults": f"{ours['page_faults']:.0f}", "rounds": ours["rounds"]})
    return pd.DataFrame(lines)


def render(report: Report, peers: list[str]) -> str:
    """The printed report."""

    def table(frame: pd.DataFrame) -> str:
        return str(frame.to_string(index=False))

    records = report.records()
    out = ["Machine", *(f"  {key}: {value}" for key, value in report.machine.items()), "", "Contenders"]
    out += [f"  {name}: {note}" for name, note in report.contenders.items()]
    workloads = {cell.workload.name: cell.workload for cell in report.cells.values()}
    out += ["", "Workloads", *(f"  {w.name}: {w.describe()}; {w.stands_for}" for w in workloads.values())]
    out += ["", "Modes", *(f"  {mode}: {text}" for mode, text in MODES.items())]
    out += ["", "Largest relative error against float64"]
    out += [f"  {name}, {line}" for name, lines in report.errors.items() for line in lines]
    rates = [cell.floor.gflops(cell.timings) for cell in report.cells.values()]
    if rates:
        out += [
            "",
            "Speed, float32: medians of alternating runs, ratios taken round by round. "
            f"Floor = operations / rate of torch.mm ({'x'.join(map(str, GEMM))}), {min(rates):.0f} to "
            f"{max(rates):.0f} GFLOP/s over the run.",
        ]
        out += [table(speed_table(records, peers))]
        why = {(name, r) for cell in report.cells.values() for name, r in cell.reasons.items()}
        out += [f"  n/a: {name}: {reason}" for name, reason in sorted(why)]
    if report.overhead is not None:
        times = {n: f"{1e6 * report.overhead.median(n):.1f} us" for n in report.overhead.seconds}
        out += ["", f"Call overhead, x {OVERHEAD.batch}x{OVERHEAD.length}x{OVERHEAD.in_features}, "
                f"N = {OVERHEAD.cluster_size}, nothing requires grad: {times}"]  # fmt: skip
    if report.half:
        lines = [
            {"mode": mode, **{f"{n} ms": f"{1e3 * t.median(n):.2f}" for n in t.seconds},
             "float32/bf16, ours": _times(t.ratio("ours", "ours bf16")),
             "eager bf16/ours bf16": _times(t.ratio("eager bf16", "ours bf16"))}
            for mode, t in report.half.items()
        ]  # fmt: skip
        out += ["", "bfloat16, kinetics-rgb", table(pd.DataFrame(lines))]
    if report.workspace:
        lines = [
            {"workload": workload, "mode": mode, "x, y, gradients MB": f"{sizes['operands'] / MEGA:.1f}",
             **{f"{name} workspace MB": f"{m[mode]['workspace'] / MEGA:.1f}" for name, m in found.items()}}
            for workload, found in report.workspace.items()
            for mode, sizes in found["ours"].items()
        ]  # fmt: skip
        out += ["", "Workspace: peak resident memory beyond inputs, y and gradients asked for",
                table(pd.DataFrame(lines))]  # fmt: skip
    if report.default_malloc:
        out += ["", "kinetics-rgb with the C library's default malloc settings",
                table(speed_table(report.default_malloc, peers))]  # fmt: skip
    out += ["", "Targets", table(pd.DataFrame([asdict(f) for f in report.figures()]))]
    return "\n".join(out)


def save(report: Report, folder: Path) -> list[Path]:
    """CSV (one line per workload, mode and contender) and JSON (everything); returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    stamp = str(report.machine["date"]).replace(":", "").split("+")[0]
    stem = folder / f"{stamp}-{report.machine['commit']}"
    records = report.records()
    frame = pd.DataFrame(records)
    for key in (
        "date",
        "commit",
        "backend",
        "isa",
        "cpu",
        "cores",
        "threads",
        "torch",
        "malloc_keeps_freed_memory",
    ):
        frame[key] = report.machine[key]
    csv, everything = stem.with_name(stem.name + ".csv"), stem.with_name(stem.name + ".json")
    frame.to_csv(csv, index=False)

    def medians(timings: Timings) -> dict[str, float]:
        return {name: timings.median(name) for name in timings.seconds}

    content = {
        "machine": report.machine,
        "contenders": report.contenders,
        "errors": report.errors,
        "records": records,
        "seconds": {f"{w}/{m}": cell.timings.seconds for (w, m), cell in report.cells.items()},
        "overhead_s": medians(report.overhead) if report.overhead is not None else None,
        "bfloat16_s": {mode: medians(t) for mode, t in report.half.items()},
        "workspace_bytes": report.workspace,
        "default_malloc": report.default_malloc,
        "targets": [asdict(f) for f in report.figures()],
    }
    everything.write_text(json.dumps(content, indent=1) + "\n")
    return [csv, everything]
