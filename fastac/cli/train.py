"""``fastac train``."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import click
import pandas as pd
import torch

from fastac import figures
from fastac.data.feature_sets import FeatureSetDataset
from fastac.data.problems import Problem
from fastac.models import VideoClassifier
from fastac.training import Trainer, checkpoint, distributed, evaluate
from fastac.training.lock import check_unlocked
from fastac.training.run import (
    CHECKPOINTS,
    CONFIG,
    PROBLEMS,
    RunError,
    check_data,
    check_model,
    check_settings,
    initial_model,
    is_run,
    load_run,
    open_data,
    problems_of,
    save_problems,
    save_run,
)
from fastac.training.run_config import RunConfig, load, template

from . import common
from .show import draw_videos

logger = logging.getLogger("fastac")


def _print_template(context: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked:
        click.echo(template(), nl=False)
        context.exit()


@click.command("train")
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A YAML file of settings; paths in it are relative to its folder.",
)
@click.option(
    "--output", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder of the run."
)
@click.option(
    "--resume",
    is_flag=True,
    help="Go on with the run in the folder, with its settings; start it if there is none, but settings are.",
)
@click.option(
    "--print-config",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_template,
    help="Print every setting with its default and meaning, as YAML, and stop.",
)
@common.device_option
@common.threads_option
@click.argument("settings", nargs=-1, metavar="[NAME=VALUE]...")
def command(
    config: Path | None, output: Path, resume: bool, device: torch.device, settings: tuple[str, ...]
) -> None:
    """Train a classifier on features on disk, evaluate it and draw what it looks at.

    The classifier is that of the attention clusters unless model.system says otherwise.

    \b
    fastac train data.features=features data.labels=labels.csv \\
        --output runs/first

    trains with the paper's settings (its section 5.4) on a folder of features and a CSV file of labels.

    Features are files MODALITY/VIDEO.npy, files VIDEO.npz with an array per modality, or one HDF5 file with
    data sets VIDEO/MODALITY or MODALITY/VIDEO. An array is (local features, dimension). Videos may differ in
    their number of local features and may lack modalities.

    Labels are a CSV file with the columns video, label and split, which is "train" or "validation". Without a
    validation split: data.validation_split=null, and without a column split data.train_split=null, too.

    Settings come from --config and from NAME=VALUE, which wins. --print-config lists all of them. Some:

    \b
    training.epochs=30                    passes over the training set
    model.cluster.cluster_size=64         attention units per modality
    model.clusters.audio.cluster_size=32  those of one modality
    model.system=attention-boosted-lstm   another system; --print-config has all
    data.train_features=20                local features drawn per video
    data.multi_label=true                 several labels a video: a;b

    The folder then has config.yaml, metrics.csv, curves.png, attention.png, evaluation.json, events for
    TensorBoard, problems.csv (broken features, if any) and checkpoints: one is made per epoch, the best and
    the last are kept. A run that was interrupted, or killed, goes on where its last epoch ended; a finished
    one does with more epochs:

    \b
    fastac train --resume --output runs/first
    fastac train --resume --output runs/first training.epochs=200

    Several processes share each batch, one GPU a process if there are any:

    \b
    torchrun --nproc-per-node 4 -m fastac train ...
    """
    common.check_writable(output, "--output")
    try:
        with common.user_errors(), common.os_errors_at(output):
            run_config = _read_config(config, output, settings, resume=resume)
            with distributed.process_group(device) as processes:
                _train(run_config, output, resume=resume, device=device, processes=processes)
    except KeyboardInterrupt:
        if checkpoint.exists(output / CHECKPOINTS):
            click.echo(f"\nto go on: fastac train --resume --output {output}", err=True)
        raise


def _read_config(config: Path | None, output: Path, settings: tuple[str, ...], *, resume: bool) -> RunConfig:
    """The settings; those of the run in the folder if it goes on and no file is given."""
    check_unlocked(output)  # `Trainer.lock` decides, but not before the data have been read
    _check_folder(output, resume=resume)
    if not resume or config is not None:
        return load(config, settings)
    if (output / CONFIG).is_file():
        return load(output / CONFIG, settings)
    if not settings:
        raise RunError(f"--resume must find a run in the folder of --output, there is no {output / CONFIG}")
    return load(None, settings)


def _check_folder(output: Path, config: RunConfig | None = None, *, resume: bool) -> None:
    """Whether the folder is new, or has the run that is to go on, with these settings."""
    if not is_run(output):
        return
    if not resume:
        raise RunError(f"{output} holds a run already: go on with it by --resume, or choose another folder")
    if config is not None:
        check_settings(output, config)


def _train(
    config: RunConfig, output: Path, *, resume: bool, device: torch.device, processes: distributed.Processes
) -> None:
    _check_folder(output, config, resume=resume)
    level = logger.level
    if not processes.first:
        logger.setLevel(logging.ERROR)  # the first one says what is wrong with the data
    with common.user_errors(*common.WRONG_ARGUMENT):
        train, validation = open_data(config)
        model = initial_model(config, train)
    if not processes.first:
        logger.setLevel(logging.WARNING)
    try:
        trainer = Trainer(model, train, validation, config.training, directory=output, device=device)
        with trainer.lock():
            _check_folder(output, config, resume=resume)  # again: another process may have been here
            _start(config, output, model, train, validation, processes)
            if trainer.resume():
                logger.info("going on after epoch %d of %d", trainer.epoch, config.training.epochs)
            with _problems_saved(output, train, validation, processes):
                trainer.fit()
                _conclude(output, validation or train, device, processes, validated=validation is not None)
    finally:
        logger.setLevel(level)


def _start(
    config: RunConfig,
    output: Path,
    model: VideoClassifier,
    train: FeatureSetDataset,
    validation: FeatureSetDataset | None,
    processes: distributed.Processes,
) -> None:
    """Checks that the folder's run, if any, is of the same model and data; writes what `load_run` reads."""
    check_model(output, model, train.class_names)
    check_data(output, train)
    processes.barrier()  # the first one writes when all have looked
    if not processes.first:
        return
    save_run(output, model, train.class_names, config, train)
    problems = problems_of(train, validation)
    save_problems(output, problems)
    if problems:
        logger.warning(
            "%s problems with the features are listed in %s", f"{len(problems):,}", output / PROBLEMS
        )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    modalities = ", ".join(f"{name} ({dimension})" for name, dimension in train.modalities.items())
    others = "no validation" if validation is None else f"{len(validation):,} for validation"
    logger.info("%s videos for training, %s; %s classes", f"{len(train):,}", others, f"{train.num_classes:,}")
    logger.info("modalities: %s; %s parameters", modalities, f"{parameters:,}")


@contextmanager
def _problems_saved(
    output: Path,
    train: FeatureSetDataset,
    validation: FeatureSetDataset | None,
    processes: distributed.Processes,
) -> Iterator[None]:
    """Adds entries that break inside to problems.csv; after an exception only those this process knows of."""
    before = problems_of(train, validation)
    gathered: list[list[Problem]] = []
    try:
        yield
        gathered = processes.gather(problems_of(train, validation))
    finally:
        problems = list(dict.fromkeys([*before, *chain(*gathered), *problems_of(train, validation)]))
        if processes.first and len(problems) > len(before):
            save_problems(output, problems)
            later = len(problems) - len(before)
            logger.warning(
                "%s entries that broke in training are in %s, too", f"{later:,}", output / PROBLEMS
            )


def _conclude(
    output: Path,
    data: FeatureSetDataset,
    device: torch.device,
    processes: distributed.Processes,
    *,
    validated: bool,
) -> None:
    """Evaluates the best checkpoint and draws the pictures."""
    run = load_run(output, checkpoint.BEST)
    model = run.model.to(device)
    evaluation = evaluate(model, data, device=device, **run.evaluation) if validated else {}
    if not processes.first:
        return
    if validated:
        click.echo(f"best checkpoint (epoch {run.state['epoch']}) on the validation set:")
        common.print_metrics(evaluation)
        common.write_json(output / "evaluation.json", {"epoch": run.state["epoch"], **evaluation})
    metrics = pd.read_csv(output / "metrics.csv")
    figures.save(figures.training_curves(metrics), output / "curves.png")
    if run.model.has_attention:
        draw_videos(run, data, [], output / "attention.png", device)
        click.echo(f"the run is in {output}: look at curves.png and attention.png")
    else:
        click.echo(f"the run is in {output}: look at curves.png; its model has no attention weights to draw")
