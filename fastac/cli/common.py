"""What several commands share: options, and errors of the user's that need no traceback."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click
import torch

from fastac import _native, backends
from fastac.data.problems import DataProblemsError
from fastac.training import CheckpointError, RunLockedError, TrainingError, distributed
from fastac.training.run import RunError
from fastac.training.run_config import ConfigError

from . import EXIT_USAGE

Function = TypeVar("Function", bound=Callable[..., Any])

WRONG_ARGUMENT = (ValueError, TypeError)
"""For `user_errors` around what takes a user's values and checks them itself."""

run_argument = click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))


def device_option(function: Function) -> Function:
    """``--device``."""
    return click.option(
        "--device",
        metavar="NAME",
        callback=lambda context, parameter, name: choose_device(name),
        help="cpu, cuda, cuda:1, ...; CUDA if there is one.",
    )(function)


def features_option(function: Function) -> Function:
    """``--features``."""
    return click.option(
        "--features",
        type=click.Path(exists=True, path_type=Path),
        help="Folder or HDF5 file; that of the training unless given.",
    )(function)


def checkpoint_option(function: Function) -> Function:
    """``--checkpoint``."""
    return click.option(
        "--checkpoint",
        "which",
        type=click.Choice(["best", "last"]),
        default="best",
        show_default=True,
        help="Which checkpoint of the run.",
    )(function)


def threads_option(function: Function) -> Function:
    """``--threads``."""
    return click.option(
        "--threads",
        type=click.IntRange(min=1),
        expose_value=False,
        callback=lambda context, parameter, threads: _use_threads(threads),
        help="Threads of torch; as torch chooses unless given.",
    )(function)


def _use_threads(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)


class UsageFailure(click.ClickException):
    """A wrong configuration: exit status 2, without the usage line of a wrong option."""

    exit_code = EXIT_USAGE


@contextmanager
def user_errors(*also: type[Exception]) -> Iterator[None]:
    """Turns errors that a user can mend into a message; all others stay bugs, with their traceback.

    A user can mend a wrong configuration, data, run or checkpoint, a disk, a package that is not installed,
    and a lack of memory on a device.

    Args:
        also: more, such as `WRONG_ARGUMENT` where the user's values are checked.
    """
    expected: tuple[type[Exception], ...]
    expected = (
        RunError,
        RunLockedError,
        CheckpointError,
        TrainingError,
        DataProblemsError,
        ImportError,
        *also,
    )
    try:
        yield
    except click.ClickException:
        raise
    except (ConfigError, backends.BackendError) as error:
        raise UsageFailure(str(error)) from error
    except BrokenPipeError:
        raise
    except OSError as error:
        raise click.ClickException(_os_error(error)) from error
    except torch.cuda.OutOfMemoryError as error:
        raise click.ClickException(
            f"{error}\nA smaller training.batch_size or a larger training.accumulation needs less memory; "
            "evaluation and prediction do with a smaller training.evaluation_batch_size."
        ) from error
    except expected as error:
        raise click.ClickException(str(error)) from error


@contextmanager
def os_errors_at(path: str | Path) -> Iterator[None]:
    """Names what was written to in errors of the operating system that do not, as of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def _os_error(error: OSError) -> str:
    if error.filename is None or error.strerror is None:
        return str(error)
    return f"{os.fspath(error.filename)}: {error.strerror}"


def check_writable(path: Path, option: str) -> None:
    """Whether files can be made in a folder that may not be there yet; before hours of work, not after.

    Raises:
        BadParameter: naming the option.
    """
    above = path.absolute()
    while not os.path.lexists(above):
        above = above.parent
    if not above.is_dir():
        raise click.BadParameter(f"must lie in a folder, {above} is none", param_hint=option)
    if not os.access(above, os.W_OK | os.X_OK):
        raise click.BadParameter(
            f"must lie in a folder that can be written to, got {above}", param_hint=option
        )


def check_picture(path: Path) -> None:
    """Whether a picture can be written to ``path``: its folder and its suffix.

    Raises:
        BadParameter: it cannot.
    """
    from fastac import figures

    check_writable(path.parent, "--output")
    if path.suffix.removeprefix(".").lower() not in figures.formats():
        known = ", ".join(f".{suffix}" for suffix in figures.formats())
        raise click.BadParameter(f"must end in one of {known}, got {path}", param_hint="--output")


def check_one_process(command: str) -> None:
    """Raises UsageFailure where torchrun started several processes."""
    count = os.environ.get("WORLD_SIZE", "1")
    if count != "1":
        raise UsageFailure(
            f"fastac {command} must run in one process, got {count}: start it without torchrun"
        )


def check_environment(device: torch.device) -> None:
    """Raises UsageFailure where FASTAC_BACKEND or FASTAC_CPU_ISA asks for what cannot be had on a device."""
    asked = backends.current
    try:
        reason = None if asked is None else backends.why_not(asked, torch.empty(0, 0, 1, device=device))
    except ValueError as error:
        raise UsageFailure(f"FASTAC_BACKEND: {error}") from error
    if reason is not None:
        raise UsageFailure(f"FASTAC_BACKEND: backend {asked!r} cannot be used: {reason}")
    if device.type == "cpu" and asked in (None, "cpu") and _native.available:
        try:
            _native.isa()
        except RuntimeError as error:
            raise UsageFailure(str(error).partition("\n")[0]) from error


def choose_device(name: str | None) -> torch.device:
    """The device of ``--device``, on which the backend and the instruction set asked for can be used."""
    try:
        device = distributed.choose_device(name)
        if device.type == "meta":
            raise ValueError(f"device must be one that computes, got {name!r}")
        torch.empty(0, device=device)
    # What torch says of a device that it knows by name but was not built for has no common base class.
    except (ValueError, RuntimeError, NotImplementedError, AssertionError) as error:
        raise click.BadParameter(str(error).partition("\n")[0], param_hint="--device") from error
    check_environment(device)
    return device


def print_metrics(metrics: Mapping[str, float], *, err: bool = False) -> None:
    """One metric per line, to standard output or error; shares in %."""
    for name, value in metrics.items():
        text = f"{value:.4f}" if name == "loss" else f"{100 * value:.2f} %"
        click.echo(f"{name:10s} {text}", err=err)


def as_json(content: Mapping[str, Any]) -> str:
    """JSON; null for NaN, which it does not have."""
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in content.items()}
    return json.dumps(plain, indent=1, ensure_ascii=False)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON, making the folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(as_json(content) + "\n", encoding="utf-8")
