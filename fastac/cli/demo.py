"""``fastac demo``."""

from __future__ import annotations

import time
from pathlib import Path

import click
import torch

from fastac.data.mnist import cache_dir
from fastac.experiments import speed, table1
from fastac.experiments.flash_mnist import Recipe, authors_training, draw_test_video, prepare
from fastac.training import Trainer

from . import common
from .flash_mnist import data_options, echo_data, echo_frame_accuracy, load_digits

CLUSTER_SIZE = 64
ROUNDS, STEPS = 6, 20
"""Of the comparison with plain torch."""


@click.command("demo")
@click.option(
    "--epochs",
    type=click.IntRange(min=1),
    default=20,
    show_default=True,
    help="Epochs of the attention cluster.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0, max=2**32 - 1),
    default=1,
    show_default=True,
    help="Of data, initial values and dropout.",
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("flash_mnist.png"),
    show_default=True,
    help="Where the picture goes; its suffix (.png, .pdf, .svg, ...) decides the format.",
)
@data_options(train_videos=20, test_videos=5)
@common.threads_option
def command(
    epochs: int,
    seed: int,
    output: Path,
    data: str,
    train_videos: int,
    test_videos: int,
    cnn_frames: int,
    no_cache: bool,
) -> int:
    """Train an attention cluster on a reduced Flash-MNIST and draw what its units attend to.

    In a few minutes on two cores: trains the paper's frame CNN on digits in noise (Long et al., CVPR 2018),
    then 64 attention units with shift on its features through the fused operator, compares that with plain
    torch step by step, and draws the units' weights under the frames of one test video. The exit status is 1
    if the two do not agree.
    """
    common.check_one_process("demo")
    common.choose_device(None)
    common.check_picture(output)
    with common.user_errors():
        return _demo(
            Recipe(train_videos, test_videos, cnn_frames, seed=seed),
            data,
            epochs=epochs,
            output=output,
            use_cache=not no_cache,
        )


def _demo(recipe: Recipe, data: str, *, epochs: int, output: Path, use_cache: bool) -> int:
    started = time.perf_counter()
    click.echo(f"fastac demo: Flash-MNIST, torch {torch.__version__}, {torch.get_num_threads()} threads")
    _, line = speed.describe_backend()
    click.echo(line)
    digits = load_digits(data)
    echo_data(digits, recipe)
    prepared = prepare(digits, recipe, use_cache=use_cache)
    echo_frame_accuracy(prepared)
    if use_cache:
        click.echo(f"cache of the features: {cache_dir()} (--no-cache does without)")

    torch.manual_seed(recipe.seed)
    model = table1.make_model("fc1", CLUSTER_SIZE, shift=True, num_classes=prepared.train.num_classes)
    config = authors_training(epochs, recipe.seed)
    initial = type(model).from_config(model.config)
    initial.load_state_dict(model.state_dict())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    click.echo(
        f"training {CLUSTER_SIZE} attention units with shift and the last layer ({parameters:,} parameters)"
    )
    epochs_done = Trainer(model, prepared.train, prepared.test, config).fit()
    comparison = speed.compare(initial, prepared.train, config, rounds=ROUNDS, steps=STEPS)
    picture = draw_test_video(model, prepared, output)
    click.echo(comparison.report())
    click.echo("\nsummary")
    accuracy = epochs_done[-1].values["validation_accuracy"]
    size = "a reduced set" if recipe.reduced else "a full set"
    click.echo(f"  test accuracy         {accuracy:.1%} (chance {1 / prepared.test.num_classes:.2%}; {size})")
    click.echo(f"  frame accuracy (CNN)  {prepared.frame_accuracy:.1%}")
    click.echo(
        f"  speed, cluster alone  {comparison.cluster.ratio:.2f} x plain torch "
        f"(whole step {comparison.step.ratio:.2f} x)"
    )
    click.echo(f"  picture               {picture.resolve()}")
    click.echo(f"  time                  {time.perf_counter() - started:.0f} s")
    return 0 if comparison.agrees else 1
