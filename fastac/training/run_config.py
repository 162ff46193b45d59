"""The configuration of a run: data, model, training; from YAML and from ``name=value`` on the command line.

Everything wrong with it is reported at once, each with its name, what it must be and what it was.
"""

from __future__ import annotations

import io
import os
import textwrap
import types
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, Field, ValidationError, field_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from .config import Settings, Switch, TrainingConfig
from .systems import MODELS, AttentionBoostedLSTMSettings, AttentionClusterSettings, PositiveInt, System

WIDTH, COMMENT_COLUMN = 80, 33
"""Of the template: where its lines end and where the comments begin."""


_WORDS = {
    "be true or false": "be a valid boolean",
    "be an integer": "be a valid integer",
    "be a number": "be a valid number",
    "be text": "be a valid string",
    "be a list": "be a valid list",
}
"""A user's words, and pydantic's."""


LONGEST = 80
"""Characters of a value in a message."""

DEFAULT_SYSTEM = "attention-cluster"


class ConfigError(ValueError):
    """The configuration cannot be read or is not valid; the message lists everything that is wrong."""


class DataConfig(Settings):
    """Where features and labels are, and which of them are used (`fastac.data.FeatureSetDataset`)."""

    features: Path = Field(description="folder of .npy or .npz files, or one HDF5 file")
    labels: Path = Field(
        description="CSV file with the columns video, label and, if there are several, split"
    )
    train_split: str | None = Field(default="train", description="value of split to train on; null: all rows")
    validation_split: str | None = Field(
        default="validation", description="value of split to evaluate on; null: no evaluation"
    )
    modalities: list[str] | None = Field(
        default=None, description="modalities to use, in this order; null: all"
    )
    class_names: list[str] | None = Field(
        default=None, description="classes in their order; null: those of the training labels"
    )
    multi_label: Switch = Field(
        default=False, description="a label may name several classes, separated by ; or |"
    )
    train_features: PositiveInt | dict[str, PositiveInt] | None = Field(
        default=None,
        description="features drawn at random per video in training, one number or by modality; null: all",
    )
    test_features: PositiveInt | dict[str, PositiveInt] | None = Field(
        default=None, description="features at equal intervals per video in testing, likewise"
    )
    check: Literal["full", "shapes", "none"] = Field(
        default="full", description="what is looked at before training: every value, shapes, nothing"
    )
    in_memory: Switch = Field(False, description="keep all features in memory, as float32")
    on_error: Literal["report", "raise"] = Field(
        default="report", description="broken features: list them and go on without, or stop"
    )

    @field_validator("features", "labels")
    @classmethod
    def _absolute(cls, path: Path) -> Path:
        """A run may be continued and evaluated from any folder, and when that of the YAML file is gone."""
        path = Path(os.path.expanduser(path)).absolute()
        return path.resolve() if ".." in path.parts else path


class RunConfig(Settings):
    """All settings of `fastac train`."""

    data: DataConfig
    model: Annotated[System, Field(discriminator="system")] = AttentionClusterSettings()
    training: TrainingConfig = TrainingConfig()


def load(path: Path | None, overrides: Iterable[str] = ()) -> RunConfig:
    """Reads a YAML file and replaces single values by ``name.of.setting=value``.

    The value is YAML too; for a setting that is text, such as a path, whatever is no text in YAML is taken as
    it stands. Relative paths of the file are relative to its folder, those of overrides to the current one.

    Raises:
        ConfigError: unreadable, unknown names or values out of range; all of them in one message.
    """
    content: dict[str, Any] = {}
    if path is not None:
        content = _parse(_read(path), str(path))
        data = content.get("data")
        if isinstance(data, dict):
            for name in ("features", "labels"):
                if isinstance(data.get(name), str):
                    data[name] = str(path.parent / os.path.expanduser(data[name]))
    for override in overrides:
        _replace(content, override)
    return validate(content)


def validate(content: Mapping[str, Any]) -> RunConfig:
    """The configuration of a plain mapping.

    Raises:
        ConfigError: everything that is wrong with it.
    """
    content = _without_empty({"data": {}, **content}, RunConfig)  # with data: so that what it needs is named
    model = content.get("model")
    if isinstance(model, Mapping) and "system" not in model:
        content["model"] = {"system": DEFAULT_SYSTEM, **model}
    try:
        config = RunConfig.model_validate(content)
    except ValidationError as error:
        problems: dict[tuple[str, str], list[str]] = {}
        for problem in error.errors():
            name, message, got = _describe(problem, content)
            messages = problems.setdefault((name, got), [])
            if message not in messages:
                messages.append(message)
        names = [name for name, _ in problems]
        lines = [
            f"{name} {_joined(messages)}{got}"
            for (name, got), messages in problems.items()
            # What is wrong with a mapping's entries says more than that it is no integer either.
            if not any(other.startswith(f"{name}.") for other in names)
        ]
        raise ConfigError("\n".join(sorted(lines))) from None
    _check_sampling(config)
    return config


def _check_sampling(config: RunConfig) -> None:
    """A sequence has one length: of other numbers of frames some would be cut off in one of the two."""
    train, test = config.data.train_features, config.data.test_features
    if isinstance(config.model, AttentionBoostedLSTMSettings) and train != test:
        raise ConfigError(
            f"data.test_features must be data.train_features for {config.model.system}, "
            f"got {_shown(test)} and {_shown(train)}"
        )


def dump(config: RunConfig) -> str:
    """The whole configuration as YAML; `load` reads the same back."""
    return _to_yaml(config.model_dump(mode="json"))


def template() -> str:
    """Every setting with its default and meaning, as YAML to start from, in lines of at most 80 columns."""
    return "\n".join(_commented(RunConfig)) + "\n"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def _parse(text: str, where: str) -> dict[str, Any]:
    content = _parse_value(text, where)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{where} must be a mapping from names to settings, got {_shown(content)}")
    return content


def _parse_value(text: str, where: str) -> Any:
    """YAML 1.2: 1e-3 is a number, and no is a word."""
    try:
        return YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        raise ConfigError(f"{where} is not YAML: {_yaml_error(error)}") from error
    # The constructors say of a date that there is not, a name that is a list and the like what Python says.
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise ConfigError(f"{where} is not YAML: {type(error).__name__}: {error}") from error


def _yaml_error(error: YAMLError) -> str:
    """What is wrong, with the line and column, without the parser's advice to programmers."""
    mark = getattr(error, "problem_mark", None)
    parts = [getattr(error, "context", None), getattr(error, "problem", None)]
    text = ": ".join(" ".join(part.split()) for part in parts if part) or " ".join(str(error).split())
    return text if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: {text}"


def _replace(content: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    parts = name.split(".")
    if not equals or not all(parts):
        raise ConfigError(f"an override must be name.of.setting=value, got {override!r}")
    value = _text_value(text) if _is_text(parts) else _parse_value(text, f"the value of {override!r}")
    inner = content
    for part in parts[:-1]:
        if inner.get(part) is None:
            inner[part] = {}
        inner = inner[part]
        if not isinstance(inner, dict):
            raise ConfigError(f"{override!r}: {part} has no settings below it, it is {_shown(inner)}")
    inner[parts[-1]] = value


def _is_text(parts: list[str]) -> bool:
    """Whether a setting is a path or a text, which may be null."""
    above, name = parts[:-1], parts[-1]
    models: list[type[BaseModel]] = [RunConfig]
    for part in above:
        models = [m for model in models for m in _members(_annotation(model, part))]
    annotations = [_annotation(model, name) for model in models]
    return any(
        {Path, str} & {*(get_args(a) if get_origin(a) in (Union, types.UnionType) else (a,))}
        for a in annotations
    )


def _text_value(text: str) -> str | None:
    """A text in quotes or without; 007, 1.0 and [x are texts too. null and nothing are None."""
    try:
        value = _parse_value(text, "")
    except ConfigError:
        return text
    return value if value is None or isinstance(value, str) else text


def _without_empty(content: Mapping[str, Any], *models: type[BaseModel]) -> dict[str, Any]:
    """The content with an empty mapping for a section that has nothing below it.

    Args:
        content: of a section.
        models: what it may be.
    """
    result = dict(content)
    for name, value in content.items():
        annotations = [_annotation(model, name) for model in models]
        sections = [m for annotation in annotations for m in _members(annotation)]
        if not sections and not any(get_origin(annotation) is dict for annotation in annotations):
            continue
        if value is None:
            result[name] = {}
        elif sections and isinstance(value, Mapping):
            result[name] = _without_empty(value, *sections)
    return result


def _describe(problem: Mapping[str, Any], content: Mapping[str, Any]) -> tuple[str, str, str]:
    """What pydantic found: the setting's name, what it must be, and ", got ..."."""
    kind = problem["type"]
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        got = content["model"].get("system")
        return "model.system", f"must be one of {', '.join(MODELS)}", f", got {_shown(got)}"
    location = _names(problem["loc"], content, added=kind in ("missing", "extra_forbidden"))
    name = ".".join(location) or "the configuration"
    if kind == "missing":
        return name, "is needed and not given", ""
    if kind == "extra_forbidden":
        return name, f"is unknown; known are {', '.join(_fields_at(location[:-1], content))}", ""
    message = problem["msg"]
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        message = "must be a mapping"
    elif kind == "path_type":
        message = "must be a path"
    elif kind == "invalid_key":
        message = "must have text as its name"
    for start in ("Input should ", "Input ", "List should "):
        if message.startswith(start):
            message = "must " + message.removeprefix(start)
            break
    message = message.partition(" after validation")[0]
    for ours, theirs in _WORDS.items():
        message = message.replace(theirs, ours)
    return name, message, f", got {_shown(problem['input'])}"


def _joined(messages: list[str]) -> str:
    """One sentence of what the members of a union say."""
    first, *others = messages
    return " or ".join([first, *(message.removeprefix("must ") for message in others)])


def _shown(value: Any) -> str:
    """A value as YAML writes it, in short."""
    if value is None or isinstance(value, bool):
        return _plain(value)
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def _names(location: Iterable[int | str], content: Any, *, added: bool) -> list[str]:
    """The part of pydantic's location that the user wrote; the rest names members of a union.

    The last one may not be in the content, if something is missing there (``added``).
    """
    names = []
    *above, last = location
    for part in above:
        is_name = isinstance(content, Mapping) and part in content
        if is_name or (isinstance(content, list) and isinstance(part, int)):
            content = content[part]
            names.append(str(part))
    if added or isinstance(last, int) or (isinstance(content, Mapping) and last in content):
        names.append(str(last))
    return names


def _fields_at(location: Iterable[str], content: Mapping[str, Any]) -> list[str]:
    """The names of the settings below a place in the configuration."""
    model: Any = RunConfig
    for part in location:
        inner = content.get(part)
        content = inner if isinstance(inner, Mapping) else {}
        if _is_settings(model) and part in model.model_fields:
            model = model.model_fields[part].annotation
            if get_origin(model) in (Union, types.UnionType):
                model = _chosen(_members(model), content.get("system", DEFAULT_SYSTEM))
        else:  # the name of a modality
            model = next((a for a in get_args(model) if _is_settings(a)), model)
    return list(model.model_fields) if _is_settings(model) else []


def _is_settings(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _annotation(model: type[BaseModel], name: str) -> Any:
    """The type of a setting, None if the model has no such."""
    field = model.model_fields.get(name)
    return None if field is None else field.annotation


def _members(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a setting may be: one, one of several, or none."""
    if _is_settings(annotation):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType):
        return [member for member in get_args(annotation) if _is_settings(member)]
    return []


def _chosen(members: Iterable[type[BaseModel]], system: object) -> type[BaseModel] | None:
    """The section of a system."""
    return next((m for m in members if m.model_fields["system"].default == system), None)


def _commented(model: type[BaseModel], depth: int = 0, width: int = WIDTH) -> Iterator[str]:
    for name, field in model.model_fields.items():
        start = "  " * depth + f"{name}:"
        comment = " ".join(filter(None, (field.description, "(needed)" if field.is_required() else None)))
        sections = _members(field.annotation)
        if sections:
            yield from _beside(start, comment, width)
            yield from _commented(sections[0], depth + 1, width)
            for other in sections[1:]:
                yield f"# or {name}:"
                yield from (f"# {line}" for line in _commented(other, depth + 1, width - 2))
            continue
        choices = _choices(field.annotation)
        if len(choices) > 1:
            comment += f" ({' | '.join(choices)})"
        value = f"<{name}>" if field.is_required() else _plain(field.get_default())
        yield from _beside(f"{start} {value}", comment, width)


def _beside(text: str, comment: str, width: int) -> Iterator[str]:
    """The text with a comment in a column of its own."""
    lines = textwrap.wrap(comment, width - COMMENT_COLUMN - 2, break_on_hyphens=False) or [""]
    for line in lines:
        yield f"{text:{COMMENT_COLUMN - 1}} # {line}".rstrip(" #")
        text = ""


def _plain(value: Any) -> str:
    """A default as YAML."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _choices(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in get_args(annotation)]
    if get_origin(annotation) in (Union, types.UnionType):
        return [choice for part in get_args(annotation) for choice in _choices(part)]
    return []


def _to_yaml(content: Any) -> str:
    yaml = YAML(typ="rt")
    yaml.default_flow_style = False
    yaml.width = 4096
    yaml.representer.add_representer(
        type(None), lambda representer, _: representer.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    stream = io.StringIO()
    yaml.dump(content, stream)
    return stream.getvalue()
