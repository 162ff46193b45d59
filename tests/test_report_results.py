"""What `fastac report` reads: committed files only, the newest runs, and none of another form."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import report_data
from report_page import draw_nothing, page_of, put, small_run

from fastac.cli import main
from fastac.report import ReportError, build, committed
from fastac.report.page import PAGE
from fastac.report.runs import read

# Committed only


def test_what_is_not_committed_is_left_out_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_nothing(monkeypatch)
    kept, changed, deleted = (small_run(cpu=name) for name in ("Kept", "Changed", "Deleted"))
    for number, run in enumerate((kept, changed, deleted)):
        run["machine"]["date"] = f"2031-02-0{number + 1}T00:00:00+00:00"
    results = put(tmp_path, kept, changed, deleted)
    (results / ".gitignore").write_text("cpu-ignored*\n")
    report_data.commit_all(tmp_path)
    altered = results / report_data.name_of(changed, "cpu")
    altered.write_text(altered.read_text().replace("0.1", "0.2"))
    gone = results / report_data.name_of(deleted, "cpu")
    gone.unlink()
    untracked = report_data.write_run(results, small_run(cpu="Untracked", date="2031-03-01T00:00:00+00:00"))
    staged = report_data.write_run(results, small_run(cpu="Staged", date="2031-04-01T00:00:00+00:00"))
    report_data.git(tmp_path, "add", str(staged))
    (results / "cpu-ignored.json").write_text("{}")
    with (results / "flash_mnist.csv").open("a") as file:
        file.write("fc1,True,8,1,100,99.99,1,x,1,97.5,1\n")

    assert main(["report", "--results", str(results), "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    left = [line.split(": ")[1] for line in said.err.splitlines() if line.startswith("left out")]
    expected = (altered.name, gone.name, untracked.name, staged.name, "cpu-ignored.json", "flash_mnist.csv")
    assert left == sorted(expected)
    page = page_of(tmp_path / "out")
    assert [t["caption"].strip() for t in page.tables if "Machine" in t["caption"]] == ["Machine: Kept"]
    for name in ("Changed", "Deleted", "Untracked", "Staged", "99.99"):
        assert name not in page.text


def test_the_newest_run_of_each_processor_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_nothing(monkeypatch)
    runs = [
        small_run(cpu=cpu, date=date, commit=commit)
        for cpu, date, commit in (
            ("A", "2031-02-03T04:05:06+00:00", "aaaaaaaaaaa1"),
            ("A", "2031-02-03T05:05:06+02:00", "aaaaaaaaaaa0"),  # an hour earlier
            ("B", "2030-01-01T00:00:00+00:00", "bbbbbbbbbbb1-dirty"),
        )
    ]
    results = put(tmp_path, *runs, tables=False)
    (results / "2031-02-03T040506-aaaaaaaaaaa2.json").write_text('{"of": "another form"}')
    report_data.commit_all(tmp_path)
    built = build(results, tmp_path / "out")
    assert [run.machine["commit"] for run in built.runs] == ["aaaaaaaaaaa1", "bbbbbbbbbbb1-dirty"]
    page = page_of(tmp_path / "out")
    assert "aaaaaaaaaaa0" not in page.text and "aaaaaaaaaaa2" not in page.text
    sources = {t["source"] for t in page.tables if t["section"] == "speed"}
    assert any("bbbbbbbbbbb1-dirty (code not committed)" in source for source in sources)
    assert len(sources) == 2


def test_processors_whose_names_differ_in_signs_have_pictures_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_nothing(monkeypatch)
    output = tmp_path / "out"
    build(
        put(tmp_path, small_run(cpu="X (1)"), small_run(cpu="X 1", commit="bbbbbbbbbbbb"), tables=False),
        output,
    )
    page = page_of(output)
    files = [picture["src"] for picture in page.pictures]
    assert len(files) == len(set(files)) == len(list(output.glob("*.png"))) > 0


def test_other_pictures_in_the_folder_are_named_and_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_nothing(monkeypatch)
    results = put(tmp_path, small_run(), tables=False)
    output = tmp_path / "out"
    output.mkdir()
    (output / "old.png").write_bytes(b"x")
    assert main(["report", "--results", str(results), "--output", str(output)]) == 0
    said = capsys.readouterr()
    assert f"not of this page: {output / 'old.png'}" in said.err
    assert (output / "old.png").read_bytes() == b"x"
    assert "read: benchmarks/results/cpu-" in said.out
    assert f"page: {output / PAGE}, with " in said.out


def test_a_folder_as_it_is_committed(tmp_path: Path) -> None:
    put(tmp_path, small_run(), tables=False)
    folder = committed.read(tmp_path / "benchmarks" / "results")
    assert folder.prefix == "benchmarks/results/"
    (name,) = folder.committed
    assert folder.left_out == ()
    run = read(folder.path / name, folder.prefix + name, "cpu")
    assert run.file == f"benchmarks/results/{name}"
    shutil.rmtree(folder.path)
    folder.path.mkdir()
    assert committed.read(folder.path).left_out == (name,)
    assert committed.read(tmp_path).left_out == (folder.prefix + name,)  # git's own files are not named


def test_help_stands_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["report", "--help"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("Usage: fastac report [OPTIONS]")
    assert "left out, and named" in said and "benchmarks/results" in said and "docs/benchmarks" in said
    assert max(map(len, said.splitlines())) <= 80
    assert "`" not in said


# Mistakes


def run_command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    capsys.readouterr()
    status = main(["report", *map(str, arguments)])
    captured = capsys.readouterr()
    assert captured.out == ""
    return status, captured.err


def test_folders_without_results_are_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    nowhere, outside, empty = tmp_path / "nowhere", tmp_path / "outside", tmp_path / "empty"
    outside.mkdir()
    (empty / "results").mkdir(parents=True)
    (empty / "file").write_text("x")
    report_data.commit_all(empty)
    for results, message in (
        (nowhere, f"Error: results must be a folder, got {nowhere}\n"),
        (empty / "file", f"Error: results must be a folder, got {empty / 'file'}\n"),
        (outside, f"Error: results must lie in a git work tree, got {outside}\n"),
        (empty / ".git", f"Error: results must lie in a git work tree, got {empty / '.git'}\n"),
        (
            empty / "results",
            f"Error: results must hold committed results such as cpu-*.json, {empty / 'results'} has none\n",
        ),
    ):
        assert run_command(capsys, "--results", results, "--output", output) == (1, message)
    report_data.write_run(empty / "results", small_run())
    status, said = run_command(capsys, "--results", empty / "results", "--output", output)
    assert status == 1
    assert said.endswith("has none; not as in the last commit: cpu-2031-02-03T040506-0123456789ab.json\n")
    assert said.count("\n") == 1
    assert not output.exists()


def test_a_repository_without_a_commit_has_no_results(tmp_path: Path) -> None:
    report_data.git(tmp_path, "init", "--quiet")
    report_data.write_run(tmp_path, small_run())
    with pytest.raises(ReportError, match="must hold committed results"):
        build(tmp_path, tmp_path / "out")


def test_an_output_that_cannot_be_written_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = put(tmp_path, small_run())
    in_file = results / "flash_mnist.csv" / "x"
    status, said = run_command(capsys, "--results", results, "--output", in_file)
    assert status == 2
    assert f"--output: must lie in a folder, {results / 'flash_mnist.csv'} is none" in said


def test_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = put(tmp_path, small_run())
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ReportError, match="git is needed to tell which results are committed"):
        build(results, tmp_path / "out")


def broken(**changes: Any) -> dict[str, Any]:
    return small_run() | changes


RECORD = report_data.record("online", report_data.SIZES["online"], "forward", "ours")
SWEPT = RECORD | {"suite": "sweep", "varied": "L"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "must be JSON: "),
        ("[]", "must hold a JSON object, got list"),
        (broken(records={}), "records must be a JSON list, got dict"),
        (broken(machine=None), "machine must be a JSON object, got NoneType"),
        (broken(machine={"date": "2031-01-01", "commit": "x"}), "machine must have the text 'cpu', got None"),
        (broken(machine={"date": "soon", "commit": "x", "cpu": "c"}), "date must be in ISO 8601, got 'soon'"),
        (broken(records=[3]), "records must hold JSON objects, got 3"),
        (broken(records=[{"suite": "speed"}]), "every record must have 'workload'"),
        (broken(records=[RECORD, RECORD]), "once, got twice ['speed', 'online', 'forward', 'float32', "),
        (broken(records=[RECORD | {"median_s": "fast"}]), "median_s of every record must be a number"),
        (broken(targets=[{"figure": "x"}]), "every target must have target, measured, verdict, got"),
        (broken(records=[SWEPT, SWEPT]), "once, got twice ['sweep', 'L', 'online', 'forward', "),
        (
            broken(exponents=[{"varied": "L", "from": "1"}]),
            "every exponent must have workload, mode, contender",
        ),
        (broken(contenders={"ours": "me"}), "contender 'ours' must have note and computes, got 'me'"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_a_file_of_another_form_is_a_line(
    text: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cpu-x.json"
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    report_data.commit_all(tmp_path)
    status, said = run_command(capsys, "--results", tmp_path, "--output", tmp_path / "out")
    assert status == 1
    assert said.startswith(f"Error: {path}")
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["flash_mnist.csv", "flash_mnist_speed.csv", "softmax_weight.csv", "comparison.csv"]
)
def test_a_table_of_another_form_is_a_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text("a,b\n1,2\n")
    report_data.commit_all(tmp_path)
    status, said = run_command(capsys, "--results", tmp_path, "--output", tmp_path / "out")
    assert status == 1
    assert said.startswith(f"Error: {tmp_path / name} must have the columns ")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "figure", "message"),
    [
        ("softmax_weight.csv", ",10.5,", "gbytes_per_s must be a number in every row"),
        ("flash_mnist_speed.csv", ",19.5,", "step_ms must be a number in every row"),
        ("comparison.csv", '"21.5"', "step_ms must be a number in every row"),
        ("flash_mnist.csv", ",87.31,", "cannot be read: "),
    ],
    ids=lambda value: value if value.endswith(".csv") else "",
)
def test_text_in_the_place_of_a_figure_is_a_line(
    name: str, figure: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = put(tmp_path)
    text = (results / name).read_text()
    assert figure in text
    (results / name).write_text(text.replace(figure, ",fast," if "," in figure else "fast"))
    report_data.commit_all(tmp_path)
    status, said = run_command(capsys, "--results", results, "--output", tmp_path / "out")
    assert status == 1
    assert said.startswith(f"Error: {results / name}") and message in said
    assert said.count("\n") == 1


def test_a_figure_of_a_gpu_that_stands_twice_is_a_line(tmp_path: Path) -> None:
    run = report_data.gpu_run()
    run["records"].append(run["records"][0])
    with pytest.raises(ReportError, match=r"a record must stand there once, got twice \['kinetics-rgb', "):
        build(put(tmp_path, run, tables=False), tmp_path / "out")
