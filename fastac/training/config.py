"""The settings of a training run, checked as a whole: every wrong one is named, with what it must be."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError


class Settings(BaseModel):
    """Settings that know their names: an unknown one is an error, and none changes afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("float_type", "Input should be a valid number")
    return value


Integer = Annotated[int, Field(strict=True)]
"""An int; neither a bool, a float nor text."""

Number = Annotated[float, BeforeValidator(_no_bool)]
"""A finite number, also as text: YAML 1.1 reads 1e-3 as such. No bool."""

Switch = Annotated[bool, Field(strict=True)]
"""True or false; not 0, 1 or text."""


class OptimizerConfig(Settings):
    """The optimizer. The default is the paper's (section 5.4)."""

    name: Literal["rmsprop", "adam", "adamw", "sgd"] = Field(default="rmsprop", description="which one")
    lr: Annotated[Number, Field(gt=0)] = Field(default=1e-3, description="learning rate")
    momentum: Annotated[Number, Field(ge=0, lt=1)] = Field(default=0.0, description="of rmsprop and sgd")
    weight_decay: Annotated[Number, Field(ge=0)] = Field(default=0.0, description="weight decay")

    @model_validator(mode="after")
    def _momentum_is_used(self) -> OptimizerConfig:
        if self.momentum and self.name not in ("rmsprop", "sgd"):
            raise PydanticCustomError(
                "momentum_unused",
                "Input should have momentum 0 for {name}: it is for rmsprop and sgd",
                {"name": self.name},
            )
        return self


class TrainingConfig(Settings):
    """How to train. The defaults are the paper's for video (section 5.4) where it names them."""

    epochs: Annotated[Integer, Field(ge=1)] = Field(default=100, description="passes over the training set")
    batch_size: Annotated[Integer, Field(ge=1)] = Field(
        default=64, description="videos per step of the optimizer, over all processes and pieces"
    )
    accumulation: Annotated[Integer, Field(ge=1)] = Field(
        default=1, description="pieces a batch is computed in, one after the other, to save memory"
    )
    optimizer: OptimizerConfig = Field(default=OptimizerConfig(), description="the optimizer")
    clip_norm: Annotated[Number, Field(gt=0)] | None = Field(
        default=5.0, description="largest l2 norm of all gradients together; null: no limit"
    )
    class_weights: Switch = Field(
        default=True, description="weight a video by 1/S, S its class's videos (single-label data only)"
    )
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="bfloat16: autocast, the weights stay float32"
    )
    seed: Annotated[Integer, Field(ge=0, lt=2**32)] = Field(
        default=1, description="of initial values, order and dropout"
    )
    workers: Annotated[Integer, Field(ge=0)] = Field(default=0, description="processes that read features")
    evaluation_batch_size: Annotated[Integer, Field(ge=1)] = Field(
        default=1024, description="videos per batch of evaluation and prediction"
    )
    tensorboard: Switch = Field(default=True, description="write metrics for TensorBoard beside metrics.csv")
