"""`fastac.models.classifier`: configuration, state, and copies."""

from __future__ import annotations

import copy
import io
import json
import pickle
from typing import Any

import pytest
import torch
from classifier_helpers import MISSING, MODALITIES, SIZES, arranged, make, make_videos
from ruamel.yaml import YAML

from fastac.models.classifier import AttentionClusterClassifier


def test_state_dict_keys_are_stable() -> None:
    assert {key: tuple(t.shape) for key, t in make().state_dict().items()} == {
        "mean_rgb": (8,),
        "mean_flow": (5,),
        "mean_audio": (4,),
        "means_known": (3,),
        "clusters.rgb.weight": (3, 8),
        "clusters.rgb.alpha": (3,),
        "clusters.rgb.beta": (3,),
        "clusters.flow.hidden_weight": (2, 4, 5),
        "clusters.flow.hidden_bias": (2, 4),
        "clusters.flow.score_weight": (2, 4),
        "clusters.audio.tanh_weight": (3, 4),
        "clusters.audio.gate_weight": (3, 4),
        "clusters.audio.score_weight": (1, 3),
        "clusters.audio.position_bias": (1, 7),
        "clusters.audio.alpha": (1,),
        "clusters.audio.beta": (1,),
        "fc.weight": (6, 38),
        "fc.bias": (6,),
    }


def test_state_dict_carries_means_and_whether_they_are_known() -> None:
    model = make(means=False)
    model.set_means({"rgb": torch.randn(8), "flow": torch.randn(5)})
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    loaded = make(means=False)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    assert loaded.means_known.tolist() == [True, True, False]
    videos = make_videos(model, {**SIZES, "flow": (0, 0, 1, 5)})
    arguments = arranged(videos, "packed")
    assert torch.equal(loaded(**arguments), model(**arguments))
    with pytest.raises(ValueError, match="modality 'audio' is missing"):
        loaded(**arranged(make_videos(model, MISSING), "packed"))


@pytest.mark.parametrize("through", ["dict", "json", "sorted json", "yaml"])
def test_config_round_trip(through: str) -> None:
    model = make(dropout=0.25, multi_label=True)
    config = model.config
    if through == "json":
        config = json.loads(json.dumps(config))
    elif through == "sorted json":
        config = json.loads(json.dumps(config, sort_keys=True))
        assert list(config["modalities"]) != list(MODALITIES)
    elif through == "yaml":
        stream = io.StringIO()
        YAML(typ="safe", pure=True).dump(config, stream)  # sorts
        config = YAML(typ="safe", pure=True).load(stream.getvalue())
        assert list(config["modalities"]) != list(MODALITIES)
    rebuilt = AttentionClusterClassifier.from_config(config, dtype=torch.float64).eval()
    assert rebuilt.config == model.config
    assert list(rebuilt.modalities) == list(MODALITIES)
    assert rebuilt.modalities == model.modalities
    rebuilt.load_state_dict(model.state_dict())
    arguments = arranged(make_videos(model, MISSING), "packed")
    assert torch.equal(rebuilt(**arguments), model(**arguments))


def test_config_needs_little() -> None:
    config = {"modalities": {"b": {"in_features": 4, "cluster_size": 2}}, "num_classes": 3}
    model = AttentionClusterClassifier.from_config(config)
    assert model.config == {
        "modalities": {
            "b": {
                "in_features": 4,
                "cluster_size": 2,
                "weighting": "fc1",
                "hidden_features": None,
                "shared_hidden": False,
                "position_bias": None,
                "shift": True,
                "eps": 1e-12,
            }
        },
        "order": ["b"],
        "num_classes": 3,
        "dropout": 0.9,
        "multi_label": False,
    }
    assert config == {"modalities": {"b": {"in_features": 4, "cluster_size": 2}}, "num_classes": 3}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"momentum": 1},
            ValueError,
            "config has unknown 'momentum'; known are modalities, order, num_classes",
        ),
        ({"num_classes": None}, ValueError, "config must give num_classes, got modalities"),
        ({"order": ["a"]}, ValueError, r"order must name each of a, b once, got \['a'\]"),
        ({"order": "ab"}, TypeError, "order must be a list of names, got str"),
        ({"order": ["a", 1]}, ValueError, r"order must name each of a, b once"),
        ({"order": 2}, TypeError, "order must be a list of names, got int"),
        ({"modalities": ["a"]}, TypeError, "modalities must be a mapping"),
    ],
)
def test_bad_config(change: dict[str, Any], error: type[Exception], message: str) -> None:
    cluster = {"in_features": 4, "cluster_size": 2}
    config = {"modalities": {"a": cluster, "b": cluster}, "num_classes": 3, "order": ["b", "a"], **change}
    config = {key: value for key, value in config.items() if value is not None}
    with pytest.raises(error, match=message):
        AttentionClusterClassifier.from_config(config)
    with pytest.raises(TypeError, match="config must be a mapping, got list"):
        AttentionClusterClassifier.from_config([])  # type: ignore[arg-type]


def test_copies_and_pickles() -> None:
    model = make()
    arguments = arranged(make_videos(model, MISSING), "packed")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(**arguments), model(**arguments))


def test_reset_parameters_keeps_the_means() -> None:
    model = make()
    before = copy.deepcopy(model.state_dict())
    torch.nn.init.ones_(model.clusters["audio"].position_bias)
    model.reset_parameters()
    same = {key for key, tensor in model.state_dict().items() if torch.equal(tensor, before[key])}
    assert same == {"mean_rgb", "mean_flow", "mean_audio", "means_known"}


def test_device_dtype_and_repr() -> None:
    model = make(means=False, device="meta", dtype=torch.bfloat16)
    assert {str(t.device) for t in model.state_dict().values()} == {"meta"}
    assert {t.dtype for k, t in model.state_dict().items() if k != "means_known"} == {torch.bfloat16}
    assert make().half().means_known.dtype == torch.bool
    text = repr(make(multi_label=True))
    assert "num_classes=6, multi_label=True" in text
    assert "(rgb): AttentionCluster(8, 3, weighting='fc1')" in text
