"""The systems that `fastac train` knows: from their settings to a model, trained, loaded, looked at."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import feature_files
import numpy as np
import pytest
import torch
from torch import Tensor

from fastac.cli import main
from fastac.data import FeatureSetDataset
from fastac.data.sampling import EqualIntervals
from fastac.models import (
    AttentionBoostedLSTM,
    AttentionClusterClassifier,
    PoolingClassifier,
    PyramidClassifier,
    VideoClassifier,
)
from fastac.models.base import class_scores
from fastac.training.run import RunError, load_run, open_like_training, save_run
from fastac.training.run_config import ConfigError, dump, load, template, validate
from fastac.training.systems import (
    MODELS,
    AttentionBoostedLSTMSettings,
    AttentionClusterSettings,
    PoolingSettings,
    PyramidSettings,
    SystemSettings,
    system_of,
)

pytestmark = pytest.mark.xdist_group("systems")

SIDE = 12
"""Of the frames."""

SYSTEMS = {
    "attention-cluster": ["model.cluster.cluster_size=3"],
    "attention-boosted-lstm": ["model.hidden_features=8", "model.dense_features=8"],
    "pyramid-attention": [f"model.frame_shape=[1, {SIDE}, {SIDE}]", "model.channels=[4, 4]"],
    "pooling": ["model.pooling=netvlad", "model.cluster_size=2"],
}
"""Settings that keep each system small."""


@dataclass
class Features:
    """What a model is made for."""

    modalities: dict[str, int]
    num_classes: int = 7
    multi_label: bool = False
    lengths: dict[str, float] = field(default_factory=dict)

    def mean_features(self) -> dict[str, Tensor]:
        return {name: torch.ones(m) for name, m in self.modalities.items()}

    def mean_lengths(self) -> dict[str, float]:
        return self.lengths


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Videos of 3 to 7 frames with a square at a class's place, as settings of the data."""
    folder, generator = tmp_path_factory.mktemp("clips"), np.random.default_rng(0)
    videos, rows = {}, ["video,label,split\n"]
    for i in range(24):
        frames = generator.standard_normal((3 + i % 5, SIDE, SIDE), dtype=np.float32)
        frames[i % 3, 4 * (i % 3) : 4 * (i % 3) + 4] += 4
        videos[f"clip{i:02}"] = {"frames": frames.reshape(len(frames), -1)}
        rows.append(f"clip{i:02},{'abc'[i % 3]},{'train' if i % 4 else 'validation'}\n")
    labels = folder / "labels.csv"
    labels.write_text("".join(rows))
    features = feature_files.write_npy(folder / "features", videos)
    return [f"data.features={features}", f"data.labels={labels}"]


@pytest.mark.parametrize("system", MODELS)
def test_a_system_is_trained_and_used_by_the_command_line(
    system: str, clips: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    settings = [
        f"model.system={system}",
        *SYSTEMS[system],
        "training.epochs=2",
        "training.batch_size=6",
        "training.tensorboard=false",
        "model.dropout=0",
    ]
    assert main(["train", *clips, *settings, "--output", str(run)]) == 0, capsys.readouterr().err
    assert json.loads((run / "model.json").read_text())["system"] == system
    opened = load_run(run, "last")
    assert type(opened.model) is MODELS[system]
    assert opened.state["values"]["validation_accuracy"] > 0
    assert opened.modalities == {"frames": SIDE * SIDE}
    data = open_like_training(opened, None, None)
    batch = data.collate([data[number] for number in range(5)])
    with torch.no_grad():
        scores = class_scores(opened.model(**batch.inputs()))
    assert scores.shape == (5, 3)
    assert scores.isfinite().all()
    again = ["train", "--resume", "--output", str(run), "training.epochs=3"]
    assert main(again) == 0, capsys.readouterr().err
    assert load_run(run, "last").state["epoch"] == 3
    assert main(["eval", str(run)]) == 0
    capsys.readouterr()
    assert main(["predict", str(run), clips[0].partition("=")[2], "--top", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 24
    assert (run / "attention.png").is_file() == (system != "pooling")


@pytest.mark.parametrize("system", ["attention-boosted-lstm", "pyramid-attention"])
def test_a_system_is_trained_in_bfloat16(
    system: str, clips: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [f"model.system={system}", *SYSTEMS[system], "training.epochs=1", "training.accumulation=2"]
    precision = ["training.precision=bfloat16", "training.batch_size=6", "training.tensorboard=false"]
    assert main(["train", *clips, *settings, *precision, "--output", str(tmp_path)]) == 0
    assert math.isfinite(load_run(tmp_path, "last").state["values"]["train_loss"]), capsys.readouterr().err


def test_what_has_no_attention_is_not_drawn(
    clips: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["model.system=pooling", "training.epochs=1", "training.tensorboard=false"]
    assert main(["train", *clips, *settings, "--output", str(tmp_path)]) == 0
    assert "no attention weights" in capsys.readouterr().out
    assert main(["show", str(tmp_path), "--output", str(tmp_path / "x.png")]) == 1
    assert "no attention weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        (AttentionClusterSettings(), AttentionClusterClassifier),
        (AttentionBoostedLSTMSettings(sequence_length=4), AttentionBoostedLSTM),
        (PoolingSettings(pooling="sdpa", cluster_size=3), PoolingClassifier),
        (PyramidSettings(frame_shape=[1, 3, 4], channels=[4]), PyramidClassifier),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
@pytest.mark.parametrize("multi_label", [False, True])
def test_a_model_of_the_settings(
    settings: SystemSettings, kind: type[VideoClassifier], multi_label: bool
) -> None:
    model = settings.build(Features({"rgb": 12}, multi_label=multi_label))
    assert type(model) is kind
    assert model.dimensions == {"rgb": 12}
    assert (model.num_classes, model.multi_label) == (7, multi_label)
    again = kind.from_config(json.loads(json.dumps(model.config)))
    again.load_state_dict(model.state_dict())
    x = torch.randn(2, 5, 12)
    model.eval()
    again.eval()
    assert torch.equal(class_scores(model(x)), class_scores(again(x)))
    assert MODELS[system_of(model)] is kind


def test_every_system_has_settings_and_a_name() -> None:
    for system, settings in SYSTEMS.items():
        config = load(None, ["data.features=f", "data.labels=l", f"model.system={system}", *settings])
        assert config.model.system == system
    assert SYSTEMS.keys() == MODELS.keys()
    with pytest.raises(TypeError, match=r"model must be one of AttentionClusterClassifier, .*, got Linear"):
        system_of(torch.nn.Linear(1, 1))  # type: ignore[arg-type]


def test_clusters_of_single_modalities() -> None:
    settings = AttentionClusterSettings.model_validate(
        {"cluster": {"cluster_size": 2}, "clusters": {"audio": {"cluster_size": 5, "weighting": "fc2"}}}
    )
    model = settings.build(Features({"rgb": 4, "audio": 3}, multi_label=True))
    assert isinstance(model, AttentionClusterClassifier)
    assert model.config["modalities"]["rgb"]["cluster_size"] == 2
    assert model.config["modalities"]["audio"]["cluster_size"] == 5
    assert model.config["modalities"]["audio"]["weighting"] == "fc2"
    assert model.fc.weight.shape == (7, 2 * 4 + 5 * 3)
    assert torch.equal(model.get_buffer("mean_rgb"), torch.ones(4))
    with pytest.raises(ValueError, match=r"model\.clusters must be of the data's modalities rgb, got audio"):
        settings.build(Features({"rgb": 4}))


def test_the_sequence_is_as_long_as_the_mean_video() -> None:
    settings = AttentionBoostedLSTMSettings()
    model = settings.build(Features({"rgb": 4}, lengths={"rgb": 6.6}))
    assert isinstance(model, AttentionBoostedLSTM)
    assert model.sequence_length == 6
    with pytest.raises(ValueError, match="no video has the modality rgb"):
        settings.build(Features({"rgb": 4}, lengths={"rgb": math.nan}))


def test_mean_lengths_are_those_of_what_is_taken(tmp_path: Path) -> None:
    videos = {
        name: {"rgb": np.ones((length, 2), np.float32)} for name, length in (("a", 2), ("b", 9), ("c", 4))
    }
    videos["a"]["audio"] = np.ones((5, 1), np.float32)
    path = feature_files.write_npy(tmp_path / "features", videos)
    assert FeatureSetDataset(path).mean_lengths() == {"audio": 5.0, "rgb": 5.0}
    sampled = FeatureSetDataset(path, sampling={"rgb": EqualIntervals(3)}, check="none")
    assert sampled.mean_lengths() == {"audio": 5.0, "rgb": (2 + 3 + 3) / 3}
    nothing = FeatureSetDataset(path, modalities={"rgb": 2, "flow": 3})
    assert math.isnan(nothing.mean_lengths()["flow"])


@pytest.mark.parametrize("system", ["attention-boosted-lstm", "pooling", "pyramid-attention"])
def test_one_modality_only(system: str) -> None:
    config = load(None, ["data.features=f", "data.labels=l", f"model.system={system}", *SYSTEMS[system]])
    with pytest.raises(
        ValueError, match=rf"data\.modalities must name one modality for {system}, .*rgb, audio"
    ):
        config.model.build(Features({"rgb": 4, "audio": 3}))


def test_frames_of_another_shape() -> None:
    settings = PyramidSettings(frame_shape=[1, 4, 4])
    with pytest.raises(ValueError, match="must have the 12 values of a feature, got 1 x 4 x 4 = 16"):
        settings.build(Features({"rgb": 12}))


# The configuration


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"system": "cnn-lstm-attention"},
            "model.system must be one of attention-cluster, attention-boosted-lstm, pyramid-attention, "
            "pooling, got 'cnn-lstm-attention'",
        ),
        ({"system": None}, "model.system must be one of .*, got null"),
        ({"system": ["pooling"]}, "model.system must be one of .*, got "),
        (
            {"system": "attention-boosted-lstm", "position": "behind"},
            "model.position must be 'none', 'before' or 'after', got 'behind'",
        ),
        (
            {"system": "pooling", "cluster": {}},
            "model.cluster is unknown; known are system, pooling, cluster_size, dropout",
        ),
        ({"cluster": {"sise": 3}}, "model.cluster.sise is unknown; known are cluster_size, weighting"),
        ({"position": "after"}, "model.position is unknown; known are system, dropout, cluster, clusters"),
        ({"system": "pyramid-attention"}, "model.frame_shape is needed and not given"),
        (
            {"system": "pyramid-attention", "frame_shape": [1, 2]},
            "model.frame_shape must have at least 3 items, got",
        ),
        ("pooling", "model must be a mapping, got 'pooling'"),
    ],
)
def test_wrong_settings_of_a_model(content: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate({"data": {"features": "f", "labels": "l"}, "model": content})


def test_a_sequence_has_one_length() -> None:
    """Of a test video with more frames than T the last ones would never be seen."""
    data = ["data.features=f", "data.labels=l", "model.system=attention-boosted-lstm"]
    message = "data.test_features must be data.train_features for attention-boosted-lstm, got null and 15"
    with pytest.raises(ConfigError, match=message):
        load(None, [*data, "data.train_features=15"])
    with pytest.raises(ConfigError, match="got 20 and 15"):
        load(None, [*data, "data.train_features=15", "data.test_features=20"])
    load(None, [*data, "data.train_features=15", "data.test_features=15"])
    load(None, [*data[:2], "data.train_features=15", "data.test_features=20"])


def test_dump_and_load_keep_the_system(tmp_path: Path) -> None:
    data = ["data.features=f", "data.labels=l"]
    config = load(None, [*data, "model.system=pooling", "model.pooling=netvlad"])
    path = tmp_path / "config.yaml"
    path.write_text(dump(config))
    assert load(path).model == config.model
    assert isinstance(load(None, data).model, AttentionClusterSettings)


def test_the_template_shows_every_system() -> None:
    text = template()
    for system in MODELS:
        assert f"system: {system}" in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_folder_of_another_system_is_not_resumed(
    clips: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["model.system=pooling", "training.epochs=1", "training.tensorboard=false"]
    assert main(["train", *clips, *settings, "--output", str(tmp_path)]) == 0
    capsys.readouterr()
    other = ["model.system=attention-cluster", "training.epochs=1", "training.tensorboard=false"]
    assert main(["train", "--resume", *clips, *other, "--output", str(tmp_path)]) == 2
    assert "model.pooling is unknown; known are system, dropout, cluster" in capsys.readouterr().err
    config = tmp_path / "other.yaml"
    config.write_text("model: {system: attention-cluster}")
    asked = ["--config", str(config), *clips, *other]
    assert main(["train", "--resume", *asked, "--output", str(tmp_path)]) == 1
    assert "model.system was 'pooling', is 'attention-cluster'" in capsys.readouterr().err
    assert json.loads((tmp_path / "model.json").read_text())["system"] == "pooling"


def test_a_model_without_a_name_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="model must be one of"):
        save_run(tmp_path, torch.nn.Linear(1, 1), ["a"], None)  # type: ignore[arg-type]


@pytest.mark.parametrize("system", ["resnet", None, ["pooling"]])
def test_a_run_of_an_unknown_system(system: object, tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text(json.dumps({"system": system, "class_names": [], "model": {}}))
    with pytest.raises(RunError, match="must describe one of the systems attention-cluster, "):
        load_run(tmp_path)
