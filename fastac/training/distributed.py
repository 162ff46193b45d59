"""Several processes, started by ``torchrun``: who this one is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The group of processes, and which of them runs this; alone it is rank 0 of 1."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def barrier(self) -> None:
        """Waits for all processes."""
        if self.world_size > 1:
            dist.barrier()

    def gather(self, value: T) -> list[T]:
        """What each process gives, by rank; it must be possible to pickle it."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values


def current() -> Processes:
    """The processes of the group that is open now."""
    if not (dist.is_available() and dist.is_initialized()):
        return Processes()
    return Processes(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def process_group(device: torch.device) -> Iterator[Processes]:
    """Joins the group that ``torchrun`` describes in the environment; alone there is nothing to join.

    Processes speak by NCCL on CUDA, else by gloo. One that leaves with an exception must end: the others wait
    for it until it does.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield current()
        return
    if device.type == "cuda":
        dist.init_process_group("nccl", device_id=None if device.index is None else device)
    else:
        dist.init_process_group("gloo")
    yield current()
    # Not after an exception: closing the group may wait for processes that wait for this one.
    dist.destroy_process_group()


def choose_device(name: str | None = None) -> torch.device:
    """The device asked for, else CUDA where torch has one, else the CPU; with ``torchrun`` one GPU a process.

    Raises:
        ValueError: torch does not know the device or it is not there.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"device must be one that torch knows, such as cpu or cuda, got {name!r}") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device must be one of this machine, got {name!r}: torch sees no CUDA device")
        if device.index is None:
            device = torch.device("cuda", local_rank)
        if device.index >= torch.cuda.device_count():
            raise ValueError(
                f"device must be one of this machine's {torch.cuda.device_count()} CUDA devices, got {device}"
            )
        torch.cuda.set_device(device)
    return device
