"""The stages of `make gpu` that run in processes of their own: build, tests, warm-up, sanitizers.

Every process has a deadline; one that outlives it is ended with all its children, and the report says so.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .machine import ROOT

TESTS = "tests/gpu"
TOOLS = ("memcheck", "racecheck")
MISSING = ("no nvcc found", "no C++ compiler found")
"""What setup.py says where a compiler is not installed."""


@dataclass
class Job:
    """A command in a process group of its own."""

    name: str
    command: list[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    optional: bool = False
    """Whether the job ends when the last job that is not optional has ended."""


@dataclass
class Done:
    """How a job ended: its status is None if it was ended at its deadline."""

    status: int | None
    output: str  # stdout and stderr together


def run_all(jobs: list[Job], deadline: float, clock: Callable[[], float] = time.monotonic) -> dict[str, Done]:
    """Run jobs at the same time, until all that are not optional have ended or `clock` passes `deadline`."""
    with tempfile.TemporaryDirectory() as folder:
        running: dict[str, tuple[subprocess.Popen[bytes], Path]] = {}
        try:
            for job in jobs:
                log = Path(folder) / f"{len(running)}.log"
                with log.open("wb") as file:
                    process = subprocess.Popen(
                        job.command, cwd=ROOT, env={**os.environ, **job.environment},
                        stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )  # fmt: skip
                running[job.name] = (process, log)
            awaited = [running[job.name][0] for job in jobs if not job.optional]
            while clock() < deadline and any(process.poll() is None for process in awaited):
                time.sleep(0.1)
            ended = {name: process.poll() for name, (process, _) in running.items()}
        finally:
            end([process for process, _ in running.values()])
        return {
            name: Done(ended[name], log.read_text(errors="replace")) for name, (_, log) in running.items()
        }


def end(processes: list[subprocess.Popen[bytes]]) -> None:
    """End what still runs of processes started by `run_all`, with their children."""
    left = [process for process in processes if process.poll() is None]
    for number, patience in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 10.0)):
        for process in left:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
        until = time.monotonic() + patience
        for process in left:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))


def build(deadline: float, capability: int) -> dict[str, dict[str, Any]]:
    """Build both extensions in place with this interpreter: {"C++": ..., "CUDA": ...}.

    Each result has "built" and "seconds"; if it was not built, "reason" and "failed", which is whether a
    compiler stopped rather than was missing or out of time. Where the C++ one fails, FASTAC_NATIVE=0 is set
    for everything that follows: the Triton kernels need no extension. The CUDA one is compiled for this GPU.

    Args:
        deadline: by time.monotonic.
        capability: of the GPU, 10 major + minor.
    """
    jobs = str(os.cpu_count() or 1)
    both = {"FASTAC_CUDA": "1", "FASTAC_CUDA_ARCHS": str(capability), "FASTAC_BUILD_JOBS": jobs}
    now = time.monotonic()
    cuda = attempt(["--parallel", "2"], both, now + 0.8 * (deadline - now))
    if cuda["built"]:
        return {"C++": cuda, "CUDA": cuda}
    plain = attempt([], {"FASTAC_CUDA": "0"}, deadline)
    if not plain["built"]:
        os.environ["FASTAC_NATIVE"] = "0"
        cuda |= {"reason": "needs the C++ extension", "failed": False}
    return {"C++": plain, "CUDA": cuda}


def attempt(options: list[str], environment: Mapping[str, str], deadline: float) -> dict[str, Any]:
    """Build what the environment asks for; see `build` for the result."""
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace", *options]
    begin = time.monotonic()
    done = run_all([Job("build", command, environment)], deadline)["build"]
    result: dict[str, Any] = {"seconds": round(time.monotonic() - begin, 1), "built": done.status == 0}
    if done.status != 0:
        lines = done.output.strip().splitlines() or ["no output"]
        result["reason"] = "out of time" if done.status is None else lines[-1]
        result["failed"] = done.status is not None and not any(why in lines[-1] for why in MISSING)
    return result


@dataclass
class Tests:
    """What the GPU tests said."""

    collected: int = 0
    passed: int = 0
    failed: dict[str, str] = field(default_factory=dict)  # test -> what it said
    skipped: dict[str, str] = field(default_factory=dict)  # test -> reason
    broken: list[str] = field(default_factory=list)  # processes that ended without finishing their tests

    @property
    def missing(self) -> int:
        """Tests that were collected and did not end."""
        return self.collected - self.passed - len(self.failed) - len(self.skipped)

    @property
    def green(self) -> bool:
        """Whether there were tests and each of them passed or was skipped with a reason."""
        return self.passed > 0 and not self.failed and not self.broken and self.missing == 0

    def summary(self) -> str:
        parts = [f"{self.passed} passed"]
        for count, word in (
            (len(self.failed), "FAILED"),
            (len(self.skipped), "skipped"),
            (self.missing, "did not end in time"),
        ):
            if count:
                parts.append(f"{count} {word}")
        return ", ".join(parts)

    def record(self) -> dict[str, Any]:
        return {
            "collected": self.collected, "passed": self.passed, "missing": self.missing,
            "failed": self.failed, "skipped": self.skipped, "broken": self.broken,
        }  # fmt: skip


def test_jobs(shards: int, folder: Path, backends: Sequence[str]) -> list[Job]:
    """The GPU tests dealt out to processes; each writes what happened to a file of its own as it happens."""
    common = {"FASTAC_GPU_BACKENDS": ",".join(backends)}
    command = [sys.executable, "-m", "pytest", TESTS, "-m", "not full", "-q", "-p", "no:cacheprovider"]
    return [
        Job(
            f"tests {i}",
            command,
            common | {"FASTAC_GPU_SHARD": f"{i}/{shards}", "FASTAC_GPU_LOG": str(folder / f"{i}.jsonl")},
        )
        for i in range(shards)
    ]


def read_tests(folder: Path, jobs: list[Job], done: Mapping[str, Done]) -> Tests:
    """Add up what the processes of `test_jobs` wrote."""
    tests = Tests()
    outcomes: dict[str, tuple[str, str]] = {}
    for i, job in enumerate(jobs):
        log = folder / f"{i}.jsonl"
        collected = False
        for text in log.read_text().splitlines() if log.exists() else []:
            try:
                entry = json.loads(text)
            except ValueError:  # a last line cut short
                continue
            if "collected" in entry:
                tests.collected += entry["collected"]
                collected = True
            elif outcomes.get(entry["test"], ("",))[0] != "failed":  # it may pass, then fail in its teardown
                outcomes[entry["test"]] = (entry["outcome"], entry["text"])
        status = done[job.name].status
        # 0: all passed; 1: some failed; 5: no test for this process; None: out of time, counted as missing
        if status not in (0, 1, 5, None) or not collected:
            tests.broken.append(f"{job.name} ended with {status}: {done[job.name].output.strip()[-1500:]}")
    tests.passed = sum(outcome == "passed" for outcome, _ in outcomes.values())
    tests.skipped = {name: text for name, (outcome, text) in outcomes.items() if outcome == "skipped"}
    tests.failed = {name: text for name, (outcome, text) in outcomes.items() if outcome == "failed"}
    return tests


def tests_and_warm_up(
    deadline: float, warm: Callable[[int], list[Job]], cores: int, backends: Sequence[str]
) -> Tests:
    """Run the GPU tests; beside them, where there are cores, compile what the benchmark will need.

    Args:
        deadline: of all processes, by time.monotonic.
        warm: the warm-up dealt out to a number of processes.
        cores: how many processors there are.
        backends: those that are tested.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        jobs = test_jobs(max(1, min(8, cores // 2)), folder, backends)
        warming = warm(min(4, cores // 4)) if cores >= 4 else []
        done = run_all(jobs + warming, deadline)
        return read_tests(folder, jobs, done)


# compute-sanitizer


def sanitizer() -> str | None:
    """Path of compute-sanitizer."""
    return shutil.which("compute-sanitizer") or next(
        (str(p) for p in Path("/usr/local").glob("cuda*/bin/compute-sanitizer")), None
    )


def verdict(tool: str, done: Done) -> dict[str, Any]:
    """What one run of the sanitizer found: {"state": "clean", "errors" or "did not run", "text": ...}."""
    if done.status is None:
        return {"state": "did not run", "text": "out of time"}
    counts = re.findall(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)", done.output)
    lines = [text for text in done.output.splitlines() if text.startswith("=========")]
    last = done.output.strip().splitlines()[-1:] or ["no output"]
    if "not supported" in done.output.lower():
        return {"state": "did not run", "text": "\n".join(lines[:5])}
    if any(int(a or b) for a, b in counts):
        return {"state": "errors", "text": "\n".join(lines[:40])}
    if not counts or done.status != 0 or "probe: done" not in done.output:
        return {"state": "did not run", "text": last[0]}
    return {"state": "clean", "text": lines[-1]}


def sanitize(path: str, deadline: float, backends: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Run small shapes under memcheck and racecheck, one after the other, on each backend in turn."""
    found = {}
    todo = [(backend, tool) for backend in backends for tool in TOOLS]
    for i, (backend, tool) in enumerate(todo):
        now = time.monotonic()
        until = now + (deadline - now) / (len(todo) - i)
        command = [path, "--tool", tool, "--error-exitcode", "9", "--target-processes", "application-only"]
        command += [sys.executable, "-m", "benchmarks.gpu_probe", backend]
        # One allocation per tensor, so that a write past its end is a write past the end of an allocation.
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        found[f"{backend} {tool}"] = verdict(tool, run_all([Job(tool, command, environment)], until)[tool])
    return found
