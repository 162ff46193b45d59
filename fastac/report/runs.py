"""The results of one run of the benchmarks, and which runs a page is made of."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from .committed import ReportError

KEYS = ("workload", "mode", "dtype", "contender", "reason")
"""What tells records apart, and why one has no figure: text."""

CPU_KEYS = ("suite", "varied", "layout", "computes")

SIZES = ("batch", "length", "in_features", "cluster_size", "rows")
CPU_NUMBERS = (
    *SIZES,
    *("full_batch", "median_s", "quartile1_s", "quartile3_s", "p95_s", "rounds", "page_faults"),
    *("operations", "bytes", "gemm_gflops", "copy_gbytes_per_s", "floor_s", "time_over_floor"),
    *("gflops", "gbytes_per_s", "time_over_ours", "peak_bytes", "workspace_bytes"),
)
GPU_NUMBERS = (
    *SIZES,
    *("median_s", "quartile1_s", "quartile3_s", "rounds", "operations", "bytes", "floor_s"),
    *("share_of_floor", "time_over_ours", "call_s", "copy_s", "matmul_flops", "bytes_per_s", "flops"),
)

EXPONENT_KEYS = ("varied", "workload", "mode", "contender", "quantity", "low", "high")
EXPONENT_NUMBERS = ("exponent", "from", "to", "points")

VERSIONS = ("torch", "triton", "cuda", "driver", "python")


@dataclass(frozen=True)
class Run:
    """One file of results.

    Attributes:
        file: its path in the work tree.
        kind: "cpu" or "gpu".
        machine: what it was measured on, and when.
        device: the processor's or the GPU's name.
        date: when it was measured.
        content: the whole file.
        records: a row per record; numbers are floats, NaN where there is none.
    """

    file: str
    kind: str
    machine: dict[str, Any]
    device: str
    date: datetime.datetime
    content: dict[str, Any]
    records: pd.DataFrame

    @property
    def commit(self) -> str:
        """The commit measured, with what a changed tree means."""
        return marked(str(self.machine["commit"]))

    @property
    def source(self) -> str:
        """One line that says what every figure of the run comes from."""
        threads = self.machine.get("threads")
        used = "" if threads is None else f", {threads} thread{'' if threads == 1 else 's'}"
        versions = (f"{name} {self.machine[name]}" for name in VERSIONS if self.machine.get(name))
        parts = [
            f"{self.device}{used}",
            str(self.date.date()),
            f"fastac at commit {self.commit}",
            *versions,
        ]
        return "; ".join(parts)

    def suite(self, name: str) -> pd.DataFrame:
        """The records of one suite; no rows if it was not run."""
        found: pd.DataFrame = self.records[self.records["suite"] == name]
        return found

    def contenders(self) -> dict[str, dict[str, str]]:
        """By name, a contender's ``note`` and what it ``computes``."""
        return {
            name: {"note": str(about["note"]), "computes": str(about["computes"])}
            for name, about in self.content["contenders"].items()
        }


def marked(commit: str) -> str:
    """A commit, with a remark if it is one of a changed tree."""
    if commit.endswith("-dirty"):
        return f"{commit} (code not committed)"
    return commit


def newest(runs: Iterable[Run]) -> list[Run]:
    """The newest run of every device, by the devices' names."""
    found: dict[str, Run] = {}
    for run in sorted(runs, key=lambda run: (run.date, run.file)):
        found[run.device] = run
    return [found[device] for device in sorted(found)]


def read(path: Path, name: str, kind: str) -> Run:
    """Reads one file of results.

    Args:
        path: the file.
        name: its path in the work tree.
        kind: "cpu" or "gpu".

    Raises:
        ReportError: it is of another form; the message says where.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, ValueError) as error:
        raise ReportError(f"{path} must be JSON: {error}") from error
    lists = ("records", "targets", *(("exponents",) if kind == "cpu" else ()))
    mappings = ("machine", "errors", *(("contenders",) if kind == "cpu" else ("unmeasured", "red")))
    _check(path, content, lists, mappings)
    machine = content["machine"]
    device = "cpu" if kind == "cpu" else "gpu"
    for key in ("date", "commit", device):
        if not isinstance(machine.get(key), str):
            raise ReportError(f"{path}: machine must have the text {key!r}, got {machine.get(key)!r}")
    try:
        date = datetime.datetime.fromisoformat(machine["date"])
    except ValueError as error:
        raise ReportError(f"{path}: machine's date must be in ISO 8601, got {machine['date']!r}") from error
    if date.tzinfo is None:
        date = date.replace(tzinfo=datetime.timezone.utc)
    keys, numbers = ((*KEYS, *CPU_KEYS), CPU_NUMBERS) if kind == "cpu" else (KEYS, GPU_NUMBERS)
    records = _frame(path, content["records"], keys, numbers)
    _check_unique(path, records)
    return Run(name, kind, machine, machine[device], date, content, records)


def _check(path: Path, content: Any, lists: Iterable[str], mappings: Iterable[str]) -> None:
    if not isinstance(content, dict):
        raise ReportError(f"{path} must hold a JSON object, got {type(content).__name__}")
    for key, kind, what in [*((k, list, "list") for k in lists), *((k, dict, "object") for k in mappings)]:
        if not isinstance(content.get(key), kind):
            raise ReportError(f"{path}: {key} must be a JSON {what}, got {type(content.get(key)).__name__}")
    for key in lists:
        for entry in content[key]:
            if not isinstance(entry, dict):
                raise ReportError(f"{path}: {key} must hold JSON objects, got {entry!r}")
    for target in content["targets"]:
        missing = [key for key in ("figure", "target", "measured", "verdict") if key not in target]
        if missing:
            raise ReportError(f"{path}: every target must have {', '.join(missing)}, got {target}")
    for exponent in content.get("exponents", []):
        missing = [key for key in EXPONENT_KEYS if key not in exponent]
        missing += [key for key in EXPONENT_NUMBERS if not isinstance(exponent.get(key), (int, float))]
        if missing:
            raise ReportError(f"{path}: every exponent must have {', '.join(missing)}, got {exponent}")
    for name, about in content.get("contenders", {}).items():
        if not isinstance(about, dict) or not {"note", "computes"} <= about.keys():
            raise ReportError(f"{path}: contender {name!r} must have note and computes, got {about!r}")


def _check_unique(path: Path, records: pd.DataFrame) -> None:
    """Whether each figure stands there once; a figure of a sweep or a GPU has its sizes as well."""
    keys = ("suite", "varied", "workload", "mode", "dtype", "layout", "contender")
    identity = [key for key in keys if key in records]
    sized = records["varied"] != "" if "varied" in records else pd.Series(True, index=records.index)
    sizes = records[list(SIZES)].where(sized)
    twice = records[pd.concat([records[identity], sizes], axis=1).duplicated()]
    if len(twice):
        raise ReportError(
            f"{path}: a record must stand there once, got twice {[v for v in twice.iloc[0][identity] if v]}"
        )


def _frame(
    path: Path, records: list[dict[str, Any]], keys: Iterable[str], numbers: Iterable[str]
) -> pd.DataFrame:
    """Records as a table: the keys as text, "" where one is missing; the numbers as floats."""
    frame: pd.DataFrame = pd.DataFrame(records)
    for key in ("workload", "mode", "contender", *(("suite",) if "suite" in keys else ())):
        if len(records) and (key not in frame or frame[key].isna().any()):
            raise ReportError(f"{path}: every record must have {key!r}")
    for key in keys:
        column = frame[key] if key in frame else pd.Series("", index=frame.index)
        frame[key] = column.astype(object).where(column.notna(), "").astype(str)
    for key in numbers:
        column = frame[key] if key in frame else pd.Series(float("nan"), index=frame.index)
        try:
            frame[key] = pd.to_numeric(column.map(lambda value: None if value == "" else value)).astype(float)
        except (ValueError, TypeError) as error:
            raise ReportError(f"{path}: {key} of every record must be a number: {error}") from error
    return frame
