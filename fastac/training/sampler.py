"""Which videos make which batch: the same for any number of processes and pieces."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler


def mixed_seed(*parts: int) -> int:
    """One 63-bit seed from several numbers; near ones, if they are as many, give unrelated seeds."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


class BatchSampler(Sampler[list[int]]):
    """One process's share of every piece of every batch.

    A batch of ``batch_size`` videos is cut into ``pieces``, a piece into one share per process. Shares differ
    in size by one video at most and may be empty in the last batch. Order depends on (seed, epoch) alone.

    Args:
        count: videos in the data set.
        batch_size: videos in a batch, over all processes.
        shuffle: a new random order each epoch; else ascending.
        seed: of the order.
        pieces: parts of a batch that are computed one after the other.
        rank, world_size: this process, and how many there are.

    Raises:
        ValueError: batch_size is below 1.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        *,
        shuffle: bool,
        seed: int = 0,
        pieces: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {batch_size}")
        self._count, self._batch_size, self._shuffle, self._seed = count, batch_size, shuffle, seed
        self._pieces, self._rank, self._world_size = pieces, rank, world_size
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next pass."""
        self._epoch = epoch

    def batch_sizes(self) -> list[int]:
        """Videos in each batch, over all processes."""
        full, rest = divmod(self._count, self._batch_size)
        return [self._batch_size] * full + ([rest] if rest else [])

    def __len__(self) -> int:
        return len(self.batch_sizes()) * self._pieces

    def __iter__(self) -> Iterator[list[int]]:
        if self._shuffle:
            generator = torch.Generator().manual_seed(mixed_seed(self._seed, self._epoch))
            order = torch.randperm(self._count, generator=generator).numpy()
        else:
            order = np.arange(self._count)
        first = 0
        for size in self.batch_sizes():
            for number in range(self._pieces):
                start, stop = _part(size, self._pieces, number)
                share_start, share_stop = _part(stop - start, self._world_size, self._rank)
                yield order[first + start + share_start : first + start + share_stop].tolist()
            first += size


def _part(count: int, parts: int, number: int) -> tuple[int, int]:
    """Where part ``number`` of ``count`` things lies, as `torch.tensor_split` cuts: longer parts first."""
    length, longer = divmod(count, parts)
    start = number * length + min(number, longer)
    return start, start + length + (number < longer)
