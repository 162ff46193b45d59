"""The suites on tiny workloads: every record is whole, reasons are kept, wrong results give none."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

from . import __main__ as command_line
from . import compare, correctness, machine, memory, tables, targets, timing
from .measure import Options, make_contenders
from .peers import ANOTHER, SAME, Eager, Ours
from .records import COLUMNS, MEASURED, Record, Report, measured, record, save
from .suites import SUITES, SWEEP, calls, dtypes, layouts, malloc, notes, peaks, speed, step
from .timing import Timings
from .workloads import MODES, OVERHEAD, WORKLOADS, Workload, make_case

SMALL = Workload("small", 4, 7, 32, 5, "tests")
TINY = {
    "kinetics-rgb": replace(SMALL, name="kinetics-rgb"),
    "yt8m-rgb": replace(SMALL, name="yt8m-rgb", length=9),
    "ragged": replace(SMALL, name="ragged", ragged=True),
    "mil-bag": replace(SMALL, name="mil-bag", batch=1, length=64, scores="given"),
    "online": replace(SMALL, name="online", batch=1),
}
PEERS = ["eager", "sdpa", "timm-style", "mean"]


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, workload in TINY.items():
        monkeypatch.setitem(WORKLOADS, name, workload)
    monkeypatch.setattr(timing, "GEMM", (64, 32, 16))
    monkeypatch.setattr(machine, "prime", lambda: None)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def options(*workloads: str, peers: list[str] | None = None, suites: tuple[str, ...] = ("speed",)) -> Options:
    chosen = PEERS if peers is None else peers
    return Options([*workloads], chosen, [*suites], rounds=2, budget=0.1, threads=1)


def whole(records: list[Record]) -> None:
    """Every column is there; a figure or a reason, never both, never neither."""
    assert records
    for r in records:
        assert tuple(r) == COLUMNS
        assert r["computes"] in (SAME, ANOTHER)
        figures = [name for name in MEASURED if r[name] is not None]
        assert bool(figures) != bool(r["reason"]), r
        if r["median_s"] is not None:
            assert 0 < r["quartile1_s"] <= r["median_s"] <= r["quartile3_s"]


# Records


def test_a_record_has_every_column_and_no_other() -> None:
    one = record(SMALL.reduced(2), 28, suite="speed", mode="forward", median_s=1.0)
    assert tuple(one) == COLUMNS
    assert (one["batch"], one["full_batch"], one["varied"], one["reason"]) == (2, 4, "", "")
    assert one["peak_bytes"] is None
    with pytest.raises(TypeError, match="no column speed_s"):
        record(SMALL, 28, speed_s=1.0)
    with pytest.raises(ValueError, match="sdpa: a record has figures or a reason"):
        record(SMALL, 28, contender="sdpa", median_s=1.0, reason="too slow")


def test_what_is_measured() -> None:
    floor = timing.Floor()
    seconds = {"ours": [1.0, 2.0, 4.0], "eager": [3.0, 4.0, 40.0], "gemm": [0.5, 0.5, 1.0]}
    timings = Timings(seconds, dict.fromkeys(seconds, 0.5))
    figures = measured(timings, "eager", operations=2 * floor.operations, moved=8_000, floor=floor)
    assert figures["median_s"] == 4.0
    assert figures["time_over_ours"] == 3.0
    assert figures["time_over_floor"] == 4.0
    assert figures["floor_s"] == 1.0
    assert figures["gbytes_per_s"] == 2e-6
    assert figures["gflops"] == 2 * floor.operations / 4.0 / 1e9
    assert figures["page_faults"] == 0.5
    assert "p95_s" not in figures
    many = Timings({"ours": [float(k) for k in range(1, 102)]}, {"ours": 0})
    assert measured(many, "ours")["p95_s"] == pytest.approx(96.0)
    assert "time_over_ours" not in measured(many, "ours", ours="another")


def test_the_files_hold_the_records(tmp_path: Path) -> None:
    about = dict.fromkeys(("cores", "backend", "isa", "cpu", "threads", "torch", "python"), "?")
    about |= {"date": "2030-01-02T03:04:05+00:00", "commit": "abc", "malloc_keeps_freed_memory": True}
    rows = [
        record(SMALL, 28, suite="speed", contender="ours", median_s=0.25, rounds=3),
        record(SMALL, 28, suite="speed", contender="flex", reason='no, "never"'),
    ]
    figure = targets.at_most("f", 2.0, 1.0)
    report = Report(about, {"rounds": 3}, {"ours": {"note": "n", "computes": SAME}}, {}, rows, [], [figure])
    table, everything = save(report, tmp_path / "new")
    assert table.name == "cpu-2030-01-02T030405-abc.csv"
    assert everything.name == "cpu-2030-01-02T030405-abc.json"
    content = json.loads(everything.read_text())
    assert list(content) == ["machine", "options", "contenders", "errors", "records", "exponents", "targets"]
    assert content["records"] == rows
    assert content["targets"][0]["verdict"] == "met"
    frame = pd.read_csv(table)
    assert list(frame["median_s"].fillna(-1)) == [0.25, -1]
    assert list(frame["reason"].fillna("")) == ["", 'no, "never"']
    assert set(frame["commit"]) == {"abc"}


# Suites


@pytest.mark.parametrize("workload", ["kinetics-rgb", "ragged", "mil-bag"])
def test_speed(workload: str) -> None:
    errors: dict[str, list[str]] = {}
    records = list(speed.run(options(workload), errors))
    whole(records)
    assert [(r["mode"], r["contender"]) for r in records if r["contender"] == "ours"] == [
        (mode, "ours") for mode in MODES
    ]
    assert {(r["mode"], r["contender"]) for r in records} == {(m, c) for m in MODES for c in ["ours", *PEERS]}
    assert len(errors[f"speed: {workload}"]) == len(MODES)
    for r in records:
        floor = [r["floor_s"], r["time_over_floor"], r["gemm_gflops"], r["copy_gbytes_per_s"]]
        assert all(value is not None for value in floor) == (r["computes"] == SAME and not r["reason"])
        if r["contender"] == "ours":
            assert r["time_over_ours"] == 1
    why = {(r["contender"], r["mode"]): r["reason"] for r in records if r["reason"]}
    only = "another pooling: timed in forward and training only"
    expected = {("timm-style", "frozen"): only, ("timm-style", "backward"): only, ("mean", "backward"): only}
    expected["mean", "frozen"] = "it has no parameters: with x frozen there is no gradient"
    if workload == "mil-bag":
        given = "scores are given, it computes its own from queries"
        expected |= {("sdpa", mode): given for mode in MODES}
    assert why == expected
    layout = {r["contender"]: r["layout"] for r in records}
    assert layout["ours"] == ("packed" if workload == "ragged" else "dense")
    assert layout["eager"] == layout["mean"] == ("padded" if workload == "ragged" else "dense")


def test_a_pooling_that_has_no_room_is_a_row_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    from .peers import TimmStyle

    right = TimmStyle.call

    def call(module: Any, x: Tensor, mask: Tensor | None) -> Tensor:
        if x.requires_grad and x.size(1) > correctness.POSITIONS:
            raise RuntimeError("not enough memory: you tried to allocate 9 bytes\nmore")
        return right(module, x, mask)

    monkeypatch.setattr(correctness, "POSITIONS", SMALL.length - 1)
    monkeypatch.setattr(TimmStyle, "call", staticmethod(call))
    records = list(speed.run(options("kinetics-rgb", peers=["timm-style", "mean"]), {}))
    whole(records)
    found = {r["mode"]: r["reason"] for r in records if r["contender"] == "timm-style"}
    assert found["forward"] == ""
    assert found["training"] == "RuntimeError: not enough memory: you tried to allocate 9 bytes"
    assert targets.value(records, "median_s", contender="mean", mode="training") is not None


def test_a_wrong_result_gives_no_records(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Ours.prepare

    def wrong(self: Ours, case: Any) -> Any:
        prepared = right(self, case)
        call = prepared.call
        return replace(prepared, call=lambda *operands: call(*operands) * 1.001)

    monkeypatch.setattr(Ours, "prepare", wrong)
    for suite in (speed.run, calls.overhead, dtypes.run, layouts.run):
        found = suite(options("kinetics-rgb"), {})
        with pytest.raises(correctness.Red, match="y of ours"):
            next(found)


def test_dtypes() -> None:
    records = list(dtypes.run(options(), {}))
    whole(records)
    found = {(r["workload"], r["mode"], r["dtype"], r["contender"]) for r in records}
    names = ("float32", "float64", "bfloat16", "float16")
    assert found == {
        (w, m, d, c) for w in dtypes.WORKLOAD_NAMES for m in MODES for d in names for c in ("ours", "eager")
    }
    ours = {r["dtype"]: r for r in records if (r["contender"], r["mode"]) == ("ours", "forward")}
    assert ours["float64"]["bytes"] == 4 * ours["float16"]["bytes"]
    assert all(r["time_over_ours"] == 1 for r in ours.values())


def test_layouts() -> None:
    records = list(layouts.run(options(peers=["eager"]), {}))
    whole(records)
    assert {(r["contender"], r["layout"]) for r in records} == {
        ("ours", "packed"),
        ("ours (nested)", "nested"),
        ("ours (lengths)", "padded"),
        ("ours (mask)", "padded"),
        ("eager", "padded"),
    }
    assert all(r["time_over_ours"] is not None for r in records)


def test_calls() -> None:
    single = list(calls.latency(options(peers=["eager"]), {}))
    many = list(calls.overhead(options(peers=["eager"]), {}))
    whole(single)
    whole(many)
    assert {(r["suite"], r["workload"], r["mode"]) for r in single + many} == {
        (suite, workload, mode)
        for suite, workload in (
            ("latency", "online"),
            ("latency", OVERHEAD.name),
            ("overhead", OVERHEAD.name),
        )
        for mode in calls.MODES
    }


def test_peaks() -> None:
    if not memory.available():
        pytest.skip("the system does not tell the peak of the resident memory")
    large = replace(SMALL, length=2000, in_features=1000)
    found = memory.measure(large, "cpu", 1, ["ours", "eager"])
    gradients = large.batch * (large.length + large.cluster_size) * large.in_features * 4
    for modes in found.values():
        assert set(modes) == set(memory.MEASURED_MODES)
        assert modes["training"]["peak_bytes"] >= 0.99 * gradients > 10 * modes["frozen"]["workspace_bytes"]
        assert all(m["workspace_bytes"] <= m["peak_bytes"] for m in modes.values())


def test_a_peer_without_a_peak_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Any, case: Any) -> Any:
        raise RuntimeError("no compiler\nand more")

    figures = {"peak_bytes": 3, "workspace_bytes": 1}
    monkeypatch.setattr(memory, "peak", lambda *arguments: figures)
    monkeypatch.setattr(memory, "return_freed_memory", lambda: None)
    monkeypatch.setattr(Eager, "prepare", fails)
    found = memory.measure_here(SMALL, "cpu", 1, ["ours", "eager"])
    why = "RuntimeError: no compiler"
    assert [found["eager"][mode] for mode in memory.MEASURED_MODES] == 3 * [{"reason": why}]
    assert found["ours"] == dict.fromkeys(memory.MEASURED_MODES, figures)
    monkeypatch.setattr(Ours, "prepare", fails)
    with pytest.raises(RuntimeError, match="no compiler"):
        memory.measure_here(SMALL, "cpu", 1, ["ours"])


def test_peaks_are_records(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {"peak_bytes": 3, "workspace_bytes": 1}
    found = {
        "ours": dict.fromkeys(memory.MEASURED_MODES, figures),
        "eager": {mode: {"reason": "no room"} for mode in memory.MEASURED_MODES},
    }
    asked: list[Any] = []

    def measure(*arguments: Any) -> Any:
        asked.append(arguments)
        return found

    monkeypatch.setattr(memory, "measure", measure)
    records = list(peaks.run(options("ragged"), {}))
    whole(records)
    assert asked == [(TINY["ragged"], "cpu", 1, ["ours", "eager", "sdpa"])]
    assert {(r["contender"], r["layout"], r["reason"]) for r in records} == {
        ("ours", "packed", ""),
        ("eager", "padded", "no room"),
    }


# The training step


def one_step(name: str) -> tuple[Any, Any]:
    case = make_case(SMALL)
    labels = torch.arange(SMALL.batch)
    return case, step.make_step(name, case, labels, 6, 0.0, "cpu")


def test_ours_and_the_plain_classifier_make_the_same_steps() -> None:
    models = {}
    for name in ("ours", "eager"):
        _, call = one_step(name)
        losses = [call().item() for _ in range(3)]
        assert losses[2] < losses[0]
        models[name] = (call.model, losses)
    (ours, mine), (plain, theirs) = models["ours"], models["eager"]
    assert mine == pytest.approx(theirs, rel=1e-5)
    state = {name.rsplit(".", 1)[-1]: p for name, p in ours.clusters.named_parameters()}
    for name in ("weight", "alpha", "beta"):
        torch.testing.assert_close(state[name], getattr(plain, name), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ours.fc.weight, plain.fc.weight, rtol=1e-3, atol=1e-4)


def test_steps_that_disagree_give_no_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        step, "plain_cluster", lambda x, w, a, b: Eager().prepare(make_case(SMALL)).call(x, w, a, -b)
    )
    monkeypatch.setattr(step, "CLASSES", {"kinetics-rgb": 6})
    with pytest.raises(correctness.Red, match=r"loss of step 0 is .* of eager, .* of ours"):
        list(step.run(options(peers=["eager"]), {}))


def test_a_loss_that_does_not_fall_is_wrong() -> None:
    with pytest.raises(correctness.Red, match="does not fall"):
        step.agree(SMALL, {"ours": [1.0, 1.0, 1.0], "eager": [1.0, 1.0, 1.0]})


def test_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "CLASSES", {"kinetics-rgb": 6})

    def broken(*arguments: Any, **more: Any) -> Any:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", broken)
    errors: dict[str, list[str]] = {}
    records = list(step.run(options(peers=["eager", "compile", "sdpa"]), errors))
    whole(records)
    assert [(r["contender"], r["reason"]) for r in records] == [
        ("ours", ""),
        ("eager", ""),
        ("compile", "RuntimeError: no compiler"),
    ]
    assert "losses of the first 3 steps" in errors["step: kinetics-rgb"][0]
    product = 28 * 32 * 5
    assert {r["operations"] for r in records} == {8 * product + 6 * 4 * 5 * 32 * 6}


# The run


def test_a_run_has_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    told = options("kinetics-rgb", suites=("speed", "overhead"))
    report = compare.run(told)
    whole(report.records)
    assert dict.fromkeys(r["suite"] for r in report.records) == {"speed": None, "overhead": None}
    assert report.options["rounds"] == 2
    assert report.contenders["mean"]["computes"] == ANOTHER
    assert list(report.contenders) == ["ours", *PEERS]
    verdicts = {f.figure: f.verdict for f in report.targets}
    assert verdicts["kinetics-rgb training, eager / ours"] != "not measured"
    assert verdicts["kinetics-rgb training, compile / ours"] == "not measured"
    assert verdicts["yt8m-rgb forward / floor"] == "not measured"
    text = tables.render(report)
    assert "another pooling: timed in forward and training only" in text
    assert "B reduced" not in text
    json.dumps(report.records, allow_nan=False)


@pytest.mark.parametrize("error", [RuntimeError("no memory"), KeyboardInterrupt()])
def test_what_was_measured_before_a_failure_is_kept(
    error: BaseException,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    row = record(SMALL, 28, suite="speed", contender="ours", median_s=1.0)

    def fails(options: Options, errors: dict[str, list[str]]) -> Iterator[Record]:
        raise error
        yield

    monkeypatch.setitem(SUITES, "speed", lambda options, errors: iter([row]))
    monkeypatch.setitem(SUITES, "overhead", fails)
    monkeypatch.setattr(machine, "reexecute", lambda *arguments: None)
    monkeypatch.setattr(command_line.tempfile, "mkdtemp", lambda prefix: str(tmp_path / "kept"))
    asked = ["benchmarks", "--suite", "speed", "--suite", "overhead", "--output", str(tmp_path / "results")]
    monkeypatch.setattr(sys, "argv", asked)
    if isinstance(error, KeyboardInterrupt):
        assert command_line.main() == 130
    else:
        with pytest.raises(compare.Unfinished):
            command_line.main()
    assert "suite overhead did not finish; the records from before are in" in capsys.readouterr().err
    (kept,) = (tmp_path / "kept").glob("*.json")
    assert json.loads(kept.read_text())["records"] == [row]
    assert not (tmp_path / "results").exists()


def test_the_sweeps_are_one_of_the_suites(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [record(SMALL, 28, suite=SWEEP, varied="L", contender="ours", median_s=1.0)]
    exponents = [{"varied": "L", "workload": "w", "mode": "forward", "contender": "ours", "quantity": "time",
                  "exponent": 1.0, "low": 0.9, "high": 1.1, "from": 1, "to": 9, "points": 3}]  # fmt: skip
    monkeypatch.setattr(compare.sweeps, "run", lambda options: (rows, exponents))
    report = compare.run(options(suites=(SWEEP,)))
    assert report.records == rows
    assert report.exponents == exponents
    assert "Exponents of cost over size" in tables.render(report)


def test_the_default_malloc_is_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    rows = [record(SMALL, 28, suite="speed", contender="ours", median_s=1.0)]

    def run(command: list[str], **more: Any) -> Any:
        asked.append(command)
        folder = Path(command[command.index("--output") + 1])
        content = {"records": rows, "errors": {"speed: kinetics-rgb": ["line"]}}
        (folder / "cpu-now.json").write_text(json.dumps(content))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(malloc.subprocess, "run", run)
    errors: dict[str, list[str]] = {}
    told = options(suites=("default-malloc",))
    assert list(malloc.run(told, errors)) == [rows[0] | {"suite": "default-malloc"}]
    assert errors == {"default-malloc: kinetics-rgb": ["line"]}
    assert "--default-malloc" in asked[0]
    assert asked[0][asked[0].index("--peers") + 1] == "eager,sdpa"
    assert list(malloc.run(replace(told, default_malloc=True), {})) == []
    assert len(asked) == 1


def test_every_suite_has_a_note() -> None:
    assert list(notes()) == [*SUITES, SWEEP]
    assert all(notes().values())


def test_contenders_are_those_asked_for() -> None:
    made = make_contenders(options(peers=["mean", "eager"]), ("eager", "sdpa"))
    assert list(made) == ["ours", "eager"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", "eager,fast"], "--peers: 'fast' is not one of eager, compile"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--tuning", "-1"], "--tuning must be at least 0, got -1"),
        (["--suite", "pace"], "invalid choice: 'pace'"),
    ],
)
def test_a_wrong_argument_is_one_line(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(machine, "reexecute", lambda default_malloc: None)
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    with pytest.raises(SystemExit) as left:
        command_line.main()
    assert left.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_wrong_result_is_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def run(options: Options) -> Report:
        raise correctness.Red("y of ours")

    monkeypatch.setattr(machine, "reexecute", lambda default_malloc: None)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--quick", "--output", str(tmp_path)])
    monkeypatch.setattr(compare, "run", run)
    assert command_line.main() == 1
    assert "WRONG RESULT, no speed is reported: y of ours" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# Targets


def test_targets_come_from_the_records() -> None:
    def speed_of(contender: str, mode: str, ratio: float, workload: str = "kinetics-rgb") -> Record:
        return record(
            WORKLOADS[workload], 28, suite="speed", mode=mode, dtype="float32", contender=contender,
            time_over_ours=ratio, time_over_floor=1.2 * ratio,
        )  # fmt: skip

    ours = {"mode": "forward", "contender": "ours", "dtype": "float32"}
    half = ours | {"dtype": "bfloat16"}
    large = {"peak_bytes": 10**8, "workspace_bytes": 10**8}
    rows = [
        speed_of("ours", "forward", 1.0),
        speed_of("eager", "forward", 3.0),
        speed_of("eager", "backward", 0.5),
        record(TINY["kinetics-rgb"], 28, suite="dtypes", median_s=3.0, **ours),
        record(TINY["kinetics-rgb"], 28, suite="dtypes", median_s=1.0, **half),
        record(OVERHEAD, 4, suite="overhead", median_s=2e-5, **ours),
        record(TINY["online"], 7, suite="memory", **ours, **large),
    ]
    found = {f.figure: f for f in targets.figures(rows, TINY, isa="avx512_bf16", threads=1)}
    assert found["kinetics-rgb forward / floor"].verdict == "missed by 9 %"
    assert found["kinetics-rgb forward, eager / ours"].verdict == "met"
    assert found["kinetics-rgb forward, compile / ours"].verdict == "not measured"
    assert found["kinetics-rgb not slower (backward, eager)"].verdict == "missed by 50 %"
    assert found["kinetics-rgb forward, bf16 against float32"].measured == "3x"
    assert found["call overhead, nothing requires grad"].verdict == "missed by 100 %"
    assert found["online forward, workspace"].verdict.startswith("missed by")
    assert found["ragged, workspace"].verdict == "not measured"
    other = {f.figure: f for f in targets.figures(rows, TINY, isa="avx512", threads=1)}
    assert other["kinetics-rgb forward, bf16 against float32"].verdict == "no AVX512-BF16 in use"
