"""Checkpoints are whole or not there, and a run that was killed goes on as if it had not been."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import training_helpers
from torch import nn
from training_helpers import EPOCHS, KILL_EPOCH, RaggedFeatures, make_model, run_data, run_settings, state_of

from fastac.training import CheckpointError, OptimizerConfig, Trainer, checkpoint
from fastac.training.engine import make_optimizer

KILLED = -signal.SIGKILL


def small(value: float, optimizer: str = "adam") -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model whose parameters are all ``value``, and its optimizer after a step that left them."""
    model = nn.Linear(3, 2)
    tuned = make_optimizer(model.parameters(), OptimizerConfig(name=optimizer))
    model(torch.ones(1, 3)).sum().backward()
    tuned.step()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model, tuned


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from test_training_checkpoint import save
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
save(Path(sys.argv[1]), 1, best=True)
for room in sys.argv[2:]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(room), -1))
    try:
        save(Path(sys.argv[1]), 2, best=True)
    except OSError as error:
        print(f"{error.__class__.__name__} {error.strerror}")
"""


def test_a_file_that_cannot_grow_is_an_oserror_and_costs_nothing_that_was_there(tmp_path: Path) -> None:
    """The sizes stop the parameters, the optimizer's state, and the latter half-way."""
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path), "0", "300", "1000"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == 3 * "OSError File too large\n"
    assert epoch_of(tmp_path) == epoch_of(tmp_path, "best") == 1
    save(tmp_path, 2, best=True)  # where there is room again
    assert epoch_of(tmp_path) == epoch_of(tmp_path, "best") == 2


def save(directory: Path, epoch: int, *, best: bool) -> None:
    checkpoint.save(directory, epoch, *small(epoch), {"best": float(epoch)}, best=best)


def epoch_of(directory: Path, which: str = "last") -> int | None:
    """The epoch of a checkpoint, all of whose parts must agree; None if there is none."""
    if not checkpoint.exists(directory, which):
        return None
    model, optimizer = small(-1)
    checkpoint.load_model(directory, model, which)
    checkpoint.load_optimizer(directory, optimizer, which)
    epoch = checkpoint.read_state(directory, which)["epoch"]
    assert all((parameter == epoch).all() for parameter in model.parameters())
    assert isinstance(epoch, int)
    return epoch


def folders(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("*epoch*"))


# Files


def test_last_and_best_are_kept_and_no_others(tmp_path: Path) -> None:
    bests = []
    for epoch, best in enumerate([True, False, True, False, False], start=1):
        save(tmp_path, epoch, best=best)
        bests.append(epoch_of(tmp_path, "best"))
        assert epoch_of(tmp_path) == epoch
        kept = {f"epoch-{number:04d}" for number in (epoch, bests[-1])}
        assert folders(tmp_path) == sorted(kept)
    assert bests == [1, 1, 3, 3, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "epoch-0003", "epoch-0005", "last"]


def test_the_first_checkpoint_is_the_best_there_is(tmp_path: Path) -> None:
    save(tmp_path, 4, best=False)
    assert epoch_of(tmp_path, "best") == 4


def test_a_checkpoint_in_use_is_not_overwritten(tmp_path: Path) -> None:
    for epoch in (1, 2):
        save(tmp_path, epoch, best=epoch == 1)
    for epoch in (1, 2):
        with pytest.raises(CheckpointError, match=f"epoch-000{epoch} is in use"):
            save(tmp_path, epoch, best=True)
    assert epoch_of(tmp_path) == 2
    assert epoch_of(tmp_path, "best") == 1


class Events:
    """Audit hook: counts what the process asks of the file system, and ends it at one of the calls."""

    names = ("open", "os.mkdir", "os.rename", "os.symlink", "os.remove", "os.rmdir", "os.truncate")

    def __init__(self, directory: Path, end_at: int) -> None:
        self.directory, self.end_at, self.seen = str(directory), end_at, 0

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in self.names:
            return
        # What shutil.rmtree removes is named relative to a descriptor.
        if not (event in ("os.remove", "os.rmdir") or any(self.directory in str(a) for a in arguments)):
            return
        if self.seen == self.end_at:
            os._exit(9)
        self.seen += 1


def forked(action: Callable[[], None]) -> int:
    """Exit status of a child process that does it."""
    child = os.fork()
    if child == 0:
        try:
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("best", [False, True])
def test_killed_between_any_two_operations(tmp_path: Path, best: bool) -> None:
    """``last`` and ``best`` belong to one moment, before or after; and saving again completes it."""
    outcomes = []
    for end_at in range(200):
        directory = tmp_path / str(end_at)
        save(directory, 1, best=True)
        save(directory, 2, best=False)

        def again(directory: Path = directory, end_at: int = end_at) -> None:
            sys.addaudithook(Events(directory, end_at))
            save(directory, 3, best=best)

        status = forked(again)
        assert status in (0, 9)
        last = epoch_of(directory)
        assert epoch_of(directory, "best") == (3 if best and last == 3 else 1)
        outcomes.append((status, last))
        if last == 2:
            save(directory, 3, best=best)
        save(directory, 4, best=False)
        assert epoch_of(directory) == 4
        assert epoch_of(directory, "best") == (3 if best else 1)
        assert folders(directory) == ["epoch-0003" if best else "epoch-0001", "epoch-0004"]
        assert not list(directory.glob(".*"))
        if status == 0:
            break
    assert outcomes[0] == (9, 2)
    assert outcomes[-1] == (0, 3)
    assert len(outcomes) > 10
    assert (9, 3) in outcomes  # between the link and the removal of what is obsolete
    assert sorted(last for _, last in outcomes) == [last for _, last in outcomes]


def test_killed_in_the_first_checkpoint(tmp_path: Path) -> None:
    for end_at in range(200):
        directory = tmp_path / str(end_at)

        def first(directory: Path = directory, end_at: int = end_at) -> None:
            sys.addaudithook(Events(directory, end_at))
            save(directory, 1, best=True)

        status = forked(first)
        if checkpoint.exists(directory):
            assert epoch_of(directory) == epoch_of(directory, "best") == 1
        else:
            save(directory, 1, best=True)
            assert epoch_of(directory) == epoch_of(directory, "best") == 1
        if status == 0:
            break
    assert end_at > 5


@pytest.mark.parametrize("name", [checkpoint.MODEL, checkpoint.OPTIMIZER, checkpoint.STATE])
@pytest.mark.parametrize("damage", ["truncated", "empty", "missing"])
def test_damaged_files_are_named(tmp_path: Path, name: str, damage: str) -> None:
    directory = tmp_path / "checkpoints"
    train_data, _ = run_data()
    settings = run_settings(epochs=1, tensorboard=False)
    Trainer(make_model(), train_data, None, settings, directory=tmp_path).fit()
    path = (directory / "last" / name).resolve()
    if damage == "missing":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size // 2 if damage == "truncated" else 0)
    assert checkpoint.exists(directory)  # a damaged checkpoint is no reason to start again
    with pytest.raises(CheckpointError, match=f"{name} cannot be "):
        Trainer(make_model(), train_data, None, settings, directory=tmp_path).resume()


@pytest.mark.parametrize("content", ["[]", "{}", '{"epoch": "1"}', "nothing"])
def test_a_state_must_have_an_epoch(tmp_path: Path, content: str) -> None:
    save(tmp_path, 1, best=True)
    (tmp_path / "last" / checkpoint.STATE).write_text(content)
    with pytest.raises(CheckpointError, match=r"state\.json cannot be read"):
        checkpoint.read_state(tmp_path)


def test_a_link_that_leads_nowhere_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last").symlink_to("epoch-0007")
    trainer = Trainer(make_model(), run_data()[0], None, run_settings(), directory=tmp_path)
    with pytest.raises(CheckpointError, match=r"state\.json cannot be read"):
        trainer.resume()


# Resuming


def trained(directory: Path | None, epochs: int, **changes: Any) -> Trainer:
    """The run of the helpers, resumed if it is there, up to an epoch."""
    settings = run_settings(epochs=epochs, **{"tensorboard": False, **changes})
    trainer = Trainer(make_model(), *run_data(), settings, directory=directory, show_progress=False)
    trainer.resume()
    trainer.fit()
    return trainer


def rows(directory: Path) -> list[dict[str, str]]:
    """metrics.csv without what a clock decides."""
    with (directory / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "train_seconds"} for row in csv.DictReader(file)]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """To the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module", autouse=True)
def one_thread_in_fixtures() -> Iterator[None]:
    """More of them round differently; the suite's own fixture for this comes after those of a module."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run that nobody killed."""
    directory = tmp_path_factory.mktemp("uninterrupted")
    trained(directory, EPOCHS)
    return directory


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a run that was killed twice and then finished, and what it wrote to stderr."""
    directory = tmp_path_factory.mktemp("killed")
    for kill_at, done in (("epoch", KILL_EPOCH - 1), ("checkpoint", KILL_EPOCH)):
        with (directory / "log.txt").open("a") as log:
            ended = subprocess.run(
                [sys.executable, training_helpers.__file__, "train", str(directory), kill_at],
                stderr=log,
                timeout=120,
            )
        text = (directory / "log.txt").read_text()
        assert ended.returncode == KILLED, text
        assert checkpoint.read_state(directory / "checkpoints")["epoch"] == done
    # The row of an epoch without its checkpoint is there, and half a checkpoint.
    assert [row["epoch"] for row in rows(directory)] == ["1", "2", "3"]
    assert (directory / "checkpoints" / ".epoch-0003.part").is_dir()
    trained(directory, EPOCHS, tensorboard=True)
    return directory, text


def test_killed_and_resumed_is_as_uninterrupted(killed: tuple[Path, str], uninterrupted: Path) -> None:
    directory, _ = killed
    assert rows(directory) == rows(uninterrupted)
    assert [row["epoch"] for row in rows(directory)] == [str(number + 1) for number in range(EPOCHS)]
    one, other = ((path / "metrics.csv").read_bytes().splitlines() for path in (directory, uninterrupted))
    seconds = one[0].split(b",").index(b"train_seconds")
    for line, wanted in zip(one, other, strict=True):
        cells, cells_wanted = line.split(b","), wanted.split(b",")
        del cells[seconds], cells_wanted[seconds]
        assert cells == cells_wanted
    for which in ("last", "best"):
        assert same(state_of(directory, which), state_of(uninterrupted, which))
    states = [
        torch.load(path / "checkpoints/last/optimizer.pt", weights_only=True)["state"]
        for path in (directory, uninterrupted)
    ]
    assert states[0]
    assert all(same(states[0][number], states[1][number]) for number in states[1])
    assert sorted(p.name for p in (directory / "checkpoints").iterdir()) == sorted(
        p.name for p in (uninterrupted / "checkpoints").iterdir()
    )


def test_other_runs_differ_from_the_uninterrupted(tmp_path: Path, uninterrupted: Path) -> None:
    """What the test above compares is not the same anyway: seed, dropout and the optimizer's state matter."""
    assert not same(trained(None, EPOCHS, seed=4).model.state_dict(), state_of(uninterrupted))
    first = trained(tmp_path, 2)
    assert not same(first.model.state_dict(), state_of(uninterrupted))
    forgetful = Trainer(first.model, *run_data(), run_settings(tensorboard=False), show_progress=False)
    forgetful.epoch = 2
    forgetful.fit()
    assert not same(forgetful.model.state_dict(), state_of(uninterrupted))
    assert same(trained(tmp_path, EPOCHS).model.state_dict(), state_of(uninterrupted))


def test_a_log_file_gets_a_line_per_epoch(killed: tuple[Path, str]) -> None:
    _, text = killed
    lines = [line for line in text.splitlines() if line.startswith("epoch ")]
    assert [line.split("  ")[0] for line in lines] == [f"epoch {n}/{EPOCHS}" for n in (1, 2, 3)]
    assert all(c == "\n" or c.isprintable() for c in text)
    assert len(text.splitlines()) <= 5  # the choice of backend, once per process, too


def test_tensorboard_forgets_what_is_repeated(killed: tuple[Path, str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    directory, _ = killed
    events = EventAccumulator(str(directory / "tensorboard")).Reload()
    assert "validation/top5" in events.Tags()["scalars"]
    losses = events.Scalars("train/loss")
    assert [event.step for event in losses] == [1, 2, 3, 4]
    for event, row in zip(losses, rows(directory), strict=True):
        assert event.value == pytest.approx(float(row["train_loss"]))


def test_more_epochs_go_on(tmp_path: Path, uninterrupted: Path) -> None:
    for epochs in (1, 3, EPOCHS):
        trained(tmp_path, epochs)
    assert rows(tmp_path) == rows(uninterrupted)
    assert same(state_of(tmp_path), state_of(uninterrupted))


def test_what_is_finished_stays(tmp_path: Path) -> None:
    trained(tmp_path, 2)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for epochs in (2, 1):
        trainer = Trainer(make_model(seed=8), *run_data(), run_settings(epochs=epochs), directory=tmp_path)
        assert trainer.resume()
        assert trainer.epoch == 2
        assert trainer.fit() == []
        assert same(trainer.model.state_dict(), state_of(tmp_path))
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_nothing_to_resume(tmp_path: Path) -> None:
    for directory in (None, tmp_path, tmp_path / "not there"):
        trainer = Trainer(make_model(), run_data()[0], None, run_settings(), directory=directory)
        assert not trainer.resume()
        assert trainer.epoch == 0


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    trained(tmp_path, 2)
    fresh = Trainer(make_model(), *run_data(), run_settings(), directory=tmp_path, show_progress=False)
    with pytest.raises(CheckpointError, match="has a run of 2 epochs, this one is at epoch 0: resume it or"):
        fresh.fit()
    assert len(rows(tmp_path)) == 2


def test_a_copy_without_links_is_refused(tmp_path: Path) -> None:
    """Before the epoch that it could not save."""
    trained(tmp_path, 1)
    last = tmp_path / "checkpoints" / "last"
    folder = last.resolve()
    last.unlink()
    folder.rename(last)
    with pytest.raises(CheckpointError, match="last must be a symbolic link to go on from, it is none"):
        trained(tmp_path, 2)


def test_another_model_is_refused(tmp_path: Path) -> None:
    trained(tmp_path, 1)
    settings = run_settings(tensorboard=False)
    wider = Trainer(make_model(cluster_size=4), *run_data(), settings, directory=tmp_path)
    with pytest.raises(CheckpointError, match=r"is of another model: it has clusters\.rgb\.weight") as caught:
        wider.resume()
    assert "clusters.rgb.weight (3, 6) instead of (4, 6)" in str(caught.value)
    assert str(caught.value).endswith("and 4 more")
    other = Trainer(nn.ModuleDict({"fc": nn.Linear(2, 3)}), run_data()[0], None, settings, directory=tmp_path)
    with pytest.raises(CheckpointError, match="it has also clusters") as caught:
        other.resume()
    assert "fc.weight (7, 33) instead of (3, 2)" in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(tmp_path))


def test_other_settings_are_refused(tmp_path: Path) -> None:
    trained(tmp_path, 1)
    optimizer = OptimizerConfig(name="adam", lr=0.5)
    changed = run_settings(batch_size=10, optimizer=optimizer, workers=1, evaluation_batch_size=3, epochs=9)
    trainer = Trainer(make_model(), *run_data(), changed, directory=tmp_path)
    with pytest.raises(CheckpointError, match="other settings: batch_size was 9, is 10; optimizer was") as e:
        trainer.resume()
    assert "workers" not in str(e.value)
    assert "epochs" not in str(e.value)
    # One that lost them may be of any.
    path = tmp_path / "checkpoints/last/state.json"
    state = json.loads(path.read_text())
    del state["training"]
    path.write_text(json.dumps(state))
    trainer = Trainer(make_model(), *run_data(), run_settings(), directory=tmp_path)
    with pytest.raises(CheckpointError, match="other settings: batch_size was None, is 9"):
        trainer.resume()


def test_validation_may_begin_later(tmp_path: Path) -> None:
    train_data, validation_data = run_data()
    for epochs, data in ((1, None), (3, validation_data)):
        settings = run_settings(epochs=epochs, tensorboard=False)
        trainer = Trainer(make_model(), train_data, data, settings, directory=tmp_path, show_progress=False)
        trainer.resume()
        trainer.fit()
    accuracies = [row["validation_accuracy"] for row in rows(tmp_path)]
    assert accuracies[0] == ""
    assert all(float(accuracy) >= 0 for accuracy in accuracies[1:])


def test_best_is_the_highest_accuracy(tmp_path: Path) -> None:
    data = RaggedFeatures(30, seed=1)
    settings = run_settings(epochs=6, tensorboard=False, optimizer=OptimizerConfig(name="adam", lr=0.1))
    trainer = Trainer(make_model(), data, RaggedFeatures(40, seed=1), settings, directory=tmp_path)
    trainer.fit()
    accuracies = [float(row["validation_accuracy"]) for row in rows(tmp_path)]
    best = checkpoint.read_state(tmp_path / "checkpoints", "best")
    assert best["epoch"] == 1 + accuracies.index(max(accuracies))
    assert best["values"]["validation_accuracy"] == max(accuracies) == trainer.best
    assert len(set(accuracies)) > 1
