"""Training with the fused cluster beside plain torch: the same engine, initial values, batches, dropout."""

from __future__ import annotations

import itertools
import logging
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastac import AttentionCluster, _native, backends
from fastac.data import FeatureArray
from fastac.models import AttentionClusterClassifier
from fastac.models.base import HasScores
from fastac.provenance import commit, cpu_model
from fastac.training import Trainer, TrainingConfig
from fastac.training.log import Progress, quiet

from .flash_mnist import MODALITY
from .results import append

logger = logging.getLogger("fastac")

AGREEMENT = 1e-3
"""Largest relative difference of the two losses of one step that still counts as agreement."""

PASSES = 300
"""Forward and backward passes of the cluster alone."""


class PlainAttentionCluster(nn.Module):
    """An fc1 cluster with shift as one writes it in plain torch, with the parameters of ``cluster`` copied.

    Raises:
        ValueError: another kind of cluster.
    """

    def __init__(self, cluster: nn.Module) -> None:
        super().__init__()
        if not isinstance(cluster, AttentionCluster) or cluster.weighting != "fc1" or not cluster.shift:
            raise ValueError(f"cluster must be an AttentionCluster with fc1 and shift, got {cluster}")
        self.weight = nn.Parameter(cluster.get_parameter("weight").detach().clone())  # (N, M)
        self.alpha = nn.Parameter(cluster.get_parameter("alpha").detach().clone())  # (N,)
        self.beta = nn.Parameter(cluster.get_parameter("beta").detach().clone())  # (N,)

    def forward(self, x: Tensor, *, lengths: None = None, offsets: None = None) -> Tensor:
        """``(B, L, M)`` to ``(B, N*M)``; all sets have the length L."""
        weights = F.linear(x, self.weight).softmax(dim=1)  # Eq. 4: a = softmax over L of x Wᵀ, (B, L, N)
        z = weights.transpose(1, 2) @ x  # Eq. 2: (B, N, M)
        u = self.alpha[:, None] * z + self.beta[:, None]
        y: Tensor = F.normalize(u, dim=-1) / self.weight.size(0) ** 0.5  # Eq. 7
        return y.flatten(1)


@dataclass(frozen=True)
class Times:
    """Median seconds of the operator's path and of plain torch, taken in turn."""

    ours: float
    plain: float

    @property
    def ratio(self) -> float:
        """How many times faster the operator's path is."""
        return self.plain / self.ours

    def describe(self, name: str) -> str:
        """Both times in milliseconds and their ratio."""
        return f"{name} {self.ours * 1e3:6.2f} ms   plain {self.plain * 1e3:6.2f} ms   {self.ratio:.2f} x"


@dataclass(frozen=True)
class Comparison:
    """Outcome of training two copies of one model side by side.

    Attributes:
        backend: what computed the operator's path.
        step: one training step, all of it.
        cluster: the cluster alone, forward and backward.
        losses: of every step, the operator's and plain torch's.
        cluster_size: N.
        rounds, steps: how many rounds of how many steps.
        steps_per_epoch: of the whole training set.
    """

    backend: str
    step: Times
    cluster: Times
    losses: list[tuple[float, float]]
    cluster_size: int
    rounds: int
    steps: int
    steps_per_epoch: int

    @property
    def difference(self) -> float:
        """Largest relative difference of the two losses of one step; infinite if a loss is not finite."""
        if not all(map(math.isfinite, itertools.chain(*self.losses))):
            return math.inf
        return max(abs(a - b) / abs(b) for a, b in self.losses)

    @property
    def agrees(self) -> bool:
        """Whether the two compute the same."""
        return self.difference <= AGREEMENT

    @property
    def epoch(self) -> Times:
        """The steps of an epoch, as seconds."""
        return Times(self.steps_per_epoch * self.step.ours, self.steps_per_epoch * self.step.plain)

    @property
    def name(self) -> str:
        """The operator's path in a word."""
        return "fused" if self.backend == "cpu" else self.backend

    def report(self) -> str:
        """Losses first: times of two things that differ mean nothing."""
        verdict = "agree" if self.agrees else "DO NOT AGREE"
        epoch = self.epoch
        return "\n".join(
            (
                f"the same {len(self.losses)} steps, {self.name} and plain torch in turn (median times):",
                f"  losses {verdict}: largest relative difference {self.difference:.1e}",
                f"  cluster, forward + backward  {self.cluster.describe(self.name)}",
                f"  whole training step          {self.step.describe(self.name)}",
                f"  epoch of {self.steps_per_epoch} steps  "
                f"{self.name} {epoch.ours:.1f} s   plain {epoch.plain:.1f} s   (steps x step time)",
            )
        )


class _Recording(AttentionClusterClassifier):
    """Keeps the losses that the engine asks for."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.recorded: list[Tensor] = []

    def losses(self, output: Tensor | HasScores, labels: Tensor) -> Tensor:
        losses = super().losses(output, labels)
        self.recorded.append(losses.detach())
        return losses


def describe_backend(device: torch.device | str = "cpu") -> tuple[str, str]:
    """The backend that computes a dense cluster on a device, and a line that says so."""
    device = torch.device(device)
    name = backends.choose(torch.empty(1, 1, 1, device=device))
    if backends.current is not None:
        return name, f"attention cluster: backend {name!r}, as FASTAC_BACKEND or fastac.backend asks"
    if name == "cpu":
        return name, "attention cluster: the fused native operator"
    if device.type == "cpu":
        return name, (
            f"The native operator is not available ({_native.why_not}): running on the plain torch reference."
        )
    return name, f"attention cluster: backend {name!r}"


def compare(
    initial: AttentionClusterClassifier,
    data: FeatureArray,
    config: TrainingConfig,
    *,
    rounds: int = 9,
    steps: int = 100,
    device: torch.device | str = "cpu",
) -> Comparison:
    """Trains two copies of ``initial``, one of them with a plain torch cluster, in rounds that take turns.

    A round is an epoch of the engine on the first ``steps`` batches of the data, the same order and dropout
    for both; which of the two begins changes from round to round, so that what else the machine does meets
    both. The first round warms up and is not timed.

    Args:
        initial: fc1 with shift over the one modality ``MODALITY``; left as it is.
        data: the training set; with fewer batches, a round has fewer steps.
        config: of the training; its epochs are not used.
        rounds: at least 2.
        steps: of a round.
        device: where to compute.

    Raises:
        ValueError: a model of another kind, or a count out of range.
    """
    if rounds < 2 or steps < 1:
        raise ValueError(f"rounds must be at least 2 and steps at least 1, got {rounds} and {steps}")
    device = torch.device(device)
    count = min(steps * config.batch_size, len(data))
    steps = -(-count // config.batch_size)
    models = []
    for plain in (False, True):
        model = _Recording.from_config(initial.config)
        assert isinstance(model, _Recording)
        model.load_state_dict(initial.state_dict())
        if plain:
            model.clusters[MODALITY] = PlainAttentionCluster(model.clusters[MODALITY])
        models.append(model)
    trainers = [
        Trainer(model, data.head(count), None, config, device=device, show_progress=False) for model in models
    ]
    seconds: tuple[list[float], list[float]] = ([], [])
    with quiet(), Progress("comparing", 2 * rounds * steps, "steps") as progress:
        for round_ in range(1, rounds + 1):
            for which in _turn(round_):
                trainers[which].config = config.model_copy(update={"epochs": round_})
                (result,) = trainers[which].fit()
                seconds[which].append(result.values["train_seconds"] / steps)
                progress.advance(steps)
    means = [[float(losses.mean()) for losses in model.recorded] for model in models]
    backend, _ = describe_backend(device)
    return Comparison(
        backend=backend,
        step=Times(*(statistics.median(s[1:]) for s in seconds)),
        cluster=_cluster_times(
            [model.clusters[MODALITY] for model in models], data, config.batch_size, device
        ),
        losses=list(zip(*means, strict=True)),
        cluster_size=initial.modalities[MODALITY].cluster_size,
        rounds=rounds,
        steps=steps,
        steps_per_epoch=-(-len(data) // config.batch_size),
    )


def _cluster_times(
    clusters: list[nn.Module], data: FeatureArray, batch_size: int, device: torch.device
) -> Times:
    """Medians of the clusters' forward and backward passes, in turn, on batches as training has them."""
    batches = [
        data.__getitems__(range(first, min(first + batch_size, len(data)))).features[MODALITY].to(device)
        for first in range(0, min(len(data), 20 * batch_size), batch_size)
    ]
    synchronize: Callable[[], object] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    dy = torch.randn_like(clusters[0](batches[0]))
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(PASSES):
        x = batches[number % len(batches)]
        for which in _turn(number):
            synchronize()
            started = time.perf_counter()
            clusters[which](x).backward(dy[: len(x)])
            synchronize()
            seconds[which].append(time.perf_counter() - started)
    return Times(*(statistics.median(s[PASSES // 10 :]) for s in seconds))


def _turn(number: int) -> tuple[int, int]:
    return (0, 1) if number % 2 == 0 else (1, 0)


def record(
    path: Path,
    comparison: Comparison,
    config: TrainingConfig,
    *,
    data: str,
    device: torch.device | str = "cpu",
) -> None:
    """Adds a row with the figures and what they were measured on to a CSV file.

    Args:
        path: the file.
        comparison: the figures.
        config: of the training that was compared.
        data: what it was compared on, in a word.
        device: where.

    Raises:
        fastac.training.run.RunError: the file has other columns.
    """
    epoch = comparison.epoch
    row = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "cpu": cpu_model(),
        "isa": _native.isa() if comparison.backend == "cpu" else "",
        "device": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else str(device),
        "backend": comparison.backend,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load_average": f"{os.getloadavg()[0]:.1f}",
        "data": data,
        "batch_size": config.batch_size,
        "cluster_size": comparison.cluster_size,
        "rounds": comparison.rounds,
        "steps_per_round": comparison.steps,
        "steps_per_epoch": comparison.steps_per_epoch,
        "step_ms": f"{1e3 * comparison.step.ours:.3f}",
        "plain_step_ms": f"{1e3 * comparison.step.plain:.3f}",
        "step_ratio": f"{comparison.step.ratio:.3f}",
        "cluster_ms": f"{1e3 * comparison.cluster.ours:.3f}",
        "plain_cluster_ms": f"{1e3 * comparison.cluster.plain:.3f}",
        "cluster_ratio": f"{comparison.cluster.ratio:.3f}",
        "epoch_seconds": f"{epoch.ours:.1f}",
        "plain_epoch_seconds": f"{epoch.plain:.1f}",
        "loss_difference": f"{comparison.difference:.1e}",
    }
    append(path, tuple(row), [row])
