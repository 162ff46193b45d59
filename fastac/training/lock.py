"""Locks on files, by which processes keep out of each other's folders.

The operating system holds a lock (flock) for as long as the file is open in the process that took it:
whatever ends the process ends the lock. The file itself stays, empty.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path

logger = logging.getLogger("fastac")

LOCK = "training.lock"
"""What a process that trains in the folder of a run has locked there."""

_files: set[TextIOWrapper] = set()
"""Those that `alone` has open."""


class RunLockedError(RuntimeError):
    """Another process trains in the folder of a run."""


@contextmanager
def alone(path: Path, *, required: bool = True) -> Iterator[bool]:
    """Whether no other process has locked a file; if so this one has it locked while the block runs.

    The file and its folder are made if need be. A process that has locked it is in its own way, too.

    Args:
        path: the file.
        required: whether a file system without locks is an error; else that is only said in the log.

    Raises:
        OSError: the file cannot be made, or a lock is required and the file system has none.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        _files.add(file)
        try:
            yield _taken(file, fcntl.LOCK_EX, required=required)
        finally:
            _files.discard(file)


@contextmanager
def training_in(directory: Path) -> Iterator[None]:
    """Keeps other processes from training in the folder of a run while the block runs.

    Raises:
        RunLockedError: another one trains there.
        OSError: the folder cannot be made or written to.
    """
    with alone(directory / LOCK, required=False) as is_alone:
        if not is_alone:
            raise _locked(directory)
        yield


def check_unlocked(directory: Path) -> None:
    """Whether nobody trains in the folder of a run at the moment; makes and changes nothing.

    Raises:
        RunLockedError: a process does.
    """
    try:
        with (directory / LOCK).open() as file:
            free = _taken(file, fcntl.LOCK_SH)  # shared: any number of processes may ask at once
    except OSError:  # no file or no locks: `training_in` deals with both
        return
    if not free:
        raise _locked(directory)


def _taken(file: TextIOWrapper, operation: int, *, required: bool = True) -> bool:
    """Whether the lock could be had."""
    try:
        fcntl.flock(file, operation | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # what flock and SMB's emulation of it say of a locked file
        return False
    except OSError as error:
        if required:
            raise OSError(error.errno, error.strerror, file.name) from error
        logger.warning(
            "%s cannot be locked (%s): nothing keeps other processes from training there, too",
            file.name,
            error.strerror,
        )
    return True


def _locked(directory: Path) -> RunLockedError:
    return RunLockedError(
        f"another process trains in {directory}: wait until it ends, or choose another folder"
    )


def _close_in_child() -> None:
    """A worker of a data loader that outlives its process by seconds must not keep the lock so long."""
    for file in _files:
        file.close()
    _files.clear()


os.register_at_fork(after_in_child=_close_in_child)
