"""`fastac flash-mnist`, and the picture of a test video."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flash_mnist_data import SETS, rows_of

from fastac.cli import flash_mnist as command_module
from fastac.cli import main
from fastac.data import Digits, load_digits28
from fastac.data.flash_mnist import NOISE
from fastac.experiments import flash_mnist, results, speed, table1
from fastac.experiments.flash_mnist import (
    MODALITY,
    Prepared,
    Recipe,
)
from fastac.training.run import load_run

pytestmark = pytest.mark.xdist_group("experiments")  # what is built once is shared


# The picture


def test_figure_5_of_a_test_video(small: Prepared, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = table1.make_model("fc1", 12, shift=True, num_classes=SETS).train()
    path = flash_mnist.draw_test_video(model, small, tmp_path / "video.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert model.training


def test_figure_5_shows_a_rightly_labelled_video(
    small: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, Any] = {}

    def note(frames: np.ndarray, names: list[str], weights: np.ndarray, *, title: str) -> Any:
        drawn.update(frames=frames, names=names, weights=weights, title=title)

    monkeypatch.setattr(flash_mnist.figures, "weights_under_frames", note)
    monkeypatch.setattr(flash_mnist.figures, "save", lambda figure, path: path)
    model = table1.make_model("fc1", 4, shift=True, num_classes=SETS)
    of_five = [n for n, label in enumerate(small.test_videos.set_labels.tolist()) if label == 31]
    assert len(of_five) == 2
    for right in of_five:

        def forward(features: dict[str, torch.Tensor], right: int = right, **_: object) -> torch.Tensor:
            scores = torch.zeros(len(features[MODALITY]), SETS)
            scores[:, 3] = 1
            scores[of_five.index(right), 31] = 2
            return scores

        monkeypatch.setattr(model, "forward", forward)
        flash_mnist.draw_test_video(model, small, tmp_path / "x.png")
        assert drawn["title"] == f"Test video {right}: shows {{0 1 2 3 4}}, recognised {{0 1 2 3 4}}"
        assert np.array_equal(drawn["frames"], small.test_videos.video(right))
        shown = [str(d) if d != NOISE else "" for d in small.test_videos.frame_labels[right].tolist()]
        assert drawn["names"] == shown
        with torch.no_grad():
            expected = model.attention(**small.test[right].inputs())[MODALITY][0]
        np.testing.assert_allclose(drawn["weights"], expected.numpy(), rtol=1e-6)


# The command


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "PASSES", 20)


@pytest.fixture
def at_hand(small: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """The small data in the place of the full ones; lists what was asked for."""
    asked: list[Recipe] = []

    def take(digits: Digits, recipe: Recipe, *, use_cache: bool = True) -> Prepared:
        asked.append(recipe)
        return Prepared(**{**vars(small), "recipe": recipe, "digits": digits.name})

    def load(data: str) -> Digits:
        digits = load_digits28()
        return digits if data == "digits" else Digits(**{**vars(digits), "name": "mnist", "source": "MNIST"})

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command_module, "prepare", take)
    monkeypatch.setattr(command_module, "load_digits", load)
    monkeypatch.setattr(results, "folder", lambda: None)
    return asked


def fastac(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    capsys.readouterr()
    status = main(["flash-mnist", *argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_a_single_cell(at_hand: list[Recipe], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    argv = ("--cluster-size", "4", "--epochs", "2", "--output", "run")
    status, out, _ = fastac(capsys, *argv)
    assert status == 0
    assert at_hand == [Recipe()]
    assert "frame accuracy of the CNN: 97.0%" in out
    found = re.search(
        r"fc1 with shift, N = 4, 2 epochs: test accuracy ([\d.]+) % \(paper 75.9 %, difference ([-+.\d]+)\)",
        out,
    )
    assert found is not None
    assert float(found[1]) - 75.9 == pytest.approx(float(found[2]), abs=0.06)
    for name in ("attention.png", "curves.png"):
        assert (tmp_path / "run" / name).read_bytes().startswith(b"\x89PNG")
    assert load_run(tmp_path / "run").state["epoch"] in (1, 2)
    state = (tmp_path / "run" / "checkpoints" / "last" / "state.json").stat().st_mtime_ns
    status, again, _ = fastac(capsys, *argv)
    assert status == 0
    assert found[0] in again
    assert (tmp_path / "run" / "checkpoints" / "last" / "state.json").stat().st_mtime_ns == state
    at_hand.clear()
    status, _, err = fastac(capsys, "--cluster-size", "5", "--output", "run")
    assert status == 1
    assert at_hand == []  # said before the data are made
    assert "other settings" in err
    assert "cluster_size was 4, is 5" in err


def test_a_single_cell_of_a_reduced_set(at_hand: list[Recipe], capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = fastac(
        capsys, "--weighting", "average", "--epochs", "1", "--train-videos", "3", "--data", "digits"
    )
    assert status == 0
    assert at_hand == [Recipe(train_videos=3)]
    assert "a reduced set, the paper's has 100 and 10" in out
    assert "average without shift, N = 64, 1 epochs" in out
    assert "(on digits, a reduced set: not to be compared with the paper's)" in out


def test_the_table(at_hand: list[Recipe], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    argv = (
        "--table1", "--column", "fc1+shift", "--column", "average", "--cluster-sizes", "4,1", "--seeds", "2",
        "--epochs", "1", "--output", "cells",
    )  # fmt: skip
    status, out, err = fastac(capsys, *argv)
    assert status == 0
    assert "8 cells, 8 of them to train; results: cells/flash_mnist.csv" in out
    assert "cell 1 of 8, 8 left to train" in err
    assert "cell 8 of 8, 1 left to train" in err
    rows = [line.split() for line in out.splitlines()[-4:]]
    assert [row[:-6] for row in rows] == [
        ["average", "1", "1", "1", "97.0"][:-1],
        ["average", "4", "1", "1", "97.0"][:-1],
        ["FC1", "+", "shift", "1", "1", "1"],
        ["FC1", "+", "shift", "4", "1", "1"],
    ]
    assert [row[-2] for row in rows] == ["0.2", "0.6", "51.2", "75.9"]
    assert {row[-5] for row in rows} == {"2"}
    written = rows_of(tmp_path / "cells" / "flash_mnist.csv")
    assert len(written) == 8
    assert {row["seed"] for row in written} == {"1", "2"}
    assert at_hand == [Recipe()]
    status, again, _ = fastac(capsys, *argv)
    assert status == 0
    assert "8 cells, 0 of them to train" in again
    assert again.splitlines()[-4:] == out.splitlines()[-4:]
    assert at_hand == [Recipe()]  # no data are needed for that


def test_the_table_is_of_mnist(
    at_hand: list[Recipe], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    status, _, err = fastac(capsys, "--table1", "--data", "digits", "--results", "table.csv")
    assert status == 1
    assert "--table1 needs MNIST, there is only scikit-learn's digits" in err
    assert not (tmp_path / "table.csv").exists()


def test_the_figures(at_hand: list[Recipe], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, out, err = fastac(capsys, "--figures", "pictures")
    assert status == 1
    assert "no Figure 4: runs/flash-mnist/flash_mnist_epochs.csv has no epochs" in out
    assert "no Figure 5: runs/flash-mnist is not the folder of a run" in out
    assert "there is nothing to draw" in err
    fastac(
        capsys, "--table1", "--column", "fc1", "--cluster-sizes", "4", "--seeds", "1", "--epochs", "2",
        "--results", "table.csv",
    )  # fmt: skip
    at_hand.clear()
    cell = "runs/flash-mnist/fc1-noshift-n4-seed1-epochs2-cnn1"
    status, out, _ = fastac(capsys, "--figures", "pictures", "--results", "table.csv", "--output", cell)
    assert status == 0
    assert out.splitlines()[-1] == "pictures: pictures/figure4.png, pictures/figure5.png"
    for name in ("figure4.png", "figure5.png"):
        assert (tmp_path / "pictures" / name).read_bytes().startswith(b"\x89PNG")
    assert at_hand == [Recipe()]
    status, out, _ = fastac(capsys, "--figures", "pictures", "--results", "table.csv", "--cnn-epochs", "7")
    assert status == 1
    assert "has no epochs with a CNN of 7 epoch(s)" in out


def test_the_speed(
    at_hand: list[Recipe],
    quick: None,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    status, out, _ = fastac(capsys, "--speed", "--cluster-size", "4", "--results", "speed.csv")
    assert status == 0
    assert "losses agree" in out
    (row,) = rows_of(tmp_path / "speed.csv")
    assert (row["cluster_size"], row["rounds"], row["steps_per_round"]) == ("4", "9", "3")
    monkeypatch.setattr(speed, "AGREEMENT", -1.0)
    status, out, _ = fastac(capsys, "--speed", "--cluster-size", "4")
    assert status == 1
    assert "losses DO NOT AGREE" in out
    assert list(tmp_path.glob("*.csv")) == [tmp_path / "speed.csv"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--table1", "--speed"], "--table1 and --speed cannot be given together"),
        (["--table1", "--train-videos", "20"], "--train-videos means nothing for --table1"),
        (["--table1", "--cnn-frames", "900"], "--cnn-frames means nothing for --table1"),
        (["--table1", "--seed", "2"], "--seed means nothing for --table1"),
        (["--column", "fc1"], "--column means nothing for a single cell"),
        (["--figures", "x", "--epochs", "3"], "--epochs means nothing for --figures"),
        (["--speed", "--weighting", "fc2"], "--weighting means nothing for --speed"),
        (["--table1", "--cluster-sizes", "1,x"], "must be integers of at least 1, such as 1,4,64, got '1,x'"),
        (["--table1", "--cluster-sizes", "0"], "must be integers of at least 1, such as 1,4,64, got '0'"),
        (["--table1", "--column", "fc3"], "'fc3' is not one of"),
        (["--epochs", "0"], "0 is not in the range x>=1"),
    ],
)
def test_wrong_usage(
    at_hand: list[Recipe], capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    status, _, err = fastac(capsys, *argv)
    assert status == 2
    assert message in " ".join(err.split())
    assert at_hand == []


def test_the_help_stands_alone(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = fastac(capsys, "--help")
    assert status == 0
    for option in ("--table1", "--figures", "--speed", "--column", "--results", "--cnn-epochs"):
        assert option in out
    assert "fastac flash-mnist --table1 --column fc1+shift --cluster-sizes 1,4,8" in out
