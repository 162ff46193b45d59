"""The section on the systems of the papers: what was trained, and how long their steps take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from fastac.experiments import comparison, table1

from .committed import Folder, ReportError
from .content import NONE, Block, Cell, Column, Heading, Section, Table, Text, missing, number, size, times
from .runs import marked

TABLE1, SPEED = "flash_mnist.csv", "flash_mnist_speed.csv"
SOFTMAX_WEIGHT, COMPARISON = "softmax_weight.csv", "comparison.csv"
FILES = (TABLE1, SPEED, SOFTMAX_WEIGHT, COMPARISON)

SPEED_ROW = (
    "date", "commit", "cpu", "device", "backend", "threads", "torch", "python", "data", "batch_size",
    "cluster_size", "rounds", "step_ms", "plain_step_ms", "step_ratio", "cluster_ms", "plain_cluster_ms",
    "cluster_ratio", "loss_difference",
)  # fmt: skip
SOFTMAX_ROW = (
    "date", "commit", "cpu", "threads", "torch", "python", "batch", "length", "in_features", "ragged", "rows",
    "mode", "dtype", "contender", "median_s", "time_over_ours", "gbytes_per_s",
)  # fmt: skip


def systems(folder: Folder) -> Section:
    """What the committed CSV files of the experiments hold."""
    section = Section("systems", "The systems")
    for title, name, blocks in (
        ("Table 1 of the paper: Flash-MNIST", TABLE1, _table1),
        ("All systems and poolings on Flash-MNIST", COMPARISON, _comparison),
        ("Training step on Flash-MNIST, fused and plain", SPEED, _speed),
        ("Softmax over time, times the features", SOFTMAX_WEIGHT, _softmax_weight),
    ):
        section.blocks.append(Heading(title))
        if name in folder.committed:
            section.blocks += blocks(folder.path / name, folder.prefix + name)
        else:
            section.blocks.append(missing())
    return section


TEXTS = (
    "date", "commit", "timed_commit", "cpu", "device", "backend", "torch", "python", "data", "digits",
    "system", "mode", "dtype", "contender", "ragged",
)  # fmt: skip
"""Columns of text; a version such as 2.10 is none of the numbers."""


def read(path: Path, columns: tuple[str, ...]) -> pd.DataFrame:
    """A CSV file that has at least these columns, those that are not ``TEXTS`` as numbers.

    Raises:
        ReportError: it has not, or is no CSV.
    """
    try:
        frame: pd.DataFrame = pd.read_csv(path, dtype=dict.fromkeys(TEXTS, str))
    except (ValueError, UnicodeDecodeError) as error:  # pandas' errors of form are ValueErrors
        raise ReportError(f"{path} must be CSV: {error}") from error
    lacking = [name for name in columns if name not in frame.columns]
    if lacking:
        raise ReportError(f"{path} must have the columns {','.join(columns)}, lacks {','.join(lacking)}")
    for name in columns:
        if name in TEXTS:
            frame[name] = frame[name].fillna("")
        else:
            try:
                frame[name] = pd.to_numeric(frame[name])
            except ValueError as error:
                raise ReportError(f"{path}: {name} must be a number in every row: {error}") from error
    return frame


def _different(values: pd.Series) -> str:
    """The values of a column, each once."""
    return ", ".join(marked(str(value)) for value in dict.fromkeys(values.dropna()))


def _sizes(values: pd.Series) -> str:
    """The whole numbers of a column, each once."""
    return ", ".join(size(value) for value in dict.fromkeys(values.dropna()))


def _source(frame: pd.DataFrame, file: str) -> str:
    """Where rows with columns cpu, threads, date, commit, torch, python, and perhaps device, come from."""
    devices = [str(name) for name in dict.fromkeys(frame.get("device", [])) if name not in ("", "cpu")]
    threads = _sizes(frame["threads"])
    parts = [
        *devices,
        _different(frame["cpu"]),
        f"{threads} thread{'' if threads == '1' else 's'}",
        _different(frame["date"].str[:10]),
    ]
    parts += [f"fastac at commit {_different(frame['commit'])}", f"torch {_different(frame['torch'])}"]
    return "; ".join([*parts, f"python {_different(frame['python'])}", file])


def _table1(path: Path, file: str) -> list[Block]:
    try:
        done, rows = table1.read(path), table1.table(path)
    except (ValueError, UnicodeDecodeError, KeyError) as error:
        raise ReportError(f"{path} cannot be read: {error}") from error
    if done.empty:
        return [missing()]
    source = (
        f"fastac at commit {_different(done['commit'])}; {file}, which records no machine, versions or date: "
        "a cell is a training run, not a time"
    )
    heads = (
        "N",
        "ours, %",
        "spread",
        "paper, %",
        "difference",
        "runs",
        "epochs",
        "epochs of the CNN",
        "accuracy of its frames, %",
    )
    table = Table("Test accuracy at the last epoch", source, [Column(name) for name in heads], "column")
    for key, column in table1.COLUMNS.items():
        of_column = rows[rows["column"] == column]
        for n in sorted({*table1.CLUSTER_SIZES, *of_column["N"].tolist()}):
            found = of_column[of_column["N"] == n]
            paper = table1.paper_accuracy(key[0], n, shift=key[1])
            if found.empty:
                table.add([str(n), table.absent(""), NONE, _accuracy(paper), *[NONE] * 5], column)
            for row in found.to_dict("records"):
                table.add(
                    [
                        str(n),
                        _accuracy(row["ours"]),
                        _accuracy(row["spread"]),
                        _accuracy(row["paper"]),
                        _difference(row["difference"]),
                        str(row["runs"]),
                        str(row["epochs"]),
                        str(row["CNN epochs"]),
                        _accuracy(row["frame accuracy"]),
                    ],
                    column,
                )
    said = "Mean and standard deviation of our runs beside the paper's figure."
    return [Text(said), table]


def _accuracy(value: float | None) -> str:
    return NONE if value is None or math.isnan(value) else f"{value:.1f}"


def _difference(value: float) -> str:
    return NONE if math.isnan(value) else f"{round(value, 1) + 0.0:+.1f}".replace("-", "−")


def _comparison(path: Path, file: str) -> list[Block]:
    frame = read(path, comparison.ROW)
    if frame.empty:
        return [missing()]
    trained = f"trained at commit {_different(frame['commit'])}"
    source = _source(frame.assign(commit=frame["timed_commit"]), file)
    heads = ("system", "accuracy, %", "parameters", "ms per step", "epochs", "batch", "seed")
    table = Table("One engine, one budget", f"{source}; {trained}", [Column(name) for name in heads])
    done: dict[str, dict[str, Any]] = {str(row["system"]): row for row in frame.to_dict("records")}  # type: ignore[misc]
    for system in [*comparison.SYSTEMS, *(name for name in done if name not in comparison.SYSTEMS)]:
        if system not in done:
            table.add([system, table.absent(""), *[NONE] * 5])
            continue
        row = done[system]
        cells = [_accuracy(row["accuracy"]), size(row["parameters"]), number(row["step_ms"])]
        table.add([system, *cells, *(size(row[key]) for key in ("epochs", "batch_size", "seed"))])
    said = (
        f"{_sizes(frame['train_videos'])} videos for training, {_sizes(frame['test_videos'])} for testing, "
        f"digits: {_different(frame['digits'])}; accuracy of the CNN on frames "
        f"{_different(frame['frame_accuracy'])} %."
    )
    return [Text(said), table]


def _speed(path: Path, file: str) -> list[Block]:
    frame = read(path, SPEED_ROW)
    if frame.empty:
        return [missing()]
    heads = (
        "threads", "backend", "step, ms", "plain step, ms", "plain over ours",
        "cluster, ms", "plain cluster, ms", "plain over ours", "losses differ by",
    )  # fmt: skip
    blocks: list[Block] = []
    run = ["cpu", "device", "backend", "threads", "data", "batch_size", "cluster_size"]
    newest_rows = _newest(frame, run).drop_duplicates(run, keep="last")  # dates are those of a day
    for newest in _sources(newest_rows, ["device", "data", "batch_size", "cluster_size"]):
        table = Table(
            f"One model, its cluster fused and in plain torch: {_different(newest['data'])}, "
            f"B = {_sizes(newest['batch_size'])}, N = {_sizes(newest['cluster_size'])}",
            _source(newest, file),
            [Column(name, is_text=name == "backend") for name in heads],
        )
        for row in newest.sort_values("threads").to_dict("records"):
            table.add(
                [
                    size(row["threads"]),
                    str(row["backend"]),
                    number(row["step_ms"]),
                    number(row["plain_step_ms"]),
                    times(row["step_ratio"]),
                    number(row["cluster_ms"]),
                    number(row["plain_cluster_ms"]),
                    times(row["cluster_ratio"]),
                    f"{row['loss_difference']:.1e}",
                ]
            )
        blocks.append(table)
    return blocks


def _softmax_weight(path: Path, file: str) -> list[Block]:
    frame = read(path, SOFTMAX_ROW)
    if frame.empty:
        return [missing()]
    blocks: list[Block] = [
        Text(
            "y = x · softmax(scores) over time, the attention of the bi-LSTM; a peer's figure is its time "
            "over ours."
        )
    ]
    shape = ["batch", "length", "in_features", "ragged", "rows"]
    call = ["threads", "mode", "dtype"]
    for newest in _sources(_newest(frame, ["cpu", *shape, *call])):
        peers = [name for name in dict.fromkeys(newest["contender"]) if name != "ours"]
        columns = [
            Column("mode"),
            Column("threads"),
            Column("dtype", is_text=True),
            Column("ms"),
            Column("GB/s"),
        ]
        columns += [Column(f"{peer} over ours") for peer in peers]
        table = Table("Time of a call", _source(newest, file), columns, "shape")
        for _, group in newest.groupby([*shape, *call], sort=False):
            about = group.iloc[0].to_dict()
            length = f"L {'≤' if about['ragged'] == 'True' else '='} {size(about['length'])}"
            name = f"B = {size(about['batch'])}, {length}, D = {size(about['in_features'])}"
            rows = group.set_index("contender")
            ours = rows.loc["ours"] if "ours" in rows.index else None
            cells: list[Cell | str] = [str(about["mode"]), size(about["threads"]), str(about["dtype"])]
            if ours is None:
                cells += [table.absent("")] * 2
            else:
                cells += [number(1e3 * ours["median_s"]), number(ours["gbytes_per_s"])]
            cells += [
                times(rows.at[peer, "time_over_ours"]) if peer in rows.index else table.absent("")
                for peer in peers
            ]
            table.add(cells, name)
        blocks.append(table)
    return blocks


def _newest(frame: pd.DataFrame, run: list[str]) -> pd.DataFrame:
    """The rows of the newest date among those that have the same values in the columns of ``run``."""
    newest: pd.DataFrame = frame[frame["date"] == frame.groupby(run)["date"].transform("max")]
    return newest


def _sources(frame: pd.DataFrame, apart: Sequence[str] = ()) -> list[pd.DataFrame]:
    """The rows of each processor and version, so that the source of a table is that of all its rows."""
    versions = ["cpu", "commit", "torch", "python"]
    return [group for _, group in frame.groupby([*versions, *apart], sort=True)]
