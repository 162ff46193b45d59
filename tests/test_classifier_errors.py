"""`fastac.models.classifier`: what it refuses to take and to be made of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from classifier_helpers import MODALITIES, NAN, C, make

from fastac.models.classifier import AttentionClusterClassifier, ClusterConfig


def good() -> dict[str, Any]:
    return {
        "features": {
            "rgb": torch.randn(2, 3, 8),
            "flow": torch.randn(7, 5),
            "audio": torch.randn(2, 2, 4),
        },
        "lengths": {"rgb": torch.tensor([3, 1])},
        "offsets": {"flow": torch.tensor([0, 3, 7])},
        "max_length": {"flow": 4},
    }


BAD_INPUT: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "bare": (
        {"features": torch.randn(2, 3, 8)},
        TypeError,
        "features must be a mapping from modality .*Tensor",
    ),
    "unknown": (
        {"features": {"smell": torch.ones(1)}},
        ValueError,
        "of the modalities rgb, flow, audio, got 's",
    ),
    "none": (
        {"features": {}, "lengths": None, "offsets": None, "max_length": None},
        ValueError,
        "at least one",
    ),
    "no tensor": (
        {"features": {"rgb": [1.0]}},
        TypeError,
        r"features\['rgb'\] must be a torch.Tensor, got list",
    ),
    "rank": (
        {"features": {"audio": torch.randn(2, 4)}},
        ValueError,
        r"'audio': x must have shape \(B, L, M\)",
    ),
    "in_features": (
        {"features": {"rgb": torch.randn(2, 3, 7)}},
        ValueError,
        "modality 'rgb': x must have 8 f",
    ),
    "dtype": (
        {"features": {"rgb": torch.randn(2, 3, 8).double()}},
        TypeError,
        r"\['rgb'\] must be torch.float32",
    ),
    "integers": (
        {"features": {"rgb": torch.ones(2, 3, 8).long()}},
        TypeError,
        r"\['rgb'\] must be torch.float32",
    ),
    "device": (
        {"features": {"rgb": torch.randn(2, 3, 8, device="meta")}},
        ValueError,
        "device of the model, cpu",
    ),
    "batch": (
        {"features": {"audio": torch.randn(3, 2, 4)}},
        ValueError,
        r"\['audio'\] must have B = 2 sets, as 'r",
    ),
    "packed batch": (
        {"offsets": {"flow": torch.tensor([0, 3])}},
        ValueError,
        r"\['flow'\] must have B = 2 .* 1",
    ),
    "no offsets": ({"offsets": {}}, ValueError, "'flow': x must have shape .* needs offsets"),
    "both": (
        {"lengths": {"flow": torch.ones(2).long()}},
        ValueError,
        "'flow': at most one of lengths, mask and of",
    ),
    "bare lengths": ({"lengths": torch.tensor([3, 1])}, TypeError, "lengths must be a mapping from modality"),
    "unknown lengths": (
        {"lengths": {"smell": torch.tensor([3, 1])}},
        ValueError,
        "lengths must be of the modal",
    ),
    "long": (
        {"lengths": {"rgb": torch.tensor([4, 1])}},
        ValueError,
        "'rgb': lengths must lie in 0...L with L = 3",
    ),
    "falling": ({"offsets": {"flow": torch.tensor([0, 8, 7])}}, ValueError, "'flow': offsets must not fall"),
    "max_length": ({"max_length": {"flow": 4.0}}, TypeError, "max_length must be an int, got float"),
    "position_bias": (
        {"features": {"audio": torch.randn(2, 8, 4)}},
        ValueError,
        "'audio': position_bias must c",
    ),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD_INPUT.values(), ids=list(BAD_INPUT))
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    model = make(dtype=torch.float32)
    arguments = good()
    assert model(**arguments).shape == (2, C)
    for what, new in change.items():
        keep = isinstance(new, dict) and new and isinstance(arguments[what], dict)
        arguments[what] = {**arguments[what], **new} if keep else new
    with pytest.raises(error, match=message):
        model(**arguments)


def test_borders_of_an_absent_modality() -> None:
    model = make(dtype=torch.float32)
    arguments = good()
    del arguments["features"]["flow"]
    with pytest.raises(ValueError, match="offsets must be of modalities in features, got 'flow'"):
        model(**arguments)


BAD_MODELS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "list": ({"modalities": [ClusterConfig(4, 2)]}, TypeError, "modalities must be a mapping"),
    "none": ({"modalities": {}}, ValueError, "at least one entry"),
    "number": ({"modalities": {1: ClusterConfig(4, 2)}}, TypeError, "names of type str, got 1"),
    "dot": ({"modalities": {"a.b": ClusterConfig(4, 2)}}, ValueError, "identifiers as names, got 'a.b'"),
    "empty": ({"modalities": {"": ClusterConfig(4, 2)}}, ValueError, "identifiers as names, got ''"),
    "taken": (
        {"modalities": {"items": ClusterConfig(4, 2)}},
        ValueError,
        "ModuleDict uses itself, got 'items'",
    ),
    "config": (
        {"modalities": {"a": 4}},
        TypeError,
        r"modalities\['a'\] must be a ClusterConfig or a mapping",
    ),
    "unknown": (
        {"modalities": {"a": {"in_features": 4, "cluster_size": 2, "heads": 3}}},
        ValueError,
        r"modalities\['a'\] has unknown 'heads'; known are in_features, cluster_size, weighting, hi",
    ),
    "missing": (
        {"modalities": {"a": {"in_features": 4}}},
        ValueError,
        "must give cluster_size, got in_features",
    ),
    "flag": (
        {"modalities": {"a": {"in_features": 4, "cluster_size": 2, "shift": "false"}}},
        TypeError,
        r"modalities\['a'\]: shift must be a bool, got 'false'",
    ),
    "weighting": (
        {"modalities": {"a": ClusterConfig(4, 2, "fc3")}},
        ValueError,
        r"modalities\['a'\]: weighting must be one of",
    ),
    "size": ({"modalities": {"a": ClusterConfig(4, 0)}}, ValueError, r"\['a'\]: cluster_size must be >= 1"),
    "classes": ({"num_classes": 0}, ValueError, "num_classes must be >= 1, got 0"),
    "bool classes": ({"num_classes": True}, TypeError, "num_classes must be an int, got bool"),
    "dropout": ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1.0"),
    "NaN dropout": ({"dropout": NAN}, ValueError, r"dropout must be in \[0, 1\), got nan"),
    "text dropout": ({"dropout": "0.9"}, TypeError, "dropout must be a number, got str"),
    "multi_label": ({"multi_label": 1}, TypeError, "multi_label must be a bool, got 1"),
    "dtype": ({"dtype": torch.int64}, TypeError, r"modalities\['rgb'\]: dtype must be float16"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD_MODELS.values(), ids=list(BAD_MODELS))
def test_bad_models(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AttentionClusterClassifier(**{"modalities": MODALITIES, "num_classes": C, **change})
