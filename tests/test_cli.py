"""The command line, as a user meets it: results, messages, exit statuses, no traceback for a mistake."""

from __future__ import annotations

import contextlib
import csv
import importlib
import io
import json
import logging
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import feature_files
import numpy as np
import pytest
from cli_helpers import Data, fastac, make_data, make_run, start

from fastac import _native, backends
from fastac.cli import common, logging_to_stderr
from fastac.training import Trainer
from fastac.training.run_config import template

pytestmark = pytest.mark.xdist_group("cli")  # what is trained once is shared
COMMANDS = ("train", "eval", "predict", "show", "report", "info")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tests must not change it."""
    return make_run(data, tmp_path_factory.mktemp("runs") / "first")


# Help


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)], ids=str)
def test_help_fits_a_terminal(command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result = fastac(*command, "--help")
    assert result.status == 0
    assert result.out.startswith("Usage: fastac")
    assert max(map(len, result.out.splitlines())) <= 80
    assert "`" not in result.out


def test_print_config_is_a_configuration(tmp_path: Path) -> None:
    result = fastac("train", "--print-config")
    assert (result.status, result.out, result.err) == (0, template(), "")


def test_version_and_info() -> None:
    assert fastac("--version").out.startswith("fastac, version ")
    assert "FASTAC_" in fastac("info").out


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        (
            "FASTAC_BACKEND",
            "foo",
            "FASTAC_BACKEND: backend must be one of cuda, triton, cpu, reference, got 'foo'",
        ),
        ("FASTAC_BACKEND", "cuda", "FASTAC_BACKEND: backend 'cuda' cannot be used: "),
        ("FASTAC_CPU_ISA", "foo", "FASTAC_CPU_ISA must name an instruction set that this processor runs ("),
    ],
)
def test_an_environment_variable_of_no_use(
    variable: str, value: str, message: str, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable == "FASTAC_CPU_ISA" and not _native.available:
        pytest.skip("the native library is not built")
    monkeypatch.setenv(variable, value)
    out, err = (
        process := start("train", *data.settings, "--device", "cpu", "--output", tmp_path / "new")
    ).communicate()
    assert (process.returncode, out) == (2, "")
    assert err.startswith(f"Error: {message}") and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []  # nothing was begun
    out, err = (process := start("info")).communicate()
    assert (process.returncode, err) == (0, "")
    assert ("(forced: foo, which is no backend)" in out) == ((variable, value) == ("FASTAC_BACKEND", "foo"))


def test_a_backend_that_cannot_run_a_call(run: Path, data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "LACKING", {"attention_cluster": ("reference",)})
    monkeypatch.setattr(common, "check_environment", lambda device: None)
    with backends.backend("reference"):
        result = fastac("predict", run, data.features, "--device", "cpu")
    assert result.status == 2
    assert "backend 'reference' cannot run this call: the reference backend has no" in result.err


def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'pandas'", name="pandas")

    monkeypatch.setattr(importlib, "import_module", missing)
    assert fastac("train") == (1, "", "Error: fastac train needs pandas: pip install 'fastac[train]'\n")


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["trian"], 2, "the command must be one of train, eval, predict"),
        (["train"], 2, "Missing option '--output'"),
        (["train", "--output", "NEW"], 2, "data.features is needed and not given\ndata.labels is needed"),
        (["train", "--output", "NEW", "SETTINGS", "training.epochs=0"], 2, "training.epochs must be greater"),
        (
            ["train", "--output", "NEW", "SETTINGS", "epochs"],
            2,
            "must be name.of.setting=value, got 'epochs'",
        ),
        (["train", "--output", "NEW", "SETTINGS", "data.features=no"], 1, "there is nothing at"),
        (["train", "--output", "NEW", "SETTINGS", "data.labels=no"], 1, "labels must be a CSV file"),
        (["train", "--output", "NEW", "SETTINGS", "data.train_split=x"], 1, "split must be one that"),
        (["train", "--output", "NEW", "SETTINGS", "data.modalities=[smell]"], 1, "(audio, rgb)"),
        (["train", "--output", "NEW", "SETTINGS", "data.class_names=[a, b]"], 1, "unknown label 'größe'"),
        (
            ["train", "--output", "NEW", "SETTINGS", "model.clusters.x.shift=true"],
            1,
            "modalities audio, rgb, got x",
        ),
        (
            ["train", "--output", "NEW", "SETTINGS", "data.train_features={x: 3}"],
            1,
            "data.train_features must be of the data's modalities audio, rgb, got x",
        ),
        (["train", "--output", "NEW", "SETTINGS", "--device", "meta"], 2, "got 'meta'"),
        (["train", "--output", "NEW", "SETTINGS", "--device", "no"], 2, "must be one that torch knows"),
        (["train", "--output", "NEW", "SETTINGS", "--threads", "0"], 2, "'--threads': 0 is not in the range"),
        (["train", "--output", "LABELS/x", "SETTINGS"], 2, "--output: must lie in a folder, LABELS is none"),
        (["train", "--output", "RUN", "SETTINGS"], 1, "holds a run already: go on with it by --resume"),
        (["train", "--resume", "--output", "NEW"], 1, "--resume must find a run in the folder of --output"),
        (["train", "--resume", "--output", "RUN", "training.seed=7"], 1, "training.seed was 1, is 7"),
        (
            ["train", "--resume", "--output", "RUN", "training.epochs=3"],
            1,
            "training.epochs may only be raised: RUN is at epoch 4 already, got 3",
        ),
        (["train", "--config", "LABELS", "--output", "NEW"], 2, "must be a mapping from names to settings"),
        (["eval", "FEATURES"], 1, "must be the folder of a run, it has no model.json"),
        (["eval", "RUN", "--split", "x"], 1, "split must be one that"),
        (["eval", "RUN", "--features", "LABELS"], 1, "features must be a directory or an HDF5 file"),
        (["eval", "RUN", "--json", "LABELS/x"], 2, "--json: must lie in a folder"),
        (["predict", "RUN", "NEW"], 2, "Path 'NEW' does not exist"),
        (["predict", "RUN", "FEATURES", "--top", "0"], 2, "'--top': 0 is not in the range"),
        (["predict", "RUN", "FEATURES", "--output", "NEW.txt"], 2, "--output: must end in .csv or .jsonl"),
        (["predict", "RUN", "FEATURES", "--output", "LABELS/x.csv"], 2, "--output: must lie in a folder"),
        (["show", "RUN", "--output", "NEW.foo"], 2, "--output: must end in one of"),
        (
            ["show", "RUN", "--output", "NEW.png", "--video", "x"],
            2,
            "24 videos such as clip 00, clip 01, clip 02, got x",
        ),
        (["show", "RUN"], 2, "Missing option '--output'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_a_message(
    data: Data, run: Path, tmp_path: Path, arguments: list[str], status: int, message: str
) -> None:
    before = sorted(run.rglob("*"))
    places = {"NEW": tmp_path / "new", "LABELS": data.labels, "RUN": run, "FEATURES": data.features}

    def placed(text: str) -> str:
        for name, path in places.items():
            text = text.replace(name, str(path))
        return text

    given = [
        a for argument in arguments for a in (data.settings if argument == "SETTINGS" else [placed(argument)])
    ]
    result = fastac(*given)
    assert result.status == status, result
    assert placed(message) in result.err
    assert result.out == ""
    assert list(tmp_path.iterdir()) == []  # nothing was begun
    assert sorted(run.rglob("*")) == before


def test_a_folder_that_cannot_be_written_to(
    data: Data, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)  # root may write anywhere
    for arguments in (
        ["train", *data.settings, "--output", tmp_path / "new"],
        ["predict", run, data.features, "--output", tmp_path / "new.csv"],
        ["show", run, "--output", tmp_path / "new.png"],
    ):
        result = fastac(*arguments)
        assert result.status == 2
        assert f"--output: must lie in a folder that can be written to, got {tmp_path}" in result.err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk(data: Data, run: Path) -> None:
    result = fastac("predict", run, data.features, "--format", "csv", "--output", "/dev/full")
    assert (result.status, result.err.splitlines()[-1]) == (1, "Error: /dev/full: No space left on device")
    with Path("/dev/full").open("wb") as full:
        info = [sys.executable, "-m", "fastac", "info"]
        done = subprocess.run(info, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "Error: standard output: No space left on device\n")


def test_a_traceback_is_shown_when_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTAC_TRACEBACK", "1")
    result = fastac("train", "--output", tmp_path / "new")
    assert result.status == 2
    assert "Traceback" in result.err and "ConfigError" in result.err
    assert result.err.endswith(
        "Error: data.features is needed and not given\ndata.labels is needed and not given\n"
    )


@pytest.mark.parametrize("kind", [ValueError, TypeError, RuntimeError, KeyError, EOFError])
def test_a_bug_is_no_user_s_mistake(
    kind: type[Exception], data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Trainer) -> None:
        raise kind("a bug")

    monkeypatch.setattr(Trainer, "fit", broken)
    with pytest.raises(kind, match="a bug"):
        fastac("train", *data.settings, "--output", tmp_path / "run")


def test_one_process_only(run: Path, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for arguments in (
        ["eval", run],
        ["predict", run, data.features],
        ["show", run, "--output", tmp_path / "x.png"],
    ):
        result = fastac(*arguments)
        assert result.status == 2
        assert f"fastac {arguments[0]} must run in one process, got 2" in result.err


# Evaluation, prediction, pictures


def test_eval_gives_what_training_gave(run: Path, data: Data, tmp_path: Path) -> None:
    result = fastac("eval", run, "--json", tmp_path / "metrics.json")
    assert result.status == 0, result.err
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert metrics == {"videos": 6, **evaluation}
    assert f"loss       {metrics['loss']:.4f}\naccuracy   {100 * metrics['accuracy']:.2f} %" in result.out
    result = fastac("eval", run, "--json", "-")
    assert json.loads(result.out) == metrics
    assert f"loss       {metrics['loss']:.4f}\n" in result.err
    result = fastac("eval", run, "--labels", data.labels, "--checkpoint", "last")
    assert result.out.startswith(f"all videos of {data.labels}: 24 videos; last checkpoint (epoch 4)")


def test_what_was_trained_in_bfloat16_is_evaluated_in_it(data: Data, tmp_path: Path) -> None:
    settings = ["training.epochs=1", "training.precision=bfloat16", "training.evaluation_batch_size=4"]
    assert fastac("train", *data.settings, *settings, "--output", tmp_path / "run").status == 0
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert evaluation["loss"] == float(row["validation_loss"])
    assert fastac("eval", tmp_path / "run", "--json", tmp_path / "metrics.json").status == 0
    assert json.loads((tmp_path / "metrics.json").read_text())["loss"] == evaluation["loss"]


def test_nan_is_null_in_json(tmp_path: Path) -> None:
    common.write_json(tmp_path / "new" / "x.json", {"map": math.nan, "epoch": 3, "name": "größe"})
    assert json.loads((tmp_path / "new" / "x.json").read_text("utf-8")) == {
        "map": None,
        "epoch": 3,
        "name": "größe",
    }


def test_eval_refuses_labels_that_the_model_does_not_know(run: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.csv"
    labels.write_text("video,label\nclip 00,zebra\nclip 01,c\n")
    result = fastac("eval", run, "--labels", labels)
    assert result.status == 1
    assert "clip 00: unknown label 'zebra' (line 2)" in result.err


def test_predictions_are_those_of_the_model(run: Path, data: Data, tmp_path: Path) -> None:
    result = fastac("predict", run, data.features, "--top", 9)
    assert result.status == 0, result.err
    rows = list(csv.DictReader(io.StringIO(result.out)))
    names = list(data.videos)
    assert [row["video"] for row in rows] == [name for name in names for _ in range(3)]
    assert [row["rank"] for row in rows] == ["1", "2", "3"] * len(names)
    for at in range(0, len(rows), 3):
        assert {row["label"] for row in rows[at : at + 3]} == {"größe", "ñandú", "c"}
        of_video = [float(row["probability"]) for row in rows[at : at + 3]]
        assert of_video == sorted(of_video, reverse=True)
        assert sum(of_video) == pytest.approx(1, abs=2e-6)
    right = sum(
        rows[3 * number]["label"] == ("größe", "ñandú", "c")[number % 3] for number in range(0, len(names), 4)
    )
    assert right / 6 == pytest.approx(json.loads((run / "evaluation.json").read_text())["accuracy"])

    archive = feature_files.write_hdf5(tmp_path / "features", data.videos)
    result = fastac("predict", run, archive, "--top", 2, "--output", tmp_path / "new" / "p.jsonl")
    assert (result.status, result.out) == (0, f"predictions of 24 videos: {tmp_path / 'new' / 'p.jsonl'}\n")
    lines = [json.loads(line) for line in (tmp_path / "new" / "p.jsonl").read_text("utf-8").splitlines()]
    assert [line["video"] for line in lines] == names
    for number, line in enumerate(lines):
        for row, prediction in zip(rows[3 * number : 3 * number + 2], line["predictions"], strict=True):
            assert prediction == {"label": row["label"], "probability": float(row["probability"])}


def test_broken_features_are_left_out_of_the_predictions(run: Path, data: Data, tmp_path: Path) -> None:
    features = shutil.copytree(data.features, tmp_path / "features")
    (features / "rgb" / "clip 03.npy").write_bytes(b"x")
    result = fastac("predict", run, features, "--top", 1)
    assert result.status == 1
    assert "clip 03 [rgb]: unreadable" in result.err
    assert [row["video"] for row in csv.DictReader(io.StringIO(result.out))] == [
        name for name in data.videos if name != "clip 03"
    ]
    narrow = {name: {"rgb": sets["rgb"][:, :5]} for name, sets in data.videos.items()}
    result = fastac("predict", run, feature_files.write_npz(tmp_path / "narrow", narrow))
    assert (result.status, result.out) == (1, "")
    assert "no video is usable" in result.err and "wrong dimension: must have M = 6, got 5" in result.err


@pytest.mark.skipif(sys.platform == "darwin", reason="file names are UTF-8 there")
def test_a_name_that_is_not_utf_8(run: Path, tmp_path: Path) -> None:
    (tmp_path / "rgb").mkdir()
    with open(os.fsencode(tmp_path / "rgb") + b"/\xff.npy", "wb") as file:
        np.save(file, np.ones((3, 6), np.float32))
    result = fastac("predict", run, tmp_path, "--top", 1, "--output", tmp_path / "p.csv")
    assert result.status == 0, result.err
    assert (tmp_path / "p.csv").read_bytes().splitlines()[1].startswith(b"\xff,1,")


def test_predictions_appear_whole_or_not_at_all(
    run: Path, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "p.csv"
    path.write_text("of an earlier run\n")
    module = importlib.import_module("fastac.cli.predict")
    predict = module.predict

    def breaks(*arguments: Any, **options: Any) -> Iterator[Any]:
        yield from predict(*arguments, **{**options, "batch_size": 5})
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(module, "predict", breaks)
    result = fastac("predict", run, data.features, "--output", path)
    assert (result.status, result.err.splitlines()[-1]) == (1, f"Error: {path}: Input/output error")
    assert path.read_text() == "of an earlier run\n"
    assert list(tmp_path.iterdir()) == [path]


def test_the_reader_of_a_pipe_may_go(run: Path, data: Data) -> None:
    process = start("predict", run, data.features)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 1
    assert "Traceback" not in err and "Exception ignored" not in err and "Error" not in err


def test_show_draws(run: Path, data: Data, tmp_path: Path) -> None:
    result = fastac(
        "show", run, "--output", tmp_path / "new" / "a.png", "--video", "clip 05", "--video", "clip 00"
    )
    assert (result.status, result.out) == (0, f"picture: {tmp_path / 'new' / 'a.png'}\n")
    assert (tmp_path / "new" / "a.png").read_bytes().startswith(b"\x89PNG")
    result = fastac("show", run, "--output", tmp_path / "b.svg")
    assert result.status == 0
    assert "<svg" in (tmp_path / "b.svg").read_text("utf-8")


def test_show_passes_over_broken_videos_unless_they_are_named(run: Path, data: Data, tmp_path: Path) -> None:
    features = feature_files.write_npy(
        tmp_path / "f", {name: data.videos[name] for name in ("clip 03", "clip 04")}
    )
    (features / "rgb" / "clip 03.npy").write_bytes(b"x")
    arguments = ["show", run, "--features", features, "--output", tmp_path / "a.png"]
    assert fastac(*arguments).status == 0
    (tmp_path / "a.png").unlink()
    result = fastac(*arguments, "--video", "clip 03")
    assert (result.status, result.err.splitlines()[-1]) == (1, "Error: video clip 03 has no usable features")
    for path in features.rglob("*.npy"):
        path.write_bytes(b"x")
    result = fastac(*arguments)
    assert result.status == 1
    assert not (tmp_path / "a.png").exists()


def test_the_log_goes_to_what_standard_error_is_now() -> None:
    logger, err = logging.getLogger("fastac"), io.StringIO()
    before = list(logger.handlers), logger.level, logger.propagate
    with logging_to_stderr(), contextlib.redirect_stderr(err):
        logger.warning("größe")
    assert err.getvalue() == "größe\n"
    assert (list(logger.handlers), logger.level, logger.propagate) == before
