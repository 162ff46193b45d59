"""The settings of the training engine: what is wrong with them, those of the paper, and as JSON."""

from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import ValidationError

from fastac.training import OptimizerConfig, TrainingConfig


def test_all_wrong_settings_are_reported_at_once() -> None:
    wrong = {
        "epochs": 0,
        "batch_size": True,
        "accumulation": "2",
        "optimizer": {"name": "lion", "lr": math.nan, "momentum": True, "weight_decay": -1, "beta": 3},
        "clip_norm": 0,
        "class_weights": 1,
        "precision": "fp8",
        "seed": 2**32,
        "workers": 1.0,
        "evaluation_batch_size": None,
        "tensorboard": "yes",
        "epoch": 3,
    }
    with pytest.raises(ValidationError) as caught:
        TrainingConfig.model_validate(wrong)
    found = {".".join(map(str, e["loc"])): e["type"] for e in caught.value.errors()}
    assert found == {
        "epochs": "greater_than_equal",
        "batch_size": "int_type",
        "accumulation": "int_type",
        "optimizer.name": "literal_error",
        "optimizer.lr": "finite_number",
        "optimizer.momentum": "float_type",
        "optimizer.weight_decay": "greater_than_equal",
        "optimizer.beta": "extra_forbidden",
        "clip_norm": "greater_than",
        "class_weights": "bool_type",
        "precision": "literal_error",
        "seed": "less_than",
        "workers": "int_type",
        "evaluation_batch_size": "int_type",
        "tensorboard": "bool_type",
        "epoch": "extra_forbidden",
    }


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"optimizer": {"name": "adam", "momentum": 0.5}}, "momentum 0 for adam"),
        ({"optimizer": 3}, "valid dictionary"),
        ({"optimizer": {"lr": math.inf}}, "finite number"),
        ({"optimizer": {"lr": 0}}, "greater than 0"),
        ({"optimizer": {"lr": "fast"}}, "valid number"),
        ({"clip_norm": True}, "valid number"),
        ({"epochs": 2.5}, "valid integer"),
    ],
)
def test_wrong_settings(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message) as caught:
        TrainingConfig.model_validate(wrong)
    assert len(caught.value.errors()) == 1


def test_settings_of_the_paper_and_of_files() -> None:
    """RMSProp with 1e-3, norm 5, weights 1/S (5.4); they survive JSON."""
    config = TrainingConfig()
    assert (config.optimizer.name, config.optimizer.lr, config.clip_norm) == ("rmsprop", 1e-3, 5)
    assert config.class_weights
    changed = TrainingConfig(optimizer=OptimizerConfig(name="sgd", momentum=0.9), clip_norm=None)
    assert TrainingConfig.model_validate_json(changed.model_dump_json()) == changed
    assert TrainingConfig.model_validate({"optimizer": {"lr": "1e-3"}, "clip_norm": 3}).clip_norm == 3.0
    with pytest.raises(ValidationError, match="frozen"):
        config.epochs = 3  # type: ignore[misc]
