"""Table 1 cell by cell: resumed, never twice, beside the paper's; its rows and commits."""

from __future__ import annotations

import csv
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flash_mnist_data import SETS, rows_of, watched

from fastac.experiments import results, table1
from fastac.experiments.flash_mnist import (
    MODALITY,
    Prepared,
    Recipe,
    class_names,
)
from fastac.experiments.table1 import Cell
from fastac.training.run import RunError, load_run

pytestmark = pytest.mark.xdist_group("experiments")  # what is built once is shared


def test_the_papers_table() -> None:
    """As in the paper: N, then average, FC1, FC2, FC1 + shift, FC2 + shift."""
    paper = """
        1    0.2  0.2  0.2  51.2 53.7
        2    0.4  0.4  0.5  64.8 66.8
        4    0.6  2.2  2.3  75.9 76.8
        8    0.9  31.7 22.5 80.6 83.1
        16   1.2  82.3 82.0 86.9 84.9
        32   2.4  83.3 83.2 87.1 85.6
        64   5.0  83.2 82.4 87.1 85.6
        128  8.9  81.8 80.9 87.1 85.7
    """
    columns = [("average", False), ("fc1", False), ("fc2", False), ("fc1", True), ("fc2", True)]
    assert list(table1.COLUMNS) == columns
    for line in paper.strip().splitlines():
        size, *accuracies = line.split()
        assert [table1.paper_accuracy(weighting, int(size), shift=shift) for weighting, shift in columns] == [
            float(accuracy) for accuracy in accuracies
        ]
    assert table1.paper_accuracy("fc1", 3, shift=True) is None
    assert table1.paper_accuracy("average", 64, shift=True) is None


def test_the_cells_of_the_whole_table() -> None:
    cells = table1.cells(table1.COLUMNS, table1.CLUSTER_SIZES)
    assert len(cells) == len(set(cells)) == 5 * (4 * 3 + 4)
    assert [cell.cluster_size for cell in cells] == sorted(cell.cluster_size for cell in cells)
    for cell in cells:
        assert cell.epochs == (30 if cell.shift and cell.cluster_size >= 16 else 100)
        assert cell.cnn_epochs == 1
    assert {cell.seed for cell in cells if cell.cluster_size == 8} == {1, 2, 3}
    assert {cell.seed for cell in cells if cell.cluster_size == 16} == {1}
    assert len({cell.name for cell in cells}) == len(cells)


def test_some_cells() -> None:
    assert table1.cells([("fc1", True)], [64, 1], seeds=2, epochs=5, cnn_epochs=3) == [
        Cell("fc1", True, 1, 1, 5, 3),
        Cell("fc1", True, 1, 2, 5, 3),
        Cell("fc1", True, 64, 1, 5, 3),
        Cell("fc1", True, 64, 2, 5, 3),
    ]
    assert Cell("fc1", True, 64, 2, 5, 3).name == "fc1-shift-n64-seed2-epochs5-cnn3"
    assert Cell("average", False, 1, 1, 5).name == "average-noshift-n1-seed1-epochs5-cnn1"


CELLS = [Cell("fc1", True, 2, 1, 3), Cell("average", False, 2, 1, 2)]
MEASURED = {"seconds", "commit"}


def repeated(path: Path) -> list[dict[str, str]]:
    """The rows, without what differs from run to run."""
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in rows_of(path)]


def test_a_cell_leaves_a_row_its_epochs_and_a_run(small: Prepared, tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.csv"
    table1.run(CELLS, small, path, tmp_path / "runs")
    header = path.read_text().splitlines()[0]
    assert header.startswith("weighting,shift,cluster_size,seed,epochs,accuracy,seconds,commit,")
    first, second = repeated(path)
    assert (first["weighting"], first["shift"], first["cluster_size"]) == ("fc1", "True", "2")
    assert (first["seed"], first["epochs"], first["cnn_epochs"]) == ("1", "3", "1")
    assert (first["frame_accuracy"], first["threads"]) == ("97.00", "1")
    assert (second["weighting"], second["shift"], second["epochs"]) == ("average", "False", "2")
    epochs = repeated(table1.epochs_path(path))
    assert [(row["weighting"], row["epoch"]) for row in epochs] == [
        ("fc1", "1"),
        ("fc1", "2"),
        ("fc1", "3"),
        ("average", "1"),
        ("average", "2"),
    ]
    assert first["accuracy"] == epochs[2]["accuracy"]
    with (tmp_path / "runs" / CELLS[0].name / "metrics.csv").open(newline="") as file:
        metrics = list(csv.DictReader(file))
    assert float(first["accuracy"]) == pytest.approx(
        100 * float(metrics[-1]["validation_accuracy"]), abs=0.006
    )
    assert float(epochs[0]["train_loss"]) == pytest.approx(float(metrics[0]["train_loss"]), abs=1e-5)

    run = load_run(tmp_path / "runs" / CELLS[0].name, "last")
    assert run.class_names == class_names(SETS)
    assert run.state["epoch"] == 3
    assert run.model.modalities[MODALITY].cluster_size == 2
    scores = run.model(**small.test.__getitems__(range(len(small.test))).inputs())
    correct = (scores.argmax(-1) == small.test.labels).float().mean().item()
    assert 100 * correct == pytest.approx(float(first["accuracy"]), abs=0.006)


class Interrupted(Exception):
    """Stands for kill -9, at the start of an epoch."""


def test_an_interrupted_table_goes_on_where_it_was(
    small: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, again = tmp_path / "whole.csv", tmp_path / "again.csv"
    table1.run(CELLS, small, whole, tmp_path / "whole")

    begun: list[int] = []

    def interrupt(epoch: int) -> None:
        begun.append(epoch)
        if begun == [1, 2]:
            raise Interrupted

    monkeypatch.setattr(small.train, "set_epoch", interrupt)
    with pytest.raises(Interrupted):
        table1.run(CELLS, small, again, tmp_path / "again")
    assert not again.exists()
    table1.run(CELLS, small, again, tmp_path / "again")
    assert begun == [1, 2, 2, 3, 1, 2]  # not the first epoch again
    assert repeated(again) == repeated(whole)
    assert repeated(table1.epochs_path(again)) == repeated(table1.epochs_path(whole))
    table1.run(CELLS, small, again, tmp_path / "again")
    assert begun == [1, 2, 2, 3, 1, 2]
    assert len(repeated(again)) == 2


def test_a_cell_that_was_killed_between_its_two_files_is_whole_in_the_end(
    small: Prepared, tmp_path: Path
) -> None:
    path = tmp_path / "results.csv"
    table1.run(CELLS, small, path, tmp_path)
    expected, epochs = repeated(path), repeated(table1.epochs_path(path))
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    table1.run(CELLS, small, path, tmp_path)
    assert repeated(path) == expected
    assert repeated(table1.epochs_path(path)) == epochs


def test_two_processes_do_not_do_a_cell_twice(
    small: Prepared, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "results.csv"
    folder = tmp_path / CELLS[0].name
    folder.mkdir()
    program = (
        "import fcntl, sys\n"
        f"file = open({str(folder / 'lock')!r}, 'a')\n"
        "fcntl.flock(file, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == "held\n"
        with watched(caplog):
            table1.run(CELLS, small, path, tmp_path)
        other.stdin.close()
    assert f"{CELLS[0].name}: another process is at it" in caplog.text
    assert [row["weighting"] for row in repeated(path)] == ["average"]
    table1.run(CELLS, small, path, tmp_path)
    assert [row["weighting"] for row in repeated(path)] == ["average", "fc1"]


def test_how_many_cells_are_left(small: Prepared, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table1.run(CELLS[1:], small, tmp_path / "results.csv", tmp_path)
    with watched(caplog):
        table1.run(CELLS, small, tmp_path / "results.csv", tmp_path)
    assert f"{CELLS[0].name}: cell 1 of 2, 1 left to train" in caplog.text
    assert f"{CELLS[1].name}: done before" in caplog.text


def test_reduced_data_never_get_into_the_table(small: Prepared, tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    for change in ({"recipe": Recipe(train_videos=20)}, {"digits": "digits"}):
        with pytest.raises(ValueError, match="prepared must be the paper's data set for Table 1"):
            table1.run(CELLS, Prepared(**{**vars(small), **change}), path, tmp_path)
    with pytest.raises(ValueError, match=r"prepared must be of cnn_epochs = 2 for .*-cnn2, got 1"):
        table1.run([Cell("fc1", True, 2, 1, 3, cnn_epochs=2)], small, path, tmp_path)
    assert not path.exists()


def test_a_folder_of_another_run_is_not_gone_on_with(small: Prepared, tmp_path: Path) -> None:
    cell = CELLS[0]
    table1.train_cell(cell, small, tmp_path)
    with pytest.raises(RunError, match=r"other settings, .*: seed was 1, is 2"):
        table1.train_cell(Cell("fc1", True, 2, 2, 3), small, tmp_path)
    other = Prepared(**{**vars(small), "recipe": Recipe(train_videos=7)})
    with pytest.raises(RunError, match=r"other settings, .*: train_videos was 100, is 7"):
        table1.train_cell(cell, other, tmp_path)
    with pytest.raises(RunError, match="holds a run of 3 epochs, more than the 1 asked for"):
        table1.train_cell(Cell("fc1", True, 2, 1, 1), small, tmp_path)
    assert len(table1.train_cell(Cell("fc1", True, 2, 1, 4), small, tmp_path)) == 4
    assert table1.read_recipe(tmp_path) == ("mnist", Recipe())
    (tmp_path / "cell.json").unlink()
    # As a run of fastac train before its first epoch.
    (tmp_path / "checkpoints").rename(tmp_path / "elsewhere")
    with pytest.raises(RunError, match=r"holds a run of something else: it has no cell\.json"):
        table1.train_cell(cell, small, tmp_path)
    with pytest.raises(RunError, match=r"is not the folder of a run of fastac flash-mnist: cell.json"):
        table1.read_recipe(tmp_path)


HEADER = ",".join(table1.ROW) + "\n"
ROWS = """\
fc1,True,1,1,100,50.0,9,abc,1,97.5,2
fc1,True,1,2,100,53.0,9,abc,1,97.5,2
fc1,True,1,3,100,56.0,9,abc,1,97.5,2
fc1,True,1,1,100,60.0,9,abc,10,98.5,2
fc1,False,64,1,100,80.0,9,0123,1,97.5,2
average,False,3,1,100,1.0,9,abc,1,97.5,2
fc2,False,8,1,100,23.0,9,abc,1,97.5,2
"""


def test_the_table_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    path.write_text(HEADER + ROWS)
    frame = table1.table(path)
    assert frame["column"].tolist() == ["average", "FC1", "FC2", "FC1 + shift", "FC1 + shift"]
    assert frame["N"].tolist() == [3, 64, 8, 1, 1]
    assert frame["CNN epochs"].tolist() == [1, 1, 1, 1, 10]
    assert frame["runs"].tolist() == [1, 1, 1, 3, 1]
    nan = math.nan
    np.testing.assert_allclose(frame["ours"], [1.0, 80.0, 23.0, 53.0, 60.0])
    np.testing.assert_allclose(frame["spread"], [nan, nan, nan, 3.0, nan])
    np.testing.assert_allclose(frame["paper"], [nan, 83.2, 22.5, 51.2, 51.2])
    np.testing.assert_allclose(frame["difference"], [nan, -3.2, 0.5, 1.8, 8.8], atol=1e-9)
    lines = table1.as_text(frame).splitlines()
    assert lines[0].split() == [
        "column", "N", "epochs", "CNN", "epochs", "frame", "accuracy", "runs", "ours", "spread", "paper",
        "difference",
    ]  # fmt: skip
    assert lines[1].split() == ["average", "3", "100", "1", "97.5", "1", "1.0"]
    assert lines[2].split() == ["FC1", "64", "100", "1", "97.5", "1", "80.0", "83.2", "-3.2"]
    assert lines[4].split() == [
        "FC1",
        "+",
        "shift",
        "1",
        "100",
        "1",
        "97.5",
        "3",
        "53.0",
        "3.0",
        "51.2",
        "+1.8",
    ]
    assert "nan" not in "".join(lines).lower()


def test_what_is_in_the_results(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    assert not table1.has(table1.read(path), CELLS[0])
    assert table1.table(path).empty
    path.touch()  # as another process leaves it for a moment
    assert not table1.has(table1.read(path), CELLS[0])
    path.write_text(HEADER + ROWS)
    done = table1.read(path)
    assert table1.has(done, Cell("fc1", True, 1, 2, 100))
    assert done["commit"].tolist()[4] == "0123"
    for other in (
        Cell("fc2", True, 1, 2, 100),
        Cell("fc1", False, 1, 2, 100),
        Cell("fc1", True, 2, 2, 100),
        Cell("fc1", True, 1, 4, 100),
        Cell("fc1", True, 1, 2, 30),
        Cell("fc1", True, 1, 2, 100, cnn_epochs=10),
    ):
        assert not table1.has(done, other)
    path.write_text("weighting,shift\nfc1,True\n")
    with pytest.raises(
        RunError, match=r"results.csv must have the columns weighting,.*, got weighting,shift"
    ):
        table1.read(path)


def test_rows_are_added_once(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.csv"
    row = {"a": 1, "b": True, "c": "x"}
    results.append(path, ("a", "b", "c"), [row], key=("a", "b"))
    results.append(path, ("a", "b", "c"), [{**row, "c": "y"}, {**row, "a": 2}], key=("a", "b"))
    assert path.read_text() == "a,b,c\n1,True,x\n2,True,x\n"
    results.append(path, ("a", "b", "c"), [row])
    assert path.read_text() == "a,b,c\n1,True,x\n2,True,x\n1,True,x\n"
    with pytest.raises(RunError, match="must have the columns a,c, got a,b,c"):
        results.append(path, ("a", "c"), [{"a": 1, "c": 2}])


def test_a_row_names_the_commit_that_was_there_when_training_began(
    small: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table1, "commit", lambda: "later" if (tmp_path / CELLS[0].name).exists() else "first")
    table1.run(CELLS, small, tmp_path / "results.csv", tmp_path)
    assert table1.read(tmp_path / "results.csv")["commit"].tolist() == ["first", "first"]
