"""Checkpoints that are whole or not there, whenever the process is killed.

    epoch-0007/model.safetensors    parameters and buffers
               optimizer.pt         state of the optimizer
               state.json           what else the run was at
               best                 link to the best checkpoint so far: another folder, or this one
    last                            link to epoch-0007
    best                            link to last/best

A folder is written under another name, flushed to disk and renamed. Then `last` is replaced, in one step, and
with it `best`: no moment has one without the other. What neither names is removed.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.pt", "state.json"
LAST, BEST = "last", "best"

_NAMED = 3
"""An error names this many differences and counts the rest."""


class CheckpointError(RuntimeError):
    """A checkpoint is not there, cannot be read or does not fit the model."""


def save(
    directory: Path,
    epoch: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    *,
    best: bool,
) -> Path:
    """Writes the checkpoint of ``epoch``, points ``last`` (and ``best``) to it and removes what is obsolete.

    Args:
        directory: where the checkpoints of a run are.
        epoch: epochs done.
        model, optimizer: whose states are kept.
        state: more, as JSON can hold it.
        best: whether ``best`` is this one from now on; the first one is in any case.

    Raises:
        CheckpointError: ``last`` or ``best`` is of this epoch already.
        OSError: it cannot be written; what was there stays.
    """
    directory.mkdir(parents=True, exist_ok=True)
    final = directory / f"epoch-{epoch:04d}"
    temporary = directory / f".{final.name}.part"
    previous = _best(directory)
    if final in (previous, _target(directory / LAST)):
        raise CheckpointError(f"{final} is in use: go back to it, or take another folder")
    for folder in (temporary, final):  # of a run that was killed
        shutil.rmtree(folder, ignore_errors=True)
    temporary.mkdir()
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    # Through bytes: the libraries' own writing reports a full disk as an error of theirs.
    content = safetensors.torch.save(tensors, metadata={"epoch": str(epoch)})
    (temporary / MODEL).write_bytes(content)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    (temporary / OPTIMIZER).write_bytes(buffer.getbuffer())
    (temporary / STATE).write_text(json.dumps({"epoch": epoch, **state}, indent=1) + "\n", encoding="utf-8")
    (temporary / BEST).symlink_to("." if best or previous is None else f"../{previous.name}")
    for name in (MODEL, OPTIMIZER, STATE, "."):
        _flush(temporary / name)
    temporary.rename(final)
    _flush(directory)
    _point(directory / BEST, f"{LAST}/{BEST}")  # leads nowhere until last does
    _point(directory / LAST, final.name)
    _flush(directory)
    kept = (final, _best(directory))
    for folder in directory.glob("epoch-*"):
        if folder not in kept:
            shutil.rmtree(folder, ignore_errors=True)
    return final


def exists(directory: Path, which: str = LAST) -> bool:
    """Whether ``directory`` has a checkpoint ``which``, be it a damaged one."""
    return os.path.lexists(directory / which)


def check_links(directory: Path) -> None:
    """Whether `save` can go on in ``directory``.

    Raises:
        CheckpointError: ``last`` or ``best`` is no link, as in a copy that followed them.
    """
    for link in (directory / LAST, directory / BEST):
        if os.path.lexists(link) and not link.is_symlink():
            raise CheckpointError(
                f"{link} must be a symbolic link to go on from, it is none: copy the run with its links, "
                "as cp -a does"
            )


def read_state(directory: Path, which: str = LAST) -> dict[str, Any]:
    """What `save` was given as ``state``, and ``epoch``.

    Raises:
        CheckpointError: there is none, or it is not JSON with an epoch.
    """
    path = directory / which / STATE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(state, dict) or not isinstance(state.get("epoch"), int):
        raise CheckpointError(f"{path} cannot be read: it must be a mapping with an epoch")
    return state


def load_model(directory: Path, model: nn.Module, which: str = LAST) -> None:
    """Gives ``model`` the parameters and buffers of a checkpoint.

    Raises:
        CheckpointError: it cannot be read, or names or shapes differ.
    """
    path = directory / which / MODEL
    try:
        tensors = safetensors.torch.load_file(path)
    except Exception as error:  # safetensors' errors share no base class
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        differences = _differences(tensors, model.state_dict()) or str(error)
        raise CheckpointError(f"{path} is of another model: {differences}") from error


def load_optimizer(directory: Path, optimizer: torch.optim.Optimizer, which: str = LAST) -> None:
    """Gives ``optimizer`` the state of a checkpoint, its learning rate and other settings included.

    Raises:
        CheckpointError: it cannot be read or is for another number of parameters.
    """
    path = directory / which / OPTIMIZER
    try:
        # Read to the CPU, as the checkpoint may be of another device; it goes where the parameters are.
        optimizer.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch.load raises whatever the bytes lead it to
        raise CheckpointError(f"{path} cannot be loaded: {error}") from error


def _differences(saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """How two state dicts differ, in short."""

    def listed(what: str, names: list[str]) -> list[str]:
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        return [f"{what} {', '.join(names[:_NAMED])}{more}"] if names else []

    shapes = [
        f"{name} {tuple(saved[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in saved and saved[name].shape != own[name].shape
    ]
    return "; ".join(
        listed("it lacks", [name for name in own if name not in saved])
        + listed("it has also", [name for name in saved if name not in own])
        + listed("it has", shapes)
    )


def _target(link: Path) -> Path | None:
    """The folder beside a link that it leads to, or None."""
    return link.with_name(link.resolve().name) if link.exists() else None


def _best(directory: Path) -> Path | None:
    """The best checkpoint, which the last one knows, or None."""
    inner = directory / LAST / BEST
    return directory / inner.resolve().name if inner.exists() else None


def _point(link: Path, target: str) -> None:
    if link.is_symlink() and os.readlink(link) == target:
        return
    temporary = link.with_name(f".{link.name}.part")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, link)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
