"""Training and evaluation of the systems in `fastac.models` (install ``fastac[train]``)."""

from __future__ import annotations

from .checkpoint import CheckpointError
from .config import OptimizerConfig, TrainingConfig
from .engine import EpochResult, Trainer, TrainingError, evaluate, predict

__all__ = [
    "CheckpointError",
    "EpochResult",
    "OptimizerConfig",
    "Trainer",
    "TrainingConfig",
    "TrainingError",
    "evaluate",
    "predict",
]
