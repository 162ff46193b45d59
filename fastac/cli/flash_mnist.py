"""``fastac flash-mnist``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
import pandas as pd
import torch
from click.core import ParameterSource

from fastac import figures
from fastac.data import DigestMismatchError, Digits, load_digits28, load_mnist
from fastac.experiments import results as result_files
from fastac.experiments import speed, table1
from fastac.experiments.flash_mnist import (
    Prepared,
    Recipe,
    authors_training,
    draw_test_video,
    prepare,
)
from fastac.training.run import CHECKPOINTS, RunError, load_run

from . import common

Function = TypeVar("Function", bound=Callable[..., Any])

TABLE_COLUMNS = {
    f"{weighting}+shift" if shift else weighting: (weighting, shift) for weighting, shift in table1.COLUMNS
}

COMMON = {"table", "figures_to", "with_speed", "output", "threads", "device", "data"}
ALLOWED = {
    "--table1": COMMON | {"columns", "cluster_sizes", "seeds", "epochs", "results", "cnn_epochs"},
    "--figures": COMMON | {"results", "cnn_epochs"},
    "--speed": COMMON
    | {
        "cluster_size",
        "seed",
        "results",
        "cnn_epochs",
        "cnn_frames",
        "train_videos",
        "test_videos",
        "no_cache",
    },
    "a single cell": COMMON
    | {"weighting", "shift", "cluster_size", "seed", "epochs"}
    | {"cnn_epochs", "cnn_frames", "train_videos", "test_videos", "no_cache"},
}
"""The options that mean something, by what is asked for."""


def data_options(*, train_videos: int, test_videos: int) -> Callable[[Function], Function]:
    """The options of the data set, with these defaults."""

    def decorate(function: Function) -> Function:
        for option in (
            click.option("--no-cache", is_flag=True, help="Neither read nor write cached features."),
            click.option(
                "--cnn-frames",
                type=click.IntRange(min=64),
                default=Recipe().cnn_frames,
                show_default=True,
                help="Digit frames in an epoch of the frame CNN.",
            ),
            click.option(
                "--test-videos",
                type=click.IntRange(min=1),
                default=test_videos,
                show_default=True,
                help="Test videos per set of digits.",
            ),
            click.option(
                "--train-videos",
                type=click.IntRange(min=1),
                default=train_videos,
                show_default=True,
                help="Training videos per set of digits.",
            ),
            click.option(
                "--data",
                type=click.Choice(["auto", "digits"]),
                default="auto",
                show_default=True,
                help="auto: MNIST, or scikit-learn's digits where it cannot be had; digits: these.",
            ),
        ):
            function = option(function)
        return function

    return decorate


def load_digits(data: str) -> Digits:
    """The digits of ``--data``; a wrong folder or file is a wrong configuration."""
    try:
        return load_digits28() if data == "digits" else load_mnist(log=click.echo)
    except (DigestMismatchError, FileNotFoundError) as error:
        raise common.UsageFailure(str(error)) from error


def echo_data(digits: Digits, recipe: Recipe) -> None:
    """Says what the data are."""
    click.echo(
        f"digits: {digits.source}, {len(digits.train_images):,} for training, "
        f"{len(digits.test_images):,} for testing"
    )
    click.echo(f"videos: {recipe.describe()}")


def echo_frame_accuracy(prepared: Prepared) -> None:
    """Says how good the local features are."""
    epochs = prepared.recipe.cnn_epochs
    click.echo(f"frame accuracy of the CNN: {prepared.frame_accuracy:.1%} ({epochs} epoch(s) of training)")


def _sizes(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    """Numbers with commas between them."""
    if text is None:
        return None
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise click.BadParameter(f"must be integers of at least 1, such as 1,4,64, got {text!r}")
    return sizes


@click.command("flash-mnist")
@click.option(
    "--table1", "table", is_flag=True, help="Train cells of Table 1 and print it beside the paper's."
)
@click.option(
    "--figures",
    "figures_to",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Draw Figure 4 from the results and Figure 5 from the run in --output; trains no classifier.",
)
@click.option("--speed", "with_speed", is_flag=True, help="Compare the fused cluster with plain torch.")
@click.option(
    "--weighting",
    type=click.Choice(["average", "fc1", "fc2"]),
    default="fc1",
    show_default=True,
    help="Weighting function.",
)
@click.option("--shift/--no-shift", default=None, help="Shifting operation. [shift, but not with average]")
@click.option(
    "--cluster-size", type=click.IntRange(min=1), default=64, show_default=True, help="N, attention units."
)
@click.option(
    "--epochs",
    type=click.IntRange(min=1),
    help="Epochs of the classifier. [100; with shift and N >= 16: 30]",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0, max=2**32 - 1),
    default=1,
    show_default=True,
    help="Of initial values, order and dropout; the videos are the same for every seed.",
)
@click.option(
    "--cnn-epochs",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Epochs of the frame CNN; the authors' is one.",
)
@data_options(train_videos=Recipe().train_videos, test_videos=Recipe().test_videos)
@click.option(
    "--column",
    "columns",
    type=click.Choice(list(TABLE_COLUMNS)),
    multiple=True,
    help="With --table1: a column; may be repeated. [all]",
)
@click.option(
    "--cluster-sizes",
    metavar="N,N,...",
    callback=_sizes,
    help="With --table1: the rows, such as 1,4,64. [all eight]",
)
@click.option(
    "--seeds", type=click.IntRange(min=1), help="With --table1: runs per cell. [3 for N <= 8, else 1]"
)
@click.option(
    "--results",
    type=click.Path(dir_okay=False, path_type=Path),
    help="CSV file of the table, which --table1 adds to and --figures reads, or that --speed adds a row to. "
    "[the table's: benchmarks/results/flash_mnist.csv in a checkout, else flash_mnist.csv in --output]",
)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("runs/flash-mnist"),
    show_default=True,
    help="Folder of the run; with --table1 of the cells' runs.",
)
@common.device_option
@common.threads_option
@click.pass_context
def command(context: click.Context, /, **options: Any) -> int:
    """Run the paper's experiment on digits that flash up in noise (Long et al., CVPR 2018, section 4).

    Without --table1, --figures or --speed one cell of Table 1 is trained: its accuracy is printed beside the
    paper's, and attention.png (Figure 5 for one test video) and curves.png are drawn in --output. The first
    run makes the data (minutes), later ones take them from the cache. A run that was interrupted goes on
    where it was when the command is given again.

    \b
    fastac flash-mnist                                       FC1 with shift, N = 64, 30 epochs
    fastac flash-mnist --train-videos 20 --test-videos 5     the same on a reduced set
    fastac flash-mnist --table1 --column fc1+shift --cluster-sizes 1,4,8
    fastac flash-mnist --figures pictures
    fastac flash-mnist --speed

    Table 1 is trained cell by cell; cells that are done are skipped, and several processes may share the
    work. The exit status of --speed is 1 if the losses of the fused cluster and of plain torch do not agree.
    """
    asked = [
        name
        for name, there in (
            ("--table1", options["table"]),
            ("--figures", options["figures_to"] is not None),
            ("--speed", options["with_speed"]),
        )
        if there
    ]
    if len(asked) > 1:
        raise click.UsageError(f"{asked[0]} and {asked[1]} cannot be given together")
    mode = asked[0] if asked else "a single cell"
    for parameter in context.command.params:
        given = context.get_parameter_source(str(parameter.name)) is ParameterSource.COMMANDLINE
        if given and parameter.name not in ALLOWED[mode]:
            raise click.UsageError(f"{parameter.opts[0]} means nothing for {mode}")
    common.check_one_process("flash-mnist")
    common.check_writable(options["output"], "--output")
    if options["figures_to"] is not None:
        common.check_writable(options["figures_to"], "--figures")
    if options["results"] is not None:
        common.check_writable(options["results"].parent, "--results")
    functions = {"--table1": _table, "--figures": _figures, "--speed": _speed, "a single cell": _cell}
    with common.user_errors():
        return functions[mode](options["device"], options)


def _recipe(options: dict[str, Any]) -> Recipe:
    return Recipe(
        **{name: options[name] for name in ("train_videos", "test_videos", "cnn_frames", "cnn_epochs")}
    )


def _prepared(options: dict[str, Any], recipe: Recipe, cell: table1.Cell | None = None) -> Prepared:
    """The data; for a cell to train in --output, once it is known that nothing else is there."""
    digits = load_digits(options["data"])
    if cell is not None:
        table1.check_same(options["output"], cell, digits.name, recipe)
    echo_data(digits, recipe)
    prepared = prepare(digits, recipe, use_cache=not options["no_cache"])
    echo_frame_accuracy(prepared)
    return prepared


def _cell(device: torch.device, options: dict[str, Any]) -> int:
    """Trains one cell and draws its pictures."""
    weighting, size, output = options["weighting"], options["cluster_size"], options["output"]
    shift = options["shift"] if options["shift"] is not None else weighting != "average"
    epochs = options["epochs"] or table1.default_epochs(size, shift=shift)
    recipe = _recipe(options)
    cell = table1.Cell(weighting, shift, size, options["seed"], epochs, recipe.cnn_epochs)
    prepared = _prepared(options, recipe, cell)
    with result_files.alone(output) as is_alone:
        if not is_alone:
            raise RunError(f"{output}: another process is at it")
        rows = table1.train_cell(cell, prepared, output, device=device)
    accuracy = 100 * float(rows[-1]["validation_accuracy"])
    paper = table1.paper_accuracy(weighting, size, shift=shift)
    if not prepared.as_the_authors:
        beside = f"on {prepared.digits}, {'a reduced set' if recipe.reduced else 'a full set'}"
        beside += ": not to be compared with the paper's"
    elif paper is None:
        beside = "the paper's table has no such cell"
    else:
        beside = f"paper {paper:.1f} %, difference {accuracy - paper:+.1f}"
    shift_text = "with shift" if shift else "without shift"
    click.echo(
        f"{weighting} {shift_text}, N = {size}, {epochs} epochs: test accuracy {accuracy:.2f} % ({beside})"
    )
    trained = load_run(output, "last")
    pictures = (
        draw_test_video(trained.model.to(device), prepared, output / "attention.png"),
        figures.save(figures.training_curves(pd.read_csv(output / "metrics.csv")), output / "curves.png"),
    )
    click.echo(f"pictures: {', '.join(map(str, pictures))}; checkpoints: {output / CHECKPOINTS}")
    return 0


def _results(options: dict[str, Any]) -> Path:
    """The file of the table's results."""
    if options["results"] is not None:
        return Path(options["results"])
    return Path(result_files.folder() or options["output"]) / "flash_mnist.csv"


def _table(device: torch.device, options: dict[str, Any]) -> int:
    """Trains the cells that are not there yet, and prints the table."""
    results = _results(options)
    wanted = table1.cells(
        [TABLE_COLUMNS[name] for name in options["columns"] or TABLE_COLUMNS],
        options["cluster_sizes"] or table1.CLUSTER_SIZES,
        seeds=options["seeds"],
        epochs=options["epochs"],
        cnn_epochs=options["cnn_epochs"],
    )
    done = table1.read(results)
    left = sum(not table1.has(done, cell) for cell in wanted)
    click.echo(f"{len(wanted)} cells, {left} of them to train; results: {results}")
    if left:
        digits = load_digits(options["data"])
        if digits.name != "mnist":
            raise RunError(f"--table1 needs MNIST, there is only {digits.source}")
        recipe = Recipe(cnn_epochs=options["cnn_epochs"])
        echo_data(digits, recipe)
        prepared = prepare(digits, recipe)
        echo_frame_accuracy(prepared)
        table1.run(wanted, prepared, results, options["output"], device=device)
    click.echo("test accuracy in %, at the last epoch: mean and spread (standard deviation) of our runs")
    click.echo(table1.as_text(table1.table(results)))
    return 0


def _figures(device: torch.device, options: dict[str, Any]) -> int:
    """Draws what is there to be drawn."""
    folder: Path = options["figures_to"]
    output: Path = options["output"]
    epochs = table1.epochs_path(_results(options))
    drawn = []
    if epochs.is_file():
        rows = pd.read_csv(epochs)
        rows = rows[rows["cnn_epochs"] == options["cnn_epochs"]]
        if len(rows):
            drawn.append(figures.save(figures.accuracy_per_epoch(rows), folder / "figure4.png"))
    if not drawn:
        click.echo(f"no Figure 4: {epochs} has no epochs with a CNN of {options['cnn_epochs']} epoch(s)")
    if (output / CHECKPOINTS).is_dir():
        trained = load_run(output, "last")
        name, recipe = table1.read_recipe(output)
        digits = load_digits(options["data"])
        if digits.name != name:
            raise RunError(f"{output} was trained on {name}, the digits at hand are {digits.name}")
        prepared = prepare(digits, recipe)
        drawn.append(draw_test_video(trained.model.to(device), prepared, folder / "figure5.png"))
    else:
        click.echo(f"no Figure 5: {output} is not the folder of a run; --output names one")
    if not drawn:
        raise RunError("there is nothing to draw")
    click.echo(f"pictures: {', '.join(map(str, drawn))}")
    return 0


def _speed(device: torch.device, options: dict[str, Any]) -> int:
    """Trains with both clusters and prints how long they took."""
    _, line = speed.describe_backend(device)
    click.echo(f"torch {torch.__version__}, {torch.get_num_threads()} threads; {line}")
    recipe = _recipe(options)
    prepared = _prepared(options, recipe)
    size, seed = options["cluster_size"], options["seed"]
    config = authors_training(1, seed)
    torch.manual_seed(seed)
    model = table1.make_model("fc1", size, shift=True, num_classes=prepared.train.num_classes)
    comparison = speed.compare(model, prepared.train, config, device=device)
    click.echo(comparison.report())
    if options["results"] is not None:
        data = f"{prepared.digits}, {len(prepared.train)} videos"
        speed.record(options["results"], comparison, config, data=data, device=device)
        click.echo(f"results: {options['results']}")
    return 0 if comparison.agrees else 1
