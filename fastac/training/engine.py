"""One training engine for every system here: epochs, steps, evaluation, checkpoints, processes.

The paper's section 5.4 is `TrainingConfig`'s default: RMSProp, gradients clipped to norm 5, videos weighted
by 1/S. A batch is what one step of the optimizer sees; how many processes share it and in how many pieces
they compute it changes rounding only (and dropout's draws).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from fastac.data.batch import FeatureBatch
from fastac.models.base import class_scores

from . import checkpoint, distributed
from .config import OptimizerConfig, TrainingConfig
from .lock import RunLockedError, training_in
from .log import MetricsLog, Progress
from .metrics import compute, main_metric, make_metrics, update
from .sampler import BatchSampler, mixed_seed

logger = logging.getLogger("fastac")

DROPOUT, ORDER = 0, 1
"""What a seed is for."""

MAY_CHANGE = {"epochs", "workers", "evaluation_batch_size", "tensorboard"}
"""Settings that a run may be resumed with other values of: how long and how fast."""


class TrainingError(RuntimeError):
    """Training cannot go on: the loss or a parameter is not finite."""


class FeatureData(Protocol):
    """What the engine asks of a data set; `fastac.data.FeatureArray` and `FeatureSetDataset` are such."""

    @property
    def labels(self) -> Tensor | None: ...  # noqa: D102
    @property
    def class_names(self) -> list[str]: ...  # noqa: D102
    @property
    def names(self) -> list[str]: ...  # noqa: D102
    @property
    def multi_label(self) -> bool: ...  # noqa: D102
    @property
    def modalities(self) -> Mapping[str, int]: ...  # noqa: D102
    @property
    def num_classes(self) -> int: ...  # noqa: D102
    def __len__(self) -> int: ...
    def collate(self, items: Any) -> FeatureBatch: ...  # noqa: D102
    def set_epoch(self, epoch: int) -> None: ...  # noqa: D102
    def mean_features(self) -> dict[str, Tensor]: ...  # noqa: D102
    def class_counts(self) -> Tensor: ...  # noqa: D102


def make_optimizer(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer that ``config`` names, in torch's fused form where it has one."""
    common: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.name == "adam":
        return torch.optim.Adam(parameters, fused=True, **common)
    if config.name == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **common)
    if config.name == "sgd":
        return torch.optim.SGD(parameters, momentum=config.momentum, fused=True, **common)
    return torch.optim.RMSprop(parameters, momentum=config.momentum, foreach=True, **common)


def class_weights(counts: Tensor) -> Tensor:
    """Weights ``(C,)`` of the classes' videos: 1/S (paper 5.4), scaled so that the mean over the videos is 1.

    The scale is inferred; it keeps the loss of balanced classes what it is without weights. A class without
    videos has weight 0.
    """
    present = counts > 0
    weights = torch.where(present, 1.0 / counts.clamp(min=1).double(), 0.0)
    return (weights * (counts.sum() / present.sum().clamp(min=1))).float()


@dataclass(frozen=True)
class EpochResult:
    """One row of metrics.csv: the epoch, counted from 1, and its values by column."""

    epoch: int
    values: dict[str, float]


class Trainer:
    """Trains a model on a data set, with everything that a long run needs.

    With several processes each has a Trainer, made with the same arguments. The model's state is that of rank
    0, which alone writes files.

    Args:
        model: takes ``**batch.inputs()`` and has ``losses(output, labels) -> (B,)``; what it returns is the
            scores (B, C), or has them as ``scores`` (`fastac.models.VideoClassifier`).
        train_data, validation_data: the data sets; without the latter nothing is evaluated and the last
            checkpoint counts as the best.
        config: how.
        directory: of the run: checkpoints, metrics.csv and TensorBoard's events go there. None keeps nothing.
        device: where to compute; the model is moved there.
        show_progress: bars or progress lines while an epoch runs.

    Raises:
        ValueError: an empty data set, one without labels, or two with other classes or kinds of labels.
    """

    def __init__(
        self,
        model: nn.Module,
        train_data: FeatureData,
        validation_data: FeatureData | None,
        config: TrainingConfig,
        *,
        directory: Path | None = None,
        device: torch.device | str = "cpu",
        show_progress: bool = True,
    ) -> None:
        _check_data("train_data", train_data)
        if validation_data is not None:
            _check_data("validation_data", validation_data)
            for what in ("multi_label", "num_classes"):
                wanted, given = getattr(train_data, what), getattr(validation_data, what)
                if wanted != given:
                    raise ValueError(f"validation_data must have {what} {wanted} as train_data, got {given}")
        self.config, self.directory = config, directory
        self.device = torch.device(device)
        self.processes = distributed.current()
        self.model = model.to(self.device)
        self._parameters = list(model.parameters())
        self.optimizer = make_optimizer(self._parameters, config.optimizer)
        self.epoch = 0
        self.best, self.best_loss = -math.inf, math.inf
        self._locked = False
        self._train_data, self._validation_data = train_data, validation_data
        self._show_progress = show_progress and self.processes.first
        self._weights = None
        if config.class_weights and not train_data.multi_label:
            self._weights = class_weights(train_data.class_counts()).to(self.device)
        self._sampler = BatchSampler(
            len(train_data),
            config.batch_size,
            shuffle=True,
            seed=mixed_seed(config.seed, ORDER),
            pieces=config.accumulation,
            rank=self.processes.rank,
            world_size=self.processes.world_size,
        )
        self._parallel: nn.Module = model
        if self.processes.world_size > 1:
            devices = [self.device] if self.device.type == "cuda" else None
            self._parallel = DistributedDataParallel(model, device_ids=devices)

    @property
    def checkpoints(self) -> Path | None:
        """The folder of the checkpoints."""
        return None if self.directory is None else self.directory / "checkpoints"

    def resume(self) -> bool:
        """Goes back to where the run in ``directory`` was; False if there is nothing to go back to.

        The epochs that follow are those of a run that was never interrupted: order and dropout depend on
        the seed and the epoch only. The settings must be those of the run, except for how long and how fast
        (`MAY_CHANGE`). To the bit it is so on the CPU, with the same number of threads and processes.

        Raises:
            fastac.training.CheckpointError: the checkpoint cannot be read, is of another model or of other
                settings, or not all processes see the same one. The model may have changed.
        """
        if self.checkpoints is None:
            return False
        problem = None
        try:
            if checkpoint.exists(self.checkpoints):
                self._load(self.checkpoints)
        except checkpoint.CheckpointError as error:
            problem = error
        # All or none go on: one process alone would wait for the others.
        found = self.processes.gather((self.epoch, None if problem is None else str(problem)))
        if problem is not None:
            raise problem
        for rank, (epoch, message) in enumerate(found):
            if message is not None:
                raise checkpoint.CheckpointError(f"process {rank}: {message}")
            if epoch != self.epoch:
                raise checkpoint.CheckpointError(
                    f"{self.checkpoints} must be the same for all processes: the last checkpoint is of epoch "
                    f"{epoch} for process {rank} and of {self.epoch} for process {self.processes.rank}"
                )
        return self.epoch > 0

    def _load(self, directory: Path) -> None:
        checkpoint.check_links(directory)
        state = checkpoint.read_state(directory)
        before, now = state.get("training", {}), self.config.model_dump(mode="json")
        differing = [
            f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
            for name in dict.fromkeys((*before, *now))
            if name not in MAY_CHANGE and before.get(name) != now.get(name)
        ]
        if differing:
            raise checkpoint.CheckpointError(
                f"{directory} is of a run with other settings: {'; '.join(differing)}"
            )
        checkpoint.load_model(directory, self.model)
        checkpoint.load_optimizer(directory, self.optimizer)
        best, best_loss = state.get("best"), state.get("best_loss")
        self.epoch, self.best = state["epoch"], -math.inf if best is None else float(best)
        self.best_loss = math.inf if best_loss is None else float(best_loss)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps processes of other groups from training in ``directory`` while the block runs.

        `fit` does so by itself; for what else is written there, before or after it. Rank 0 holds the lock.

        Raises:
            fastac.training.RunLockedError: another process trains there; all processes of the group get it.
            OSError: the folder cannot be made or written to.
        """
        if self.directory is None or self._locked:
            yield
            return
        problem: RunLockedError | OSError | None = None
        with ExitStack() as stack:
            if self.processes.first:
                try:
                    stack.enter_context(training_in(self.directory))
                except (RunLockedError, OSError) as error:
                    problem = error
            # All or none go on: one process alone would wait for the others.
            problem = self.processes.gather(problem)[0]
            if problem is not None:
                raise problem
            self._locked = True
            try:
                yield
            finally:
                self._locked = False

    def fit(self) -> list[EpochResult]:
        """Trains up to ``config.epochs``, from where the run is; returns what the epochs gave.

        Raises:
            fastac.training.RunLockedError: another process trains in ``directory``; nothing was changed.
            TrainingError: a loss or a parameter that is not finite; the checkpoints of earlier epochs stay.
            fastac.training.CheckpointError: ``directory`` has a run that is at another epoch, or a
                metrics.csv that is not of a run.
            ImportError: ``config.tensorboard``, and TensorBoard is not installed.
        """
        if self.epoch >= self.config.epochs:
            return []
        with self.lock():
            return self._fit()

    def _fit(self) -> list[EpochResult]:
        if self.checkpoints is not None and checkpoint.exists(self.checkpoints):
            there = checkpoint.read_state(self.checkpoints)["epoch"]
            if there != self.epoch:
                raise checkpoint.CheckpointError(
                    f"{self.directory} has a run of {there} epochs, this one is at epoch {self.epoch}: "
                    "resume it or choose another folder"
                )
        log = None
        if self.directory is not None and self.processes.first:
            log = MetricsLog(self.directory, epochs_done=self.epoch, tensorboard=self.config.tensorboard)
        results = []
        try:
            while self.epoch < self.config.epochs:
                result, best = self._epoch()
                results.append(result)
                # The row first: a resumed run removes rows that no checkpoint covers, and could not add one.
                if log is not None:
                    log.add(result.epoch, result.values)
                if self.checkpoints is not None and self.processes.first:
                    state = {
                        "best": self.best if math.isfinite(self.best) else None,
                        "best_loss": self.best_loss if math.isfinite(self.best_loss) else None,
                        "values": result.values,
                        "training": self.config.model_dump(mode="json"),
                    }
                    checkpoint.save(
                        self.checkpoints, self.epoch, self.model, self.optimizer, state, best=best
                    )
                self.processes.barrier()
        finally:
            if log is not None:
                log.close()
        return results

    def _epoch(self) -> tuple[EpochResult, bool]:
        """One epoch and its evaluation; also whether it is the best so far."""
        number = self.epoch + 1
        started = time.perf_counter()
        values = {"train_loss": self._train(number)}
        values["train_seconds"] = time.perf_counter() - started
        best = True
        if self._validation_data is not None:
            evaluation = evaluate(
                self.model,
                self._validation_data,
                device=self.device,
                batch_size=self.config.evaluation_batch_size,
                workers=self.config.workers,
                precision=self.config.precision,
                show_progress=self._show_progress,
            )
            values.update({f"validation_{name}": value for name, value in evaluation.items()})
            reached = evaluation[main_metric(multi_label=self._train_data.multi_label)]
            loss = evaluation["loss"]
            # An accuracy that cannot rise any more says nothing of how sure the model is.
            better = reached > self.best or (reached == self.best and loss < self.best_loss)
            best = better or self.best == -math.inf
            if better:  # not if it is NaN, as no label can make it
                self.best, self.best_loss = reached, loss if math.isfinite(loss) else math.inf
        self.epoch = number
        if self.processes.first:
            text = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
            logger.info("epoch %d/%d  %s", number, self.config.epochs, text)
        return EpochResult(number, values), best

    def _train(self, number: int) -> float:
        """The steps of one epoch; returns the mean loss over all its videos."""
        config, last_piece = self.config, self.config.accumulation - 1
        # Seeded anew each epoch: a run that resumes here needs no generator's state.
        torch.manual_seed(mixed_seed(config.seed, DROPOUT, number, self.processes.rank))
        self._sampler.set_epoch(number)
        self._train_data.set_epoch(number)
        batches = iter(_loader(self._train_data, self._sampler, config.workers, self.device))
        self._parallel.train()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        with Progress(
            f"epoch {number}", len(self._train_data), "videos", show=self._show_progress
        ) as progress:
            for size in self._sampler.batch_sizes():
                self.optimizer.zero_grad()
                for piece in range(config.accumulation):
                    total += self._backward(next(batches), size, synchronise=piece == last_piece)
                if config.clip_norm is not None:
                    nn.utils.clip_grad_norm_(self._parameters, config.clip_norm)
                self.optimizer.step()
                progress.advance(size)
        if self.processes.world_size > 1:
            dist.all_reduce(total)
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)
        loss = float(total) / len(self._train_data)
        finite = torch.stack([p.detach().isfinite().all() for p in self._parameters]).all()
        if not math.isfinite(loss) or not finite:
            what = "loss" if not math.isfinite(loss) else "last step"
            raise TrainingError(
                f"the {what} of epoch {number} is not finite: a smaller learning rate, a limit on the "
                "gradients' norm (clip_norm) or float32 may help"
            )
        return loss

    def _backward(self, batch: FeatureBatch, size: int, *, synchronise: bool) -> Tensor:
        """Adds the gradient of this process's share of ``size`` videos; returns the share's summed loss."""
        batch = _moved(batch, self.device)
        assert batch.labels is not None
        together: AbstractContextManager[Any] = nullcontext()
        if not synchronise and isinstance(self._parallel, DistributedDataParallel):
            together = self._parallel.no_sync()
        with together:
            with _autocast(self.device, self.config.precision):
                output = self._parallel(**batch.inputs())
                losses: Tensor = cast(Any, self.model).losses(output, batch.labels)  # (B,)
            if self._weights is not None:
                losses = losses * self._weights[batch.labels]
            loss = losses.sum()
            # Processes average their gradients; the loss is a mean over the videos of all of them.
            (loss * (self.processes.world_size / size)).backward()
        return loss.detach()


def evaluate(
    model: nn.Module,
    data: FeatureData,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 1024,
    workers: int = 0,
    precision: str = "float32",
    show_progress: bool = False,
) -> dict[str, float]:
    """Loss and metrics over a whole data set, shared by the processes of the group; see `make_metrics`.

    The loss is the mean over the videos, without weights. Leaves the model in the mode it was in.

    Raises:
        ValueError: an empty data set, or one without labels; another precision than float32 or bfloat16, or a
            batch_size below 1.
    """
    _check_data("data", data)
    device = torch.device(device)
    metrics = make_metrics(data.num_classes, multi_label=data.multi_label).to(device)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for batch, output in _outputs(model, data, device, batch_size, workers, precision, show_progress):
        assert batch.labels is not None
        total += cast(Any, model).losses(output, batch.labels).sum()
        update(metrics, class_scores(output), batch.labels, multi_label=data.multi_label)
    if distributed.current().world_size > 1:
        dist.all_reduce(total)
    return {"loss": float(total) / len(data), **compute(metrics)}


def predict(
    model: nn.Module,
    data: FeatureData,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 1024,
    workers: int = 0,
    precision: str = "float32",
    show_progress: bool = False,
) -> Iterator[tuple[FeatureBatch, Tensor]]:
    """Batches of a data set and their class probabilities ``(B, C)``, in the data set's order.

    In a group of processes each gets its share of every batch, which may be empty; ``batch.index`` says of
    what. The model is in eval mode until the iterator ends or is closed.
    """
    device = torch.device(device)
    for batch, output in _outputs(model, data, device, batch_size, workers, precision, show_progress):
        yield batch, cast(Any, model).probabilities(output)


@torch.no_grad()
def _outputs(
    model: nn.Module,
    data: FeatureData,
    device: torch.device,
    batch_size: int,
    workers: int,
    precision: str,
    show_progress: bool,
) -> Iterator[tuple[FeatureBatch, Any]]:
    processes = distributed.current()
    sampler = BatchSampler(
        len(data), batch_size, shuffle=False, rank=processes.rank, world_size=processes.world_size
    )
    was_training = model.training
    model.eval()
    try:
        with Progress("evaluating", len(data), "videos", show=show_progress) as progress:
            for size, batch in zip(
                sampler.batch_sizes(), _loader(data, sampler, workers, device), strict=True
            ):
                moved = _moved(batch, device)
                with _autocast(device, precision):
                    output = model(**moved.inputs())
                yield moved, output
                progress.advance(size)
    finally:
        model.train(was_training)


def _check_data(name: str, data: FeatureData) -> None:
    if not len(data):
        raise ValueError(f"{name} must have at least one video, got none")
    if data.labels is None:
        raise ValueError(f"{name} must have labels, got a data set without")


def _loader(
    data: FeatureData, sampler: BatchSampler, workers: int, device: torch.device
) -> DataLoader[FeatureBatch]:
    return DataLoader(
        cast(Dataset[FeatureBatch], data),
        batch_sampler=sampler,
        collate_fn=partial(_collated, data),
        num_workers=workers,
        pin_memory=device.type == "cuda",
    )


def _collated(data: FeatureData, items: Any) -> FeatureBatch:
    """``data.collate``, which must make a batch of something: a share of a small batch may have no video."""
    if len(items):
        return data.collate(items)
    return FeatureBatch(
        features={modality: torch.empty(0, m) for modality, m in data.modalities.items()},
        labels=None if data.labels is None else data.labels[:0],
        index=torch.empty(0, dtype=torch.int64),
        offsets={modality: torch.zeros(1, dtype=torch.int64) for modality in data.modalities},
        max_length=dict.fromkeys(data.modalities, 0),
    )


def _moved(batch: FeatureBatch, device: torch.device) -> FeatureBatch:
    return batch if device.type == "cpu" else batch.to(device, non_blocking=True)


def _autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    if precision == "float32":
        return nullcontext()
    if precision != "bfloat16":
        raise ValueError(f"precision must be float32 or bfloat16, got {precision!r}")
    return torch.autocast(device.type, dtype=torch.bfloat16)
