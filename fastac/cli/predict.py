"""``fastac predict``."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import click
import torch

from fastac.training import predict
from fastac.training.run import load_run, open_like_training

from . import common

FORMATS = ("csv", "jsonl")


@click.command("predict")
@common.run_argument
@click.argument("features", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--top", type=click.IntRange(min=1), default=5, show_default=True, help="Classes per video, at most all."
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, allow_dash=True),
    default="-",
    show_default="standard output",
    help="File; its suffix .csv or .jsonl decides the format. It appears when it is whole.",
)
@click.option("--format", "format_", type=click.Choice(FORMATS), help="Format, whatever the suffix.  [csv]")
@common.checkpoint_option
@common.device_option
@common.threads_option
def command(
    run: Path, features: Path, top: int, output: str, format_: str | None, which: str, device: torch.device
) -> None:
    """Name the most probable classes of every video in FEATURES, a folder or an HDF5 file.

    RUN is the folder of a run of fastac train. Videos are sorted by name. CSV has a row per video and rank:
    video, rank, label, probability. JSON lines have a line per video: {"video": ..., "predictions":
    [{"label": ..., "probability": ...}, ...]}. Both are UTF-8.

    Broken features are named on standard error and count as absent, a video without any others is left out,
    and the exit status is 1.

    \b
    fastac predict runs/first features --top 3
    fastac predict runs/first features --output predictions.jsonl
    """
    common.check_one_process("predict")
    if output != "-":
        common.check_writable(Path(output).parent, "--output")
    chosen_format = format_ or _format(output)
    with common.user_errors():
        trained = load_run(run, which)
        with common.user_errors(*common.WRONG_ARGUMENT):
            data = open_like_training(trained, features, None)
        model = trained.model.to(device)
        count = min(top, len(trained.class_names))
        quiet = output == "-" and sys.stdout.isatty()
        with _opened(output) as file:
            write = _writer(file, chosen_format)
            for batch, probabilities in predict(
                model, data, device=device, show_progress=not quiet, **trained.evaluation
            ):
                values, classes = probabilities.topk(count, dim=1)
                for number, of_video, indices in zip(
                    batch.index.tolist(), values.tolist(), classes.tolist(), strict=True
                ):
                    labels = [trained.class_names[index] for index in indices]
                    write(data.names[number], labels, of_video)
    if output != "-":
        click.echo(f"predictions of {len(data):,} videos: {output}")
    if data.problems:
        raise click.ClickException(f"{len(data.problems):,} problems with the features, see above")


def _format(output: str) -> str:
    if output == "-":
        return "csv"
    suffix = Path(output).suffix.removeprefix(".").lower()
    if suffix not in FORMATS:
        raise click.BadParameter(
            f"must end in .csv or .jsonl unless --format is given, got {output}", param_hint="--output"
        )
    return suffix


def _writer(file: TextIO, format_: str) -> Callable[[str, list[str], list[float]], None]:
    """A function that writes one video's labels and probabilities."""
    if format_ == "jsonl":

        def write_line(video: str, labels: list[str], probabilities: list[float]) -> None:
            predictions: list[dict[str, Any]] = [
                {"label": label, "probability": round(probability, 6)}
                for label, probability in zip(labels, probabilities, strict=True)
            ]
            file.write(json.dumps({"video": video, "predictions": predictions}, ensure_ascii=False) + "\n")

        return write_line
    table = csv.writer(file, lineterminator="\n")
    table.writerow(("video", "rank", "label", "probability"))

    def write_rows(video: str, labels: list[str], probabilities: list[float]) -> None:
        for rank, (label, probability) in enumerate(zip(labels, probabilities, strict=True), start=1):
            table.writerow((video, rank, label, f"{probability:.6f}"))

    return write_rows


@contextmanager
def _opened(output: str) -> Iterator[TextIO]:
    """Standard output, or a file that appears when it is whole.

    A video's name that is not UTF-8 is written as the bytes that it has on disk.
    """
    where = "standard output" if output == "-" else output
    with common.os_errors_at(where), _stream(output) as file:
        yield file


@contextmanager
def _stream(output: str) -> Iterator[TextIO]:
    if output == "-":
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
        yield sys.stdout
        sys.stdout.flush()
        return
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():  # a device or a named pipe
        with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            yield file
        return
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
