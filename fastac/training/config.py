"""The settings of a training run, checked as a whole: every wrong one is named, with what it must be."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Settings(BaseModel):
    """Settings that know their names: an unknown one is an error, and none changes afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class OptimizerConfig(Settings):
    """The optimizer. The default is the paper's (section 5.4)."""

    name: Literal["rmsprop", "adam", "adamw", "sgd"] = Field("rmsprop", description="which one")
    lr: Annotated[float, Field(gt=0)] = Field(1e-3, description="learning rate")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="of rmsprop and sgd")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="weight decay")


class TrainingConfig(Settings):
    """How to train. The defaults are the paper's for video (section 5.4) where it names them."""

    epochs: Annotated[int, Field(ge=1)] = Field(100, description="passes over the training set")
    batch_size: Annotated[int, Field(ge=1)] = Field(
        64, description="videos per step of the optimizer, over all processes and pieces"
    )
    accumulation: Annotated[int, Field(ge=1)] = Field(
        1, description="pieces a batch is computed in, one after the other, to save memory"
    )
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="the optimizer")
    clip_norm: Annotated[float, Field(gt=0)] | None = Field(
        5.0, description="largest l2 norm of all gradients together; null: no limit"
    )
    class_weights: bool = Field(
        True, description="weight a video by 1/S, S its class's videos (single-label data only)"
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="bfloat16: autocast, the weights stay float32"
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(1, description="of initial values, order and dropout")
    workers: Annotated[int, Field(ge=0)] = Field(0, description="processes that read features")
    evaluation_batch_size: Annotated[int, Field(ge=1)] = Field(
        1024, description="videos per evaluation batch"
    )
    tensorboard: bool = Field(True, description="write metrics for TensorBoard beside metrics.csv")
