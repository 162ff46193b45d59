"""The ratio check fails where a fast path is lost or a result is wrong; one slow attempt does not fail it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import fastac
from fastac import _native

from . import correctness, machine, ratio_check
from .peers import Eager, Prepared
from .ratio_check import CHECKS, Check
from .timing import Timings
from .workloads import Case, Workload

SMALL = Check(Workload("small", 8, 25, 512, 64, "tests"), 1.3)
pytestmark = pytest.mark.skipif(not _native.available, reason=f"no native library: {_native.why_not}")


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_kernels_pass(capsys: pytest.CaptureFixture[str]) -> None:
    assert ratio_check.run([SMALL], attempts=5, rounds=15, budget=1.0)
    out, err = capsys.readouterr()
    assert out.startswith("small (B=8 ") and out.endswith("at least 1.3 is asked for: passed\n")
    assert err == ""


def test_the_reference_in_place_of_the_kernels_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    with fastac.backend("reference"):
        assert not ratio_check.run([SMALL], attempts=2, rounds=9, budget=0.5)
    out, err = capsys.readouterr()
    assert out == ""
    assert "a fast path is lost (backend 'reference')" in err and len(err.splitlines()) == 1


def test_the_command_fails_with_a_lost_fast_path() -> None:
    command = [sys.executable, "-m", "benchmarks.ratio_check", "--threads", "1", "--attempts", "1"]
    done = subprocess.run(
        [*command, "--rounds", "5", "--budget", "0.2"], cwd=machine.ROOT, capture_output=True, text=True,
        env={**os.environ, "FASTAC_BACKEND": "reference"}, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    lines = done.stderr.splitlines()
    # Beside other jobs one of the two may come out well by chance.
    assert {line.split()[0] for line in lines} <= {check.workload.name for check in CHECKS}
    assert lines
    assert all(
        "a fast path is lost (backend 'reference', as FASTAC_BACKEND=reference asks)" in x for x in lines
    )
    assert len(lines) + done.stdout.count(": passed") == len(CHECKS)


def measuring(values: list[float]) -> Callable[..., Timings]:
    """In place of `alternate`: the next ratio of a list."""
    left = iter(values)
    return lambda *_, **__: Timings({"ours": [1.0], "eager": [next(left)]}, {"ours": 0, "eager": 0})


def test_the_best_attempt_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"attempts": 3, "rounds": 1, "budget": 0.0}
    for values, tried in (([1.3], 1), ([1.0, 2.0], 2), ([1.0, 1.1, 1.3], 3), ([1.2, 1.1, 1.0], 3)):
        monkeypatch.setattr(ratio_check, "alternate", measuring(values))
        assert ratio_check.ratios(SMALL, **given) == values[:tried]  # type: ignore[arg-type]
        monkeypatch.setattr(ratio_check, "alternate", measuring(values))
        assert ratio_check.run([SMALL], **given) == (max(values) >= 1.3)  # type: ignore[arg-type]


def test_one_lost_path_of_two_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ratio_check, "alternate", measuring([1.0, 3.0]))
    assert not ratio_check.run([SMALL, SMALL], attempts=1, rounds=1, budget=0.0)


class Wrong:
    """Ours with a result that is a little off."""

    def prepare(self, case: Case) -> Prepared:
        right = Eager().prepare(case)

        def call(*operands: Tensor) -> Tensor:
            return right.call(*operands) * (1 + 1e-4)

        return replace(right, call=call)


def test_no_ratio_of_a_wrong_result(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ratio_check, "Ours", Wrong)
    with pytest.raises(correctness.Red, match="y of ours"):
        ratio_check.run([SMALL], attempts=1, rounds=1, budget=0.0)
    assert capsys.readouterr().out == ""


def test_two_workloads_are_held_to_more_than_plain_torch_reaches() -> None:
    assert len(CHECKS) == 2
    assert all(1.2 <= check.threshold <= 2.0 for check in CHECKS)
