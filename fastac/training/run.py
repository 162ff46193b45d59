"""A run's folder: its configuration, its model, its classes; made by training, read by the other commands.

config.yaml     all settings
model.json      system, classes, and what `from_config` of the system's class takes
problems.csv    what was wrong with the features, if anything was
metrics.csv     one row per epoch
checkpoints/    `last` and `best`, see `fastac.training.checkpoint`
tensorboard/    events
training.lock   empty; who trains here has it locked, see `fastac.training.lock`
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastac.data.feature_sets import FeatureSetDataset
from fastac.data.labels import encode_labels, read_labels
from fastac.data.problems import DataProblemsError, Problem, write_problems
from fastac.data.sampling import EqualIntervals, RandomSampling, Sampling
from fastac.data.storage import Storage, check_there, open_storage
from fastac.models import VideoClassifier

from . import checkpoint
from .config import TrainingConfig
from .engine import MAY_CHANGE
from .run_config import ConfigError, RunConfig, dump, load
from .systems import MODELS, system_of

CONFIG, MODEL, PROBLEMS, CHECKPOINTS = "config.yaml", "model.json", "problems.csv", "checkpoints"


class RunError(RuntimeError):
    """A folder is not what a command needs: no run, or another run than the one asked for."""


@dataclass
class Run:
    """A trained model and what it was trained on.

    Attributes:
        directory: of the run.
        model: in eval mode, with the parameters of the checkpoint asked for.
        class_names: the C classes.
        config: the settings, or None for a run that is not of `fastac train`.
        state: what the checkpoint says of itself: ``epoch``, ``values``.
    """

    directory: Path
    model: VideoClassifier
    class_names: list[str]
    config: RunConfig | None
    state: dict[str, Any]

    @property
    def modalities(self) -> dict[str, int]:
        """The dimension M of each modality."""
        return self.model.dimensions

    @property
    def evaluation(self) -> dict[str, Any]:
        """Arguments of `fastac.training.evaluate` and `predict`: what the run itself was evaluated with."""
        training = TrainingConfig() if self.config is None else self.config.training
        return {
            "batch_size": training.evaluation_batch_size,
            "workers": training.workers,
            "precision": training.precision,
        }


def initial_model(config: RunConfig, train: FeatureSetDataset) -> VideoClassifier:
    """The untrained model of a configuration, drawn from its seed.

    Raises:
        ValueError: data that the system cannot take.
    """
    torch.manual_seed(config.training.seed)
    return config.model.build(train)


def open_data(config: RunConfig) -> tuple[FeatureSetDataset, FeatureSetDataset | None]:
    """The training and the validation set of a configuration.

    Raises:
        fastac.data.DataProblemsError: data that cannot be used, with all that is wrong in both sets.
        OSError, ImportError, TypeError, ValueError: as `fastac.data.FeatureSetDataset`.
    """
    data = config.data
    storage = _open_features(config)
    common: dict[str, Any] = {
        "class_names": data.class_names,
        "multi_label": data.multi_label,
        "seed": config.training.seed,
        "on_error": data.on_error,
        "check": data.check,
        "in_memory": data.in_memory,
    }
    errors: dict[str, Exception] = {}
    train = validation = None
    modalities: Sequence[str] | Mapping[str, int] | None = data.modalities
    with _collected(errors, "training"):
        train = FeatureSetDataset(
            storage,
            data.labels,
            split=data.train_split,
            modalities=modalities,
            sampling=_sampling(RandomSampling, data.train_features),
            **common,
        )
    if data.validation_split is not None:
        modalities = getattr(errors.get("training", train), "modalities", None) or modalities
        with _collected(errors, "validation"):
            validation = FeatureSetDataset(
                copy.copy(storage),  # each closes its own files
                data.labels,
                split=data.validation_split,
                modalities=modalities,
                sampling=_sampling(EqualIntervals, data.test_features),
                **common,
            )
    _raise_all(errors)
    assert train is not None
    return train, validation


def _open_features(config: RunConfig) -> Storage:
    """The features, none of them read; labels and names of modalities are checked. Raises: as `open_data`."""
    data = config.data
    errors: dict[str, Exception] = {}
    table = None
    with _collected(errors, "labels"):
        table = read_labels(data.labels)
    if table is None:
        with _collected(errors, "features"):
            check_there(data.features)
        _raise_all(errors)
    assert table is not None
    splits = {"training": data.train_split}
    if data.validation_split is not None:
        splits["validation"] = data.validation_split
    for name, split in splits.items():
        with _collected(errors, name):
            encode_labels(
                table, table.rows(split), class_names=data.class_names, multi_label=data.multi_label
            )
    storage = None
    with _collected(errors, "features"):
        storage = open_storage(
            data.features, expected_modalities=data.modalities or (), expected_videos=table.videos
        )
        _check_names(config, data.modalities or storage.modalities or ())
    _raise_all(errors)
    assert storage is not None
    return storage


def _check_names(config: RunConfig, modalities: Sequence[str]) -> None:
    """Raises: ValueError, all settings by modality that name an unknown one; if any modality is known."""
    settings = {
        "data.train_features": config.data.train_features,
        "data.test_features": config.data.test_features,
        "model.clusters": getattr(config.model, "clusters", None),
    }
    wrong = [
        f"{name} must be of the data's modalities {', '.join(modalities)}, got {', '.join(unknown)}"
        for name, value in settings.items()
        if isinstance(value, dict) and (unknown := sorted(value.keys() - set(modalities)))
    ]
    if modalities and wrong:
        raise ValueError("\n".join(wrong))


@contextmanager
def _collected(errors: dict[str, Exception], of: str) -> Iterator[None]:
    """What is wrong with the data is kept for `_raise_all`."""
    try:
        yield
    except (OSError, ValueError) as error:
        errors[of] = error


def _raise_all(errors: Mapping[str, Exception]) -> None:
    """Raises the error, or all of them as one DataProblemsError, if there are any."""
    different: dict[str, str] = {}
    for of, error in errors.items():
        different.setdefault(str(error), of)
    if len(different) == 1:
        raise next(iter(errors.values()))
    if different:
        problems = [problem for error in errors.values() for problem in getattr(error, "problems", ())]
        message = "\n".join(f"{of}: {text}" for text, of in different.items())
        raise DataProblemsError(message, list(dict.fromkeys(problems)))


def open_like_training(
    run: Run, features: Path | None, labels: Path | None, *, split: str | None = None, check: str = "full"
) -> FeatureSetDataset:
    """Other features for a trained model: the modalities, dimensions, classes and test sampling of its run.

    Args:
        run: the trained model.
        features: a folder or file; that of the training unless given.
        labels: a CSV file, or None for features without labels.
        split: the split to take.
        check: as for `fastac.data.FeatureSetDataset`.

    Raises:
        fastac.data.DataProblemsError: data that cannot be used.
        RunError: no features given, and the run has none, or they are not where they were.
        OSError, ImportError, TypeError, ValueError: as `fastac.data.FeatureSetDataset`.
    """
    data = None if run.config is None else run.config.data
    if features is None:
        if data is None:
            raise RunError(f"{run.directory} was not trained by fastac train: say where the features are")
        features = data.features
        if not features.exists():
            raise RunError(
                f"the features of the training are not at {features} any more: --features must say where"
            )
    return FeatureSetDataset(
        features,
        labels,
        split=split,
        modalities=run.modalities,
        class_names=run.class_names if labels is not None else None,
        multi_label=run.model.multi_label,
        sampling=None if data is None else _sampling(EqualIntervals, data.test_features),
        check=check,
    )


def save_run(
    directory: Path,
    model: VideoClassifier,
    class_names: list[str],
    config: RunConfig | None,
    train: FeatureSetDataset | None = None,
) -> None:
    """Writes config.yaml and model.json, by which `load_run` makes the model again.

    Args:
        directory: of the run.
        model, class_names, config: as `Run` has them.
        train: the training set, for `check_data`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if config is not None:
        write_whole(directory / CONFIG, dump(config))
    description = {"system": system_of(model), "class_names": class_names, "model": model.config}
    if train is not None:
        description["training_set"] = _fingerprint(train)
    write_whole(directory / MODEL, json.dumps(description, indent=1, ensure_ascii=False) + "\n")


def problems_of(*data: FeatureSetDataset | None) -> list[Problem]:
    """What is wrong with some data, each problem once."""
    return list(dict.fromkeys(p for d in data if d is not None for p in d.problems))


def save_problems(directory: Path, problems: Sequence[Problem]) -> None:
    """Writes what is wrong with the data to problems.csv; no file if nothing is."""
    path = directory / PROBLEMS
    if problems:
        write_problems(problems, path)
    else:
        path.unlink(missing_ok=True)


def is_run(directory: Path) -> bool:
    """Whether a folder has a run; it may be of another command, or killed before its first checkpoint."""
    return any(os.path.lexists(directory / name) for name in (CONFIG, MODEL, CHECKPOINTS))


def check_settings(directory: Path, config: RunConfig) -> None:
    """Whether the run in a folder may be resumed with these settings.

    Settings may differ in how long and how fast (`fastac.training.engine.MAY_CHANGE`) and in where the data
    are, as they may have been moved.

    Raises:
        RunError: it is not a run of fastac train, all settings that differ, or fewer epochs than are done.
        ConfigError: its configuration is damaged.
        CheckpointError: its last checkpoint is, or is no link.
    """
    if not (directory / CONFIG).is_file():
        raise RunError(f"{directory} has no {CONFIG}: it is not a run of fastac train")
    free = {"data.features", "data.labels", "data.in_memory", *(f"training.{name}" for name in MAY_CHANGE)}
    before, now = (_flat(c.model_dump(mode="json")) for c in (_load_config(directory), config))
    differing = [
        f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    fatal = [text for text in differing if text.partition(" ")[0] not in free]
    if fatal:
        raise RunError(f"{directory} was trained with other settings: {', '.join(fatal)}")
    checkpoints = directory / CHECKPOINTS
    if checkpoint.exists(checkpoints):
        checkpoint.check_links(checkpoints)
        done, asked = checkpoint.read_state(checkpoints)["epoch"], config.training.epochs
        if asked < done:
            raise RunError(
                f"training.epochs may only be raised: {directory} is at epoch {done} already, got {asked}"
            )


def check_model(directory: Path, model: VideoClassifier, class_names: list[str]) -> None:
    """Whether the run in a folder has the same model and classes, which the data decide, too.

    Raises:
        RunError: it does not.
    """
    if not (directory / MODEL).is_file():  # killed before it was written
        return
    description = _read_description(directory)
    if description["class_names"] != class_names:
        raise RunError(
            f"{directory} was trained with other classes: they were {_some(description['class_names'])}, "
            f"are {_some(class_names)}"
        )
    if description["model"] != json.loads(json.dumps(model.config)):
        raise RunError(
            f"{directory} was trained with another model: it was {description['model']}, is {model.config}"
        )


def check_data(directory: Path, train: FeatureSetDataset) -> None:
    """Whether the run in a folder was trained on the same videos, labels and modalities, in the same order.

    The contents of the features are not looked at. A run whose model.json does not tell is not refused.

    Raises:
        RunError: it was not.
    """
    if not (directory / MODEL).is_file():  # killed before it was written
        return
    before, now = _read_description(directory).get("training_set"), _fingerprint(train)
    if before is None or before == now:
        return
    count = before.get("videos") if isinstance(before, dict) else None
    difference = "their names, labels, modalities or order differ"
    if count != now["videos"]:
        difference = f"it had {count} videos to train on, these are {now['videos']}"
    raise RunError(f"{directory} was trained on other data: {difference}")


def _fingerprint(train: FeatureSetDataset) -> dict[str, Any]:
    """What is the same for the same training set."""
    labels = None if train.labels is None else train.labels.tolist()
    content = json.dumps([train.names, labels, train.modalities, train.missing])
    return {"videos": len(train), "sha256": hashlib.sha256(content.encode()).hexdigest()}


def load_run(directory: str | os.PathLike[str], which: str = checkpoint.BEST) -> Run:
    """A trained model from its folder, in eval mode.

    Args:
        directory: of the run.
        which: "best" or "last".

    Raises:
        RunError: the folder is not of a run, has no such checkpoint, or its model.json is damaged.
        ConfigError: its configuration is damaged.
        CheckpointError: the checkpoint is damaged.
        ValueError: another checkpoint than best or last.
    """
    if which not in (checkpoint.BEST, checkpoint.LAST):
        raise ValueError(f"which must be {checkpoint.BEST} or {checkpoint.LAST}, got {which!r}")
    directory = Path(directory)
    description = _read_description(directory)
    try:
        model = MODELS[description["system"]].from_config(description["model"])
    except (TypeError, ValueError) as error:
        raise RunError(f"{directory / MODEL} describes no model: {error}") from error
    names = description["class_names"]
    if len(names) != model.num_classes:
        raise RunError(
            f"{directory / MODEL} must name the {model.num_classes} classes of its model, got {len(names)}"
        )
    checkpoints = directory / CHECKPOINTS
    if not checkpoint.exists(checkpoints, which):
        raise RunError(f"{directory} has no {which} checkpoint: no epoch of its training was completed")
    state = checkpoint.read_state(checkpoints, which)
    checkpoint.load_model(checkpoints, model, which)
    config = _load_config(directory) if (directory / CONFIG).is_file() else None
    return Run(directory, model.eval(), names, config, state)


def _load_config(directory: Path) -> RunConfig:
    try:
        return load(directory / CONFIG)
    except ConfigError as error:
        raise ConfigError(f"{directory / CONFIG} is damaged: {error}") from error


def _read_description(directory: Path) -> dict[str, Any]:
    """model.json, its parts present and of the right types. Raises: RunError."""
    path = directory / MODEL
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunError(f"{directory} must be the folder of a run, it has no {MODEL}") from error
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error
    found = description.get("system") if isinstance(description, dict) else description
    if not isinstance(description, dict) or not isinstance(found, str) or found not in MODELS:
        raise RunError(f"{path} must describe one of the systems {', '.join(MODELS)}, got {found!r}")
    names = description.get("class_names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RunError(f"{path} must have class_names, a list of names, got {names!r}")
    if not isinstance(description.get("model"), dict):
        raise RunError(f"{path} must have model, a mapping, got {description.get('model')!r}")
    return description


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 10:,} more" if len(names) > 10 else ""
    return f"{', '.join(names[:10])}{more}"


def _sampling(
    kind: type[RandomSampling] | type[EqualIntervals], count: int | dict[str, int] | None
) -> Sampling | dict[str, Sampling] | None:
    if count is None:
        return None
    if isinstance(count, int):
        return kind(count)
    return {modality: kind(k) for modality, k in count.items()}


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def write_whole(path: Path, text: str) -> None:
    """Writes a text file that is the old one or the new one, whenever the process is killed."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
