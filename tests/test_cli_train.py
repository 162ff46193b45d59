"""`fastac train`, as a user meets it: settings, resumption, broken features, interruption, processes."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import feature_files
import pytest
from cli_helpers import SETTINGS, Data, fastac, losses, make_data, make_run, start

from fastac.training import Trainer
from fastac.training.run_config import load

pytestmark = pytest.mark.xdist_group("cli_train")  # what is trained once is shared


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tests must not change it."""
    return make_run(data, tmp_path_factory.mktemp("runs") / "first")


def test_a_configuration_file_in_another_folder(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(data.features, tmp_path / "videos")
    shutil.copy(data.labels, tmp_path)
    (tmp_path / "configs").mkdir()
    text = "data: {features: ../videos, labels: ../labels.csv}\ntraining: {epochs: 9, tensorboard: false}\n"
    (tmp_path / "configs" / "small.yaml").write_text(text)
    result = fastac("train", "--config", "configs/small.yaml", "--output", "runs/x", "training.epochs=1")
    assert result.status == 0, result.err
    assert len(losses(Path("runs/x"))) == 1
    shutil.rmtree("configs")
    Path("runs/x").rename("moved")
    monkeypatch.chdir("/")
    result = fastac("eval", tmp_path / "moved")
    assert result.status == 0, result.err
    assert f"split validation of {tmp_path / 'labels.csv'}: 6 videos; best checkpoint (epoch 1)" in result.out


def test_a_run_goes_on_where_it_was(data: Data, run: Path, tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    assert fastac("train", *data.settings, "training.epochs=2", "--output", parts).status == 0
    result = fastac("train", "--resume", "--output", parts, "training.epochs=4")
    assert result.status == 0, result.err
    assert "going on after epoch 2 of 4" in result.err
    assert losses(parts) == losses(run)
    assert load(parts / "config.yaml").training.epochs == 4
    moved = data.features.rename(data.features.with_name("elsewhere"))
    try:
        result = fastac("train", "--resume", "--output", parts)
        assert result.status == 1
        assert "there is nothing at" in result.err
        result = fastac("train", "--resume", "--output", parts, f"data.features={moved}")
        assert result.status == 0, result.err
    finally:
        moved.rename(data.features)


def test_a_run_is_not_resumed_on_other_classes(data: Data, run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run", symlinks=True)
    other = tmp_path / "labels.csv"
    other.write_text(data.labels.read_text("utf-8").replace("größe", "size"), encoding="utf-8")
    before = (copy / "model.json").read_bytes()
    result = fastac("train", "--resume", "--output", copy, f"data.labels={other}")
    assert result.status == 1
    assert "was trained with other classes: they were c, größe, ñandú, are c, size, ñandú" in result.err
    assert (copy / "model.json").read_bytes() == before


def test_a_run_is_not_resumed_on_other_videos_or_labels(data: Data, run: Path, tmp_path: Path) -> None:
    copy, other = shutil.copytree(run, tmp_path / "run", symlinks=True), tmp_path / "labels.csv"
    resume = ["train", "--resume", "--output", copy, f"data.labels={other}", "training.epochs=5"]
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    text = data.labels.read_text("utf-8")
    for changed, message in (
        (text.replace("clip 01,ñandú,train\n", ""), "it had 18 videos to train on, these are 17"),
        (text.replace("clip 01,ñandú", "clip 01,c"), "their names, labels, modalities or order differ"),
    ):
        other.write_text(changed, encoding="utf-8")
        result = fastac(*resume)
        assert result.status == 1
        assert f"Error: {copy} was trained on other data: {message}\n" in result.err
        assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before
    description = json.loads((copy / "model.json").read_text("utf-8"))
    del description["training_set"]  # a run of an earlier version does not tell
    (copy / "model.json").write_text(json.dumps(description), encoding="utf-8")
    result = fastac(*resume)
    assert result.status == 0, result.err


def test_a_copy_without_links_is_evaluated_and_not_resumed(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy, symlinks=True)
    for name in ("best", "last"):
        target = (copy / "checkpoints" / name).resolve()
        (copy / "checkpoints" / name).unlink()
        shutil.copytree(target, copy / "checkpoints" / name, symlinks=True)
    assert fastac("eval", copy).status == 0
    result = fastac("train", "--resume", "--output", copy, "training.epochs=5")
    assert (result.status, result.out) == (1, "")
    assert f"{copy / 'checkpoints' / 'last'} must be a symbolic link to go on from" in result.err
    assert load(copy / "config.yaml").training.epochs == 4


def test_a_run_of_another_command_is_left_alone(data: Data, run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run", symlinks=True)
    (copy / "config.yaml").unlink()
    result = fastac("train", *data.settings, "--output", copy)
    assert (result.status, result.out) == (1, "")
    assert "holds a run already" in result.err
    result = fastac("train", *data.settings, "--resume", "--output", copy)
    assert result.status == 1
    assert "it is not a run of fastac train" in result.err


def test_broken_features_are_listed_and_training_goes_on(data: Data, tmp_path: Path) -> None:
    features = shutil.copytree(data.features, tmp_path / "features")
    (features / "rgb" / "clip 01.npy").write_bytes(b"x")
    (features / "rgb" / "clip 03.npy").write_bytes(b"x")  # it has no audio either
    settings = [*data.settings, f"data.features={features}", "training.epochs=1"]
    result = fastac("train", *settings, "--output", tmp_path / "run")
    assert result.status == 0
    assert "17 videos for training" in result.err
    with (tmp_path / "run" / "problems.csv").open() as file:
        assert {row["video"] for row in csv.DictReader(file)} == {"clip 01", "clip 03"}
    result = fastac("train", *settings, "data.on_error=raise", "--output", tmp_path / "other")
    assert result.status == 1
    assert "clip 01" in result.err and "clip 03" in result.err
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("interrupted", [False, True])
def test_features_that_break_in_training_are_in_problems_csv(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: bool
) -> None:
    features = shutil.copytree(data.features, tmp_path / "features")
    (features / "rgb" / "clip 01.npy").write_bytes(b"x")
    fit = Trainer.fit

    def breaking(trainer: Trainer) -> Any:
        (features / "rgb" / "clip 02.npy").unlink()
        (features / "rgb" / "clip 04.npy").unlink()  # one of the validation set
        fit(trainer)
        if interrupted:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "fit", breaking)
    settings = [*data.settings, f"data.features={features}", "training.epochs=1"]
    result = fastac("train", *settings, "--output", tmp_path / "run")
    assert result.status == (130 if interrupted else 0), result.err
    problems = tmp_path / "run" / "problems.csv"
    assert f"2 entries that broke in training are in {problems}, too" in result.err
    with problems.open() as file:
        assert [row["video"] for row in csv.DictReader(file)] == ["clip 01", "clip 02", "clip 04"]


def test_several_labels_one_modality_and_no_validation(data: Data, tmp_path: Path) -> None:
    several = tmp_path / "several.csv"
    rows = [f"{name},{'ab'[i % 2]}{';c' if i % 3 == 0 else ''}\n" for i, name in enumerate(data.videos)]
    several.write_text("video,label\n" + "".join(rows))
    settings = [f"data.features={feature_files.write_hdf5(tmp_path / 'f', data.videos)}", *SETTINGS]
    settings += [f"data.labels={several}", "data.multi_label=true", "data.modalities=[rgb]"]
    settings += ["data.train_split=null", "data.validation_split=null", "training.epochs=1"]
    result = fastac("train", *settings, "--output", tmp_path / "run")
    assert result.status == 0, result.err
    assert "24 videos for training, no validation; 3 classes" in result.err
    assert not (tmp_path / "run" / "evaluation.json").exists()
    result = fastac("eval", tmp_path / "run", "--json", tmp_path / "new" / "metrics.json")
    assert result.status == 0, result.err
    assert result.out.startswith(f"all videos of {several}: 24 videos")
    assert {"loss", "map", "micro_ap"} < json.loads((tmp_path / "new" / "metrics.json").read_text()).keys()


def test_an_interrupted_run_says_how_to_go_on(
    data: Data, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Trainer) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "fit", interrupted)
    result = fastac("train", *data.settings, "--output", tmp_path / "run")
    assert result.status == 130
    assert "to go on" not in result.err  # there is nothing yet
    copy = shutil.copytree(run, tmp_path / "copy", symlinks=True)
    result = fastac("train", "--resume", "--output", copy)
    assert result.status == 130
    assert f"to go on: fastac train --resume --output {copy}" in result.err
    assert result.err.endswith("interrupted\n")


def test_ctrl_c(data: Data, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start("train", *data.settings, "training.epochs=100000", "--output", run)
    deadline = time.monotonic() + 60
    while not (run / "checkpoints" / "last").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    try:
        err = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    done = len(losses(run))
    result = fastac("train", "--resume", "--output", run, f"training.epochs={done + 1}")
    assert result.status == 0, result.err
    assert len(losses(run)) == done + 1


def test_two_processes_give_what_one_gives(data: Data, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    # The last batch, of one video, leaves one process without any.
    settings = [*data.settings, "training.epochs=2", "training.batch_size=17", "model.dropout=0"]
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m")
    process = start("train", *settings, "--output", two, launcher=launcher)
    assert fastac("train", *settings, "--output", one).status == 0
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.count("best checkpoint") == 1  # one process speaks
    assert err.count("epoch 2/2") == 1
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    for row, other in zip(losses(one), losses(two), strict=True):
        assert [float(x) for x in row] == pytest.approx([float(x) for x in other], rel=1e-5)
