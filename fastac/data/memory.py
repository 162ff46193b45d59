"""`MemoryStorage`: features that are read once and then stay in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache

from .storage import Float32Array, Select, Storage, Video


class MemoryStorage(Storage):
    """Another storage, whose entries are kept as float32 once they were read whole.

    What was kept before worker processes are forked is shared with them; a check that reads everything
    (`FeatureSetDataset` with check="full") keeps everything. A pickle takes the kept features along.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._kept: dict[tuple[str, str], tuple[Float32Array, str]] = {}  # the features and where they were
        self._modalities: dict[str, tuple[str, ...]] = {}
        self.path = storage.path
        self.layout = storage.layout

    @property
    def videos(self) -> list[str]:
        """The names of all videos, sorted."""
        return self._storage.videos

    @property
    def modalities(self) -> list[str] | None:
        """The names of all modalities, sorted, or None if only the videos' files know them."""
        return self._storage.modalities

    @contextmanager
    def open(self, video: str) -> Iterator[Video]:
        """Opens one of `videos`; its files only when something that is not kept is asked for."""
        with ExitStack() as files:
            opened = cache(lambda: files.enter_context(self._storage.open(video)))
            if video not in self._modalities:
                self._modalities[video] = opened().modalities
            yield _KeptVideo(video, self._modalities[video], self._kept, opened)

    def close(self) -> None:
        """Closes the storage's files; what is kept stays."""
        self._storage.close()


class _KeptVideo(Video):
    def __init__(
        self,
        name: str,
        modalities: tuple[str, ...],
        kept: dict[tuple[str, str], tuple[Float32Array, str]],
        opened: Callable[[], Video],
    ) -> None:
        super().__init__(modalities)
        self._name, self._kept, self._opened = name, kept, opened

    def where(self, modality: str) -> str:
        """The entry's file, with its place in the file."""
        kept = self._kept.get((self._name, modality))
        return self._opened().where(modality) if kept is None else kept[1]

    def shape(self, modality: str) -> tuple[int, int]:
        """(L, M)."""
        kept = self._kept.get((self._name, modality))
        if kept is None:
            return self._opened().shape(modality)
        length, m = kept[0].shape
        return length, m

    def read(self, modality: str, select: Select | None = None) -> Float32Array:
        """A copy of the features, or of the rows that ``select`` names; the first time all are read."""
        kept = self._kept.get((self._name, modality))
        if kept is None:
            opened = self._opened()
            kept = self._kept[self._name, modality] = opened.read(modality), opened.where(modality)
        x = kept[0]
        rows: Float32Array = x.copy() if select is None else x[select(len(x))]
        return rows
