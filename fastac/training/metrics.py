"""What an evaluation reports, by torchmetrics, which also adds up over processes."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MultilabelAveragePrecision


def make_metrics(num_classes: int, *, multi_label: bool) -> MetricCollection:
    """The metrics of one kind of data.

    Single-label: ``accuracy`` (top-1) and, with more than five classes, ``top5``. Multi-label: ``map``, the mean
    over classes of the average precision, and ``micro_ap``, the average precision of all videos and classes
    in one list.
    """
    metrics: dict[str, Metric | MetricCollection]
    if multi_label:
        metrics = {
            "map": MultilabelAveragePrecision(num_classes, average="macro"),
            "micro_ap": MultilabelAveragePrecision(num_classes, average="micro"),
        }
    else:
        metrics = {"accuracy": MulticlassAccuracy(num_classes, average="micro")}
        if num_classes > 5:
            metrics["top5"] = MulticlassAccuracy(num_classes, average="micro", top_k=5)
    return MetricCollection(metrics, compute_groups=False)


def main_metric(*, multi_label: bool) -> str:
    """The metric that the best checkpoint has the highest value of."""
    return "map" if multi_label else "accuracy"


def update(metrics: MetricCollection, scores: Tensor, labels: Tensor) -> None:
    """Adds a batch: scores ``(B, C)``, labels ``(B,)`` int64 or ``(B, C)`` zeros and ones; B may be 0."""
    if len(scores):
        metrics.update(scores.float(), labels.to(torch.int64))
