"""How time and peak memory grow with B, L, M and N, one varied at a time, and the exponents fitted to that.

    B sets, L local features each, M features, N attention units

Results are checked before anything is timed: against float64 where that is quick, ours against eager's at
every size beyond. Time is fitted over the sizes with at least `FITTED_OPERATIONS` operations, where the cost
of a call itself no longer shows; peak memory over those whose x, y and gradients come to at least
`FITTED_BYTES`. Both rules look at sizes only, never at what was measured.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from . import correctness, machine, memory
from .measure import say
from .peers import SAME, Eager, Ours, Prepared
from .records import Record, measured, record
from .targets import Figure, at_most
from .timing import Floor, Timings, alternate
from .workloads import OVERHEAD, WORKLOADS, Case, Workload, make_case

FIELDS = {"B": "batch", "L": "length", "M": "in_features", "N": "cluster_size"}
MODES = ("forward", "training")
CONTENDERS = ("ours", "eager")

FITTED_OPERATIONS = 10**8
FITTED_BYTES = 1 << 26
MEMORY_RESOLUTION = 1 << 20
"""A peak below this many bytes is fitted as this: it cannot be told from none."""
TRUTH_OPERATIONS = 2 * 10**9
"""Operations of forward + backward up to which a size is checked against float64."""
MEMORY_LIMIT = 8 * 10**9
EXPONENT_LIMIT = 1.1
ELEMENT_SIZE = 4


class Options(Protocol):
    """What a sweep reads of the options of `python -m benchmarks`."""

    @property
    def threads(self) -> int: ...
    @property
    def backend(self) -> str: ...


@dataclass(frozen=True)
class Sweep:
    """A workload and the sizes that one of its dimensions takes."""

    varied: str
    base: Workload
    sizes: tuple[int, ...]

    def workloads(self) -> list[Workload]:
        """One per size; none of them is a reduction of another."""
        field = FIELDS[self.varied]
        sizes: list[dict[str, Any]] = [{field: size} for size in self.sizes]
        if self.varied == "B":
            sizes = [size | {"full_batch": None} for size in sizes]
        return [replace(self.base, **size) for size in sizes]

    def size(self, workload: Workload) -> int:
        size: int = getattr(workload, FIELDS[self.varied])
        return size


def doublings(first: int, last: int) -> tuple[int, ...]:
    return tuple(first << k for k in range((last // first).bit_length()))


SMALLER = WORKLOADS["kinetics-rgb"].reduced(4)
BAG = replace(
    WORKLOADS["mil-bag"], name="mil-bag-256", in_features=256, stands_for="mil-bag with fewer features"
)
LONG = Workload("long-sets", 4, 300, 1024, 64, "sets of any length, scores from x")
SWEEPS = (
    Sweep("B", WORKLOADS["kinetics-rgb"], doublings(1, 1024)),
    Sweep("L", BAG, (16, 64, 256, 1024, 4096, *doublings(16384, 1 << 20))),
    Sweep("L", LONG, doublings(16, 16384)),
    Sweep("M", SMALLER, (32, 50, 64, 100, 128, 200, 256, 333, 512, 777, 1024, 1536, 2048, 3001, 4096)),
    Sweep("N", SMALLER, (1, 2, 3, 5, 8, 16, 31, 64, 100, 128, 200, 256, 384, 512)),
)


def rows_of(workload: Workload) -> int:
    return workload.batch * workload.length


def operands(workload: Workload, mode: str) -> int:
    """Bytes of x, y and the gradients."""
    return workload.operand_bytes(rows_of(workload), mode, ELEMENT_SIZE)


def needed(workload: Workload, mode: str, contender: str) -> int:
    """Bytes a contender may need at most, operands and dy included.

    Eager holds up to six tensors of the scores' size (scores, weights, their gradients and transposed copies)
    and eight of y's (z, alpha z, u, what normalize keeps, and their gradients), and a second gradient of x.
    """
    results = workload.batch * workload.cluster_size * workload.in_features * ELEMENT_SIZE
    scores = rows_of(workload) * workload.cluster_size * ELEMENT_SIZE
    total = operands(workload, mode) + results + scores
    if contender == "eager":
        total += 6 * scores + 8 * results
        if mode != "forward":
            total += rows_of(workload) * workload.in_features * ELEMENT_SIZE
    return total


def available_memory() -> int:
    """Bytes that this machine can still give."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no line MemAvailable")


def too_large(workload: Workload, mode: str, contender: str, available: int) -> str | None:
    """Why a contender is left out at a size; None if it fits."""
    need = needed(workload, mode, contender)
    left = available // 2  # results of two contenders are held at once to be compared
    if contender != "ours" and need > MEMORY_LIMIT:
        return f"may need {need / 1e9:.1f} GB, more than the {MEMORY_LIMIT / 1e9:.0f} GB of this benchmark"
    if need > left:
        return f"may need {need / 1e9:.1f} GB, half of what this machine has left is {left / 1e9:.1f} GB"
    return None


def check(case: Case, prepared: Mapping[str, Prepared], mode: str) -> str:
    """Whether all contenders compute the same function, to the square root of the dtype's epsilon.

    The named workloads are held to more, a multiple of eager's error; over results of a few numbers, as they
    occur here, such a multiple is chance.

    Returns a line about the errors; raises `correctness.Red` naming every contender and result that is wrong.
    """
    workload = case.workload
    if workload.operations(case.rows, "training") <= TRUTH_OPERATIONS:
        against, exact = "float64", Eager().prepare(case.to(torch.float64))
    elif Eager.name in prepared:
        against, exact = "eager in float32", prepared[Eager.name]
    else:
        return f"{mode}: not checked, nothing else runs at this size"
    truth = correctness.joined(exact.comparable(mode, exact.closure(mode)()))
    allowed = math.sqrt(torch.finfo(case.x.dtype).eps)
    wrong, largest = [], []
    for name, contender in prepared.items():
        if contender is exact:
            continue
        errors = []
        results = contender.comparable(mode, contender.closure(mode)())
        for result, found in correctness.joined(results).items():
            if found.shape != truth[result].shape:
                raise correctness.Red(f"{mode}: {result} of {name} has shape {tuple(found.shape)}")
            errors.append(float((found - truth[result]).norm() / truth[result].norm()))
            if not errors[-1] <= allowed:
                wrong.append(f"{mode}: {result} of {name}: error {errors[-1]:.2e}, allowed {allowed:.2e}")
        largest.append(f"{name} {max(errors):.1e}")
    if wrong:
        raise correctness.Red(
            f"{workload.name}, {workload.describe()}, against {against}\n  " + "\n  ".join(wrong)
        )
    return f"{mode}: {', '.join(largest)} against {against}"


def time_size(
    case: Case, prepared: Mapping[str, Prepared], mode: str, rounds: int, budget: float
) -> tuple[Timings, Floor | None]:
    """All contenders in alternation, with the floor's product where the call is not tiny against it."""
    closures: dict[str, Any] = {n: p.closure(mode) for n, p in prepared.items()}
    floor = None
    if case.workload.operations(case.rows, mode) >= FITTED_OPERATIONS:
        floor = Floor()
        closures[floor.name] = floor
    return alternate(closures, rounds=rounds, budget=budget), floor


def fit(sizes: Sequence[int], values: Sequence[float]) -> dict[str, Any]:
    """Least squares of log value over log size; the exponent, its 95 % interval (Student's t), the range.

    Raises: ValueError for fewer than three points, whose interval would be without bound.
    """
    from scipy import stats

    if len(sizes) != len(values) or len(sizes) < 3:
        raise ValueError(f"a fit needs three sizes with a value each, got {len(sizes)} and {len(values)}")
    line = stats.linregress([math.log(s) for s in sizes], [math.log(v) for v in values])
    # Equal values lie on a line without any error, for which linregress has NaN.
    error = line.stderr if len(set(values)) > 1 else 0.0
    half = float(stats.t.ppf(0.975, len(sizes) - 2) * error)
    exponent = float(line.slope)
    return {"exponent": exponent, "low": exponent - half, "high": exponent + half,
            "from": min(sizes), "to": max(sizes), "points": len(sizes)}  # fmt: skip


def exponents_of(sweep: Sweep, records: Sequence[Record]) -> list[dict[str, Any]]:
    """The fits of one sweep's records; none where fewer than three sizes of the range have a figure."""
    by_size = {sweep.size(w): w for w in sweep.workloads()}
    large: dict[str, Callable[[Record], bool]] = {
        "time": lambda r: r["operations"] >= FITTED_OPERATIONS,
        "peak memory": lambda r: operands(by_size[r[FIELDS[sweep.varied]]], r["mode"]) >= FITTED_BYTES,
    }
    found = []
    for quantity, column in (("time", "median_s"), ("peak memory", "peak_bytes")):
        for mode in MODES:
            for name in CONTENDERS:
                chosen = [
                    r for r in records
                    if (r["mode"], r["contender"]) == (mode, name) and r[column] is not None
                    and large[quantity](r)
                ]  # fmt: skip
                if len(chosen) < 3:
                    continue
                least = MEMORY_RESOLUTION if quantity == "peak memory" else 0
                values = [max(r[column], least) for r in chosen]
                about = {"varied": sweep.varied, "mode": mode, "contender": name, "quantity": quantity,
                         "workload": sweep.base.name}  # fmt: skip
                found.append(about | fit([r[FIELDS[sweep.varied]] for r in chosen], values))
    return found


def figures(exponents: Sequence[Mapping[str, Any]]) -> Iterator[Figure]:
    """Cost must grow linearly: our time's exponent in every dimension; "not measured" without a fit."""
    ours = {
        (e["varied"], e["workload"], e["mode"]): e["exponent"]
        for e in exponents
        if e["contender"] == "ours" and e["quantity"] == "time"
    }
    for sweep in SWEEPS:
        for mode in MODES:
            name = f"exponent in {sweep.varied}, {mode} ({sweep.base.name})"
            yield at_most(name, EXPONENT_LIMIT, ours.get((sweep.varied, sweep.base.name, mode)))


def run_size(
    sweep: Sweep, workload: Workload, contenders: Mapping[str, Any], rounds: int, budget: float
) -> list[Record]:
    """Records of one size, timed."""
    available = available_memory()
    case = make_case(workload)
    found = []
    for mode in MODES:
        operations = workload.operations(case.rows, mode)
        moved = workload.bytes_moved(case.rows, mode, ELEMENT_SIZE)
        about = {"suite": "sweep", "varied": sweep.varied, "mode": mode, "dtype": "float32",
                 "layout": "dense", "computes": SAME}  # fmt: skip
        reasons = {name: too_large(workload, mode, name, available) for name in contenders}
        found += [
            record(workload, case.rows, contender=name, reason=why, operations=operations, bytes=moved,
                   **about)
            for name, why in reasons.items() if why is not None
        ]  # fmt: skip
        fitting = {name: contenders[name].prepare(case) for name, why in reasons.items() if why is None}
        if not fitting:
            continue
        errors = check(case, fitting, mode)
        timings, floor = time_size(case, fitting, mode, rounds, budget)
        for name in fitting:
            figures = measured(timings, name, operations=operations, moved=moved, floor=floor)
            found.append(record(workload, case.rows, contender=name, **about, **figures))
        told = ", ".join(f"{n} {1e3 * timings.median(n):.3f} ms" for n in fitting)
        say(f"  {sweep.varied} = {sweep.size(workload)}, {told}; errors, {errors}")
    return found


def measure_memory(sweep: Sweep, records: Sequence[Record], options: Options) -> list[dict[str, int]]:
    """peak_bytes and workspace_bytes of every record, in order, from a process of its own; see `memory`."""
    by_size = {sweep.size(w): w for w in sweep.workloads()}
    calls = [
        {"workload": asdict(by_size[r[FIELDS[sweep.varied]]]), "mode": r["mode"], "contender": r["contender"]}
        for r in records
    ]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.sweeps"],
        input=json.dumps({"threads": options.threads, "backend": options.backend, "calls": calls}),
        cwd=machine.ROOT, env=machine.default_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"measuring the memory of a sweep over {sweep.varied} failed:\n{done.stderr}")
    peaks: list[dict[str, int]] = json.loads(done.stdout.splitlines()[-1])
    return peaks


def measure_memory_here(request: Mapping[str, Any]) -> list[dict[str, int]]:
    """The same, in this process, which must not do anything else."""
    torch.set_num_threads(request["threads"])
    memory.return_freed_memory()
    contenders: dict[str, Any] = {"ours": Ours(request["backend"]), "eager": Eager()}
    warm = make_case(OVERHEAD)
    for contender in contenders.values():
        for mode in MODES:
            contender.prepare(warm).closure(mode)()
    found = []
    case = warm
    for call in request["calls"]:
        workload = Workload(**call["workload"])
        if workload != case.workload:
            del case  # before the next one is made: both at once may not fit
            case = make_case(workload)
            case.x.sum()  # wakes the thread pool
        prepared = contenders[call["contender"]].prepare(case)
        found.append(memory.peak(prepared, call["mode"], False))
    return found


def run(
    options: Options, sweeps: Sequence[Sweep] = SWEEPS, *, rounds: int = 15, budget: float = 0.6
) -> tuple[list[Record], list[dict[str, Any]]]:
    """All sweeps: (records, exponents).

    Args:
        options: threads of torch, and the backend measured as ours.
        rounds: at most this many per size and mode.
        budget: seconds per size and mode, once five rounds are done.

    Raises: correctness.Red before any figure of a size whose results are wrong.
    """
    torch.set_num_threads(options.threads)
    contenders: dict[str, Any] = {"ours": Ours(options.backend), "eager": Eager()}
    records: list[Record] = []
    exponents: list[dict[str, Any]] = []
    for sweep in sweeps:
        say(f"sweep over {sweep.varied}: {sweep.base.name}, {sweep.base.describe()}")
        found: list[Record] = []
        for workload in sweep.workloads():
            found += run_size(sweep, workload, contenders, rounds, budget)
        if memory.available():
            say("  peak memory ...")
            ran = [r for r in found if not r["reason"]]
            for one, peaks in zip(ran, measure_memory(sweep, ran, options), strict=True):
                one.update(peaks)
        fits = exponents_of(sweep, found)
        for e in fits:
            say(f"  exponent of {e['quantity']}, {e['mode']}, {e['contender']}: {e['exponent']:.2f} "
                f"({e['low']:.2f} .. {e['high']:.2f}) from {e['from']} to {e['to']}")  # fmt: skip
        records += found
        exponents += fits
    return records, exponents


if __name__ == "__main__":
    print(json.dumps(measure_memory_here(json.load(sys.stdin))))
