"""The tests that need an NVIDIA GPU: skipped, with the reason, where there is none.

Each runs on every backend that FASTAC_GPU_BACKENDS names, triton and cuda unless set, and is skipped for one
that cannot run there. `make gpu` runs them in several processes at once: FASTAC_GPU_SHARD=i/n leaves every
n-th test to a process, and FASTAC_GPU_LOG names the file that says, line by line as it happens, what became
of each.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_helpers import BACKENDS, OURS

import fastac
from fastac import backends

HERE = Path(__file__).resolve().parent

if importlib.util.find_spec("fastac.kernels") is None:  # a checkout that is not installed
    fastac.__path__.append(str(HERE.parent.parent))


def why_not() -> str | None:
    """Why none of these tests can run here."""
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device"
    if backends.interpreting():
        return "Triton interprets its kernels in this process; tests/gpu must run by itself"
    return None


def _log(entry: dict[str, Any]) -> None:
    name = os.environ.get("FASTAC_GPU_LOG")
    if name:
        with open(name, "a") as file:
            file.write(json.dumps(entry) + "\n")


def _here(path: Path) -> bool:
    return HERE in path.parents


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ours = [item for item in items if _here(item.path)]
    part, parts = map(int, os.environ.get("FASTAC_GPU_SHARD", "0/1").split("/"))
    # One backend's after the other's, so that no process gets all the tests of the slower one.
    dealt = sorted(ours, key=lambda item: BACKENDS.index(item.callspec.params["tested"]))
    left_out = {id(item) for i, item in enumerate(dealt) if i % parts != part}
    dropped = [item for item in ours if id(item) in left_out]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if id(item) not in left_out]
    reason = why_not()
    if reason is not None:
        for item in ours:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish(session: pytest.Session) -> None:
    _log({"collected": sum(_here(item.path) for item in session.items)})


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    failed = report.failed or (report.when == "call" and hasattr(report, "wasxfail") and report.passed)
    if failed or report.skipped or (report.when == "call" and report.passed):
        text = ""
        if report.skipped and isinstance(report.longrepr, tuple):
            text = report.longrepr[2].removeprefix("Skipped: ")
        elif failed:
            text = report.longreprtext[-3000:]
        _log({"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration, "text": text})


@pytest.fixture(autouse=True, params=BACKENDS)
def tested(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chooses the backend that `OURS` calls."""
    reason = backends.why_not(request.param, torch.empty(1, device="cuda"))
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    monkeypatch.setattr(OURS, "name", request.param)


@pytest.fixture(autouse=True)
def cleared() -> Iterator[None]:
    """No cached memory is left to the next test, and an error of the device stays with its own test."""
    yield
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
