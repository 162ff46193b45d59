"""`MemoryStorage`: features that are read once and then stay in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .storage import Float32Array, Select, Storage, Video


class MemoryStorage(Storage):
    """Another storage, whose entries are kept as float32 once they were read whole.

    What was kept before worker processes are forked is shared with them; a check that reads everything
    (`FeatureSetDataset` with check="full") keeps everything. A pickle takes the kept features along.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._kept: dict[tuple[str, str], Float32Array] = {}
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
        """Opens one of `videos`, without touching its files where all of it is kept."""
        modalities = self._modalities.get(video)
        if modalities is not None and all((video, modality) in self._kept for modality in modalities):
            yield _KeptVideo(video, modalities, self._kept, None)
            return
        with self._storage.open(video) as opened:
            self._modalities[video] = opened.modalities
            yield _KeptVideo(video, opened.modalities, self._kept, opened)

    def close(self) -> None:
        """Closes the storage's files; what is kept stays."""
        self._storage.close()


class _KeptVideo(Video):
    def __init__(
        self,
        name: str,
        modalities: tuple[str, ...],
        kept: dict[tuple[str, str], Float32Array],
        opened: Video | None,
    ) -> None:
        super().__init__(modalities)
        self._name, self._kept, self._opened = name, kept, opened

    def where(self, modality: str) -> str:
        """The entry's file, or that it is in memory."""
        return "in memory" if self._opened is None else self._opened.where(modality)

    def shape(self, modality: str) -> tuple[int, int]:
        """(L, M)."""
        kept = self._kept.get((self._name, modality))
        if kept is not None:
            return kept.shape[0], kept.shape[1]
        assert self._opened is not None
        return self._opened.shape(modality)

    def read(self, modality: str, select: Select | None = None) -> Float32Array:
        """A copy of the features, or of the rows that ``select`` names; the first time all are read."""
        kept = self._kept.get((self._name, modality))
        if kept is None:
            assert self._opened is not None
            kept = self._kept[self._name, modality] = self._opened.read(modality)
        rows: Float32Array = kept.copy() if select is None else kept[select(len(kept))]
        return rows
