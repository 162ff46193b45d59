"""The stages of `make gpu` that are processes of their own, on a machine without a GPU."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent))  # `benchmarks` is not installed

from benchmarks import gpu_probe, gpu_stages


def python(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def test_processes_end_at_the_deadline() -> None:
    jobs = [
        gpu_stages.Job(
            "quick", python("import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)")
        ),
        gpu_stages.Job("slow", python("import time; print('begun', flush=True); time.sleep(60)")),
    ]
    begin = time.monotonic()
    done = gpu_stages.run_all(jobs, begin + 2)
    assert time.monotonic() - begin < 20
    assert done["quick"].status == 3
    assert sorted(done["quick"].output.split()) == ["err", "out"]
    assert done["slow"] == gpu_stages.Done(None, "begun\n")


def test_optional_processes_end_with_the_others() -> None:
    jobs = [
        gpu_stages.Job("tests", python("pass")),
        gpu_stages.Job("warm", python("import time; time.sleep(60)"), optional=True),
    ]
    begin = time.monotonic()
    done = gpu_stages.run_all(jobs, begin + 50)
    assert time.monotonic() - begin < 20
    assert (done["tests"].status, done["warm"].status) == (0, None)


# Builds


def test_a_build_that_fails_is_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTAC_NATIVE", "1")  # restored afterwards
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").write_text("#!/bin/sh\necho nvcc 0\n")
    (tmp_path / "bin" / "nvcc").chmod(0o755)
    result = gpu_stages.build(time.monotonic() + 60, 90)
    for name in ("C++", "CUDA"):
        assert not result[name]["built"]
        assert not result[name]["failed"]  # it is not installed
    assert "no C++ compiler found" in result["C++"]["reason"]
    assert result["CUDA"]["reason"] == "needs the C++ extension"
    assert os.environ["FASTAC_NATIVE"] == "0"


def test_the_cuda_extension_is_built_for_this_gpu_if_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever becomes of it, the C++ one is there, and a compiler that stops is a failure."""
    said = {"1": (None, ""), "0": (0, "")}
    asked = []

    def run_all(jobs: list[gpu_stages.Job], deadline: float) -> dict[str, gpu_stages.Done]:
        (job,) = jobs
        asked.append(dict(job.environment))
        return {job.name: gpu_stages.Done(*said[job.environment["FASTAC_CUDA"]])}

    monkeypatch.setattr(gpu_stages, "run_all", run_all)
    for done, reason, failed in (
        ((None, "fastac: compiling"), "out of time", False),
        ((1, "warning\nfastac: no nvcc found in"), "fastac: no nvcc found in", False),
        ((1, "error\nfastac: this command failed: nvcc"), "fastac: this command failed: nvcc", True),
    ):
        said["1"] = done
        asked.clear()
        found = gpu_stages.build(time.monotonic() + 60, 90)
        assert found["C++"]["built"]
        assert (found["CUDA"]["built"], found["CUDA"]["reason"], found["CUDA"]["failed"]) == (
            False, reason, failed
        )  # fmt: skip
        assert [(e["FASTAC_CUDA"], e.get("FASTAC_CUDA_ARCHS")) for e in asked] == [("1", "90"), ("0", None)]
    said["1"] = (0, "")
    asked.clear()
    found = gpu_stages.build(time.monotonic() + 60, 120)
    assert found["C++"]["built"]
    assert found["CUDA"]["built"]
    assert [e["FASTAC_CUDA_ARCHS"] for e in asked] == ["120"]


# Tests


def logged(folder: Path, *shards: list[Any]) -> tuple[list[gpu_stages.Job], dict[str, gpu_stages.Done]]:
    jobs = gpu_stages.test_jobs(len(shards), folder, ["triton", "cuda"])
    for i, entries in enumerate(shards):
        lines = [e if isinstance(e, str) else json.dumps(e) for e in entries]
        (folder / f"{i}.jsonl").write_text("\n".join(lines))
    return jobs, {job.name: gpu_stages.Done(0, "said") for job in jobs}


def entry(test: str, outcome: str, text: str = "") -> dict[str, str]:
    return {"test": test, "outcome": outcome, "text": text}


def test_green_only_if_every_test_ended(tmp_path: Path) -> None:
    whole = [{"collected": 2}, entry("a", "passed"), entry("b", "skipped", "one device")]
    jobs, done = logged(tmp_path, whole, [{"collected": 1}, entry("c", "passed")])
    tests = gpu_stages.read_tests(tmp_path, jobs, done)
    assert (tests.collected, tests.passed, tests.missing, tests.green) == (3, 2, 0, True)
    assert tests.skipped == {"b": "one device"}
    assert tests.summary() == "2 passed, 1 skipped"

    jobs, done = logged(tmp_path, whole, [{"collected": 2}, entry("c", "passed"), '{"test": "d", "outc'])
    tests = gpu_stages.read_tests(tmp_path, jobs, done)
    assert (tests.missing, tests.green) == (1, False)
    assert "1 did not end in time" in tests.summary()

    jobs, done = logged(
        tmp_path, [{"collected": 1}, entry("a", "passed"), entry("a", "failed", "in teardown")]
    )
    tests = gpu_stages.read_tests(tmp_path, jobs, done)
    assert (tests.passed, tests.failed, tests.green) == (0, {"a": "in teardown"}, False)

    jobs, done = logged(tmp_path, [{"collected": 1}, entry("a", "skipped", "no device")])
    assert not gpu_stages.read_tests(tmp_path, jobs, done).green  # nothing passed

    jobs, done = logged(tmp_path, whole)
    done[jobs[0].name] = gpu_stages.Done(-11, "segmentation fault")
    tests = gpu_stages.read_tests(tmp_path, jobs, done)
    assert not tests.green
    assert "segmentation fault" in tests.broken[0]


def test_the_gpu_tests_report_what_became_of_them(tmp_path: Path) -> None:
    """One of many shards, where no device is visible: every test is skipped, which is no pass."""
    jobs = gpu_stages.test_jobs(60, tmp_path, ["triton", "cuda"])[:1]
    jobs[0].environment = {**jobs[0].environment, "CUDA_VISIBLE_DEVICES": ""}
    done = gpu_stages.run_all(jobs, time.monotonic() + 100)
    tests = gpu_stages.read_tests(tmp_path, jobs, done)
    assert not tests.broken
    assert tests.collected == len(tests.skipped) > 5
    assert {"triton", "cuda"} <= {word for name in tests.skipped for word in re.split(r"[-\[\]]", name)}
    assert all("finds no CUDA device" in reason for reason in tests.skipped.values())
    assert not tests.green


# Sanitizers


SUMMARY = "========= COMPUTE-SANITIZER\nprobe: done, 18 calls\n========= "


@pytest.mark.parametrize(
    ("status", "output", "state"),
    [
        (0, SUMMARY + "ERROR SUMMARY: 0 errors", "clean"),
        (0, SUMMARY + "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", "clean"),
        (9, SUMMARY + "ERROR SUMMARY: 12 errors", "errors"),
        (9, SUMMARY + "RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)", "errors"),
        (1, "Traceback\n========= ERROR SUMMARY: 0 errors", "did not run"),
        (1, "========= Error: Device not supported\n========= ERROR SUMMARY: 1 error", "did not run"),
        (0, "probe: done, 18 calls", "did not run"),
        (None, SUMMARY, "did not run"),
    ],
)
def test_verdict_of_the_sanitizer(status: int | None, output: str, state: str) -> None:
    assert gpu_stages.verdict("memcheck", gpu_stages.Done(status, output))["state"] == state


def test_the_sanitizer_sees_every_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []

    def run_all(jobs: list[gpu_stages.Job], deadline: float) -> dict[str, gpu_stages.Done]:
        (job,) = jobs
        assert 0 < deadline - time.monotonic() < 60
        commands.append((job.command[2], job.command[-1]))
        assert job.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
        return {job.name: gpu_stages.Done(0, SUMMARY + "ERROR SUMMARY: 0 errors")}

    monkeypatch.setattr(gpu_stages, "run_all", run_all)
    found = gpu_stages.sanitize("/compute-sanitizer", time.monotonic() + 60, ["cuda", "triton"])
    runs = [(tool, backend) for backend in ("cuda", "triton") for tool in ("memcheck", "racecheck")]
    assert commands == runs
    assert [*found] == [f"{backend} {tool}" for tool, backend in runs]
    assert {result["state"] for result in found.values()} == {"clean"}


def test_the_probe_of_the_sanitizer_runs() -> None:
    assert gpu_probe.probe("cpu", "reference") == 24
