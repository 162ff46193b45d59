"""``fastac show``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
import torch

from fastac import figures
from fastac.data.feature_sets import FeatureSetDataset
from fastac.training.run import Run, RunError, load_run, open_like_training

from . import common

DRAWN = 4
"""Videos in a picture unless some are named."""


@click.command("show")
@common.run_argument
@common.features_option
@click.option(
    "--video",
    "names",
    multiple=True,
    metavar="NAME",
    help=f"A video to draw; may be repeated.  [first {DRAWN}]",
)
@click.option(
    "--output",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="The picture; its suffix (.png, .pdf, .svg, ...) decides the format.",
)
@common.checkpoint_option
@common.device_option
@common.threads_option
def command(
    run: Path, features: Path | None, names: tuple[str, ...], output: Path, which: str, device: torch.device
) -> None:
    """Draw the attention weights of the most concentrated units of a trained classifier.

    RUN is the folder of a run of fastac train. Every video has a row, every modality a column. In a panel the
    columns are local features, such as frames, and the rows are attention units (of the bi-LSTM's attention:
    the features it weighs); blue is a weight of 0, red of 1.

    \b
    fastac show runs/first --output attention.png
    fastac show runs/first --video clip7 --video clip9 --output two.pdf
    """
    common.check_one_process("show")
    common.check_picture(output)
    with common.user_errors():
        trained = load_run(run, which)
        with common.user_errors(*common.WRONG_ARGUMENT):
            data = open_like_training(trained, features, None, check="none")
        numbers = {name: number for number, name in enumerate(data.names)}
        missing = [name for name in names if name not in numbers]
        if missing:
            raise click.BadParameter(
                f"must be one of {len(data):,} videos such as {', '.join(data.names[:3])}, "
                f"got {', '.join(missing)}",
                param_hint="--video",
            )
        trained.model.to(device)
        draw_videos(trained, data, [numbers[name] for name in names], output, device)
    click.echo(f"picture: {output}")


@torch.no_grad()
def draw_videos(
    run: Run, data: FeatureSetDataset, numbers: Sequence[int], output: Path, device: torch.device
) -> None:
    """The attention maps of some videos, each with the most probable class.

    Args:
        run: the trained model.
        data: the videos.
        numbers: which of them; if there are none, the first four that have any features.
        output: the picture.
        device: where the model is.

    Raises:
        RunError: a video of ``numbers``, or every one, has no usable features; the model has no attention.
    """
    if not run.model.has_attention:
        raise RunError(f"{run.directory}: its model has no attention weights to draw")
    drawn = []
    for number in numbers or range(len(data)):
        video = data[number]
        if not any(len(x) for x in video.features.values()):
            if numbers:
                raise RunError(f"video {video.name} has no usable features")
            continue
        batch = data.collate([video]).to(device)
        probability, best = run.model.probabilities(run.model(**batch.inputs())).max(dim=1)
        name = f"{video.name}: {run.class_names[int(best)]} ({float(probability):.0%})"
        weights = run.model.attention(**batch.inputs())
        drawn.append((name, {modality: w.float().cpu().numpy() for modality, w in weights.items()}))
        if not numbers and len(drawn) == DRAWN:
            break
    if not drawn:
        raise RunError(f"none of the {len(data):,} videos has usable features")
    with common.os_errors_at(output):
        figures.save(figures.attention_maps(drawn, rows=run.model.attention_rows), output)
