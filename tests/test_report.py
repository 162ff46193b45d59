"""The page of `fastac report`: its figures are those of the results, and it says what was not measured."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
import report_data
from report_page import Page, draw_nothing, page_of, put, small_run

from benchmarks import workloads
from fastac.report import build, content, method, names, plots, runs, suites

pytestmark = pytest.mark.xdist_group("report")  # the page that several tests read is built once

SECTIONS = ("method", "speed", "roofline", "scaling", "memory", "suites", "targets", "systems", "gpus")


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with a run of everything; its page is in docs/benchmarks. Tests must not change it."""
    folder = tmp_path_factory.mktemp("full")
    results = put(folder, report_data.cpu_run(), report_data.gpu_run())
    build(results, folder / "docs" / "benchmarks")
    return folder


@pytest.fixture(scope="module")
def page(full: Path) -> Page:
    return page_of(full / "docs" / "benchmarks")


# A whole page


def test_every_section_is_there_and_linked(page: Page) -> None:
    assert page.text.startswith('<!DOCTYPE html>\n<html lang="en">')
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page.text
    assert "<title>fastac: benchmarks</title>" in page.text
    assert tuple(name for name in page.ids if not name.endswith("-title")) == SECTIONS
    assert [link for link in page.links if link.startswith("#")] == [f"#{name}" for name in SECTIONS]
    for section in ("method", "speed", "roofline", "scaling", "memory", "suites"):
        assert content.NOT_MEASURED not in page.loose[section].lower()


def test_headings_leave_out_no_level(page: Page) -> None:
    levels = [int(tag[1]) for tag, _ in page.headings]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(below - above <= 1 for above, below in pairwise(levels))


def test_the_page_needs_nothing_from_elsewhere(page: Page) -> None:
    assert "http" not in page.text
    assert "<script" not in page.text
    assert not re.search(r"@import|url\(", page.text)


def test_pictures_are_there_and_described(full: Path, page: Page) -> None:
    output = full / "docs" / "benchmarks"
    files = {picture["src"] for picture in page.pictures}
    assert files == {path.name for path in output.glob("*.png")}
    kinds = {name.split("made-up-cpu-")[1].removesuffix(".png") for name in files}
    assert kinds == {
        *(
            f"speed-{mode}-{what}"
            for mode in ("forward", "training")
            for what in ("the-same", "another-pooling")
        ),
        *("roofline", "memory-forward", "memory-training"),
        *(
            "scaling-b-kinetics-rgb",
            "scaling-l-mil-bag-256",
            "scaling-m-kinetics-rgb",
            "scaling-n-kinetics-rgb",
        ),
    }
    for picture in page.pictures:
        data = (output / picture["src"]).read_bytes()
        assert data.startswith(b"\x89PNG")
        assert (int(picture["width"]), int(picture["height"])) == (
            int.from_bytes(data[16:20], "big"),
            int.from_bytes(data[20:24], "big"),
        )
        assert b"tEXt" not in data and b"tIME" not in data
        assert len(picture["alt"]) > 40


def test_every_table_of_figures_says_what_it_comes_from(page: Page) -> None:
    static = ("Named workloads", "What a call does", "Operations and bytes")
    for table in page.tables:
        caption, source = table["caption"].strip(), table["source"]
        if caption in static:
            assert source == ""
        elif caption == "Contenders" or caption.startswith("Machine: "):
            assert source.startswith("benchmarks/results/")
        elif table["section"] == "gpus":
            assert source.startswith(
                "Made-up GPU; 2031-02-04; fastac at commit ba9876543210; torch 2.99.0; triton 3.9"
            )
        elif table["section"] == "systems" and "fused" in caption and "bbbb" in source:
            assert source.startswith(
                "Made-up GPU; Made-up CPU; 2 threads; 2031-01-09; fastac at commit bbbb; "
            )
        elif table["section"] == "systems":
            assert "commit 0123456789ab" in source and "benchmarks/results/" in source
        else:
            run, versions = "fastac at commit 0123456789ab", "torch 2.99.0+cpu; python 3.11.7"
            assert source == f"Made-up CPU, 2 threads; 2031-02-03; {run}; {versions}"


# The figures are those of the file


def find(run: dict[str, Any], **wanted: Any) -> dict[str, Any]:
    (found,) = [r for r in run["records"] if all(r[key] == value for key, value in wanted.items())]
    return found


@pytest.mark.parametrize(
    ("workload", "mode"), [("kinetics-rgb", "forward"), ("yt8m-audio", "training"), ("online", "frozen")]
)
def test_times_and_ratios_are_those_of_the_records(page: Page, workload: str, mode: str) -> None:
    run = report_data.cpu_run()
    ours = find(run, suite="speed", workload=workload, mode=mode, contender="ours")
    cells = page.row("Time of a call, float32", workload, mode)
    assert float(cells[0]) == pytest.approx(1e3 * ours["median_s"], rel=0.005)
    low, high = map(float, cells[1].split("–"))
    assert (low, high) == pytest.approx((1e3 * ours["quartile1_s"], 1e3 * ours["quartile3_s"]), rel=0.005)
    assert float(cells[2].removesuffix(" %")) == pytest.approx(100 / ours["time_over_floor"], abs=0.5)
    heads = page.table("Time of a call, float32")["rows"][1]
    for name, cell in zip(heads[4:], cells[3:], strict=True):
        peer = find(run, suite="speed", workload=workload, mode=mode, contender=name)
        if peer["median_s"] is None:
            assert cell == "–"
        else:
            assert float(cell.removesuffix("×")) == pytest.approx(peer["time_over_ours"], rel=0.005)
    every = page.row("Every time, float32", workload, "eager")
    eager = find(run, suite="speed", workload=workload, mode=every[0], contender="eager")
    assert float(every[1]) == pytest.approx(1e3 * eager["median_s"], rel=0.005)
    assert float(every[4]) == pytest.approx(eager["gflops"], rel=0.005)


def test_peers_that_compute_something_else_stand_apart(page: Page) -> None:
    above = page.table("Time of a call, float32")["rows"][0]
    assert above[1:] == ["ours", "computing the same, time over ours", "another pooling, time over ours"]
    assert '<th scope="colgroup" colspan="5">computing the same' in page.text
    assert '<th scope="colgroup" colspan="4">another pooling' in page.text


def test_a_cell_without_a_figure_has_its_reason(page: Page) -> None:
    assert "flex: " + report_data.FLEX_REASON in page.loose["speed"]
    assert "flex &lt;attention&gt; has no backward on the CPU &amp; never had" in page.text
    assert "sdpa: scores are given, SDPA computes its own from queries" in page.loose["speed"]
    contenders = page.row("Contenders", "flex")
    assert contenders[-1] == "backward, training, frozen: every workload"
    assert page.row("Contenders", "mean")[-1] == "backward, frozen: every workload"
    assert page.row("Contenders", "sdpa")[-1] == "all modes: mil-bag"


def test_a_reduced_batch_is_said(page: Page) -> None:
    assert "kinetics-flow: B = 256, L = 25, M = 1,536, N = 32 (B reduced from 512)." in page.loose["speed"]


def test_memory_dtypes_layouts_latency_and_the_rest(page: Page) -> None:
    run = report_data.cpu_run()
    memory = find(run, suite="memory", workload="yt8m-rgb", mode="training", contender="eager")
    heads = page.table("Peak memory of a call")["rows"][1]
    assert heads[1:] == ["ours", "eager", "compile", "sdpa"] * 2
    cells = page.row("Peak memory of a call", "yt8m-rgb", "training")
    assert float(cells[1]) == pytest.approx(memory["peak_bytes"] / 1e6, rel=0.005)
    assert float(cells[5]) == pytest.approx(memory["workspace_bytes"] / 1e6, rel=0.005)

    half = find(
        run, suite="dtypes", workload="yt8m-rgb", mode="backward", dtype="bfloat16", contender="eager"
    )
    dtypes = page.table("Time of a call by dtype")["rows"]
    assert dtypes[0][1:] == ["float64", "float32", "bfloat16", "float16"]
    assert float(page.row("Time of a call by dtype", "yt8m-rgb", "backward")[5]) == pytest.approx(
        1e3 * half["median_s"], rel=0.005
    )

    layouts = page.table("The same sets in every layout")["rows"]
    assert layouts[0][:3] == ["workload, mode", "contender", "layout"]
    assert [row[:3] for row in layouts[2:6]] == [
        ["forward", "ours", "packed"],
        ["forward", "ours (nested)", "nested"],
        ["forward", "ours (lengths)", "padded"],
        ["forward", "eager", "padded"],
    ]
    assert [row[-1] for row in layouts[2:6]] == ["–", "1.40×", "1.40×", "1.40×"]

    latency = find(run, suite="latency", mode="forward", contender="ours")
    cells = page.row("Single calls", "online", "forward")
    assert [cells[0], float(cells[1])] == ["ours", pytest.approx(1e6 * latency["median_s"], rel=0.005)]
    assert float(cells[4]) == pytest.approx(1e6 * latency["p95_s"], rel=0.005)

    step = find(run, suite="step", workload="kinetics-rgb", contender="compile")
    cells = page.row("A whole training step with the classifier", "kinetics-rgb", "compile")
    assert float(cells[1]) == pytest.approx(1e3 * step["median_s"], rel=0.005)

    overhead = find(run, suite="overhead", contender="eager")
    cells = page.row("A call that computes next to nothing: B = 1, L = 4, M = 16, N = 4", "eager")
    assert float(cells[1]) == pytest.approx(1e6 * overhead["median_s"], rel=0.005)

    assert page.row("With the C library's default settings", "kinetics-rgb", "forward")[-1] == "20,321"


def test_scaling_has_the_exponents_and_the_sizes_without_a_figure(page: Page) -> None:
    assert page.row("Fitted exponents", "L (mil-bag-256)", "forward") == [
        "ours",
        "time",
        "0.98",
        "−0.02 to 1.01",
        "64 to 4,096",
        "7",
    ]
    assert page.row("Fitted exponents", "N (kinetics-rgb)", "forward")[3] == "–"
    reason = "mil-bag-256: no figure of eager, forward, at L = 1,048,576: its memory would pass 8 GB"
    assert reason in page.loose["scaling"]


def test_targets_are_all_there_and_counted(page: Page) -> None:
    rows = page.table("Figures to reach", "targets")["rows"]
    assert rows[1:] == [
        ["kinetics-rgb forward / floor", "≤ 1.1x", "1.04x", "✓ met"],
        ["kinetics-rgb forward, eager / ours", "≥ 2x", "1.6x", "✗ missed by 20 %"],
        ["bf16 against float32", "-", "1.2x", "no AVX512-BF16 in use"],
        ["exponent in L", "≤ 1.1", "-", "not measured"],
    ]
    assert "1 met, 1 missed, 1 not measured, 1 without a verdict, of 4." in page.loose["targets"]


def test_the_systems_tables(page: Page) -> None:
    caption = "Test accuracy at the last epoch"
    mean, spread = "80.8", "1.0"
    assert page.row(caption, "FC1 + shift", "4") == [mean, spread, "75.9", "+4.9", "2", "100", "1", "97.5"]
    assert page.row(caption, "FC1 + shift", "8")[:3] == ["not measured", "–", "80.6"]
    assert len(page.table(caption)["rows"]) == 1 + 5 * (1 + 8)
    assert "fedcba987654-dirty (code not committed)" in page.table(caption)["source"]
    assert page.row("One engine, one budget", "bi-LSTM")[:3] == ["85.5", "4,300,000", "21.5"]
    assert page.row("One engine, one budget", "pyramid attention")[0] == "not measured"
    speed = "One model, its cluster fused and in plain torch: mnist, 100 videos, B = 64, N = 64"
    cpu, gpu = (table for table in page.tables if table["caption"].strip() == speed)
    # The older date and the earlier row of the same day are left out.
    assert cpu["rows"][1:] == [["2", "cpu", "19.5", "23.4", "1.20×", "0.800", "1.92", "2.40×", "1.3e-06"]]
    assert "torch 2.10;" in cpu["source"] and "GPU" not in cpu["source"]
    assert gpu["rows"][1:] == [["2", "cuda", "1.50", "3.00", "2.00×", "0.200", "0.500", "2.50×", "1.4e-06"]]
    for length in ("L ≤ 25", "L = 25"):  # timed one after the other
        softmax = page.row("Time of a call", f"B = 64, {length}, D = 50", "training")
        assert softmax == ["1", "float32", "0.0900", "10.5", "1.40×", "0.900×"]


def test_a_peer_that_is_faster_is_marked(page: Page) -> None:
    assert re.search(r'<td class="behind">0.900×</td>', page.text)
    assert not re.search(r'<td class="behind">[1-9]', page.text)


# GPUs


def test_every_backend_and_workload_has_a_row(page: Page) -> None:
    rows = page.table("Device time by backend and workload")["rows"][2:]
    assert [row[0] for row in rows] == ["triton", *names.WORKLOADS, "cuda", *names.WORKLOADS]


def test_a_gpu_s_figures_are_those_of_its_backend(page: Page) -> None:
    run = report_data.gpu_run()
    caption = "Device time by backend and workload"
    for backend, contender in (("cuda", "ours"), ("triton", "triton")):
        own = find(run, workload="yt8m-rgb", mode="forward", contender=contender)
        eager = find(run, workload="yt8m-rgb", mode="forward", contender="eager")
        cells = page.row(caption, backend, "yt8m-rgb")
        assert cells[0] == "bfloat16, B = 64"
        assert float(cells[1]) == pytest.approx(1e6 * own["median_s"], rel=0.005)
        assert float(cells[2].removesuffix(" %")) == pytest.approx(100 * own["share_of_floor"], abs=0.5)
        expected = eager["median_s"] / own["median_s"]
        assert float(cells[3].removesuffix("×")) == pytest.approx(expected, rel=0.005)
    assert page.row(caption, "triton", "online")[0] == "not measured"
    assert page.row(caption, "cuda", "online")[0] == "bfloat16, B = 1"
    assert "sdpa: scores are given" in page.loose["gpus"]
    assert "ragged B=256 float16: out of time" in page.loose["gpus"]


def test_a_wrong_backend_shows(tmp_path: Path) -> None:
    run = report_data.gpu_run()
    run["red"] = {"online B=1 bfloat16, triton": "y is off by 3"}
    build(put(tmp_path, run, tables=False), tmp_path / "out")
    said = page_of(tmp_path / "out").loose["gpus"]
    assert "Wrong result, no speed is reported for online B=1 bfloat16, triton: y is off by 3" in said


# What was not measured


def test_without_runs_every_section_says_so(tmp_path: Path) -> None:
    results = put(tmp_path)
    build(results, tmp_path / "out")
    page = page_of(tmp_path / "out")
    assert tuple(name for name in page.ids if not name.endswith("-title")) == SECTIONS
    for section in SECTIONS:
        assert content.NOT_MEASURED in page.loose[section].lower()
    assert page.pictures == []
    assert len(page.table("Device time by backend and workload")["rows"]) == 2 + 2 * (
        1 + len(names.WORKLOADS)
    )


def one_of_each() -> dict[str, Any]:
    """A run with a record of ours and one of eager in every suite."""
    run = report_data.cpu_run()
    kept: dict[tuple[str, ...], dict[str, Any]] = {}
    for one in run["records"]:
        if one["contender"] in ("ours", "eager"):
            kept.setdefault((one["suite"], one["varied"], one["contender"]), one)
    return run | {"records": list(kept.values())}


@pytest.mark.parametrize("suite", ["speed", "sweep", "memory"])
def test_a_suite_that_was_not_run_is_said_to_be_missing(
    suite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_nothing(monkeypatch)
    run = one_of_each()
    run["records"] = [one for one in run["records"] if one["suite"] != suite]
    build(put(tmp_path, run, tables=False), tmp_path / "out")
    page = page_of(tmp_path / "out")
    missing = {
        "speed": {"speed": ["Not measured."], "roofline": ["Not measured."]},
        "sweep": {"scaling": [f"Scaling in {symbol}: not measured." for symbol in "BLMN"]},
        "memory": {"memory": ["Not measured."]},
    }[suite]
    for section in ("speed", "roofline", "scaling", "memory", "suites"):
        said = [line for line in page.loose[section].splitlines() if "not measured." in line.lower()]
        assert said == missing.get(section, [])


def test_a_small_suite_that_was_not_run_is_said_to_be_missing(tmp_path: Path) -> None:
    titles = {
        "step": "Whole training step",
        "dtypes": "Dtypes",
        "layouts": "Layouts of sets of different length",
        "latency": "Latency of one clip",
        "overhead": "Call overhead",
        "default-malloc": "Memory settings of the C library",
    }
    everything = one_of_each()
    for suite in ["", *titles]:
        records = [one for one in everything["records"] if one["suite"] != suite]
        path = report_data.write_run(tmp_path, everything | {"records": records})
        blocks = suites.others([runs.read(path, path.name, "cpu")]).blocks
        after = {block.text: below for block, below in pairwise(blocks) if block.kind == "heading"}
        for name, title in titles.items():
            assert (after[title] == content.missing()) == (name == suite)


def test_a_run_without_targets_and_exponents_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_nothing(monkeypatch)
    run = small_run() | {"targets": []}
    build(put(tmp_path, run, tables=False), tmp_path / "out")
    page = page_of(tmp_path / "out")
    assert "Not measured." in page.loose["targets"]
    assert "Exponents: not measured." in page.loose["scaling"]
    assert page.loose["systems"].count("Not measured.") == 4


def test_ours_without_a_figure_has_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_nothing(monkeypatch)
    run = small_run()
    run["records"][0] = report_data.without(run["records"][0], "the library fell ill")
    build(put(tmp_path, run, tables=False), tmp_path / "out")
    assert "ours: the library fell ill" in page_of(tmp_path / "out").loose["speed"]


@pytest.mark.parametrize("kept", [True, False])
def test_memory_that_is_given_back_is_said(
    kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_nothing(monkeypatch)
    run = small_run()
    run["machine"]["malloc_keeps_freed_memory"] = kept
    build(put(tmp_path, run, tables=False), tmp_path / "out")
    assert ("these times have its page faults" in page_of(tmp_path / "out").loose["speed"]) != kept


def test_a_sweep_without_figures_is_said_to_be_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_nothing(monkeypatch)
    run = one_of_each()
    run["records"] = [
        report_data.without(one, "no memory left") | {"peak_bytes": None} if one["varied"] == "M" else one
        for one in run["records"]
    ]
    build(put(tmp_path, run, tables=False), tmp_path / "out")
    said = page_of(tmp_path / "out").loose["scaling"]
    assert "Scaling in M, kinetics-rgb: not measured." in said
    assert "kinetics-rgb: no figure of ours, forward, at M = 32: no memory left" in said


# The same results give the same page


def test_the_same_results_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = one_of_each()
    run["records"] = [one for one in run["records"] if one["varied"] in ("", "L")]
    results = put(tmp_path, run)
    first, second = tmp_path / "first", tmp_path / "second"
    build(results, first)
    clone = tmp_path / "elsewhere" / "clone"
    report_data.git(tmp_path, "clone", "--quiet", str(tmp_path), str(clone))
    monkeypatch.chdir(clone)
    with mpl.rc_context({"font.size": 20, "axes.facecolor": "red"}):  # a user's own settings
        build(Path("benchmarks/results"), second)
    files = sorted(path.name for path in first.iterdir())
    assert files == sorted(path.name for path in second.iterdir())
    kinds = ("speed-forward", "roofline", "scaling-l", "memory-forward", "index.html")
    assert all(any(kind in name for name in files) for kind in kinds)
    for name in files:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_no_path_of_the_machine_is_on_the_page(full: Path, page: Page) -> None:
    assert str(full) not in page.text
    assert "benchmarks/results/flash_mnist.csv" in page.text


# Odd content


def test_odd_names_are_escaped(tmp_path: Path) -> None:
    run = small_run(cpu='<b>"CPU" & $x_1$ </table>')
    run["contenders"]["<i>"] = {"note": "<script>alert(1)</script>", "computes": "the same"}
    run["records"].append(run["records"][1] | {"contender": "<i>"})
    run["records"].append(report_data.without(run["records"][1] | {"contender": "sdpa"}, "</td><td> & co"))
    run["errors"] = {"</pre>": ["<u>"]}
    run["targets"][0]["figure"] = "<h1>"
    build(put(tmp_path, run, tables=False), tmp_path / "out")
    page = page_of(tmp_path / "out")
    assert 'Machine: <b>"CPU" & $x_1$ </table>' in [t["caption"].strip() for t in page.tables]
    assert page.row("Contenders", "<i>")[1] == "<script>alert(1)</script>"
    assert "sdpa: </td><td> & co" in page.loose["speed"]
    assert "<script" not in page.text


# Parts


@pytest.mark.parametrize("limits", [(0.9, 1.3), (2.6, 4.7), (0.5, 40), (3e-3, 900), (1e-9, 1e6)], ids=str)
def test_an_axis_has_numbers_to_read(limits: tuple[float, float]) -> None:
    _, (axis,) = plots.new_figure(2.0)
    axis.set_xscale("log")
    axis.set_xlim(*limits)
    plots.logarithmic(axis, "x")
    shown = [tick for tick in axis.get_xticks() if limits[0] <= tick <= limits[1]]
    assert 2 <= len(shown) <= 8


def test_workloads_and_modes_are_those_of_the_benchmarks() -> None:
    assert list(names.WORKLOADS) == list(workloads.WORKLOADS)
    assert names.MODES == workloads.MODES
    for name, shape in names.WORKLOADS.items():
        other = workloads.WORKLOADS[name]
        assert (shape.batch, shape.in_features, shape.cluster_size) == (
            other.batch,
            other.in_features,
            other.cluster_size,
        )
        assert shape.length == (f"1–{other.length}" if other.ragged else str(other.length))
        assert shape.stands_for == other.stands_for


def counted(formula: str, **sizes: int) -> int:
    product = re.sub(r"(\d)([LMN])", r"\1*\2", formula).replace("·", "*")
    return int(eval(product, {}, sizes))


@pytest.mark.parametrize("scores", ["fc1", "given"])
def test_the_counting_model_is_that_of_the_benchmarks(scores: str) -> None:
    w = workloads.Workload("w", 1, 7, 11, 5, "", scores=scores)
    given = ", scores given" if scores == "given" else ""
    passes = {
        "forward": [f"forward{given}"],
        "backward": [f"backward{given}"],
        "training": [f"forward{given}", f"backward{given}"],
        "frozen": [f"forward{given}", f"backward{given}, x frozen"],
    }
    for mode, parts in passes.items():
        for position, expected in ((0, w.operations(7, mode)), (1, w.bytes_moved(7, mode, 2))):
            found = [counted(method.COUNTS[part][position], L=7, M=11, N=5, s=2) for part in parts]
            assert sum(found) == expected, (mode, position)


def test_contenders_have_colours_of_their_own() -> None:
    assert len({*names.COLOURS.values(), *names.SPARE}) == len(names.COLOURS) + len(names.SPARE)
    assert names.colour("eager") == names.COLOURS["eager"]
    assert names.colour("someone new") == names.colour("someone new")
    assert names.colour("someone new") in names.SPARE


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1234.5, "1,230"),
        (123456, "123,000"),
        (12.345, "12.3"),
        (9.996, "10.0"),
        (0.9996, "1.00"),
        (0.012345, "0.0123"),
        (-2.5, "-2.50"),
        (float("nan"), "–"),
        (float("inf"), "–"),
    ],
)
def test_numbers_have_three_digits_that_count(value: float, text: str) -> None:
    assert content.number(value) == text


def test_notes_are_lettered_once() -> None:
    table = content.Table("t", "s", [content.Column("a")])
    reasons = [f"reason {n}" for n in range(28)]
    letters = [table.absent(reason).note for reason in [*reasons, reasons[0]]]
    assert letters[:2] == ["a", "b"]
    assert letters[25:] == ["z", "aa", "ab", "a"]
    assert table.absent("") == content.Cell("not measured", "absent")


def test_a_row_has_as_many_cells_as_columns() -> None:
    table = content.Table("t", "s", [content.Column("a"), content.Column("b")])
    with pytest.raises(ValueError, match="cells must be 2, got 1"):
        table.add(["x"])
