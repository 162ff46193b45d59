"""Compares another commit with the present tree: `python -m benchmarks.bench_compare --help`.

The other commit is checked out into a throwaway worktree and compiled there. Two processes, one per tree,
then time the same calls in turn, with the harness of the present tree. Ratios are taken round by round.

Where its memory lies makes a process faster or slower than another one of the same code by some percent for
as long as it lives, which no number of rounds shows. So there are several pairs of processes, each with one
ratio, and the interval is that of these ratios.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from . import machine
from .measure import say
from .softmax_weight import MODES as SOFTMAX_WEIGHT_MODES
from .softmax_weight import SHAPES
from .workloads import MODES, WORKLOADS

LIBRARY = Path("fastac", "_C.abi3.so")
COMPILED = ("csrc", "setup.py")
"""What the library is made from."""
SOURCES = ("fastac", "kernels", *COMPILED)
"""What is measured."""

DEFAULT_MODES = {"cluster": ("forward", "training", "frozen"), "softmax_weight": SOFTMAX_WEIGHT_MODES}
DTYPES = ("float32", "float64", "bfloat16", "float16")
BLOCK_SECONDS = 0.02
MINIMUM_PAIRS = 6
"""The range of fewer ratios holds their median with less than CONFIDENCE."""
MINIMUM_ROUNDS = 4
CONFIDENCE = 0.95
RESOLUTION = 0.03

EPILOG = f"""\
Exit status: 0, or 1 if a result of either side is wrong, which then has no ratio, or 2 if there was nothing
to compare. A ratio above 1 means that the present tree is faster. Every pair of processes has one, the median
of its rounds; the table has the median of these, and the interval that holds their true median with at least
95 % confidence whatever their distribution (order statistics: of six pairs, the range). A verdict needs an
interval without 1 and a median that is --resolution away from it (default {RESOLUTION}).
BASE=HEAD without changes compares the code with itself: on a quiet machine it prints "no difference seen" in
every row, and its intervals show the noise. If it does not, no other comparison made then means anything.
"""


class Failed(Exception):
    """Nothing can be compared; the message is one line."""


def git(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)


def resolve(root: Path, base: str) -> str:
    """The full hash of a commit."""
    try:
        inside = git(root, "rev-parse", "--git-dir").returncode == 0
    except OSError as error:
        raise Failed(f"git does not run: {error}") from None
    if not inside:
        raise Failed(f"{root} is no git checkout, so there is no other commit to compare with")
    found = git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{base}^{{commit}}")
    if found.returncode != 0:
        raise Failed(f"BASE must name a commit, a branch or a tag of this repository, got {base!r}")
    return found.stdout.strip()


@contextlib.contextmanager
def worktree(root: Path, commit: str, folder: Path | None) -> Iterator[Path]:
    """A checkout of the commit in a temporary folder, or the one named; gone afterwards, whatever happens."""
    if folder is not None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Failed(f"--folder must be an empty or a new folder, {folder} is not")
    with contextlib.ExitStack() as stack:
        if folder is None:
            try:
                above = stack.enter_context(tempfile.TemporaryDirectory(prefix="fastac-base-"))
            except OSError as error:
                raise Failed(f"no temporary folder can be made: {error}") from None
            folder = Path(above, "tree")
        folder = folder.resolve()
        try:
            added = git(root, "worktree", "add", "--detach", "--force", str(folder), commit)
            if added.returncode != 0:
                raise Failed(f"git cannot check out {commit[:12]} into {folder}: {last_line(added.stderr)}")
            yield folder
        finally:
            git(root, "worktree", "remove", "--force", str(folder))
            shutil.rmtree(folder, ignore_errors=True)
            git(root, "worktree", "prune")


def last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "no message"


def first_error(text: str) -> str:
    """The first line that speaks of an error, else the last."""
    return next((line.strip() for line in text.splitlines() if "error" in line.lower()), last_line(text))


def check_present(root: Path) -> None:
    """The present tree must be built from what it holds: a stale library would be measured for it."""
    library = root / LIBRARY
    if not library.is_file():
        raise Failed(f"the present tree has no {LIBRARY}; type `make build`")
    # What concerns CUDA alone goes into another library.
    sources = [root / "setup.py", *(root / "csrc").glob("*.*"), *(root / "csrc" / "cpu").glob("*.*")]
    newest = max((p for p in sources if p.is_file()), key=lambda p: p.stat().st_mtime_ns)
    if newest.stat().st_mtime_ns > library.stat().st_mtime_ns:
        raise Failed(f"{LIBRARY} is older than {newest.relative_to(root)}; type `make build`")


def same_library(root: Path, commit: str) -> bool:
    """Whether commit and present tree compile to the same library: no difference in its sources."""
    if git(root, "diff", "--quiet", commit, "--", *COMPILED).returncode != 0:
        return False
    return not git(root, "ls-files", "--others", "--exclude-standard", "--", *COMPILED).stdout.strip()


def compile_extension(tree: Path, commit: str) -> None:
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    build = subprocess.Popen(
        command, cwd=tree, env={**os.environ, "FASTAC_CUDA": "0"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        said, _ = build.communicate()
    finally:
        if build.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(build.pid, signal.SIGKILL)  # the compilers too
            build.wait()
    if build.returncode != 0 or not (tree / LIBRARY).is_file():
        raise Failed(f"building {commit[:12]} failed: {first_error(said)}")


class Worker:
    """A process with the `fastac` of one tree; see compare_worker."""

    def __init__(self, name: str, tree: Path) -> None:
        self.name = name
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by stop()
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("compare_worker.py")), str(tree)],
            cwd=tree, env=machine.keeping_environment(), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
        )  # fmt: skip

    def ask(self, do: str, **request: Any) -> Any:
        """Send a request, wait for the answer. Raises: Failed if the process has ended."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            status = self.process.wait()
            self.log.seek(0)
            raise Failed(f"the {self.name} side ended with status {status}: {last_line(self.log.read())}")
        return json.loads(line)

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.log.close()


@contextlib.contextmanager
def workers(trees: Sequence[tuple[str, Path]], threads: int, prime: int) -> Iterator[dict[str, Worker]]:
    """The two sides, started one after the other in the order of their names and trees."""
    with contextlib.ExitStack() as stack:
        sides = {}
        for name, tree in trees:
            sides[name] = Worker(name, tree)
            stack.callback(sides[name].stop)
        for worker in sides.values():
            worker.ask("start", threads=threads, prime=prime)
        yield sides


Seconds = dict[str, list[float]]
"""By side, one entry per round."""


@dataclass
class Row:
    """One line of the table; `pairs` holds what each pair of processes took."""

    workload: str
    mode: str
    dtype: str
    pairs: list[Seconds] = field(default_factory=list)
    wrong: str = ""
    cannot: str = ""

    @property
    def settled(self) -> bool:
        """Whether there is nothing to time."""
        return bool(self.wrong or self.cannot)

    def record(self, resolution: float) -> dict[str, Any]:
        record: dict[str, Any] = {"workload": self.workload, "mode": self.mode, "dtype": self.dtype}
        if self.settled:
            verdict = "WRONG" if self.wrong else "not compared"
            return record | {"verdict": verdict, "reason": self.wrong or self.cannot}
        ratios = [ratio(pair) for pair in self.pairs]
        low, high = interval(ratios)
        base, here = ([s for pair in self.pairs for s in pair[side]] for side in ("base", "here"))
        return record | {
            "base_s": statistics.median(base), "here_s": statistics.median(here),
            "base_over_here": statistics.median(ratios), "low": low, "high": high,
            "pairs": len(ratios), "rounds": len(base),
            "verdict": verdict_of(statistics.median(ratios), low, high, resolution), "reason": "",
        }  # fmt: skip


def ratio(pair: Seconds) -> float:
    """Median of the rounds' ratios."""
    return statistics.median(base / here for base, here in zip(pair["base"], pair["here"], strict=True))


def interval(ratios: Sequence[float]) -> tuple[float, float]:
    """The order statistics that hold the median of independent ratios with at least `CONFIDENCE`.

    Each ratio is below the median with probability 1/2, so the k-th least and the k-th greatest have it
    between them unless fewer than k are on one side of it.
    """
    values, count = sorted(ratios), len(ratios)
    outside, k = 0.0, 0
    while (outside := outside + 2 * math.comb(count, k) / 2**count) <= 1 - CONFIDENCE:
        k += 1
    if k == 0:
        raise ValueError(f"ratios must be at least {MINIMUM_PAIRS} for an interval, got {count}")
    return values[k - 1], values[-k]


def verdict_of(median: float, low: float, high: float, resolution: float) -> str:
    """Of the present tree: both the interval and the resolution must exclude that nothing changed."""
    if low > 1 and median >= 1 + resolution:
        return "faster"
    if high < 1 and median <= 1 / (1 + resolution):
        return "slower"
    return "no difference seen"


def time_mode(mode: str, sides: dict[str, Worker], rounds: int, budget: float) -> Seconds:
    """Both sides in every round, first one then the other first, until `budget` seconds are timed.

    Either is first as often as the other, or once more: the first finds its own data in the caches.
    """
    repeats = {}
    for name, worker in sides.items():
        worker.ask("time", mode=mode, repeats=1)
        taken = worker.ask("time", mode=mode, repeats=1)
        repeats[name] = max(1, math.ceil(BLOCK_SECONDS / max(taken, 1e-7)))
    seconds: Seconds = {name: [] for name in sides}
    spent = 0.0
    for turn in range(rounds):
        for name in list(sides) if turn % 2 == 0 else list(sides)[::-1]:
            taken = sides[name].ask("time", mode=mode, repeats=repeats[name])
            seconds[name].append(taken)
            spent += taken * repeats[name]
        if turn + 1 >= MINIMUM_ROUNDS and turn % 2 and spent > budget:
            break
    return seconds


def check(rows: Sequence[Row], outcomes: dict[str, Any]) -> None:
    """Notes in the rows of a subject what a side gets wrong in their mode, or cannot do."""
    for row in rows:
        for side, outcome in outcomes.items():
            found = outcome[row.mode]
            if "wrong" in found:
                row.wrong += f"{'; ' if row.wrong else ''}{side}: {found['wrong']}"
            elif "cannot" in found:
                row.cannot += f"{'; ' if row.cannot else ''}{side}: {found['cannot']}"


def compare(
    rows: Sequence[Row], subject: dict[str, Any], sides: dict[str, Worker], *, rounds: int, budget: float
) -> None:
    """One more pair for the rows of a subject and a type.

    The first pair checks both sides; a row has times only where both are right.
    """
    first = not any(row.pairs for row in rows)
    asked = [row for row in rows if not row.settled]
    if not asked:
        return
    outcomes = {
        side: worker.ask(
            "prepare", subject=subject, dtype=rows[0].dtype, modes=[row.mode for row in asked], check=first
        )
        for side, worker in sides.items()
    }
    check(asked, outcomes)
    for row in asked:
        if not row.settled:
            row.pairs.append(time_mode(row.mode, sides, rounds, budget))
            say(f"  {row.workload}, {row.mode}, {row.dtype}: base / here {ratio(row.pairs[-1]):.3f}")


def subjects(divisor: int = 1) -> dict[str, dict[str, Any]]:
    """What can be compared, by name: the named workloads, and the shapes of softmax_weight."""
    found: dict[str, dict[str, Any]] = {}
    for name, workload in WORKLOADS.items():
        found[name] = {"kind": "cluster", "sizes": asdict(workload.reduced(divisor))}
    for shape in SHAPES:
        sizes = asdict(shape) | {"batch": max(1, shape.batch // divisor)}
        name = f"softmax_weight-{shape.batch}x{shape.length}x{shape.in_features}"
        found[name] = {"kind": "softmax_weight", "sizes": sizes}
    return found


def table(records: Sequence[dict[str, Any]]) -> str:
    lines, notes = [], []
    for r in records:
        measured = "base_s" in r
        lines.append({
            "workload": r["workload"], "mode": r["mode"], "dtype": r["dtype"],
            "base ms": f"{1e3 * r['base_s']:.3f}" if measured else "-",
            "here ms": f"{1e3 * r['here_s']:.3f}" if measured else "-",
            "base / here": f"{r['base_over_here']:.3f}" if measured else "-",
            "95 % interval": f"{r['low']:.3f} .. {r['high']:.3f}" if measured else "-",
            "pairs": str(r["pairs"]) if measured else "-",
            "rounds": str(r["rounds"]) if measured else "-",
            "verdict": r["verdict"],
        })  # fmt: skip
        if r["reason"]:
            notes.append(f"{r['verdict']}: {r['workload']}, {r['mode']}, {r['dtype']}: {r['reason']}")
    return "\n".join([str(pd.DataFrame(lines).to_string(index=False)), *notes])


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, got {text!r}")
    return int(text)


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number from 0 on, got {text!r}")
    return value


def arguments() -> argparse.ArgumentParser:
    names = list(subjects())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_compare",
        description="Speed of another commit against the present tree, changes not committed included.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("base", metavar="BASE", help="a commit, a branch or a tag")
    parser.add_argument(
        "--workload", action="append", choices=names, metavar="NAME",
        help=f"may be given several times (default: all): {', '.join(names)}",
    )  # fmt: skip
    parser.add_argument(
        "--mode", action="append", choices=list(MODES),
        help=f"may be given several times (default: {', '.join(DEFAULT_MODES['cluster'])})",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", action="append", choices=DTYPES, help="may be given several times (default: float32)"
    )
    parser.add_argument(
        "--pairs", type=positive, default=MINIMUM_PAIRS, help=f"of processes (default {MINIMUM_PAIRS})"
    )
    parser.add_argument(
        "--rounds", type=positive, default=8, help="at most this many per row and pair (default 8)"
    )
    parser.add_argument(
        "--budget", type=seconds, default=0.5,
        help=f"seconds timed per row and pair, once {MINIMUM_ROUNDS} rounds are done (default 0.5)",
    )  # fmt: skip
    parser.add_argument("--threads", type=positive, default=2, help="threads of torch (default 2)")
    parser.add_argument(
        "--divide-batch", type=positive, default=1, metavar="K", help="divide every B by K (default 1)"
    )
    parser.add_argument(
        "--resolution", type=seconds, default=RESOLUTION, metavar="R",
        help="no verdict on a median closer to 1 than this",
    )  # fmt: skip
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table there as well")
    parser.add_argument(
        "--folder", type=Path, help="where the worktree is made, and removed (default: a temporary folder)"
    )
    return parser


def run(
    given: argparse.Namespace, root: Path, chosen: dict[str, dict[str, Any]], prime: int
) -> list[dict[str, Any]]:
    """Check out, build, compare; one record per row. What comes is printed to the standard error."""
    commit = resolve(root, given.base)
    check_present(root)
    if given.rounds < MINIMUM_ROUNDS:
        raise Failed(f"--rounds must be at least {MINIMUM_ROUNDS}, got {given.rounds}")
    if given.pairs < MINIMUM_PAIRS:
        raise Failed(f"--pairs must be at least {MINIMUM_PAIRS} for an interval, got {given.pairs}")
    if given.csv is not None and not given.csv.resolve().parent.is_dir():
        raise Failed(f"--csv must name a file in a folder that exists, got {given.csv}")
    head, changed = (
        git(root, "rev-parse", "HEAD").stdout.strip(),
        bool(git(root, "status", "--porcelain", "--", *SOURCES).stdout.strip()),
    )
    here = head[:12] + (" with changes" if changed else "")
    common = {"base": commit[:12], "here": here, "threads": given.threads,
              "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")}  # fmt: skip
    rows = {
        (name, dtype): [Row(name, mode, dtype) for mode in given.mode or DEFAULT_MODES[subject["kind"]]]
        for name, subject in chosen.items()
        for dtype in given.dtype or ["float32"]
    }
    with worktree(root, commit, given.folder) as tree:
        say(f"base {commit[:12]} ({given.base}), here {here}")
        load, cores = os.getloadavg()[0], os.cpu_count() or 1
        if load > cores / 2:
            say(f"load average {load:.1f} on {cores} cores: others use this machine, trust no verdict")
        if same_library(root, commit):
            say(f"{' and '.join(COMPILED)} are the same in both: the library built here serves both sides")
            shutil.copy2(root / LIBRARY, tree / LIBRARY)
        else:
            say(f"building {commit[:12]} (about a minute) ...")
            compile_extension(tree, commit)
        trees = [("base", tree), ("here", root)]
        for pair in range(given.pairs):
            if all(row.settled for some in rows.values() for row in some):
                break
            say(f"processes {pair + 1} of {given.pairs}")
            with workers(trees if pair % 2 == 0 else trees[::-1], given.threads, prime) as sides:
                for (name, _), some in rows.items():
                    compare(some, chosen[name], sides, rounds=given.rounds, budget=given.budget)
    return [common | row.record(given.resolution) for some in rows.values() for row in some]


def terminated(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def main(
    arguments_given: Sequence[str] | None = None,
    *,
    root: Path = machine.ROOT,
    chosen: dict[str, dict[str, Any]] | None = None,
    prime: int = 1,
) -> int:
    """The command; tests name another repository as `root`, smaller calls as `chosen`, nothing to `prime`."""
    given = arguments().parse_args(arguments_given)
    if chosen is None:
        every = subjects(given.divide_batch)
        chosen = {name: every[name] for name in given.workload or every}
    before = signal.signal(signal.SIGTERM, terminated)
    try:
        records = run(given, root, chosen, prime)
    except Failed as why:
        print(f"bench-compare: {why}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bench-compare: interrupted; the worktree is removed", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    print(table(records))
    if given.csv is not None:
        pd.DataFrame(records).to_csv(given.csv, index=False)
        print(f"saved {given.csv}")
    return 1 if any(r["verdict"] == "WRONG" for r in records) else 0


if __name__ == "__main__":
    sys.exit(main())
