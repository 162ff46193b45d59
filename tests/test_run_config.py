"""The configuration of `fastac train`: YAML, overrides, and every mistake named."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastac.training.run_config import ConfigError, dump, load, template, validate

DATA = "data: {features: f, labels: l.csv}\n"
OVERRIDES = ["data.features=f", "data.labels=l.csv"]


def written(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_are_the_paper_s(tmp_path: Path) -> None:
    config = load(written(tmp_path, DATA))
    assert config.model.dropout == 0.9
    assert (config.training.optimizer.name, config.training.optimizer.lr) == ("rmsprop", 1e-3)
    assert config.training.clip_norm == 5.0


def test_paths_are_relative_to_what_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, here = tmp_path / "configs", tmp_path / "here"
    folder.mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = written(folder, "data: {features: ../f, labels: l.csv}")
    config = load(path)
    assert config.data.features == tmp_path / "f"  # without "..": the folder of the file may go
    assert config.data.labels == folder / "l.csv"
    config = load(path, ["data.features=g", "data.labels=~/l.csv"])
    assert config.data.features == here / "g"
    assert config.data.labels == tmp_path / "home" / "l.csv"


def test_overrides_win_and_are_yaml(tmp_path: Path) -> None:
    path = written(tmp_path, DATA + "training: {epochs: 3, batch_size: 7}\nmodel:\n")
    config = load(
        path,
        [
            "training.epochs=5",
            "training.optimizer.lr=1e-3",
            "model.clusters.audio.cluster_size=4",
            "data.train_features={rgb: 3}",
            "data.modalities=[rgb, audio]",
            "data.multi_label=true",
        ],
    )
    assert (config.training.epochs, config.training.batch_size) == (5, 7)
    assert config.training.optimizer.lr == 1e-3
    assert config.model.clusters["audio"].cluster_size == 4
    assert config.data.train_features == {"rgb": 3}
    assert config.data.modalities == ["rgb", "audio"]
    assert config.data.multi_label is True


def test_a_whole_section_is_a_mapping_on_the_command_line() -> None:
    config = load(None, [*OVERRIDES, "model.clusters={audio: {cluster_size: 4}}"])
    assert config == load(None, [*OVERRIDES, "model.clusters.audio.cluster_size=4"])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("007", "007"),
        ("1.0", "1.0"),
        ("a: b", "a: b"),
        ("[x", "[x"),
        ("'null'", "null"),
        ("null", None),
        ("", None),
    ],
)
def test_a_text_on_the_command_line_needs_no_quotes(text: str, value: str | None) -> None:
    assert load(None, [*OVERRIDES, f"data.train_split={text}"]).data.train_split == value


def test_dump_and_load_give_the_same(tmp_path: Path) -> None:
    names = ["a", "no", "null", "1e-3", "007", "a: b", "#x", "größe", " lead", "2020-01-01", "~", "'", "- x"]
    config = load(None, [*OVERRIDES, "model.clusters.audio.weighting=fc2", "training.clip_norm=null"])
    config = config.model_copy(update={"data": config.data.model_copy(update={"class_names": names})})
    assert load(written(tmp_path, dump(config))) == config


def test_the_template_has_every_default(tmp_path: Path) -> None:
    text = template()
    assert max(map(len, text.splitlines())) <= 80
    config = load(written(tmp_path, text))
    expected = validate({"data": {"features": tmp_path / "<features>", "labels": tmp_path / "<labels>"}})
    assert config == expected
    for line in text.splitlines():  # each name is explained, but for sections
        name, _, comment = line.partition("#")
        assert comment.strip() or name.strip().endswith(":"), line


def test_sections_may_be_empty(tmp_path: Path) -> None:
    text = DATA + "training:\n  optimizer:\nmodel:\n  cluster:\n  clusters:\n"
    assert load(written(tmp_path, text)) == load(written(tmp_path, DATA))


def test_all_mistakes_are_named_at_once() -> None:
    wrong = {
        "training.epochs=0": "training.epochs must be greater than or equal to 1, got 0",
        "training.optimizer.lr=fast": "training.optimizer.lr must be a number",
        "training.optimizer.name=adagrad": "training.optimizer.name must be 'rmsprop', 'adam'",
        "training.class_weights=1": "training.class_weights must be true or false, got 1",
        "training.batch_size=yes": "training.batch_size must be an integer, got 'yes'",
        "training.clip_norm=.inf": "training.clip_norm must be a finite number",
        "model.dropout=1": "model.dropout must be less than 1, got 1",
        "model.cluster.weighting=fc3": "model.cluster.weighting must be 'fc1', 'fc2', 'gated' or",
        "model.clusters.audio=5": "model.clusters.audio must be a mapping, got 5",
        "data.train_features=x": "data.train_features must be an integer or be a mapping, got 'x'",
        "data.test_features={rgb: 0}": "data.test_features.rgb must be greater than or equal to 1, got 0",
        "data.class_names=[a, 2]": "data.class_names.1 must be text, got 2",
        "data.features=null": "data.features must be a path, got null",
        "data.feature=x": "data.feature is unknown; known are features, labels, train_split",
        "model.clusters.rgb.size=3": "model.clusters.rgb.size is unknown; known are cluster_size, weighting",
        "colour=red": "colour is unknown; known are data, model, training",
    }
    with pytest.raises(ConfigError) as raised:
        load(None, [*OVERRIDES, *wrong])
    lines = str(raised.value).splitlines()
    assert len(lines) == len(wrong)
    for expected in wrong.values():
        assert any(line.startswith(expected) for line in lines), expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data:\n\tfeatures: x\n", r"not YAML: line 2, column 1: .*'\\t'"),
        (DATA + "training:\n  epochs: 1\n  epochs: 2\n", 'line 4, column 3: .*duplicate key "epochs"'),
        (DATA + "training: {epochs: 2020-99-99}", "not YAML: ValueError: month"),
        (DATA + "training: {epochs: !!python/name:os.system 3}", "could not determine a constructor"),
        ("[" * 600, "not YAML: RecursionError"),
        ("- 1\n", r"must be a mapping from names to settings, got \[1\]"),
        ("hello", "must be a mapping from names to settings, got 'hello'"),
        ("data: 5", "data must be a mapping, got 5"),
        ("1: 2", "1 must have text as its name"),
        ("", "data.features is needed and not given\ndata.labels is needed and not given"),
        (
            DATA + "training: {optimizer: {name: adam, momentum: 0.9}}",
            "training.optimizer must have momentum 0",
        ),
        (DATA + f"training: {{epochs: {'x' * 500}}}", r"got 'x{79}\.\.\.$"),
    ],
)
def test_a_wrong_file(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(written(tmp_path, text))


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"config\.yaml cannot be read: .*utf-8"):
        load(path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.epochs", "must be name.of.setting=value, got 'training.epochs'"),
        ("training..epochs=3", "must be name.of.setting=value"),
        ("=3", "must be name.of.setting=value"),
        ("training.epochs=[1", r"value of 'training.epochs=\[1' is not YAML"),
        ("data.features.x=1", "'data.features.x=1': features has no settings below it, it is 'f'"),
    ],
)
def test_a_wrong_override(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(None, [*OVERRIDES, override])
