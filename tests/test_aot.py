"""`make aot`: what it compiles, how it derives that from a call, and when it fails.

What needs the compiler runs in processes of its own, since the kernels may be interpreted in this one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from fastac.kernels import aot, aot_jobs, plan
from fastac.kernels.aot_jobs import TARGETS, Job

pytestmark = pytest.mark.xdist_group("aot")  # what is built once is shared

ROOT = Path(__file__).resolve().parent.parent
KERNELS = {"forward_blocks", "forward_combine", "backward_blocks", "backward_sums", "backward_reduce"}
SOFTMAX_WEIGHT = {"softmax_weight_forward", "softmax_weight_backward"}
DTYPES = {"bfloat16", "float16", "float32", "float64"}

compiles = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def run(*command: str, cache: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, where the kernels are not interpreted unless `variables` say so."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | variables
    if cache is not None:
        environment["TRITON_CACHE_DIR"] = str(cache)
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False, env=environment, timeout=300
    )


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The rows of `make aot`, not compiled."""
    path = tmp_path_factory.mktemp("aot") / "rows.json"
    done = run("-m", "fastac.kernels.aot", "--list", "--json", str(path))
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(path.read_text())
    assert len(done.stdout.splitlines()) == len(rows) + 1
    return rows


def make_job(
    kernel: str = "forward_blocks",
    pointer: str = "*bf16",
    precision: str = "ieee",
    origin: str = "class",
    **flags: bool,
) -> Job:
    shown = {"WEIGHTING": 2, "LAYOUT": 0, "PRECISION": precision, "BLOCK_L": 32, "BLOCK_N": 64}
    constants = (*shown.items(), *flags.items())
    signature = (("x_ptr", pointer), ("M", "i32"), *((name, "constexpr") for name, _ in constants))
    return Job(kernel, signature, constants, (("M", "D"),), 4, 3, origin)


GOOD = aot.Row("sm_90", make_job(), registers=90, shared=36864, matrix={"HGMMA": 8})


# What is compiled


def test_workloads_are_those_of_the_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks.workloads import WORKLOADS

    expected = {}
    for name, w in WORKLOADS.items():
        given = {"layout": "packed"} if w.ragged else {}
        given |= {"weighting": "scores"} if w.scores == "given" else {}
        expected[name] = ((w.batch, w.length, w.in_features, w.cluster_size), given)
    assert expected == aot_jobs.WORKLOADS


def test_workloads_of_softmax_weight_are_those_of_its_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks.softmax_weight import SHAPES

    expected = [(s.batch, s.length, s.in_features, "lengths" if s.ragged else "padded") for s in SHAPES]
    assert expected == list(aot_jobs.SOFTMAX_WEIGHT_WORKLOADS)


def test_calls_cover_the_flags_and_the_size_classes() -> None:
    calls = [*aot_jobs.workload_calls(), *aot_jobs.class_calls()]
    for dtype in aot_jobs.DTYPES:
        mine = [c for c in calls if c.dtype == dtype]
        combinations = {(c.weighting, c.bias, c.shift, c.layout, c.frozen) for c in mine}
        assert len(combinations) == 4 * 2 * 4 * 2
        assert {(c.length, c.units) for c in mine} >= {
            (length, units) for length in aot_jobs.LENGTHS for units in aot_jobs.UNITS
        }
        assert {c.features for c in mine} >= {1, 8, 50, 67, 128, 1024, 1536, 2048}
        assert any(c.mixed for c in mine) == (dtype.itemsize == 2)
        assert any(c.relaxed for c in mine) == (dtype == torch.float32)


@compiles
def test_selection(listed: list[dict[str, Any]]) -> None:
    """At most 40 per target, the same for one maker's GPUs; each kernel, dtype and form is among them."""
    of = {n: [r for r in listed if r["target"] == n and r["kernel"] in KERNELS] for n in TARGETS}
    assert sum(map(len, of.values())) + sum(r["kernel"] in SOFTMAX_WEIGHT for r in listed) == len(listed)
    for name, rows in of.items():
        assert 0 < len(rows) <= 40
        # backward_sums sees numbers of the accumulation type only.
        halves = {("backward_sums", d) for d in DTYPES if d.endswith("float16")}
        assert {(r["kernel"], r["dtype"]) for r in rows} == {(k, d) for k in KERNELS for d in DTYPES} - halves
        for kernel in ("forward_blocks", "backward_blocks"):
            forms = {(f, r["dtype"]) for r in rows if r["kernel"] == kernel for f in r["flags"]}
            assert {(f, d) for f in plan.WEIGHTINGS for d in DTYPES} <= forms
        kinds = {(r["kernel"], flag) for r in rows for flag in r["flags"]}
        assert kinds >= {
            (k, layout) for k in ("forward_blocks", "backward_blocks") for layout in plan.LAYOUTS
        }
        assert kinds >= {("forward_blocks", f) for f in ("split", "bias", "stats", "save_scores")}
        assert kinds >= {("backward_blocks", f) for f in ("gram", "bias", "saved", "need_x", "need_scores")}
        assert kinds >= {("backward_reduce", f) for f in ("need_weight", "need_bias", "need_shift")}
        for kernel in KERNELS - {"backward_reduce"}:
            assert any("shift" not in r["flags"] for r in rows if r["kernel"] == kernel)
        assert all(r["default"] for r in rows)
        strip = [{k: v for k, v in r.items() if k not in ("target", "failures")} for r in rows]
        same = of["sm_80" if name.startswith("sm_") else "gfx942"]  # AMD has no TF32
        assert strip == [{k: v for k, v in r.items() if k not in ("target", "failures")} for r in same]
    first = of["sm_90"][0]
    assert (first["kernel"], first["dtype"]) == ("forward_blocks", "bfloat16")


@compiles
def test_selection_of_softmax_weight(listed: list[dict[str, Any]]) -> None:
    """Beside the cluster's: both kernels in every dtype, form and flag; the same for every target."""
    of = {n: [r for r in listed if r["target"] == n and r["kernel"] in SOFTMAX_WEIGHT] for n in TARGETS}
    for rows in of.values():
        assert 0 < len(rows) <= 20
        assert {(r["kernel"], r["dtype"]) for r in rows} == {(k, d) for k in SOFTMAX_WEIGHT for d in DTYPES}
        for kernel in SOFTMAX_WEIGHT:
            mine = [r for r in rows if r["kernel"] == kernel]
            flags = {flag for r in mine for flag in r["flags"]}
            assert flags >= {"padded", "lengths", "one_block", *aot_jobs.SPECIAL}
            assert any("one_block" not in r["flags"] for r in mine)
        needs = {
            ("need_x" in r["flags"], "need_scores" in r["flags"])
            for r in rows
            if r["kernel"] == "softmax_weight_backward"
        }
        assert needs == {(True, True), (True, False), (False, True)}
        assert all(r["default"] for r in rows)
        strip = [{k: v for k, v in r.items() if k not in ("target", "failures")} for r in rows]
        assert strip == [{k: v for k, v in r.items() if k not in ("target", "failures")} for r in of["sm_80"]]


@compiles
def test_all_covers_every_configuration() -> None:
    """--all drops jobs of the same configuration only, and the neighbours are those plan.py names."""
    code = (
        "from fastac.kernels import aot_jobs as a\n"
        "t = a.TARGETS['sm_90']\n"
        "every, thin = a.jobs(t, True), a.of_target(t, True)\n"
        "assert {j.configuration for j in every} == {j.configuration for j in thin}\n"
        "assert len(set(every)) == len(every) and set(thin) <= set(every) and len(thin) < len(every)\n"
        "near = [j for j in thin if not j.default]\n"
        "assert near and not any(j.kernel in a.WITHOUT_DOT for j in near)\n"
        "assert {j.configuration for j in near}.isdisjoint(\n"
        "    j.configuration for j in every if j.default)\n"
        "amd = a.TARGETS['gfx942']\n"
        "assert all(j.default for j in a.of_target(amd, True))\n"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr


def test_cover_takes_what_is_new() -> None:
    jobs = [dataclasses.replace(make_job(), warps=w) for w in (1, 2, 4, 8)]
    facets = {1: {("a",): 1}, 2: {("a",): 1, ("b",): 1}, 4: {("c",): 1000}, 8: {("b",): 1}}

    def cover(limit: int, keep: list[Job]) -> list[int]:
        return [j.warps for j in aot_jobs.cover(jobs, keep, lambda j: facets[j.warps], limit)]

    assert cover(9, []) == [2, 4]
    assert cover(1, []) == [4]
    assert cover(9, jobs[3:]) == [1, 4, 8]
    assert cover(1, jobs[3:]) == [8]


def test_specialise() -> None:
    arguments = {
        "x_ptr": torch.empty(4, dtype=torch.bfloat16, device="meta"),
        "huge_ptr": torch.empty(1 << 29, device="meta"),
        "none_ptr": None,
        "one": 1,
        "zero": 0,
        "odd": 25,
        "even": 1024,
        "wide": 1 << 31,
        "FLAG": True,
        "BLOCK": 32,
    }
    signature, constants, attributes = aot_jobs.specialise(
        [(name, name.isupper()) for name in arguments], arguments
    )
    assert signature == {
        "x_ptr": "*bf16",
        "huge_ptr": "*fp32",
        "none_ptr": "constexpr",
        "one": "constexpr",
        "zero": "i32",
        "odd": "i32",
        "even": "i32",
        "wide": "i64",
        "FLAG": "constexpr",
        "BLOCK": "constexpr",
    }
    assert constants == {"none_ptr": None, "one": 1, "FLAG": True, "BLOCK": 32}
    assert attributes == {"x_ptr": "DS", "huge_ptr": "D", "zero": "D", "even": "D", "wide": "D"}


@compiles
def test_specialise_as_triton_does() -> None:
    code = (
        "import torch\n"
        "from fastac.kernels.aot_jobs import specialise\n"
        "from triton.backends.amd.compiler import HIPBackend\n"
        "from triton.backends.nvidia.compiler import CUDABackend\n"
        "from triton.runtime.jit import native_specialize_impl\n"
        "numbers = [0, 1, -1, 2, 16, 17, -16, 1024, 2**31 - 1, 2**31, 2**31 + 16, -(2**31), 2**40]\n"
        "dtypes = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.int32,\n"
        "          torch.uint8]\n"
        "for value in [None, *numbers, *(torch.empty(64, dtype=d) for d in dtypes)]:\n"
        "    s, c, a = specialise([('v', False)], {'v': value})\n"
        "    for backend in (CUDABackend, HIPBackend):\n"
        "        kind, letters = native_specialize_impl(backend, value, False, True, True)\n"
        "        assert kind == s['v'], (value, kind, s)\n"
        "        if kind == 'constexpr':\n"
        "            assert c == {'v': value}\n"
        "        else:\n"
        "            ours = backend.parse_attr(a.get('v', ''))\n"
        "            assert ours == backend.parse_attr(letters or ''), (value, letters, a)\n"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr


@compiles
def test_recording_leaves_launch_as_it_was() -> None:
    code = (
        "import torch\n"
        "from fastac.kernels import aot_jobs as a, launch, plan\n"
        "before = launch.start, plan.problem, torch.version.hip\n"
        "precision = {}\n"
        "for name in ('sm_90', 'gfx942'):\n"
        "    with a.recording(a.TARGETS[name].backend, 'some GPU') as found:\n"
        "        a.perform(a.Call(4, 25, 64, 16, torch.bfloat16))\n"
        "        problem = plan.problem(torch.empty(4, 25, 64, device='meta'), *[None] * 7, False)\n"
        "        assert problem.gpu == 'some GPU'\n"
        "    assert before == (launch.start, plan.problem, torch.version.hip)\n"
        "    names = [kernel.__name__ for kernel, *_ in found]\n"
        "    assert names == ['forward_blocks'] * 2 + ['backward_blocks', 'backward_reduce'], names\n"
        "    precision[name] = found[2][1]['SMALL_PRECISION']\n"
        "assert precision == {'sm_90': 'tf32x3', 'gfx942': 'ieee'}, precision\n"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr


def test_winner_of_an_unknown_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "winners", lambda: {"NVIDIA H200": {}, "NVIDIA A100-SXM4-80GB": {}})
    assert aot_jobs.gpus(TARGETS["sm_90"]) == ["NVIDIA H200"]
    assert aot_jobs.gpus(TARGETS["sm_120"]) == []
    monkeypatch.setattr(plan, "winners", lambda: {"Voodoo 2": {}})
    with pytest.raises(ValueError, match=r"no target of kernels/aot_jobs\.py lists: 'Voodoo 2'"):
        aot_jobs.gpus(TARGETS["sm_90"])


# Compiling


@compiles
def test_matrix_instruction_in_a_real_binary(tmp_path: Path) -> None:
    """What the paper's forward pass compiles to, and what a kernel that cannot be compiled is told."""
    code = (
        "import dataclasses, json\n"
        "from fastac.kernels import aot, aot_jobs\n"
        "job = next(j for j in aot_jobs.of_target(aot_jobs.TARGETS['sm_90'], False)\n"
        "           if j.kernel == 'forward_blocks' and j.dtype == 'bfloat16')\n"
        "broken = dataclasses.replace(job, constants=tuple(\n"
        "    (k, 48 if k == 'BLOCK_L' else v) for k, v in job.constants))\n"
        "print(json.dumps([aot.compile_job(j, 'sm_90').record() for j in (job, broken)]))\n"
    )
    done = run("-c", code, cache=tmp_path)
    assert done.returncode == 0, done.stderr
    good, broken = json.loads(done.stdout)
    assert good["failures"] == [] and good["error"] == ""
    assert set(good["matrix_instructions"]) <= {"HGMMA", "HMMA"} and good["matrix_instructions"]
    assert 32 <= good["registers"] <= 255
    assert 0 < good["shared_bytes"] <= 227 << 10
    assert "power of 2" in broken["error"]
    assert broken["failures"] == [f"does not compile: {broken['error']}"]


@compiles
def test_softmax_weight_in_a_real_binary(tmp_path: Path) -> None:
    """Both passes with transposed operands, as a layer over time gives them, for a GPU of either maker."""
    code = (
        "import json\n"
        "from fastac.kernels import aot, aot_jobs as a\n"
        "found = [(j, t) for t in ('sm_90', 'gfx942') for j in a.of_target(a.TARGETS[t], False)\n"
        "         if j.kernel in a.SOFTMAX_WEIGHT and 'strided' in j.flags]\n"
        "print(json.dumps([aot.compile_job(*f).record() for f in found]))\n"
    )
    done = run("-c", code, cache=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert {(r["target"], r["kernel"]) for r in rows} == {
        (t, k) for t in ("sm_90", "gfx942") for k in SOFTMAX_WEIGHT
    }
    for r in rows:
        assert r["error"] == "" and r["failures"] == []
        assert 16 <= r["registers"] <= 255 and r["matrix_instructions"] == {}


def test_count_sass() -> None:
    row = aot.Row("sm_100", make_job())
    aot.count_sass(
        row,
        "  UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8] ;\n  STL.64 [R1], R2 ;\n @P0 LDL R2, [R1+0x8] ;\n"
        "  HMMA.16816.F32 R4, R8, R12, R4 ;\n  HMMA.16816.F32 R4, R8, R12, R4 ;\n  LDG.E R2, [R4] ;\n",
    )
    assert row.matrix == {"HMMA": 2, "UTCHMMA": 1} and row.spills == 2


# Rules


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"spills": 2}, "spills: 2 instructions"),
        ({"stack": 8}, "8 bytes of stack"),
        ({"shared": (227 << 10) + 1}, "232449 bytes of shared memory, the chip has 232448"),
        ({"target": "sm_80", "shared": (163 << 10) + 1}, "the chip has 166912"),
        ({"target": "sm_120", "shared": (99 << 10) + 1}, "the chip has 101376"),
        ({"target": "sm_100", "tensor_memory": 513}, "513 columns of tensor memory, the chip has 512"),
        ({"matrix": {}}, "no matrix instruction (HMMA, DMMA, HGMMA)"),
        ({"matrix": {}, "job": make_job("backward_blocks", "*fp16", FIRST=True)}, "no matrix instruction"),
        ({"matrix": {}, "job": make_job("backward_blocks", NEED_X=True)}, "no matrix instruction"),
        ({"matrix": {}, "job": make_job("backward_reduce", NEED_WEIGHT=True)}, "no matrix instruction"),
        ({"matrix": {}, "job": make_job(pointer="*fp32", precision="tf32")}, "no matrix instruction"),
        ({"matrix": {}, "job": make_job(origin="neighbour")}, "no matrix instruction"),
        ({"shared": 1 << 20, "job": make_job(origin="neighbour")}, "bytes of shared memory"),
        ({"error": "ValueError: no"}, "does not compile: ValueError: no"),
        ({"target": "gfx942", "error": "ValueError: no"}, "does not compile: ValueError: no"),
    ],
)
def test_failures(changes: dict[str, Any], why: str) -> None:
    bad = dataclasses.replace(GOOD, **changes)
    assert [why in reason for reason in aot.failures(bad)] == [True]
    text, status = aot.report([GOOD, bad])
    assert status == 1
    assert (
        why in text
        and f"FAILS {bad.target} {bad.job.kernel}" in text
        and "2 configurations, 1 failed" in text
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"shared": 227 << 10},
        {"spills": 2, "stack": 8, "job": make_job(origin="neighbour")},
        {"matrix": {}, "job": make_job(pointer="*fp32")},
        {"matrix": {}, "job": make_job("forward_combine")},
        {"matrix": {}, "job": make_job("backward_sums")},
        {"matrix": {}, "job": make_job("softmax_weight_forward")},
        {"matrix": {}, "job": make_job("softmax_weight_backward")},
        {"matrix": {}, "job": make_job("backward_reduce")},  # without the weight's gradient
        {"matrix": {}, "job": make_job("backward_blocks", FIRST=False, NEED_X=False)},
        {"target": "gfx942", "spills": 2, "matrix": {}},
    ],
)
def test_no_failure(changes: dict[str, Any]) -> None:
    row = dataclasses.replace(GOOD, **changes)
    text, status = aot.report([row])
    assert status == 0 and aot.failures(row) == [] and "1 configurations, all good" in text
    assert ("compiled, never run" in text) == (row.target == "gfx942")


@pytest.mark.parametrize("bad", [True, False])
def test_exit_status(bad: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From the rows to the exit status and the file, without compiling."""
    monkeypatch.setattr(aot, "_unready", lambda: None)
    monkeypatch.setattr(aot, "of_target", lambda target, everything: [make_job(), make_job("backward_sums")])

    def compile_all(found: list[tuple[Job, str]], workers: int) -> list[aot.Row]:
        rows = [dataclasses.replace(GOOD, job=j, target=t, stack=8 * bad) for j, t in found]
        return rows[::-1]

    monkeypatch.setattr(aot, "compile_all", compile_all)
    path = tmp_path / "rows.json"
    status = aot.main(["--target", "sm_90", "--target", "sm_120", "--json", str(path)])
    assert status == int(bad)
    rows = json.loads(path.read_text())
    assert [(r["target"], r["kernel"]) for r in rows] == [
        (t, k) for t in ("sm_90", "sm_120") for k in ("forward_blocks", "backward_sums")
    ]
    assert [bool(r["failures"]) for r in rows] == [bad] * 4


# What is not ready


def test_interpreted() -> None:
    done = run("-m", "fastac.kernels.aot", TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert done.stderr == "TRITON_INTERPRET must not be set while compiling, it is '1'\n"


def test_without_triton(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert aot.main([]) == 2
    assert "triton is not installed: pip install" in capsys.readouterr().err


@compiles
def test_unknown_kernel() -> None:
    done = run("-m", "fastac.kernels.aot", "--list", "--target", "sm_90", "--kernel", "forward_block")
    assert done.returncode == 2
    assert done.stderr == "no kernel is called forward_block\n"
