"""Which videos make which batch: the same for any number of processes and pieces."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler


def mixed_seed(*parts: int) -> int:
    """One 63-bit seed from several numbers; near ones give unrelated seeds."""
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
            order = torch.randperm(self._count, generator=generator)
        else:
            order = torch.arange(self._count)
        if not self._count:
            return
        for batch in order.split(self._batch_size):
            for piece in batch.tensor_split(self._pieces):
                yield piece.tensor_split(self._world_size)[self._rank].tolist()
