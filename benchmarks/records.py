"""One run's results: records in SI units, and the two files that they are saved in."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from .targets import Figure
from .timing import Copy, Floor, Timings
from .workloads import Workload

Record = dict[str, Any]

KEYS = (
    "suite", "workload", "varied", "batch", "full_batch", "length", "in_features", "cluster_size", "rows",
    "mode", "dtype", "layout", "contender", "computes",
)  # fmt: skip
"""What was measured."""

MEASURED = (
    "median_s", "quartile1_s", "quartile3_s", "p95_s", "rounds", "page_faults", "gemm_gflops",
    "copy_gbytes_per_s", "floor_s", "time_over_floor", "gflops", "gbytes_per_s", "time_over_ours",
    "peak_bytes", "workspace_bytes",
)  # fmt: skip
"""Empty where a contender has no figure; `reason` then says why."""

COLUMNS = (*KEYS, "operations", "bytes", *MEASURED, "reason")

MACHINE = (
    "date", "commit", "backend", "isa", "cpu", "cores", "threads", "torch", "python",
    "malloc_keeps_freed_memory",
)  # fmt: skip
"""Columns that every line of the CSV repeats."""


def record(workload: Workload, rows: int, **values: Any) -> Record:
    """A record with every column; what is not given is None, or "" for `varied` and `reason`.

    Raises: TypeError for a column that does not exist, ValueError for a figure beside a reason.
    """
    sizes = {
        "workload": workload.name, "batch": workload.batch,
        "full_batch": workload.full_batch or workload.batch, "length": workload.length,
        "in_features": workload.in_features, "cluster_size": workload.cluster_size, "rows": rows,
    }  # fmt: skip
    unknown = set(values) - set(COLUMNS)
    if unknown:
        raise TypeError(f"records have no column {', '.join(sorted(unknown))}")
    found = dict.fromkeys(COLUMNS) | {"varied": "", "reason": ""} | sizes | values
    if found["reason"] and any(found[name] is not None for name in MEASURED):
        raise ValueError(
            f"{found['contender']}: a record has figures or a reason, not both: {found['reason']}"
        )
    return found


P95_ROUNDS = 20
"""Rounds from which on the 95th percentile says something."""


def measured(
    timings: Timings,
    key: str,
    *,
    operations: int | None = None,
    moved: int | None = None,
    ours: str | None = "ours",
    floor: Floor | None = None,
    copy: Copy | None = None,
) -> dict[str, Any]:
    """The measured columns, with the counts, of what alternated under the name `key`.

    `ours` is the name that times are divided by; floor and copy are those of the same alternation.
    """
    median = timings.median(key)
    lower, upper = timings.quartiles(key)
    values: dict[str, Any] = {
        "median_s": median, "quartile1_s": lower, "quartile3_s": upper, "rounds": timings.rounds,
        "page_faults": timings.faults[key], "operations": operations, "bytes": moved,
    }  # fmt: skip
    if timings.rounds >= P95_ROUNDS:
        values["p95_s"] = timings.percentile(key, 95)
    if ours in timings.seconds:
        values["time_over_ours"] = timings.ratio(key, ours)
    if operations is not None:
        values["gflops"] = operations / median / 1e9
    if moved is not None:
        values["gbytes_per_s"] = moved / median / 1e9
    if floor is not None:
        values["gemm_gflops"] = floor.gflops(timings)
        if operations is not None:
            values["floor_s"] = floor.seconds(timings, operations)
            values["time_over_floor"] = floor.share(timings, key, operations)
    if copy is not None:
        values["copy_gbytes_per_s"] = copy.gbytes_per_s(timings)
    return values


@dataclass
class Report:
    """Everything that one run found."""

    machine: dict[str, Any]
    options: dict[str, Any]
    contenders: dict[str, dict[str, str]]
    """Note, and what it computes, by name."""
    errors: dict[str, list[str]] = field(default_factory=dict)
    """Largest errors against float64, by suite and workload."""
    records: list[Record] = field(default_factory=list)
    exponents: list[dict[str, Any]] = field(default_factory=list)
    targets: list[Figure] = field(default_factory=list)


def of_suite(records: Iterable[Record], suite: str) -> list[Record]:
    return [r for r in records if r["suite"] == suite]


def save(report: Report, folder: Path) -> list[Path]:
    """Write cpu-<date>-<commit>.csv (the records) and .json (everything); returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    stamp = str(report.machine["date"]).split("+")[0].replace(":", "")
    stem = f"cpu-{stamp}-{report.machine['commit']}"
    frame = pd.DataFrame(report.records, columns=list(COLUMNS))
    for name in MACHINE:
        frame[name] = report.machine[name]
    table, everything = folder / f"{stem}.csv", folder / f"{stem}.json"
    frame.to_csv(table, index=False)
    content = {
        "machine": report.machine,
        "options": report.options,
        "contenders": report.contenders,
        "errors": report.errors,
        "records": report.records,
        "exponents": report.exponents,
        "targets": [asdict(figure) for figure in report.targets],
    }
    everything.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    return [table, everything]
