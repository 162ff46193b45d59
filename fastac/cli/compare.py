"""``fastac compare``."""

from __future__ import annotations

from pathlib import Path

import click
import torch

from fastac.experiments import comparison
from fastac.experiments.flash_mnist import Recipe, prepare
from fastac.training.run import RunError

from . import common
from .flash_mnist import data_options, echo_data, echo_frame_accuracy, load_digits


@click.command("compare")
@click.option(
    "--system",
    "systems",
    type=click.Choice(list(comparison.SYSTEMS)),
    multiple=True,
    help="A system to train; may be repeated.  [all]",
)
@click.option(
    "--epochs",
    type=click.IntRange(min=1),
    default=comparison.Budget().epochs,
    show_default=True,
    help="Epochs of every system.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0, max=2**32 - 1),
    default=comparison.Budget().seed,
    show_default=True,
    help="Of initial values, order and dropout; the videos are the same for every seed.",
)
@data_options(train_videos=Recipe().train_videos, test_videos=Recipe().test_videos)
@click.option(
    "--train-only",
    is_flag=True,
    help="Neither time nor write anything: another process will, when all are done.",
)
@click.option(
    "--results",
    type=click.Path(dir_okay=False, path_type=Path),
    help="CSV file of the table, which is replaced. [comparison.csv in --output]",
)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("runs/compare"),
    show_default=True,
    help="Folder of the systems' runs.",
)
@common.device_option
@common.threads_option
def command(
    systems: tuple[str, ...],
    epochs: int,
    seed: int,
    data: str,
    train_videos: int,
    test_videos: int,
    cnn_frames: int,
    no_cache: bool,
    train_only: bool,
    results: Path | None,
    output: Path,
    device: torch.device,
) -> None:
    """Train the attention cluster, the other two systems and the usual poolings on Flash-MNIST.

    All get the same videos, epochs, batches and optimizer (the settings of the Flash-MNIST code: Adam with a
    learning rate of 0.001, batches of 64, dropout 0.5). The table has each system's test accuracy at the last
    epoch, its number of parameters and the median time of a training step, taken in turn in one process.

    A system whose run in --output is done is not trained again; a run that was interrupted goes on where it
    was, and one of fewer epochs too. Several processes may share the work: with --train-only, each for other
    systems.

    \b
    fastac compare
    fastac compare --train-videos 20 --test-videos 5 --output runs/small
    fastac compare --system "attention cluster" --system "bi-LSTM"
    """
    common.check_one_process("compare")
    common.check_writable(output, "--output")
    results = results or output / "comparison.csv"
    common.check_writable(results.parent, "--results")
    chosen = [name for name in comparison.SYSTEMS if not systems or name in systems]
    recipe = Recipe(train_videos, test_videos, cnn_frames)
    budget = comparison.Budget(epochs, seed)
    with common.user_errors():
        digits = load_digits(data)
        echo_data(digits, recipe)
        prepared = prepare(digits, recipe, use_cache=not no_cache)
        echo_frame_accuracy(prepared)
        videos = comparison.Data(prepared)
        done = comparison.run(chosen, videos, budget, output, device=device)
        if train_only:
            return
        missing = [name for name in chosen if name not in done]
        if missing:
            raise RunError(
                f"another process is at {', '.join(missing)}: give the command again when it is done"
            )
        times = comparison.step_seconds(chosen, videos, device=device)
        table = comparison.record(results, chosen, videos, budget, output, times, device=device)
    click.echo(f"{epochs} epochs each; accuracy in %, median milliseconds of a step of 64 videos")
    click.echo(comparison.as_text(table))
    click.echo(f"results: {results}")
