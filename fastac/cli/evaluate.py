"""``fastac eval``."""

from __future__ import annotations

from pathlib import Path

import click
import torch

from fastac.training import evaluate
from fastac.training.run import load_run, open_like_training

from . import common


@click.command("eval")
@common.run_argument
@common.features_option
@click.option(
    "--labels",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="CSV file; that of the training unless given.",
)
@click.option(
    "--split",
    metavar="NAME",
    help="Split to evaluate on. Unless given, the run's validation split, or with --labels all rows.",
)
@click.option(
    "--json",
    "json_path",
    type=click.Path(dir_okay=False, allow_dash=True),
    help="Write the metrics here, too; - is standard output, and the text goes to standard error.",
)
@common.checkpoint_option
@common.device_option
@common.threads_option
def command(
    run: Path,
    features: Path | None,
    labels: Path | None,
    split: str | None,
    json_path: str | None,
    which: str,
    device: torch.device,
) -> None:
    """Evaluate a trained classifier: loss and accuracy, or average precision for several labels a video.

    RUN is the folder of a run of fastac train. Broken features are named on standard error and count as
    absent; a video without any others is left out.

    \b
    fastac eval runs/first
    fastac eval runs/first --features other --labels other.csv --json other.json
    """
    common.check_one_process("eval")
    to_stdout = json_path == "-"
    if json_path is not None and not to_stdout:
        common.check_writable(Path(json_path).parent, "--json")
    with common.user_errors():
        trained = load_run(run, which)
        if labels is None:
            if trained.config is None:
                raise click.ClickException(f"{run} was not trained by fastac train: --labels is needed")
            labels = trained.config.data.labels
            split = split or trained.config.data.validation_split
        with common.user_errors(*common.WRONG_ARGUMENT):
            data = open_like_training(trained, features, labels, split=split)
        metrics = evaluate(
            trained.model.to(device), data, device=device, show_progress=True, **trained.evaluation
        )
        epoch = trained.state["epoch"]
        rows = "all videos" if split is None else f"split {split}"
        click.echo(
            f"{rows} of {labels}: {len(data):,} videos; {which} checkpoint (epoch {epoch})", err=to_stdout
        )
        common.print_metrics(metrics, err=to_stdout)
        content = {"videos": len(data), "epoch": epoch, **metrics}
        if to_stdout:
            with common.os_errors_at("standard output"):
                click.echo(common.as_json(content))
        elif json_path is not None:
            common.write_json(Path(json_path), content)
    if data.problems:
        click.echo(f"{len(data.problems):,} problems with the features, see above", err=True)
