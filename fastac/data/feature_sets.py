"""`FeatureSetDataset`: features of videos on disk, several modalities, every set with its own length."""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .batch import FeatureBatch
from .labels import check_class_names, encode_labels, read_labels, unlabelled
from .memory import MemoryStorage
from .moments import Moments
from .problems import DataProblemsError, Problem, listing
from .progress import Progress
from .sampling import Sampling, sampling_generator, sampling_of
from .storage import EntryError, Float32Array, Select, Storage, Video, finite_sum, open_storage

logger = logging.getLogger("fastac")

ON_ERROR = ("report", "raise")
CHECKS = ("full", "shapes", "none")
_T = TypeVar("_T")


@dataclass
class FeatureSet:
    """One video.

    Attributes:
        name: its name in storage.
        features: by modality, ``(L, M)`` float32; ``(0, M)`` where the video lacks the modality.
        label: ``()`` int64, ``(C,)`` float32 for several labels, or None.
        index: its number in the data set.
    """

    name: str
    features: dict[str, Tensor]
    label: Tensor | None
    index: int


class FeatureSetDataset(Dataset[FeatureSet]):
    """Local features of videos from disk, with labels from a CSV file.

    Three layouts are recognised from what is there:

    - a directory with ``<modality>/<video>.npy``, each ``(L, M)``;
    - a directory with ``<video>.npz``, one ``(L, M)`` array per modality under the modality's name;
    - one HDF5 file with data sets ``<video>/<modality>`` or ``<modality>/<video>``, each ``(L, M)``
      (`fastac.data.storage.Hdf5Storage` says how the two are told apart).

    A video's name may have sub-folders, as in ``v/abc``. L differs from set to set, M is one number per
    modality. float16, float32, float64 and integers are accepted and given as float32.

    A video that merely lacks a modality is no problem: its set has no rows, and `missing` counts it. These
    are problems: an entry that cannot be read, is no number array, has another rank than 2, another M than
    most sets of its modality (the first met of equally many), no rows, or NaN or Inf in it (a float64 beyond
    float32's range included); a labelled video that is not in storage; a video without any usable modality.
    All are found before the first batch and listed in `problems`. With ``on_error="report"`` a broken entry
    counts as absent and a video without anything usable is left out. An entry that breaks later, in the
    middle of training, is absent while it stays broken, with one warning.

    Args:
        features: the directory or file, or a `Storage`.
        labels: a CSV file with the columns ``video``, ``label`` and, if it likes, ``split``
            (`fastac.data.labels.read_labels`); None takes every video in storage, without labels.
        split: take the videos of this split only.
        modalities: the names to use, in this order, or a mapping from name to M, such as the `modalities` of
            the training set; unless given, all that the videos taken have, sorted. A mapping's M is expected
            instead of what most sets have, and it may name a modality that no video has.
        class_names: the classes in order; unless given, those of the training labels, sorted
            (`fastac.data.labels.encode_labels`).
        multi_label: a video may have several labels, separated by ``;`` or ``|`` in its cell.
        sampling: which features of a set are used: a `Sampling` for all modalities or a mapping from modality
            to one or None; None, and a modality that the mapping leaves out, is everything.
        seed: of random sampling, >= 0.
        on_error: "report" lists problems and goes on; "raise" raises one error that lists all of them, and
            later one for an entry that breaks.
        check: "full" reads all data, "shapes" only the headers and sizes of files, "none" only what lists the
            videos, and one header per modality (of the first archive's modalities where nothing else names
            them). What a check leaves out is found when the entry is read.
        in_memory: keep every entry as float32 once it was read, with check="full" all of them.

    Attributes:
        modalities: M by name.
        names: the V videos, in the order of the CSV file or sorted.
        labels: ``(V,)`` int64, ``(V, C)`` float32 of zeros and ones with ``multi_label``, or None.
        num_classes, class_names: C and the names; 0 and [] without labels and class_names.
        missing: by modality, the videos that lack it (known after check "full" or "shapes").
        unlabelled: videos in storage that the CSV file does not name; they are not used.

    Raises:
        FileNotFoundError, OSError, ImportError: there are no features or labels, or they cannot be opened.
        TypeError, ValueError: an argument is wrong; labels and storage have no name in common.
        DataProblemsError: problems in the labels; with on_error="raise" problems in the features; no video is
            usable.
    """

    def __init__(
        self,
        features: str | os.PathLike[str] | Storage,
        labels: str | os.PathLike[str] | None = None,
        *,
        split: str | None = None,
        modalities: Sequence[str] | Mapping[str, int] | None = None,
        class_names: Sequence[str] | None = None,
        multi_label: bool = False,
        sampling: Sampling | Mapping[str, Sampling | None] | None = None,
        seed: int = 0,
        on_error: str = "report",
        check: str = "full",
        in_memory: bool = False,
    ) -> None:
        if on_error not in ON_ERROR:
            raise ValueError(f"on_error must be one of {', '.join(ON_ERROR)}, got {on_error!r}")
        if check not in CHECKS:
            raise ValueError(f"check must be one of {', '.join(CHECKS)}, got {check!r}")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed must be an int, got {type(seed).__name__}")
        if seed < 0:
            raise ValueError(f"seed must be >= 0, got {seed}")
        if labels is None and split is not None:
            raise ValueError(f"split {split!r} needs labels, a CSV file that says which videos it has")
        asked = _asked_modalities(modalities)
        table = None if labels is None else read_labels(labels)
        rows = [] if table is None else table.rows(split)
        names = [] if table is None else [table.videos[row] for row in rows]
        if not isinstance(features, Storage):
            features = open_storage(features, expected_modalities=asked or (), expected_videos=names)
        self.storage = MemoryStorage(features) if in_memory else features
        self.seed = seed
        self.on_error = on_error
        self.multi_label = bool(multi_label)
        self._problems: list[Problem] = []
        self._sums: dict[str, tuple[npt.NDArray[np.float64], int]] | None = None

        classes = None
        self.class_names: list[str] = [] if class_names is None else check_class_names(class_names)
        if table is not None:
            classes = encode_labels(table, rows, class_names=class_names, multi_label=multi_label)
            self.class_names = classes.names
        self.num_classes = len(self.class_names)

        stored = self.storage.videos
        if table is None:
            names = stored
        self._check_names(asked, sampling)
        self.unlabelled = unlabelled(self.storage, stored, table, names)
        there = set(stored)
        kept = [at for at, name in enumerate(names) if name in there]
        self._problems += [
            Problem(name, None, "missing", "labelled, but not in storage")
            for name in names
            if name not in there
        ]
        self.modalities: dict[str, int] = {}
        self.missing: dict[str, int] = {}
        self._present: npt.NDArray[np.bool_] | None = None  # (V, modalities): the entries that passed
        if check == "none":
            self.modalities = self._modalities_unchecked([names[at] for at in kept], asked)
        else:
            present = self._scan([names[at] for at in kept], asked, full=check == "full")
            usable: npt.NDArray[np.bool_] = np.asarray(present.any(axis=1))
            kept = [at for at, found in zip(kept, usable.tolist(), strict=True) if found]
            self._present = present[usable]
        self.names = [names[at] for at in kept]
        self.labels: Tensor | None = None if classes is None else classes.labels[kept]
        self._finish_checks()
        self._sampling = sampling_of(sampling, self.modalities)

        # Shared with worker processes. A cell of _failed only ever goes from 0 to 1.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._failed = torch.zeros(len(self.names), len(self.modalities), dtype=torch.uint8).share_memory_()
        self._reported: dict[tuple[int, str], Problem] = {}
        self._warned: set[str] = set()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._epoch.share_memory_()  # no copy where it came shared, to a worker process
        self._failed.share_memory_()

    def _check_names(self, asked: dict[str, int | None] | None, sampling: Any) -> None:
        """Finds names of modalities that cannot be right before any feature is read, if the storage knows."""
        there = self.storage.modalities
        if asked is not None and there:
            self._require(asked, dict.fromkeys(there, 0), there, [])
        if asked or there:
            sampling_of(sampling, asked or there or ())

    def _finish_checks(self) -> None:
        """Says what was found. Raises: DataProblemsError."""
        noun = "problem" if len(self._problems) == 1 else "problems"
        text = f"{self.storage.path} has {len(self._problems):,} {noun}:\n{listing(self._problems)}"
        if self._problems and self.on_error == "raise":
            raise DataProblemsError(text, self._problems, self.modalities)
        if not self.names or not self.modalities:
            reason = text if self._problems else f"{self.storage.path} has none"
            raise DataProblemsError(f"no video is usable: {reason}", self._problems, self.modalities)
        if self._problems:
            logger.warning("%s", text)
        if self.unlabelled:
            logger.info("%s has %s videos without labels", self.storage.path, f"{len(self.unlabelled):,}")
        for name, count in self.missing.items():
            if count == len(self):
                logger.warning("no video in %s has the modality %s", self.storage.path, name)
            elif count:
                logger.info("%s: %s of %s videos have no %s", self.storage.path, count, len(self), name)

    def _modalities_unchecked(
        self, names: Sequence[str], asked: dict[str, int | None] | None
    ) -> dict[str, int]:
        """M by modality, from the first entry of each with a usable header."""
        wanted = asked
        if wanted is None and self.storage.modalities is not None:
            wanted = dict.fromkeys(self.storage.modalities)
        found: dict[str, int] = {name: m for name, m in (wanted or {}).items() if m is not None}
        seen: set[str] = set()
        for video in names:
            if wanted is not None and len(found) == len(wanted):
                break
            try:
                with self.storage.open(video) as opened:
                    if wanted is None:  # the archives' own names, from the first that can be opened
                        wanted = dict.fromkeys(opened.modalities)
                    seen.update(opened.modalities)
                    for name in wanted.keys() & set(opened.modalities) - found.keys():
                        with suppress(EntryError):  # reported when it is read
                            found[name] = opened.shape(name)[1]
            except EntryError:
                continue  # reported when it is read
        self.storage.close()
        if asked is None:
            return {name: found[name] for name in wanted or () if name in found}
        self._require(asked, found, seen, self._problems)
        return {name: found[name] for name in asked}

    def _require(
        self,
        asked: dict[str, int | None],
        found: Mapping[str, int],
        seen: Iterable[str],
        problems: Sequence[Problem],
    ) -> None:
        """Raises: DataProblemsError if nothing tells M of a modality that was asked for."""
        lacking = [name for name, m in asked.items() if m is None and name not in found]
        if lacking:
            text = f":\n{listing(problems)}" if problems else ""
            there = ", ".join(sorted(set(self.storage.modalities or seen))) or "none"
            raise DataProblemsError(
                f"modalities must be some that the videos in {self.storage.path} have ({there}); there is no "
                f"usable entry of {', '.join(lacking)}{text}",
                problems,
            )

    def _scan(
        self, names: Sequence[str], asked: dict[str, int | None] | None, *, full: bool
    ) -> npt.NDArray[np.bool_]:
        """Looks at every entry and sets modalities, missing and _sums.

        Returns: (V, modalities), True for each entry that can be used.
        """
        dimensions: list[dict[str, int]] = []  # of the entries that are right by themselves
        failures: list[list[Problem]] = []
        sums: dict[tuple[str, int], npt.NDArray[np.float64]] = {}
        rows: Counter[tuple[str, int]] = Counter()
        counts: Counter[tuple[str, int]] = Counter()
        seen: set[str] = set()
        for video in _with_progress(names, "checking" if full else "checking shapes"):
            dimensions.append({})
            failures.append([])
            try:
                with self.storage.open(video) as opened:
                    seen.update(opened.modalities)
                    for name in opened.modalities:
                        if asked is not None and name not in asked:
                            continue
                        try:
                            if full:
                                x = opened.read(name)
                                total = finite_sum(x, opened.where(name))
                                length, m = x.shape
                            else:
                                length, m = opened.shape(name)
                        except EntryError as error:
                            failures[-1].append(_problem(video, name, error))
                            continue
                        dimensions[-1][name] = m
                        counts[name, m] += 1
                        if full:
                            rows[name, m] += length
                            sums[name, m] = sums[name, m] + total if (name, m) in sums else total
            except EntryError as error:
                failures[-1].append(_problem(video, None, error))
        usual: dict[str, int] = {}
        for (name, m), count in counts.items():
            if name not in usual or count > counts[name, usual[name]]:
                usual[name] = m
        if asked is not None:
            usual.update({name: m for name, m in asked.items() if m is not None})
            self._require(asked, usual, seen, self._problems + list(chain(*failures)))
        self.modalities = {name: usual[name] for name in (sorted(usual) if asked is None else asked)}
        self.missing = dict.fromkeys(self.modalities, 0)
        present = np.zeros((len(names), len(self.modalities)), dtype=np.bool_)
        for row, (video, found, failed) in enumerate(zip(names, dimensions, failures, strict=True)):
            for name, m in found.items():
                if m != usual[name]:
                    text = f"must have M = {usual[name]:,}, got {m:,}"
                    failed.append(Problem(video, name, "wrong dimension", text, self._where(video, name)))
            present[row] = [found.get(name) == m for name, m in self.modalities.items()]
            if not present[row].any():
                failed.append(Problem(video, None, "no usable modality", "the video is left out"))
            else:
                for name in self.modalities.keys() - found.keys() - {problem.modality for problem in failed}:
                    self.missing[name] += 1
            self._problems += failed
        self.storage.close()  # an HDF5 file must not be open where workers are forked
        if full:
            self._sums = {
                name: (sums.get((name, m), np.zeros(m)), rows[name, m]) for name, m in self.modalities.items()
            }
        return present

    def _where(self, video: str, modality: str) -> str:
        try:
            with self.storage.open(video) as opened:
                return opened.where(modality)
        except EntryError:
            return str(self.storage.path)

    @property
    def problems(self) -> list[Problem]:
        """All problems: those of the checks, then entries that broke since, in worker processes too.

        A worker process logs what it found; here its entry only has the names.
        """
        later = []
        for index, column in self._failed.nonzero().tolist():
            modality = list(self.modalities)[column]
            unknown = Problem(
                self.names[index], modality, "broke after the checks", "a worker process logged how"
            )
            later.append(self._reported.get((index, modality), unknown))
        return self._problems + later

    def set_epoch(self, epoch: int) -> None:
        """Draws other features from now on.

        Random sampling depends on the seed, the epoch, the video's number and the modality, and on nothing
        else. Worker processes that are kept alive see the new epoch too: call this between two passes.

        Raises: TypeError or ValueError if epoch is not an int >= 0.
        """
        if isinstance(epoch, bool) or not isinstance(epoch, int):
            raise TypeError(f"epoch must be an int, got {type(epoch).__name__}")
        if epoch < 0:
            raise ValueError(f"epoch must be >= 0, got {epoch}")
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        parts = [f"{len(self):,} videos", *(f"{name} {m:,}" for name, m in self.modalities.items())]
        if self.class_names:
            parts.append(f"{self.num_classes:,} classes")
        if self._problems:
            parts.append(f"{len(self._problems):,} problems")
        return f"{type(self).__name__}({', '.join(parts)})"

    def __getitem__(self, index: int) -> FeatureSet:
        """The video with this number, its features sampled.

        Raises: IndexError; with on_error="raise" DataProblemsError for an entry that cannot be used any more.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"index must be in 0...{len(self) - 1}, got {index}")
        index = int(index) % len(self)
        video = self.names[index]
        features = {name: torch.empty(0, m) for name, m in self.modalities.items()}
        expected = [
            name for at, name in enumerate(features) if self._present is None or self._present[index, at]
        ]
        try:
            with self.storage.open(video) as opened:
                for name in expected:
                    try:
                        if name in opened.modalities:
                            features[name] = torch.from_numpy(self._read(opened, index, name))
                        elif self._present is not None:
                            raise EntryError("gone", "it was there before", str(self.storage.path))
                    except EntryError as error:
                        self._broke(index, name, _problem(video, name, error))
        except EntryError as error:
            for name in expected:
                self._broke(index, name, _problem(video, name, error))
        label = None if self.labels is None else self.labels[index].clone()
        return FeatureSet(video, features, label, index)

    def _read(self, opened: Video, index: int, modality: str) -> Float32Array:
        sampling = self._sampling[modality]
        select: Select | None = None
        if sampling is not None:
            generator = sampling_generator(self.seed, int(self._epoch), index, modality)

            def select(length: int) -> npt.NDArray[np.int64]:
                return sampling.indices(length, generator)

        x = opened.read(modality, select)
        m = self.modalities[modality]
        if x.shape[1] != m:
            found = f"must have M = {m:,}, got {x.shape[1]:,}"
            raise EntryError("wrong dimension", found, opened.where(modality))
        if not np.isfinite(x).all():
            finite_sum(x, opened.where(modality))
        return x

    def _broke(self, index: int, modality: str, problem: Problem) -> None:
        """An entry broke after the checks. Raises: DataProblemsError with on_error="raise"."""
        if self.on_error == "raise":
            raise DataProblemsError(f"an entry broke after the checks: {problem}", [problem])
        column = list(self.modalities).index(modality)
        self._reported.setdefault((index, modality), problem)
        failed = self._failed.numpy()
        if failed[index, column]:
            return
        failed[index, column] = 1
        if problem.where in self._warned:  # one file with several entries
            return
        self._warned.add(problem.where)
        logger.warning("an entry broke after the checks and counts as absent: %s", problem)

    def collate(self, items: Sequence[FeatureSet]) -> FeatureBatch:
        """Packs B videos: the rows of each modality one set after the other, no padding.

        Each modality is there, with T = 0 if no video of the batch has it. For
        ``DataLoader(dataset, collate_fn=dataset.collate)``.
        """
        if not items:
            raise ValueError("items must hold at least one video, got none")
        batch = FeatureBatch(
            features={},
            labels=None if self.labels is None else torch.stack([_label(item) for item in items]),
            index=torch.tensor([item.index for item in items], dtype=torch.int64),
        )
        for name in self.modalities:
            sets = [item.features[name] for item in items]
            offsets = torch.zeros(len(sets) + 1, dtype=torch.int64)
            lengths = [len(x) for x in sets]
            torch.cumsum(torch.tensor(lengths), 0, out=offsets[1:])
            batch.features[name] = torch.cat(sets)
            batch.offsets[name] = offsets
            batch.max_length[name] = max(lengths)
        return batch

    def mean_features(self) -> dict[str, Tensor]:
        """By modality, the mean of all local features of the data set's videos, ``(M,)`` float32.

        Summed in float64, all features of each set and not a sample. The check "full" has it already;
        otherwise this reads all data, and broken entries are treated as in training.

        Raises: ValueError for a modality that no video has; DataProblemsError as `__getitem__`.
        """
        if self._sums is None:
            sums = {name: np.zeros(m) for name, m in self.modalities.items()}
            rows = dict.fromkeys(self.modalities, 0)
            for name, x in self._whole_sets("mean features"):
                sums[name] += x.sum(0, dtype=np.float64)
                rows[name] += len(x)
            self._sums = {name: (sums[name], rows[name]) for name in sums}
        absent = [name for name, (_, count) in self._sums.items() if not count]
        if absent:
            raise ValueError(f"no video has the modality {', '.join(absent)}: it has no mean feature")
        return {
            name: torch.from_numpy((total / n).astype(np.float32)) for name, (total, n) in self._sums.items()
        }

    def feature_moments(self) -> dict[str, tuple[Tensor, Tensor]]:
        """By modality, mean and standard deviation of all local features, ``(M,)`` float32 each.

        The deviation is 1 for a feature that never changes. Reads all data; broken entries are treated as in
        training.

        Raises: ValueError for a modality that no video has; DataProblemsError as `__getitem__`.
        """
        moments = {name: Moments(m) for name, m in self.modalities.items()}
        for name, x in self._whole_sets("mean and deviation of features"):
            moments[name].add(x)
        absent = [name for name, found in moments.items() if not found.count]
        if absent:
            raise ValueError(f"no video has the modality {', '.join(absent)}: its features have no moments")
        return {name: (found.mean, found.std) for name, found in moments.items()}

    def _whole_sets(self, what: str) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
        """Modality and features (L, M) of every set, without sampling; `what` is said on the progress bar."""
        kept, self._sampling = self._sampling, dict.fromkeys(self.modalities)
        try:
            for index in _with_progress(range(len(self)), what):
                for name, x in self[index].features.items():
                    yield name, x.numpy()
        finally:
            self._sampling = kept
            self.storage.close()

    def mean_lengths(self) -> dict[str, float]:
        """By modality, the mean number of features that are taken from a set, sampling included.

        Reads headers; entries that are absent or broken do not count. NaN for a modality that no video has.
        """
        counts: dict[str, list[int]] = {name: [] for name in self.modalities}
        generator = np.random.default_rng(0)
        for video in self.names:
            with suppress(EntryError), self.storage.open(video) as opened:
                for name in self.modalities.keys() & set(opened.modalities):
                    with suppress(EntryError):
                        length, m = opened.shape(name)
                        if m == self.modalities[name]:
                            rule = self._sampling[name]
                            counts[name].append(
                                length if rule is None else len(rule.indices(length, generator))
                            )
        self.storage.close()
        return {name: float(np.mean(c)) if c else math.nan for name, c in counts.items()}

    def class_counts(self) -> Tensor:
        """The number of videos with each label, ``(C,)`` int64. Raises: ValueError without labels."""
        if self.labels is None:
            raise ValueError("class counts need labels, this data set has none")
        if self.multi_label:
            return self.labels.sum(0, dtype=torch.float64).long()
        return torch.bincount(self.labels, minlength=self.num_classes)


def _label(item: FeatureSet) -> Tensor:
    if item.label is None:
        raise ValueError(f"items must have labels as this data set has, {item.name!r} has none")
    return item.label


def _problem(video: str, modality: str | None, error: EntryError) -> Problem:
    return Problem(video, modality, error.what, error.found, error.where)


def _asked_modalities(modalities: Any) -> dict[str, int | None] | None:
    """By name M, or None where it is to be found out."""
    if modalities is None:
        return None
    if isinstance(modalities, str) or not isinstance(modalities, (Sequence, Mapping)):
        raise TypeError(
            f"modalities must be a sequence of names or a mapping, got {type(modalities).__name__}"
        )
    names = list(modalities)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"modalities must be names, got a {type(name).__name__}: {name!r}")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"modalities must be one or more different names, got {names}")
    if not isinstance(modalities, Mapping):
        return dict.fromkeys(names)
    for name, m in modalities.items():
        if isinstance(m, bool) or not isinstance(m, int) or m < 1:
            raise ValueError(f"modalities must map names to M, an int >= 1, got {m!r} for {name!r}")
    return dict(modalities)


def _with_progress(items: Sequence[_T], title: str) -> Iterator[_T]:
    with Progress(title, len(items), "videos") as progress:
        for item in items:
            yield item
            progress.advance(1)
