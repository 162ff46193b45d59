"""Checkpoints that are whole or not there, whenever the process is killed.

A checkpoint is a folder ``epoch-0007`` with ``model.safetensors`` (parameters and buffers), ``optimizer.pt``
and ``state.json``. It is written under another name, flushed to disk and renamed. ``last`` and ``best`` are
symbolic links, each replaced in one step; what neither names is removed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.pt", "state.json"
LAST, BEST = "last", "best"


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
        best: whether ``best`` is this one from now on.
    """
    directory.mkdir(parents=True, exist_ok=True)
    final = directory / f"epoch-{epoch:04d}"
    temporary = directory / f".{final.name}.part"
    for folder in (temporary, final):  # of a run that was killed, or of the one that this repeats
        shutil.rmtree(folder, ignore_errors=True)
    temporary.mkdir()
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(tensors, temporary / MODEL, metadata={"epoch": str(epoch)})
    torch.save(optimizer.state_dict(), temporary / OPTIMIZER)
    (temporary / STATE).write_text(json.dumps({"epoch": epoch, **state}, indent=1) + "\n")
    for path in (*temporary.iterdir(), temporary):
        _flush(path)
    temporary.rename(final)
    for link in (LAST, BEST) if best else (LAST,):
        _point(directory / link, final.name)
    _flush(directory)
    kept = {os.readlink(directory / link) for link in (LAST, BEST) if (directory / link).is_symlink()}
    for folder in directory.glob("epoch-*"):
        if folder.name not in kept:
            shutil.rmtree(folder, ignore_errors=True)
    return final


def exists(directory: Path, which: str = LAST) -> bool:
    """Whether ``directory`` has a checkpoint ``which``."""
    return (directory / which / STATE).is_file()


def read_state(directory: Path, which: str = LAST) -> dict[str, Any]:
    """What `save` was given as ``state``, and ``epoch``.

    Raises:
        CheckpointError: there is none, or it is not JSON.
    """
    path = directory / which / STATE
    try:
        state: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return state


def load_model(directory: Path, model: nn.Module, which: str = LAST) -> None:
    """Gives ``model`` the parameters and buffers of a checkpoint.

    Raises:
        CheckpointError: it cannot be read, or names or shapes differ.
    """
    path = directory / which / MODEL
    try:
        model.load_state_dict(safetensors.torch.load_file(path))
    except Exception as error:  # safetensors' errors share no base class
        raise CheckpointError(f"{path} cannot be loaded: {error}") from error


def load_optimizer(directory: Path, optimizer: torch.optim.Optimizer, which: str = LAST) -> None:
    """Gives ``optimizer`` the state of a checkpoint.

    Raises:
        CheckpointError: it cannot be read or belongs to another optimizer.
    """
    path = directory / which / OPTIMIZER
    try:
        optimizer.load_state_dict(torch.load(path, weights_only=True))
    except Exception as error:  # torch.load raises whatever the bytes lead it to
        raise CheckpointError(f"{path} cannot be loaded: {error}") from error


def _point(link: Path, target: str) -> None:
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
