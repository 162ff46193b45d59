"""Training in several processes: what one process does, to rounding; and what happens if one fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import training_helpers
from training_helpers import CASES, run_case

from fastac.training import checkpoint
from fastac.training.lock import training_in

TOLERANCE = 1e-5


def torchrun(command: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """``command`` of the helpers in two processes with one thread each."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
            *(training_helpers.__file__, command, str(directory)),
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes left the results of all cases."""
    path = tmp_path_factory.mktemp("processes")
    done = torchrun("processes", path)
    assert done.returncode == 0, done.stderr
    return path


def of_rank(directory: Path, name: str, rank: int) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((directory / f"{name}.{rank}.json").read_text())
    return result


def largest_difference(one: Any, other: Any) -> float:
    """Between numbers in the same places; anything else must be the same."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        return max((largest_difference(one[key], other[key]) for key in one), default=0.0)
    if isinstance(one, list):
        assert len(one) == len(other)
        return max((largest_difference(a, b) for a, b in zip(one, other, strict=True)), default=0.0)
    return abs(one - other)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_do_what_one_does(directory: Path, tmp_path: Path, name: str) -> None:
    alone = run_case(CASES[name], tmp_path)
    together = [of_rank(directory, name, rank) for rank in range(2)]
    assert len(alone["values"]) == 3
    for result in together:
        assert largest_difference(alone["values"], result["values"]) < TOLERANCE
        assert largest_difference(alone["state"], result["state"]) < TOLERANCE
    assert together[0]["state"] == together[1]["state"]
    assert together[0]["values"] == together[1]["values"]
    predicted = {**together[0]["predicted"], **together[1]["predicted"]}
    assert len(predicted) == len(together[0]["predicted"]) + len(together[1]["predicted"])
    alone_predicted = {str(number): p for number, p in alone["predicted"].items()}
    assert largest_difference(alone_predicted, predicted) < TOLERANCE


def test_training_moves_what_is_compared(directory: Path) -> None:
    """The tolerance is far below what an epoch changes, and another seed is seen."""
    seen = of_rank(directory, "pieces", 0)
    losses = [row["train_loss"] for row in seen["values"]]
    assert min(abs(a - b) for a, b in pairwise(losses)) > 1000 * TOLERANCE
    other = of_rank(directory, "other seed", 0)
    assert largest_difference(seen["values"], other["values"]) > 1000 * TOLERANCE
    assert largest_difference(seen["state"], other["state"]) > 1000 * TOLERANCE


def test_only_the_first_process_writes(directory: Path) -> None:
    for name in CASES:
        assert sorted(p.name for p in (directory / name).iterdir()) == [
            "checkpoints",
            "metrics.csv",
            "training.lock",
        ]
        assert len((directory / name / "metrics.csv").read_text().splitlines()) == 4
        assert checkpoint.read_state(directory / name / "checkpoints")["epoch"] == 3


def test_a_process_that_fails_ends_them_all(tmp_path: Path) -> None:
    started = time.monotonic()
    done = torchrun("one-fails", tmp_path)
    assert done.returncode != 0
    assert "the disk of process 1 is gone" in done.stderr
    assert time.monotonic() - started < 120  # not until a collective times out, after half an hour
    assert checkpoint.read_state(tmp_path / "checkpoints")["epoch"] == 1
    checkpoint.load_model(tmp_path / "checkpoints", training_helpers.make_model(seed=4))
    for rank in range(2):
        message = (tmp_path / f"refused.{rank}").read_text()
        assert "must be the same for all processes" in message


def test_all_processes_leave_a_folder_that_another_one_trains_in(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with training_in(run):
        done = torchrun("refused", tmp_path)
        assert [path.name for path in run.iterdir()] == ["training.lock"]
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert f"another process trains in {run}:" in (tmp_path / f"refused.{rank}").read_text()
    run_case(CASES["odd"], run)
    assert checkpoint.read_state(run / "checkpoints")["epoch"] == 3
    assert not torch.distributed.is_initialized()
