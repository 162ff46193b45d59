"""The logic of `make gpu`, on a machine without a GPU: order, counts, gate, time budget, files, verdicts."""

from __future__ import annotations

import csv
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # `benchmarks` is not installed

from benchmarks import gpu, gpu_bench, gpu_device, gpu_report, gpu_stages, peers  # noqa: E402
from benchmarks.gpu_bench import Cell, Group, Pass, Rates  # noqa: E402
from benchmarks.gpu_device import Sample  # noqa: E402
from benchmarks.timing import Timings  # noqa: E402
from benchmarks.workloads import Workload  # noqa: E402
from fastac import _cuda, backends  # noqa: E402
from fastac.explain import Cost  # noqa: E402

SMALL = Workload("small", 4, 7, 33, 5, "tests")
RAGGED = Workload("small ragged", 4, 7, 33, 5, "tests", ragged=True)
GIVEN = Workload("small given", 3, 7, 33, 5, "tests", scores="given")
RATES = Rates(4e12, {"bfloat16": 8e14, "float16": 8e14, "float32": 5e13})
MACHINE = {"date": "2026-01-02T03:04:05+00:00", "commit": "abc", "backend": "reference", "gpu": "none",
           "driver": "1", "cuda": "2", "torch": "3", "triton": "4", "python": "5"}  # fmt: skip


class NoGpu:
    """A device whose every run takes a millisecond, and moves `clock` on."""

    name = "cpu"

    def __init__(self) -> None:
        self.clock = 0.0
        self.runs = 0

    def warm(self, sample: Sample) -> float:
        sample.run(sample.prepare())
        return 0.0

    def seconds(self, sample: Sample, lead: float) -> float:
        sample.run(sample.prepare())
        self.runs += 1
        self.clock += 1e-3
        return 1e-3

    def back_to_back(self, sample: Sample, count: int) -> float:
        sample.run(None)
        return 2e-3

    def release(self) -> None:
        pass


class Spoiled(peers.Eager):
    """Eager torch with y spoiled."""

    def __init__(self, spoil: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.spoil = spoil

    def prepare(self, case: Any) -> peers.Prepared:
        prepared = super().prepare(case)
        call = prepared.call
        prepared.call = lambda *operands: self.spoil(call(*operands))
        return prepared


def contenders() -> dict[str, Any]:
    return {"ours": peers.Ours("reference"), "eager": peers.Eager(), "sdpa": peers.Sdpa()}


def report_in(folder: Path) -> gpu_report.Report:
    return gpu_report.Report(MACHINE, folder)


def rows_of(report: gpu_report.Report) -> list[dict[str, str]]:
    with report.path(".csv").open() as file:
        return list(csv.DictReader(file))


# What is measured


def test_groups_come_most_important_first() -> None:
    found = gpu_bench.groups()
    assert str(found[0]) == "kinetics-rgb B=1024 bfloat16"
    assert [g.workload.name for g in found[:9]] == list(gpu_bench.ORDER)
    assert {g.dtype for g in found[:15]} == {"bfloat16"}
    assert {g.workload.batch for g in found[:9]} == {1, 1024}
    # Three workloads have one batch size only: those of one set, and flash-mnist, which has 1024 sets.
    assert len(found) == len(set(found)) == 3 * (9 + 6)


def test_costs_are_those_of_the_contract() -> None:
    """(L + N) M forward, (2L + 2N) M direct, (2L + N) M Gram, which has 4 L L M operations more."""
    b, length, m, n, size = 4, 7, 33, 5, 2
    case = gpu_bench.make_case(Group(SMALL, "bfloat16"), "cpu")
    found, _ = gpu_bench.forms(case, "reference")
    (forward,) = found["forward"]
    direct, gram = found["backward"]
    frozen, frozen_gram = found["frozen backward"]
    assert (direct.form, gram.form) == ("direct", "Gram")
    assert forward.cost == Cost(b * (length + n) * m * size, b * 4 * length * m * n)
    assert direct.cost.bytes == b * (2 * length + 2 * n) * m * size
    assert gram.cost.bytes == b * (2 * length + n) * m * size
    assert frozen.cost.bytes == b * (length + 2 * n) * m * size
    assert frozen_gram.cost.bytes == b * (length + n) * m * size
    # Scores of so small an M are computed again: 8 + 2 and 4 + 2 L M N.
    assert direct.cost.operations == b * 10 * length * m * n
    assert frozen.cost.operations == b * 6 * length * m * n
    assert gram.cost.operations - direct.cost.operations == b * 4 * length**2 * m
    assert frozen_gram.cost.operations - frozen.cost.operations == b * 2 * length**2 * m


def test_costs_of_ragged_sets_count_their_own_lengths() -> None:
    case = gpu_bench.make_case(Group(RAGGED, "float32"), "cpu")
    assert case.offsets is not None
    lengths = case.offsets.diff()
    found, _ = gpu_bench.forms(case, "reference")
    direct, gram = found["backward"]
    assert direct.cost.bytes == (2 * int(lengths.sum()) + 2 * 4 * 5) * 33 * 4
    assert gram.cost.operations - direct.cost.operations == 4 * int(lengths.square().sum()) * 33


def test_the_form_with_the_lower_floor_is_taken() -> None:
    few_bytes = Pass("backward", "Gram", Cost(100, 1000))
    few_operations = Pass("backward", "direct", Cost(200, 100))
    assert gpu_bench.least([few_operations, few_bytes], bandwidth=1.0, rate=1e9) is few_bytes
    assert gpu_bench.least([few_operations, few_bytes], bandwidth=1e9, rate=1.0) is few_operations


def cell_of(seconds: dict[str, list[float]], operations: int = 0, mode: str = "forward") -> Cell:
    passes = [Pass(name, "", Cost(100, operations)) for name in gpu_bench.PASSES[mode]]
    group = Group(gpu_bench.WORKLOADS["kinetics-rgb"], "bfloat16")
    ours = {"ours": "triton"} | {name: name for name in ("cuda",) if name in seconds}
    return Cell(group, mode, 7, passes, 10.0, Timings(seconds, {}), {"ours": 0.5}, {"sdpa": "absent"}, ours)


def test_floor_is_the_longer_of_copy_and_operations_in_each_round() -> None:
    timed = {"ours": [4.0, 8.0, 6.0], "eager": [12.0, 16.0, 30.0], "copy forward": [1.0, 2.0, 3.0]}
    bytes_bound = cell_of(timed)
    assert bytes_bound.floors == [1.0, 2.0, 3.0]
    assert bytes_bound.share() == 0.25
    assert bytes_bound.speedup("eager") == 3.0
    assert bytes_bound.speedup("sdpa") is None
    operations_bound = cell_of(timed, operations=24)
    assert operations_bound.floors == [2.4, 2.4, 3.0]
    assert operations_bound.share() == statistics.median([2.4 / 4, 2.4 / 8, 0.5])


def test_floors_of_two_passes_add_up() -> None:
    timed = {"ours": [10.0], "copy forward": [1.0], "copy backward": [4.0]}
    assert cell_of(timed, operations=20, mode="training").floors == [2.0 + 4.0]
    records = list(cell_of(timed, mode="training").records())
    assert [r["contender"] for r in records] == ["ours", "sdpa"]
    assert records[0]["bytes"] == 200
    assert records[0]["share_of_floor"] == 0.5
    assert records[1]["reason"] == "absent"
    assert "median_s" not in records[1]


def test_targets() -> None:
    timed = {"ours": [1.0], "compile": [2.5], "eager": [2.0], "copy forward": [0.8]}
    cell = cell_of(timed)
    cell.group = Group(gpu_bench.groups()[0].workload, "bfloat16")
    found = {f.figure: f.verdict for f in gpu_report.figures([cell])}
    assert found["kinetics-rgb forward, triton, share of the floor"] == "met"
    assert found["kinetics-rgb forward, compile / ours"] == "met"
    assert found["kinetics-rgb forward, eager / ours"] == "missed by 33 %"
    assert found["kinetics-rgb forward, sdpa / ours"] == "not measured"
    assert found["mil-bag forward, triton, share of the floor"] == "not measured"
    assert {f.verdict for f in gpu_report.figures([cell_of(timed)])} == {"not measured"}  # B = 256


def test_two_backends_side_by_side() -> None:
    timed = {"ours": [1.0], "cuda": [0.9], "compile": [2.5], "copy forward": [0.8]}
    cell = cell_of(timed)
    cell.group = Group(gpu_bench.groups()[0].workload, "bfloat16")
    found = {f.figure: (f.target, f.verdict) for f in gpu_report.figures([cell])}
    assert found["kinetics-rgb forward, triton, share of the floor"] == (">= 0.75", "met")
    assert found["kinetics-rgb forward, cuda, share of the floor"] == (">= 0.85", "met")  # 0.89
    assert found["kinetics-rgb backward, cuda, share of the floor"] == (">= 0.75", "not measured")
    said = gpu_report.line(cell)
    assert (said["cuda us"], said["cuda/ours"], said["compile/ours"]) == ("900000.0", "0.90x", "2.50x")
    cell.timings.seconds.pop("cuda")  # it was wrong: the columns stay, empty
    said = gpu_report.line(cell)
    assert (said["cuda us"], said["cuda/ours"]) == ("-", "-")


def test_winners_are_those_of_training_by_class() -> None:
    def cell(workload: str, dtype: str, triton: float, cuda: float, mode: str = "training") -> Cell:
        found = cell_of({"ours": [triton], "cuda": [cuda]}, mode=mode)
        found.group = Group(gpu_bench.WORKLOADS[workload], dtype)
        return found

    cells = [
        cell("kinetics-rgb", "bfloat16", 1.0, 0.5),
        cell("online", "float16", 1.0, 1.5),  # slower, but by less
        cell("kinetics-rgb", "float32", 1.0, 1.1),
        cell("yt8m-rgb", "bfloat16", 1.0, 2.0),
        cell("ragged", "bfloat16", 2.0, 1.0),
        cell("ragged", "bfloat16", 1.0, 9.0, "forward"),
        cell_of({"ours": [1.0]}, mode="training"),
    ]
    assert gpu_report.winners(cells) == {
        "16-bit long": "triton",
        "16-bit packed": "cuda",
        "16-bit short": "cuda",
        "32-bit short": "triton",
    }


# A group


@pytest.mark.parametrize("workload", [SMALL, RAGGED, GIVEN], ids=lambda w: w.name)
def test_a_group_is_timed_in_every_mode(workload: Workload) -> None:
    device = NoGpu()
    cells = list(
        gpu_bench.measure(
            Group(workload, "float32"), contenders(), device, RATES, backend="reference", rounds=3
        )
    )
    assert [cell.mode for cell in cells] == list(gpu_bench.PASSES)
    for cell in cells:
        absent = ["sdpa"] if workload is GIVEN else []
        assert cell.contenders() == [n for n in ("ours", "eager", "sdpa") if n not in absent]
        assert list(cell.reasons) == absent
        assert cell.timings.rounds == 3
        assert cell.share() == len(cell.passes)  # a millisecond for each copy, one for ours
        assert ("ours" in cell.calls) == (cell.mode != "backward")
    assert device.runs == 3 * sum(len(cell.timings.seconds) for cell in cells)


def test_the_backward_alone_is_the_backward() -> None:
    case = gpu_bench.make_case(Group(SMALL, "float32"), "cpu")
    prepared = peers.Ours("reference").prepare(case)
    alone = gpu_bench.sample(prepared, "backward")
    together = prepared.closure("training")()
    for a, b in zip(alone.run(alone.prepare()), together[1:], strict=True):
        torch.testing.assert_close(a, b)


def test_runs_alternate_in_rotating_order() -> None:
    order: list[str] = []
    samples = {name: Sample(lambda _, name=name: order.append(name)) for name in "abc"}
    gpu_bench.alternate(NoGpu(), samples, rounds=3, budget=60)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"


def test_a_wrong_peer_is_left_out_with_the_reason() -> None:
    runners = {**contenders(), "sdpa": Spoiled(lambda y: 1.1 * y)}
    cells = list(
        gpu_bench.measure(Group(SMALL, "float32"), runners, NoGpu(), RATES, backend="reference", rounds=1)
    )
    assert all(cell.contenders() == ["ours", "eager"] for cell in cells)
    assert all("wrong: " in cell.reasons["sdpa"] for cell in cells)


class SpoiledBackend(peers.Ours):
    """A backend of ours with y spoiled."""

    def __init__(self) -> None:
        super().__init__("reference")
        self.spoiled = Spoiled(lambda y: y * (1 + 1e-3))

    def prepare(self, case: Any) -> peers.Prepared:
        return self.spoiled.prepare(case)


def test_two_backends_are_timed_and_held_to_the_same_bounds() -> None:
    plans: list[Any] = []
    for second in (peers.Ours("reference"), SpoiledBackend()):
        cells = list(
            gpu_bench.measure(
                Group(SMALL, "float32"), {**contenders(), "cuda": second}, NoGpu(), RATES,
                backend="reference", rounds=2, checked=lambda ready, found: plans.append((ready, found)),
            )
        )  # fmt: skip
        assert all(cell.backends == {"ours": "reference", "cuda": "reference"} for cell in cells)
        assert {"cuda" in cell.contenders() for cell in cells} == {second.__class__ is peers.Ours}
    (good, plans_of_good), (bad, plans_of_bad) = plans
    assert (good.wrong, [*plans_of_good]) == ({}, ["ours", "cuda"])
    assert "y of cuda" in bad.wrong["cuda"]
    assert [*plans_of_bad] == ["ours"]


@pytest.mark.usefixtures("quick_rates")
def test_a_wrong_second_backend_is_red_and_the_first_is_measured(tmp_path: Path) -> None:
    report = report_in(tmp_path)
    runners = {**contenders(), "cuda": SpoiledBackend()}
    budget = gpu.Budget(1000, lambda: 0.0)
    assert not gpu.run_bench(report, runners, NoGpu(), [Group(SMALL, "float32")], options(), budget)
    assert [*report.red] == ["small B=4 float32, cuda"]
    assert {r["contender"] for r in rows_of(report)} == {"ours", "eager", "sdpa", "cuda"}
    assert {r["median_s"] for r in rows_of(report) if r["contender"] == "cuda"} == {""}


def options(**changes: Any) -> Any:
    given = gpu.parse(["--backends", "reference", "--rounds", "2", "--dtypes", "float32"])
    for name, value in changes.items():
        setattr(given, name, value)
    return given


@pytest.fixture
def quick_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_bench, "measure_rates", lambda device, dtypes: RATES)


@pytest.mark.usefixtures("quick_rates")
def test_a_red_gate_reports_no_speed(tmp_path: Path) -> None:
    report = report_in(tmp_path)
    runners = {**contenders(), "ours": Spoiled(lambda y: y * (1 + 1e-3))}
    green = gpu.run_bench(
        report, runners, NoGpu(), [Group(SMALL, "float32")], options(), gpu.Budget(1000, lambda: 0.0)
    )
    assert not green
    assert "y of ours" in report.red["small B=4 float32"]
    assert not report.cells
    assert not report.path(".csv").exists()
    assert "no speed is reported" in gpu_report.render(report)


@pytest.mark.usefixtures("quick_rates")
def test_a_crash_of_ours_is_no_pass(tmp_path: Path) -> None:
    class Crash(peers.Eager):
        def prepare(self, case: Any) -> peers.Prepared:
            raise RuntimeError("an illegal memory access was encountered")

    report = report_in(tmp_path)
    todo = [Group(SMALL, "float32"), Group(GIVEN, "float32")]
    budget = gpu.Budget(1000, lambda: 0.0)
    assert not gpu.run_bench(report, {"ours": Crash()}, NoGpu(), todo, options(), budget)
    assert [*report.red] == ["small B=4 float32", "small given B=3 float32"]


@pytest.mark.usefixtures("quick_rates")
def test_rows_are_in_the_files_as_they_come(tmp_path: Path) -> None:
    """A run that is cut short in its second group has left the first one whole, and says what is missing."""
    report, device = report_in(tmp_path), NoGpu()
    seen = []
    original = report.add

    def add(cell: Cell) -> None:
        original(cell)
        seen.append(len(rows_of(report)))
        if len(seen) == 6:
            raise gpu_bench.OutOfTime

    report.add = add  # type: ignore[method-assign]
    todo = [Group(w, "float32") for w in (SMALL, RAGGED, GIVEN)]
    assert gpu.run_bench(report, contenders(), device, todo, options(), gpu.Budget(1000, lambda: 0.0))
    assert seen == [3, 6, 9, 12, 15, 18]
    assert [*report.unmeasured] == ["small ragged B=4 float32", "small given B=3 float32"]
    gpu_report.finish(report)
    rows = rows_of(report)
    assert tuple(rows[0]) == gpu_report.COLUMNS
    assert {r["workload"] for r in rows} == {"small", "small ragged"}
    assert {
        (r["gpu"], r["driver"], r["cuda"], r["torch"], r["triton"], r["python"], r["commit"]) for r in rows
    } == {("none", "1", "2", "3", "4", "5", "abc")}
    saved = json.loads(report.path(".json").read_text())
    assert len(saved["records"]) == 18
    assert saved["machine"] == MACHINE
    assert saved["unmeasured"]["small given B=3 float32"] == "out of time"
    assert report.path(".png").stat().st_size > 10_000
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.usefixtures("quick_rates")
def test_the_budget_stops_before_a_group_that_would_not_fit(tmp_path: Path) -> None:
    report, device = report_in(tmp_path), NoGpu()
    device.clock = 0.0
    todo = [Group(w, "float32") for w in (SMALL, RAGGED, GIVEN)]
    # The first group advances the clock by less than the 5 s that any group is expected to take.
    budget = gpu.Budget(5.01, lambda: device.clock)
    gpu.run_bench(report, contenders(), device, todo, options(), budget)
    assert [*report.unmeasured] == ["small ragged B=4 float32", "small given B=3 float32"]
    assert {c.group.workload.name for c in report.cells} == {"small"}


def test_a_missing_matplotlib_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report = report_in(tmp_path)
    report.add(cell_of({"ours": [1.0], "copy forward": [0.5]}))
    report.save(last=True)
    assert not report.path(".png").exists()
    assert "no picture: " in gpu_report.render(report)


def test_rates_are_measured() -> None:
    rates = gpu_bench.measure_rates(NoGpu(), ("bfloat16", "float16", "float32"), size=8, copied=1000)
    assert rates.bandwidth == pytest.approx(1e6)
    assert rates.operations == pytest.approx(
        dict.fromkeys(("bfloat16", "float16", "float32"), 2 * 512 / 1e-3)
    )


# Races


def test_races_are_seen(tmp_path: Path) -> None:
    steady = peers.Ours("reference")
    assert gpu_bench.races(Group(SMALL, "float32"), steady, NoGpu(), repeats=3) == (3, [])
    turn = iter(range(100))
    racing = Spoiled(lambda y: y if next(turn) < 3 else y * (1 + 2**-20))
    repeats, different = gpu_bench.races(Group(SMALL, "float32"), racing, NoGpu(), repeats=3)
    assert repeats == 3
    assert "y" in different
    report = report_in(tmp_path)
    todo, never = [Group(SMALL, "float32")], gpu.Budget(1000, lambda: 0.0)
    turn = iter(range(100))
    assert not gpu.run_races(report, {"triton": racing}, NoGpu(), todo, 3, never)
    both = {"triton": steady, "cuda": steady}
    assert gpu.run_races(report, both, NoGpu(), todo, 3, never)
    equal = {"small B=4 float32": {"repeats": 3, "different": []}}
    assert report.stages["races"]["groups"] == {"triton": equal, "cuda": equal}
    turn = iter(range(100))
    assert not gpu.run_races(report, {"triton": steady, "cuda": racing}, NoGpu(), todo, 3, never)
    assert not gpu.run_races(report, both, NoGpu(), todo, 3, gpu.Budget(-1, lambda: 0.0))  # none ran
    late = {"small B=4 float32": "out of time"}
    assert report.stages["races"]["groups"] == {"triton": late, "cuda": late}


# The command


def without_gpu(command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_without_a_gpu_there_is_one_line_and_status_2() -> None:
    done = without_gpu([sys.executable, "-m", "benchmarks.gpu"])
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "make gpu needs an NVIDIA GPU: " in done.stderr


def test_make_gpu_without_a_gpu() -> None:
    done = without_gpu(["make", "gpu", f"GPU_PYTHON={sys.executable}"])
    assert done.returncode == 2
    assert "make gpu needs an NVIDIA GPU: " in done.stderr


def whole_run(monkeypatch: pytest.MonkeyPatch, folder: Path, tests: gpu_stages.Tests, *more: str) -> int:
    """`main` on one workload, with the GPU and the processes replaced."""
    monkeypatch.setattr(gpu_device, "why_no_gpu", lambda: None)
    monkeypatch.setattr(gpu_device, "Cuda", NoGpu)
    monkeypatch.setattr(gpu_device, "describe", lambda backend, commit: MACHINE | {"commit": commit})
    monkeypatch.setattr(gpu_stages, "tests_and_warm_up", lambda *_: tests)
    monkeypatch.setattr(gpu_stages, "sanitizer", lambda: "/compute-sanitizer")
    monkeypatch.setattr(
        gpu_stages, "sanitize", lambda *_: {"memcheck": {"state": "clean", "text": "0 errors"}}
    )
    arguments = ["--backends", "reference", "--workload", "online", "--dtypes", "float32", "--rounds", "2"]
    arguments += ["--repeats", "2", "--peers", "eager", "--commit", "1234", "--out", str(folder)]
    return gpu.main([*arguments, *more])


@pytest.mark.usefixtures("quick_rates")
def test_a_whole_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = gpu_stages.Tests(collected=1, passed=1)
    assert whole_run(monkeypatch, tmp_path, good) == 0
    said = capsys.readouterr().out
    for text in ("== tests", "1 passed", "== races", "equal bits", "== bench", "memcheck: clean", "is right"):
        assert text in said
    (saved,) = tmp_path.glob("gpu-2026-01-02T030405-1234.json")
    content = json.loads(saved.read_text())
    assert [*content["stages"]] == ["tests", "races", "card", "sanitizer"]
    assert {r["mode"] for r in content["records"]} == set(gpu_bench.PASSES)
    assert str(tmp_path) not in saved.read_text()

    bad = gpu_stages.Tests(collected=2, passed=1, failed={"tests/gpu/a.py::b": "assert 1 == 2"})
    assert whole_run(monkeypatch, tmp_path, bad, "--no-sanitizer") == 1
    said = capsys.readouterr().out
    assert "FAILED tests/gpu/a.py::b" in said
    assert "assert 1 == 2" in said
    assert "memcheck" not in said
    assert "SOMETHING IS WRONG" in said


@pytest.mark.usefixtures("quick_rates")
def test_a_backend_that_cannot_run_is_left_out_unless_it_was_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "BACKENDS", ("cuda", "reference"))
    monkeypatch.setattr(backends, "_emulated", lambda: False)
    monkeypatch.setattr(_cuda, "why_not", "not built for this test")
    described = []
    patched = ["--stages", "races", "--workload", "online", "--dtypes", "float32", "--repeats", "2"]
    patched += ["--peers", "", "--out", str(tmp_path)]
    monkeypatch.setattr(gpu_device, "why_no_gpu", lambda: None)
    monkeypatch.setattr(gpu_device, "Cuda", NoGpu)
    monkeypatch.setattr(gpu_device, "describe", lambda b, commit: described.append(b) or MACHINE)
    assert gpu.main(patched) == 0
    assert "backend 'cuda' cannot be measured here: not built for this test" in capsys.readouterr().err
    (saved,) = tmp_path.glob("*.json")
    content = json.loads(saved.read_text())
    assert content["stages"]["backends left out"] == {"cuda": "not built for this test"}
    assert [*content["stages"]["races"]["groups"]] == described == ["reference"]
    assert gpu.main([*patched, "--backends", "cuda,reference"]) == 1
    assert described == ["reference"]


@pytest.mark.usefixtures("quick_rates")
@pytest.mark.parametrize("failed", [True, False])
def test_a_compiler_that_stops_is_no_success(
    failed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = {"built": False, "seconds": 1.0, "reason": "nvcc said no", "failed": failed}
    monkeypatch.setattr(gpu_device, "capability", lambda: 90)
    monkeypatch.setattr(
        gpu_stages,
        "build",
        lambda deadline, capability: {"C++": {"built": True, "seconds": 2.0}, "CUDA": result},
    )
    good = gpu_stages.Tests(collected=1, passed=1)
    assert whole_run(monkeypatch, tmp_path, good, "--build", "--stages", "tests") == int(failed)
    said = capsys.readouterr().out
    assert "C++ extension: built, 2.0 s" in said
    assert "CUDA extension: not built: nvcc said no, 1.0 s" in said
    (saved,) = tmp_path.glob("*.json")
    assert json.loads(saved.read_text())["stages"]["build"]["CUDA"] == result


def test_the_alarm_ends_what_runs() -> None:
    begin = time.monotonic()
    with pytest.raises(gpu_bench.OutOfTime):
        gpu.alarm(0.1)
        time.sleep(20)
    assert time.monotonic() - begin < 10
    gpu.alarm(0.1)
    gpu.alarm(None)
    time.sleep(0.3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workload", "kinetics"], "--workload: 'kinetics' is not one of kinetics-rgb"),
        (["--dtypes", "float64"], "--dtypes: 'float64' is not one of bfloat16"),
        (["--dtypes", ""], "--dtypes must name at least one"),
        (["--stages", "lint"], "--stages: 'lint' is not one of tests"),
        (["--backends", "cuda,cuda"], "--backends must name at least one backend, and none twice"),
        (["--backends", ","], "--backends must name at least one backend"),
        (["--minutes", "0"], "--minutes must be positive, got 0.0"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu.parse(arguments)
    assert message in capsys.readouterr().err


def test_kernels_are_found_in_a_checkout_that_is_not_installed() -> None:
    text = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
import importlib.util, fastac
assert fastac.__file__.startswith(sys.argv[1]), fastac.__file__
assert importlib.util.find_spec("fastac.kernels") is None
from benchmarks.gpu_checkout import find_kernels
find_kernels()
import fastac.kernels
print(fastac.kernels.__file__)
"""
    done = subprocess.run(
        [sys.executable, "-c", text, str(ROOT)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == ROOT / "kernels" / "__init__.py"
