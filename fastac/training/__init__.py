"""Training and evaluation of the systems in `fastac.models` (install ``fastac[train]``)."""

from __future__ import annotations

from .checkpoint import CheckpointError
from .config import OptimizerConfig, TrainingConfig
from .engine import EpochResult, Trainer, TrainingError, evaluate, predict
from .lock import RunLockedError
from .run import Run, RunError, load_run, save_run
from .run_config import ConfigError, RunConfig

__all__ = [
    "CheckpointError",
    "ConfigError",
    "EpochResult",
    "OptimizerConfig",
    "Run",
    "RunConfig",
    "RunError",
    "RunLockedError",
    "Trainer",
    "TrainingConfig",
    "TrainingError",
    "evaluate",
    "load_run",
    "predict",
    "save_run",
]
