"""The comparison of commits, in a temporary repository with planted slowness, errors and gaps."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fastac import _native

from . import bench_compare, machine
from .bench_compare import Row, interval, main, verdict_of
from .softmax_weight import Shape
from .workloads import Workload

CLUSTER = {"kind": "cluster", "sizes": asdict(Workload("small", 2, 5, 16, 4, "tests"))}
SOFTMAX_WEIGHT = {"kind": "softmax_weight", "sizes": asdict(Shape(2, 5, 16))}
SMALL = {"small": CLUSTER, "softmax_weight-2x5x16": SOFTMAX_WEIGHT}
QUICK = ["--threads", "1", "--rounds", "4", "--budget", "0", "--mode", "forward"]
REPLACED = """

_right = attention_cluster


def attention_cluster(*args, **kwargs):
    import time

    time.sleep({sleep})
    return _right(*args, **kwargs) * {factor}
"""
PLANTED = {
    "slow": ("fastac/functional.py", REPLACED.format(sleep=0.01, factor=1)),
    "wrong": ("fastac/functional.py", REPLACED.format(sleep=0, factor=1.0001)),
    "older": ("fastac/__init__.py", "\ndel softmax_weight\n"),
    "unbuildable": ("setup.py", "raise SystemExit('error: no compiler today')\n"),
    "incomplete": ("fastac/__init__.py", "\nfrom . import info\n"),  # which is deleted
}
"""By tag: a file, and what is added to it; of setup.py nothing else is left."""

needs_library = pytest.mark.skipif(not _native.available, reason=f"no native library: {_native.why_not}")


def git(folder: Path, *arguments: str) -> str:
    names = ["-c", "user.name=tests", "-c", "user.email=tests@example.org"]
    done = subprocess.run(
        ["git", "-C", str(folder), *names, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of this package, its library built, with a tag for everything planted; "clean" is HEAD."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    root = tmp_path_factory.mktemp("repository")
    for name in ("fastac", "kernels", "csrc"):
        shutil.copytree(machine.ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy2(machine.ROOT / "setup.py", root)
    (root / ".gitignore").write_text("*.so\n__pycache__/\nbuild/\n")
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "--no-verify", "-m", "clean")
    git(root, "tag", "clean")
    for tag, (file, text) in PLANTED.items():
        with (root / file).open("w" if file == "setup.py" else "a") as planted:
            planted.write(text)
        if tag == "incomplete":
            (root / "fastac" / "info.py").unlink()
        git(root, "commit", "--quiet", "--no-verify", "-am", tag)
        git(root, "tag", tag)
        git(root, "reset", "--quiet", "--hard", "clean")
    (root / bench_compare.LIBRARY).touch()  # it is what these sources compile to, however old
    return root


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary files, of this test alone."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr("tempfile.tempdir", None)
    return folder


def assert_nothing_left(repository: Path, temporary: Path) -> None:
    assert len(git(repository, "worktree", "list").splitlines()) == 1
    assert list(temporary.iterdir()) == []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            assert str(temporary).encode() not in process.read_bytes()
        except OSError:
            continue


@needs_library
def test_a_planted_slowdown_shows(
    repository: Path, temporary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "table.csv"
    given = ["slow", *QUICK, "--resolution", "4", "--csv", str(table)]
    assert main(given, root=repository, chosen=SMALL, prime=0) == 0
    out, err = capsys.readouterr()
    assert "the library built here serves both sides" in err
    assert "base / here" in out and "95 % interval" in out
    found = pd.read_csv(table, keep_default_na=False).set_index("workload")
    slow, untouched = found.loc["small"], found.loc["softmax_weight-2x5x16"]
    assert slow["verdict"] == "faster"
    assert float(slow["base_s"]) >= 0.01
    assert 5 < float(slow["low"]) <= float(slow["base_over_here"]) <= float(slow["high"])
    assert untouched["verdict"] == "no difference seen"
    assert slow["base"] == git(repository, "rev-parse", "--short=12", "slow").strip()
    assert slow["here"] == git(repository, "rev-parse", "--short=12", "clean").strip()
    assert_nothing_left(repository, temporary)


@needs_library
def test_what_is_not_committed_is_the_present_tree(
    repository: Path, temporary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = repository / "fastac" / "functional.py"
    before = changed.read_text()
    changed.write_text(before + PLANTED["slow"][1])
    try:
        assert main(["HEAD", *QUICK], root=repository, chosen={"small": CLUSTER}, prime=0) == 0
    finally:
        changed.write_text(before)
    out, err = capsys.readouterr()
    assert out.splitlines()[1].endswith("slower")
    assert "with changes" in err
    assert_nothing_left(repository, temporary)


@needs_library
def test_a_wrong_base_has_no_ratio(
    repository: Path, temporary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["wrong", *QUICK], root=repository, chosen={"small": CLUSTER}, prime=0) == 1
    row, *reason = capsys.readouterr().out.splitlines()[1:]
    assert row.split() == ["small", "forward", "float32", *"------", "WRONG"]
    assert reason[0].startswith("WRONG: small, forward, float32: base: ")
    assert any("y of ours: rms error 1.00e-04" in line for line in reason)
    assert not any("here: " in line for line in reason)
    assert_nothing_left(repository, temporary)


@needs_library
def test_what_an_older_base_lacks_is_said_and_the_rest_compared(
    repository: Path, temporary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["older", *QUICK, "--resolution", "9"]
    assert main(given, root=repository, chosen=SMALL, prime=0) == 0
    small, gap, reason = capsys.readouterr().out.splitlines()[1:]
    assert small.endswith("no difference seen")
    assert gap.endswith("not compared")
    assert reason.endswith("softmax_weight-2x5x16, forward, float32: base: this tree has no softmax_weight")


@needs_library
def test_a_base_is_compiled_where_its_sources_differ(
    repository: Path, temporary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = repository / "setup.py"
    before = script.read_text()
    library = repository / bench_compare.LIBRARY
    script.write_text(
        "import os, shutil, sys\n"
        "assert sys.argv[1:] == ['--quiet', 'build_ext', '--inplace'] and os.environ['FASTAC_CUDA'] == '0'\n"
        f"shutil.copy({str(library)!r}, 'fastac')\n"
    )
    git(repository, "checkout", "older", "--", "fastac/__init__.py")  # one pair of processes shows the gap
    git(repository, "commit", "--quiet", "--no-verify", "-am", "built")
    git(repository, "tag", "--force", "built")
    git(repository, "reset", "--quiet", "--hard", "clean")
    assert script.read_text() == before
    library.touch()
    assert main(["built", *QUICK], root=repository, chosen={"gap": SOFTMAX_WEIGHT}, prime=0) == 0
    out, err = capsys.readouterr()
    assert "base: this tree has no softmax_weight" in out
    assert "building" in err and "serves both" not in err
    assert_nothing_left(repository, temporary)


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The message, after the lines of progress."""
    out, err = capsys.readouterr()
    assert out == ""
    messages = [line for line in err.splitlines() if line.startswith("bench-compare: ")]
    assert len(messages) == 1 and err.splitlines()[-1] == messages[0]
    return messages[0]


@needs_library
def test_mistakes_are_one_line_each(
    repository: Path, temporary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    for given, expected in (
        (["nosuch"], "BASE must name a commit, a branch or a tag of this repository, got 'nosuch'"),
        (["--", "-x"], "BASE must name a commit, a branch or a tag of this repository, got '-x'"),
        (["HEAD", "--folder", str(full)], f"--folder must be an empty or a new folder, {full} is not"),
        (["HEAD", "--rounds", "3"], "--rounds must be at least 4, got 3"),
        (["HEAD", "--pairs", "5"], "--pairs must be at least 6 for an interval, got 5"),
        (["HEAD", "--csv", str(tmp_path / "no" / "t.csv")], "--csv must name a file in a folder that exists"),
        (["unbuildable"], "failed: error: no compiler today"),
        # The installed package has that module; it must not fill in.
        (["incomplete"], "the base side ended with status 1: ImportError: cannot import name 'info'"),
    ):
        assert main(given, root=repository, chosen={"small": CLUSTER}, prime=0) == 2
        assert expected in one_line(capsys)
        assert_nothing_left(repository, temporary)
    assert (full / "file").exists()


def test_a_tree_that_is_not_built_is_one_line(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["HEAD"], root=tmp_path, chosen={}, prime=0) == 2
    assert "is no git checkout" in one_line(capsys)
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "--quiet", str(repository), str(clone))
    assert main(["HEAD"], root=clone, chosen={}, prime=0) == 2
    assert "has no fastac/_C.abi3.so; type `make build`" in one_line(capsys)
    (clone / bench_compare.LIBRARY).touch()
    source = clone / "csrc" / "cpu" / "tile.h"
    os.utime(source, (time.time() + 60, time.time() + 60))
    assert main(["HEAD"], root=clone, chosen={}, prime=0) == 2
    assert "_C.abi3.so is older than csrc/cpu/tile.h; type `make build`" in one_line(capsys)


@needs_library
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_nothing_is_left_after_an_interruption(
    repository: Path, temporary: Path, number: signal.Signals
) -> None:
    program = (
        "import sys; from pathlib import Path; from benchmarks import bench_compare\n"
        f"sys.exit(bench_compare.main(['HEAD', '--threads', '1', '--budget', '600', '--rounds', '100000',"
        f" '--mode', 'forward'], root=Path({str(repository)!r}), chosen={{'small': {CLUSTER!r}}}, prime=0))"
    )
    running = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=machine.ROOT,
        stderr=subprocess.PIPE,
        text=True,
        # a shell starts what it runs in the background with SIGINT ignored, which is inherited
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert running.stderr is not None
    for line in running.stderr:
        if "serves both sides" in line:
            break
    time.sleep(3)  # into the start of the workers, or the rounds
    try:
        running.send_signal(number)
        _, err = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == 128 + number, err
    assert "Traceback" not in err
    assert_nothing_left(repository, temporary)


@pytest.mark.parametrize(("count", "kth"), [(6, 1), (8, 1), (9, 2), (11, 2), (12, 3), (15, 4), (20, 6)])
def test_the_interval_is_that_of_the_sign_test(count: int, kth: int) -> None:
    ratios = list(np.random.default_rng(0).permutation(np.linspace(0.9, 1.2, count)))
    assert interval(ratios) == (sorted(ratios)[kth - 1], sorted(ratios)[-kth])


def test_the_interval_holds_the_median_as_often_as_it_says() -> None:
    drawn = np.random.default_rng(0).lognormal(0.0, 0.05, (4000, 6))  # of median 1
    low, high = np.array([interval(ratios) for ratios in drawn]).T
    held = np.mean((low <= 1) & (high >= 1))
    assert 0.96 < held < 0.98  # 1 - 2 / 2**6 = 0.969


def test_five_ratios_have_no_interval() -> None:
    with pytest.raises(ValueError, match="ratios must be at least 6 for an interval, got 5"):
        interval([1.0] * 5)


@pytest.mark.parametrize(
    ("median", "low", "high", "verdict"),
    [
        (1.10, 1.05, 1.15, "faster"),
        (1.10, 0.99, 1.30, "no difference seen"),
        (1.02, 1.01, 1.03, "no difference seen"),
        (0.90, 0.85, 0.95, "slower"),
        (0.90, 0.80, 1.01, "no difference seen"),
        (0.98, 0.97, 0.99, "no difference seen"),
    ],
)
def test_verdicts(median: float, low: float, high: float, verdict: str) -> None:
    assert verdict_of(median, low, high, 0.03) == verdict


def test_ratios_are_taken_round_by_round() -> None:
    pair = {"base": [2.0, 20.0, 4.0], "here": [1.0, 10.0, 2.0]}
    record = Row("w", "forward", "float32", [pair] * 6).record(0.03)
    assert record["base_over_here"] == record["low"] == record["high"] == 2.0
    assert record["verdict"] == "faster"
    assert record["base_s"] == 4.0 and record["here_s"] == 2.0
    assert record["pairs"] == 6 and record["rounds"] == 18


def test_processes_that_differ_among_themselves_are_no_difference() -> None:
    """Rounds agree to the last digit within each pair, and yet say nothing about the code."""
    pairs = [{"base": [taken] * 9, "here": [1.0] * 9} for taken in (1.05, 1.06, 1.04, 1.05, 1.07, 0.99)]
    record = Row("w", "forward", "float32", pairs).record(0.03)
    assert record["base_over_here"] == 1.05
    assert (record["low"], record["high"]) == (0.99, 1.07)
    assert record["verdict"] == "no difference seen"
