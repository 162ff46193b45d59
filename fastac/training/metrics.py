"""What an evaluation reports, by torchmetrics, which also adds up over processes."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torchmetrics import Metric, MetricCollection

_TOLD_ELSEWHERE = (
    "The ``compute`` method of metric .* was called before",  # by a process whose share is empty
    "Average precision score for one or more classes was `nan`",
    "No positive samples found in target",
)
"""Warnings of torchmetrics about what `make_metrics` documents."""


def make_metrics(num_classes: int, *, multi_label: bool) -> MetricCollection:
    """The metrics of one kind of data.

    Single-label: ``accuracy`` (top-1) and, with more than five classes, ``top5``. Multi-label: ``map``, the
    mean of the average precision over the classes that any video has (NaN if there is none), and
    ``micro_ap``, the average precision of all videos and classes in one list.
    """
    # Here, as it takes seconds to import.
    from torchmetrics import MetricCollection
    from torchmetrics.classification import MulticlassAccuracy, MultilabelAveragePrecision

    metrics: dict[str, Metric | MetricCollection]
    # Nothing is validated here: it would wait for the device, and the losses check the same.
    if multi_label:
        metrics = {
            "map": MultilabelAveragePrecision(num_classes, average="none", validate_args=False),
            "micro_ap": MultilabelAveragePrecision(num_classes, average="micro", validate_args=False),
        }
    else:
        metrics = {"accuracy": MulticlassAccuracy(num_classes, average="micro", validate_args=False)}
        if num_classes > 5:
            metrics["top5"] = MulticlassAccuracy(num_classes, average="micro", top_k=5, validate_args=False)
    # The two average precisions keep the same lists of scores and labels: once is enough.
    return MetricCollection(metrics, compute_groups=[list(metrics)] if multi_label else False)


def main_metric(*, multi_label: bool) -> str:
    """The metric that the best checkpoint has the highest value of."""
    return "map" if multi_label else "accuracy"


def update(metrics: MetricCollection, scores: Tensor, labels: Tensor, *, multi_label: bool) -> None:
    """Adds a batch: scores ``(B, C)``, labels ``(B,)`` int64 or ``(B, C)`` zeros and ones; B may be 0."""
    if multi_label:
        # torchmetrics takes a batch whose scores all lie in [0, 1] for probabilities. In float64 more of them
        # stay apart. An empty batch counts: processes can only put lists together that all of them have.
        metrics.update(scores.double().sigmoid(), labels.to(torch.int64))
    elif len(scores):
        metrics.update(scores.float(), labels)


def compute(metrics: MetricCollection) -> dict[str, float]:
    """The metrics over all batches of all processes."""
    with warnings.catch_warnings():
        for text in _TOLD_ELSEWHERE:
            warnings.filterwarnings("ignore", text, UserWarning)
        values = metrics.compute()
    # A class that a video has is found at some precision, however low; torchmetrics gives 0 or NaN to others.
    return {name: float(v[v > 0].mean() if v.dim() else v) for name, v in values.items()}
