"""One process at a time trains in a folder: the second one changes nothing, a dead one locks nothing."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import importlib
import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import feature_files
import numpy as np
import pytest
import training_helpers
from training_helpers import make_model, run_data, run_settings

from fastac.cli import main
from fastac.training import RunLockedError, Trainer, TrainingError, checkpoint, lock
from fastac.training.lock import LOCK, training_in


def trainer(directory: Path, **changes: Any) -> Trainer:
    settings = run_settings(**{"tensorboard": False, "epochs": 2, **changes})
    return Trainer(make_model(), *run_data(), settings, directory=directory, show_progress=False)


def contents(directory: Path) -> dict[Path, tuple[int, bytes]]:
    """Everything in a folder, the folder itself included, and when it was changed last."""
    paths = [directory, *directory.rglob("*")]
    return {path: (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else b"") for path in paths}


def appears(path: Path, process: subprocess.Popen[bytes]) -> bool:
    """Whether a process that goes on makes a file."""
    while not os.path.lexists(path) and process.poll() is None:
        time.sleep(0.02)
    return os.path.lexists(path)


@contextlib.contextmanager
def another(*command: object) -> Iterator[subprocess.Popen[bytes]]:
    """A process beside this one, ended at the latest with the block."""
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


# The engine


@pytest.mark.parametrize("workers", [0, 1])
def test_a_second_process_changes_nothing_and_a_killed_one_locks_nothing(
    tmp_path: Path, workers: int
) -> None:
    run, waiting = tmp_path / "run", tmp_path / "waiting"
    with another(training_helpers.__file__, "wait", run, workers) as first:
        assert appears(waiting, first)
        number = int(waiting.read_text())
        assert (number == first.pid) == (workers == 0)
        try:
            before = contents(run)
            second = trainer(run)
            assert second.resume()
            for late in (second, trainer(run, epochs=9)):
                with pytest.raises(RunLockedError, match=f"another process trains in {run}: wait until"):
                    late.fit()
            assert contents(run) == before
            first.kill()
            first.wait()
            if workers:
                os.kill(number, 0)  # there still
            assert [result.epoch for result in second.fit()] == [2]
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
    assert checkpoint.read_state(run / "checkpoints")["epoch"] == 2


def test_a_folder_is_free_after_training_and_after_an_error(tmp_path: Path) -> None:
    for epochs in (1, 2):
        going_on = trainer(tmp_path, epochs=epochs)
        going_on.resume()
        assert len(going_on.fit()) == 1
    diverging = trainer(tmp_path / "other")
    next(diverging.model.parameters()).register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(TrainingError):
        diverging.fit()
    with training_in(tmp_path), training_in(tmp_path / "other"):
        pass


def test_a_run_without_the_file_is_resumed(tmp_path: Path) -> None:
    trainer(tmp_path, epochs=1).fit()
    (tmp_path / LOCK).unlink()
    going_on = trainer(tmp_path)
    assert going_on.resume()
    assert len(going_on.fit()) == 1


def test_one_trainer_at_a_time_in_a_process_too(tmp_path: Path) -> None:
    one, other = trainer(tmp_path), trainer(tmp_path)
    with one.lock(), one.lock():
        with pytest.raises(RunLockedError), other.lock():
            pass
        assert len(one.fit()) == 2
        with pytest.raises(RunLockedError):
            other.fit()
    with other.lock():
        pass


def test_a_trainer_without_a_folder_locks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    nowhere = Trainer(make_model(), *run_data(), run_settings(epochs=1), show_progress=False)
    with nowhere.lock():
        nowhere.fit()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        trainer(tmp_path / "file" / "run").fit()


# The file system


def raising(error: OSError, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: Any, operation: int) -> None:
        raise error

    monkeypatch.setattr(fcntl, "flock", flock)


def test_a_file_system_without_locks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    raising(OSError(errno.ENOLCK, "No locks available"), monkeypatch)
    lock.check_unlocked(tmp_path)
    with caplog.at_level(logging.WARNING, "fastac"):
        assert len(trainer(tmp_path / "run").fit()) == 2
    (record,) = caplog.records
    assert record.getMessage() == (
        f"{tmp_path / 'run' / LOCK} cannot be locked (No locks available): "
        "nothing keeps other processes from training there, too"
    )
    lock.check_unlocked(tmp_path / "run")
    with pytest.raises(OSError, match="No locks available") as caught, lock.alone(tmp_path / "lock"):
        pass
    assert caught.value.filename == str(tmp_path / "lock")


def test_what_smb_says_of_a_locked_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raising(PermissionError(errno.EACCES, "Permission denied"), monkeypatch)
    with pytest.raises(RunLockedError):
        trainer(tmp_path).fit()
    with pytest.raises(RunLockedError):
        lock.check_unlocked(tmp_path)


# The command line


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """Of `fastac train`, for twelve videos of two classes."""
    generator, rows = np.random.default_rng(0), []
    videos: dict[str, dict[str, np.ndarray]] = {}
    for i in range(12):
        videos[f"clip{i}"] = {"rgb": generator.standard_normal((3, 4), dtype=np.float32)}
        rows.append(f"clip{i},{'ab'[i % 2]},{'train' if i % 4 else 'validation'}\n")
    (tmp_path / "labels.csv").write_text("video,label,split\n" + "".join(rows))
    features = feature_files.write_npy(tmp_path / "features", videos)
    return [
        *("train", f"data.features={features}", f"data.labels={tmp_path / 'labels.csv'}"),
        *("training.batch_size=4", "training.tensorboard=false", "--output", str(tmp_path / "run")),
    ]


def test_the_command_line(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    message = f"Error: another process trains in {run}: wait until it ends, or choose another folder\n"
    with another("-m", "fastac", *arguments, "training.epochs=1000000") as first:
        assert appears(run / "checkpoints" / "last", first)
        first.send_signal(signal.SIGSTOP)  # it keeps its lock, and its folder as it is
        os.waitid(os.P_PID, first.pid, os.WSTOPPED)
        before = contents(run)
        for given in (arguments, [*arguments, "--resume"], ["train", "--resume", "--output", str(run)]):
            assert main(given) == 1
            assert capsys.readouterr() == ("", message)
        # As one that looked before the first one began; it has read its data.
        monkeypatch.setattr(
            importlib.import_module("fastac.cli.train"), "check_unlocked", lambda output: None
        )
        assert main([*arguments, "--resume", "training.epochs=1000001"]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.endswith(message)
        assert "Traceback" not in err
        monkeypatch.undo()
        assert main(["eval", str(run)]) == 0
        assert main(["predict", str(run), str(tmp_path / "features")]) == 0
        assert main(["show", str(run), "--output", str(tmp_path / "a.png")]) == 0
        assert contents(run) == before
        first.kill()
        first.wait()
    done = checkpoint.read_state(run / "checkpoints")["epoch"]
    assert main(["train", "--resume", "--output", str(run), f"training.epochs={done + 1}"]) == 0
    assert checkpoint.read_state(run / "checkpoints")["epoch"] == done + 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["training.epochs=2"], "holds a run already"),
        (["training.epochs=2", "training.seed=7", "--resume"], "training.seed was 1, is 7"),
    ],
)
def test_a_run_that_was_made_while_the_data_were_read(
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    more: list[str],
    message: str,
) -> None:
    module, before = importlib.import_module("fastac.cli.train"), {}
    open_data = module.open_data

    def slow(config: Any) -> Any:
        monkeypatch.undo()
        assert main([*arguments, "training.epochs=1"]) == 0
        before.update(contents(tmp_path / "run"))
        return open_data(config)

    monkeypatch.setattr(module, "open_data", slow)
    assert main([*arguments, *more]) == 1
    assert message in capsys.readouterr().err
    assert contents(tmp_path / "run") == before
