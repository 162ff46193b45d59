"""A run's folder: written by training, opened again, and not taken for what it is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import feature_files
import numpy as np
import pytest
import torch

from fastac.data.feature_sets import FeatureSetDataset
from fastac.data.problems import DataProblemsError
from fastac.data.sampling import RandomSampling
from fastac.training import CheckpointError, Trainer, evaluate
from fastac.training.run import (
    CONFIG,
    MODEL,
    PROBLEMS,
    RunError,
    check_model,
    check_settings,
    initial_model,
    is_run,
    load_run,
    open_data,
    open_like_training,
    problems_of,
    save_problems,
    save_run,
)
from fastac.training.run_config import ConfigError, RunConfig, load


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """Twelve videos, some of them without audio; ten to train on."""
    videos = feature_files.make_videos()
    features = feature_files.write_npy(tmp_path / "features", videos)
    labels = tmp_path / "labels.csv"
    rows = [
        f"{name},{'ab'[i % 2]},{'validation' if i % 6 == 5 else 'train'}" for i, name in enumerate(videos)
    ]
    labels.write_text("video,label,split\n" + "\n".join(rows) + "\n")
    settings = ["training.epochs=1", "training.tensorboard=false", "model.cluster.cluster_size=3"]
    return load(None, [f"data.features={features}", f"data.labels={labels}", *settings])


def trained(config: RunConfig, directory: Path) -> Any:
    train, validation = open_data(config)
    model = initial_model(config, train)
    save_run(directory, model, train.class_names, config)
    Trainer(model, train, validation, config.training, directory=directory, show_progress=False).fit()
    return model


def changed(config: RunConfig, *overrides: str) -> RunConfig:
    data = [f"data.features={config.data.features}", f"data.labels={config.data.labels}"]
    settings = ["training.epochs=1", "training.tensorboard=false", "model.cluster.cluster_size=3"]
    return load(None, [*data, *settings, *overrides])


def test_a_run_is_opened_as_it_was_trained(config: RunConfig, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert not is_run(run)
    model = trained(config, run)
    assert is_run(run)
    opened = load_run(str(run), "last")
    assert opened.config == config
    assert opened.class_names == ["a", "b"]
    assert opened.modalities == {"audio": 3, "rgb": 6}
    assert opened.state["epoch"] == 1
    assert not opened.model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(opened.model.state_dict()[name], tensor), name


def test_a_run_is_evaluated_as_in_its_training(config: RunConfig, tmp_path: Path) -> None:
    settings = ["training.evaluation_batch_size=3", "training.workers=1", "training.precision=bfloat16"]
    other = changed(config, *settings)
    trained(other, tmp_path)
    run = load_run(tmp_path)
    assert run.evaluation == {"batch_size": 3, "workers": 1, "precision": "bfloat16"}
    _, validation = open_data(other)
    assert validation is not None
    assert evaluate(run.model, validation, **run.evaluation)["loss"] == run.state["values"]["validation_loss"]
    with pytest.raises(ValueError, match="which must be best or last, got 'first'"):
        load_run(tmp_path, "first")
    (tmp_path / "config.yaml").unlink()
    assert load_run(tmp_path).evaluation == {"batch_size": 1024, "workers": 0, "precision": "float32"}


def test_the_initial_model_depends_on_the_seed_only(config: RunConfig) -> None:
    train, _ = open_data(config)
    first, second = (initial_model(config, train).state_dict() for _ in range(2))
    other = initial_model(changed(config, "training.seed=2"), train).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["fc.weight"], other["fc.weight"])
    torch.testing.assert_close(first["mean_audio"], train.mean_features()["audio"])


def test_training_and_validation_are_sampled_as_the_settings_say(config: RunConfig) -> None:
    train, validation = open_data(changed(config, "data.train_features={rgb: 2}", "data.test_features=4"))
    assert validation is not None
    assert validation.class_names == train.class_names
    for data, most in ((train, {"rgb": 2, "audio": 7}), (validation, {"rgb": 4, "audio": 4})):
        for video in (data[number] for number in range(len(data))):
            assert all(len(x) <= most[name] for name, x in video.features.items())
    _, nothing = open_data(changed(config, "data.validation_split=null"))
    assert nothing is None


def test_other_features_are_opened_like_those_of_the_training(config: RunConfig, tmp_path: Path) -> None:
    trained(config, tmp_path / "run")
    run = load_run(tmp_path / "run")
    silent = feature_files.write_npz(tmp_path / "npz", {"x": {"rgb": np.ones((3, 6), np.float32)}})
    data = open_like_training(run, silent, None)
    assert data.modalities == {"audio": 3, "rgb": 6}
    assert data.labels is None
    labelled = open_like_training(run, None, config.data.labels, split="validation")
    assert len(labelled) == 2
    assert labelled.class_names == ["a", "b"]
    config.data.features.rename(tmp_path / "elsewhere")
    with pytest.raises(RunError, match=r"are not at .*features any more: --features must say where"):
        open_like_training(run, None, None)
    assert run.config is not None
    run.config = None
    with pytest.raises(RunError, match="was not trained by fastac train"):
        open_like_training(run, None, None)


def test_settings_that_may_change_when_a_run_is_resumed(config: RunConfig, tmp_path: Path) -> None:
    train, _ = open_data(config)
    save_run(tmp_path / "run", initial_model(config, train), train.class_names, config)
    check_settings(tmp_path / "run", config)
    check_settings(tmp_path / "run", changed(config, "training.epochs=9", "training.workers=2"))
    check_settings(tmp_path / "run", changed(config, "data.features=elsewhere", "data.in_memory=true"))
    different = changed(config, "training.seed=2", "model.clusters.audio.shift=false")
    with pytest.raises(RunError, match=r"other settings: model\.clusters\.audio.*training\.seed was 1, is 2"):
        check_settings(tmp_path / "run", different)
    with pytest.raises(RunError, match="it is not a run of fastac train"):
        check_settings(tmp_path, config)


def test_a_run_of_other_classes_or_another_model_is_not_resumed(config: RunConfig, tmp_path: Path) -> None:
    train, _ = open_data(config)
    model = initial_model(config, train)
    check_model(tmp_path / "none", model, ["a", "b"])  # killed before it was written
    save_run(tmp_path / "run", model, ["a", "b"], config)
    check_model(tmp_path / "run", model, ["a", "b"])
    with pytest.raises(RunError, match="other classes: they were a, b, are b, a"):
        check_model(tmp_path / "run", model, ["b", "a"])
    other = initial_model(changed(config, "model.cluster.shift=false"), train)
    with pytest.raises(RunError, match="another model"):
        check_model(tmp_path / "run", other, ["a", "b"])


def damage_description(key: str, value: Any) -> Any:
    def damage(run: Path) -> None:
        content = json.loads((run / MODEL).read_text())
        (run / MODEL).write_text(json.dumps({**content, key: value}))

    return damage


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda run: (run / MODEL).unlink(), RunError, "must be the folder of a run, it has no model.json"),
        (lambda run: (run / MODEL).write_text("{"), RunError, "model.json cannot be read"),
        (lambda run: (run / MODEL).write_text("[1]"), RunError, r"must describe one of .*, got \[1\]"),
        (damage_description("system", "x"), RunError, "must describe one of .*, got 'x'"),
        (damage_description("model", None), RunError, "must have model, a mapping, got None"),
        (damage_description("model", {"x": 1}), RunError, "describes no model: "),
        (damage_description("class_names", "ab"), RunError, "must have class_names, a list of names"),
        (damage_description("class_names", ["a"]), RunError, "must name the 2 classes of its model, got 1"),
        (lambda run: (run / CONFIG).write_text("x: 1"), ConfigError, r"config\.yaml is damaged: "),
        (lambda run: (run / "checkpoints/best").unlink(), RunError, "has no best checkpoint"),
        (
            lambda run: (run / "checkpoints/best/model.safetensors").write_bytes(b"x"),
            CheckpointError,
            "cannot be read",
        ),
    ],
)
def test_a_damaged_run(
    config: RunConfig, tmp_path: Path, damage: Any, error: type[Exception], message: str
) -> None:
    trained(config, tmp_path / "run")
    damage(tmp_path / "run")
    with pytest.raises(error, match=message):
        load_run(tmp_path / "run")


def test_problems_are_written_once_each_and_removed_when_they_are_gone(
    config: RunConfig, tmp_path: Path
) -> None:
    train, validation = open_data(config)
    save_problems(tmp_path, problems_of(train, validation))
    assert not (tmp_path / PROBLEMS).exists()
    broken = next((config.data.features / "rgb").rglob("*.npy"))
    content = broken.read_bytes()
    broken.write_bytes(b"x")
    both = changed(config, "data.train_split=null")
    problems = problems_of(open_data(both)[0], open_data(both)[0], None)
    save_problems(tmp_path, problems)
    text = (tmp_path / PROBLEMS).read_text()
    assert len(problems) == text.count("\n") - 1
    assert text.count(str(broken)) == 1
    broken.write_bytes(content)
    save_problems(tmp_path, problems_of(open_data(both)[0]))
    assert not (tmp_path / PROBLEMS).exists()


def test_the_problems_of_both_splits_are_in_one_error(config: RunConfig) -> None:
    train, validation = open_data(config)
    assert validation is not None
    rgb = config.data.features / "rgb"
    (rgb / f"{train.names[0]}.npy").write_bytes(b"x")
    np.save(rgb / f"{validation.names[0]}.npy", np.ones((4, 7), np.float32))
    np.save(rgb / f"{validation.names[1]}.npy", np.ones((4, 7), np.float32))
    with pytest.raises(DataProblemsError, match=r"^training: (.*\n)*validation: ") as caught:
        open_data(changed(config, "data.on_error=raise"))
    broken = {(p.video, p.what) for p in caught.value.problems if p.modality}
    wide = {(name, "wrong dimension") for name in validation.names}  # than the training set's
    assert broken == {(train.names[0], "unreadable"), *wide}
    assert all(str(problem) in str(caught.value) for problem in caught.value.problems)


def test_labels_and_splits_of_both_sets_are_checked_at_once(config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(DataProblemsError, match=r"got 'x'\n.*got 'y'$"):
        open_data(changed(config, "data.train_split=x", "data.validation_split=y"))
    with pytest.raises(DataProblemsError) as caught:
        open_data(changed(config, "data.class_names=[a]"))
    assert len(caught.value.problems) == 6
    with pytest.raises(DataProblemsError, match="no column 'label'"):
        broken = tmp_path / "broken.csv"
        broken.write_text("video\nv\n")
        open_data(changed(config, f"data.labels={broken}"))
    nowhere = ["data.features=nowhere", "data.labels=nowhere.csv"]
    with pytest.raises(DataProblemsError, match=r"none at .*nowhere\.csv\nfeatures: .*nothing at .*nowhere$"):
        open_data(changed(config, *nowhere))
    with pytest.raises(FileNotFoundError, match=r"none at .*nowhere\.csv"):
        open_data(changed(config, nowhere[1]))


def test_names_of_modalities_are_checked_before_features_are_read(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FeatureSetDataset, "_scan", None)
    settings = ["data.train_features={flow: 2}", "data.test_features={rgb: 2, x: 1}"]
    with pytest.raises(ValueError, match="data's modalities") as caught:
        open_data(changed(config, *settings, "model.clusters.y.shift=false"))
    assert str(caught.value).splitlines() == [
        "data.train_features must be of the data's modalities audio, rgb, got flow",
        "data.test_features must be of the data's modalities audio, rgb, got x",
        "model.clusters must be of the data's modalities audio, rgb, got y",
    ]
    with pytest.raises(ValueError, match=r"data's modalities audio, got rgb, x$"):
        open_data(changed(config, settings[1], "data.modalities=[audio]"))
    with pytest.raises(DataProblemsError, match="no usable entry of flow"):
        open_data(changed(config, "data.modalities=[rgb, flow]"))
    with pytest.raises(ValueError, match="sampling must name some of the modalities audio, rgb, got 'x'"):
        FeatureSetDataset(config.data.features, sampling={"x": RandomSampling(2)})
