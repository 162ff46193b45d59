"""Everything a GPU has to show, in one command: `make gpu`, or `python -m benchmarks.gpu --help`.

Stages, in this order, within one budget of time:

    build      the extensions in place (with --build), the CUDA one for this GPU alone and where nvcc is found
    tests      tests/gpu, dealt out to several processes; beside them the benchmark's kernels are compiled
    races      forward and backward a hundred times on every workload: equal bits, or a failure
    bench      the workloads against eager, torch.compile and SDPA, the most telling first
    sanitizer  compute-sanitizer's memcheck and racecheck on small shapes, where it is installed

Every stage runs on our backends for GPUs side by side, triton and cuda; one that cannot run here is left out,
and the report says why.

Exit status: 0 all that ran is right; 1 something is wrong, or tests did not end in time; 2 there is no GPU.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from . import gpu_device, gpu_stages, machine
from .gpu_checkout import find_kernels
from .workloads import WORKLOADS

STAGES = ("build", "tests", "races", "bench", "sanitizer")
DTYPES = ("bfloat16", "float16", "float32")
BACKENDS = ("triton", "cuda")
SANITIZER_SECONDS = 75.0
FINISH_SECONDS = 8.0


class Budget:
    """What is left of the time, by a clock that the tests replace."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.start = clock()
        self.deadline = self.start + seconds

    def left(self, reserve: float = 0.0) -> float:
        return self.deadline - reserve - self.clock()

    def until(self, share: float) -> float:
        """The moment when a share of the whole is spent."""
        return self.start + share * (self.deadline - self.start)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Tests, race repeats, benchmark and sanitizers on an NVIDIA GPU; saves what it finds.",
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="budget for everything (default 8)")
    parser.add_argument("--out", type=Path, default=machine.ROOT / "benchmarks" / "results", help="folder")
    parser.add_argument(
        "--build", action="store_true", help="build the C++ and CUDA extensions in place first"
    )
    parser.add_argument(
        "--stages", default=",".join(STAGES[1:]), help=f"comma-separated, of {', '.join(STAGES[1:])}"
    )
    parser.add_argument("--workload", action="append", help="may be given several times (default all)")
    parser.add_argument("--dtypes", default=",".join(DTYPES), help=f"of {', '.join(DTYPES)}, in this order")
    parser.add_argument("--peers", default="eager,compile,sdpa", help="may be empty")
    parser.add_argument("--rounds", type=int, default=15, help="runs of each contender (default 15)")
    parser.add_argument("--repeats", type=int, default=100, help="race repeats of a workload (default 100)")
    parser.add_argument("--no-sanitizer", action="store_true", help="leave compute-sanitizer out")
    parser.add_argument(
        "--backends",
        help=f"ours, the leading one first (default those of {','.join(BACKENDS)} that can run here)",
    )
    parser.add_argument("--commit", help="commit of the sources, where there is no repository to ask")
    parser.add_argument("--warm", help=argparse.SUPPRESS)  # i/n: compile part i of n of the benchmark
    return parser


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments()
    given = parser.parse_args(argv)
    given.stages = [name for name in given.stages.split(",") if name]
    given.dtypes = tuple(name for name in given.dtypes.split(",") if name)
    given.peers = [name for name in given.peers.split(",") if name]
    given.workload = tuple(given.workload or WORKLOADS)
    given.named = given.backends is not None
    given.backends = [name for name in (given.backends or ",".join(BACKENDS)).split(",") if name]
    for option, values, known in (
        ("--stages", given.stages, STAGES[1:]),
        ("--dtypes", given.dtypes, DTYPES),
        ("--peers", given.peers, ("eager", "compile", "sdpa")),
        ("--workload", given.workload, tuple(WORKLOADS)),
    ):
        for value in values:
            if value not in known:
                parser.error(f"{option}: {value!r} is not one of {', '.join(known)}")
    for option in ("minutes", "rounds", "repeats"):
        if getattr(given, option) <= 0:
            parser.error(f"--{option} must be positive, got {getattr(given, option)}")
    if not given.dtypes:
        parser.error(f"--dtypes must name at least one of {', '.join(DTYPES)}")
    if not given.backends or len(set(given.backends)) < len(given.backends):
        parser.error(f"--backends must name at least one backend, and none twice, got {given.backends}")
    return given


def contenders(names: list[str], backends: list[str]) -> dict[str, Any]:
    """Ours first, then our other backends, then the peers."""
    from .peers import PEERS, Ours

    found: dict[str, Any] = {"ours": Ours(backends[0])} | {name: Ours(name) for name in backends[1:]}
    with torch.device(gpu_device.Cuda.name):  # torch.compile tries itself out on the default device
        return found | {name: PEERS[name]() for name in names}


def warm_jobs(given: argparse.Namespace, parts: int) -> list[gpu_stages.Job]:
    command = [sys.executable, "-m", "benchmarks.gpu", "--backends", ",".join(given.backends)]
    command += ["--dtypes", ",".join(given.dtypes), "--peers", ",".join(given.peers)]
    for name in given.workload:
        command += ["--workload", name]
    few = {"TORCHINDUCTOR_COMPILE_THREADS": "2"}
    return [
        gpu_stages.Job(f"warm {i}", [*command, "--warm", f"{i}/{parts}"], few, optional=True)
        for i in range(parts)
    ]


def warm(given: argparse.Namespace) -> int:
    """Run every contender of some groups once, which fills the compilers' caches on disk."""
    from .gpu_bench import groups, make_case, sample

    part, parts = map(int, given.warm.split("/"))
    runners = contenders(given.peers, given.backends)
    for group in groups(given.workload, given.dtypes)[part::parts]:
        for runner in runners.values():
            try:
                prepared = runner.prepare(make_case(group, gpu_device.Cuda.name))
                for mode in ("forward", "training", "frozen"):
                    sample(prepared, mode).run(None)
            except Exception as error:  # the benchmark meets it again, and reports it
                print(f"{group}: {error}", flush=True)
            prepared = None
            torch.cuda.empty_cache()
    return 0


def run_races(
    report: Any, own: dict[str, Any], device: Any, todo: list[Any], repeats: int, budget: Budget
) -> bool:
    """Repeat every group's forward and backward on every backend; whether all that ran had equal bits."""
    from .gpu_bench import OutOfTime, races
    from .gpu_report import say

    found: dict[str, dict[str, Any]] = {backend: {} for backend in own}
    report.stages["races"] = {"repeats": repeats, "groups": found}
    right = True
    for group, backend in itertools.product(todo, own):
        groups, name = found[backend], str(group)
        if budget.left() <= 0:
            groups[name] = "out of time"
            continue
        try:
            done, different = races(group, own[backend], device, repeats)
        except torch.cuda.OutOfMemoryError:
            groups[name] = "not enough device memory"
            continue
        except OutOfTime:
            groups[name] = "out of time"
            break
        except Exception as error:
            groups[name] = f"{type(error).__name__}: {error}"
            right = False
            say(f"  {name}, {backend}: {groups[name]}")
            continue
        finally:
            device.release()
        groups[name] = {"repeats": done, "different": different}
        if different:
            right = False
            say(f"  {name}, {backend}: NOT THE SAME BITS in {done} repeats: {', '.join(different)}")
    ran = {b: sum(isinstance(v, dict) for v in groups.values()) for b, groups in found.items()}
    verdict = "equal bits" if right else "NOT RIGHT"
    counts = ", ".join(f"{backend} {count} of {len(todo)}" for backend, count in ran.items())
    say(f"  groups that ran {repeats} times: {counts}: {verdict}")
    return right and all(ran.values())


def run_bench(
    report: Any, runners: dict[str, Any], device: Any, todo: list[Any], given: Any, budget: Budget
) -> bool:
    """Measure group by group until the time is up; whether every gate was open."""
    from .correctness import Red
    from .gpu_bench import OutOfTime, measure, measure_rates
    from .gpu_report import line, say

    for group in todo:
        report.unmeasured[str(group)] = "out of time"
    longest = 5.0
    try:
        rates = measure_rates(device, given.dtypes)
        report.stages["card"] = {"copy_bytes_per_s": rates.bandwidth, "matmul_flops": dict(rates.operations)}
        say(
            f"  copy {rates.bandwidth / 1e12:.2f} TB/s, "
            + ", ".join(f"{n} {r / 1e12:.0f} TFLOP/s" for n, r in rates.operations.items())
        )
        for group in todo:
            if budget.left() < longest:
                break
            begin = budget.clock()
            name = str(group)

            def checked(ready: Any, plans: Any, name: str = name) -> None:
                report.errors[name] = ready.errors
                report.plans[name] = {
                    contender: {key: str(value) for key, value in plan.items()}
                    for contender, plan in plans.items()
                }
                for contender, wrong in ready.wrong.items():
                    report.red[f"{name}, {contender}"] = wrong
                    say(f"  {name}: {contender} is WRONG, its speed is not reported: {wrong}")

            try:
                leading = given.backends[0]
                for cell in measure(
                    group, runners, device, rates, backend=leading, rounds=given.rounds, checked=checked
                ):
                    report.add(cell)
                    said = line(cell)
                    say("  " + "  ".join(f"{key} {value}" for key, value in said.items()))
                del report.unmeasured[name]
            except Red as wrong:
                del report.unmeasured[name]
                report.red[name] = str(wrong)
                say(f"  {name}: WRONG RESULT, no speed is reported: {wrong}")
            except torch.cuda.OutOfMemoryError:
                report.unmeasured[name] = "not enough device memory"
            except Exception as error:
                del report.unmeasured[name]
                report.red[name] = f"{type(error).__name__}: {error}"
                say(f"  {name}: FAILED: {report.red[name]}")
            device.release()
            report.save()
            longest = max(longest, budget.clock() - begin)
    except OutOfTime:
        say("  the time is up")
    return not report.red


def alarm(seconds: float | None) -> None:
    """Raise `OutOfTime` here in that many seconds; None calls it off. SIGTERM raises it at once."""
    from .gpu_bench import OutOfTime

    def ring(number: int, frame: FrameType | None) -> None:
        raise OutOfTime

    signal.signal(signal.SIGALRM, ring)
    signal.signal(signal.SIGTERM, ring)
    signal.setitimer(signal.ITIMER_REAL, 0.0 if seconds is None else max(1e-3, seconds))


def main(argv: list[str] | None = None) -> int:
    given = parse(argv)
    why = gpu_device.why_no_gpu()
    if why is not None:
        print(f"make gpu needs an NVIDIA GPU: {why}", file=sys.stderr)
        return 2
    if given.warm:
        find_kernels()
        return warm(given)
    budget = Budget(60 * given.minutes)
    built = None
    if given.build:
        print("== build", flush=True)
        built = gpu_stages.build(budget.until(0.25), gpu_device.capability())
        for name, result in built.items():
            said = "built" if result["built"] else f"not built: {result['reason']}"
            print(f"  {name} extension: {said}, {result['seconds']} s", flush=True)

    from fastac import backends

    from .gpu_bench import OutOfTime, groups
    from .gpu_report import Report, finish, say

    find_kernels()
    x = torch.empty(1, device=gpu_device.Cuda.name)
    absent = {n: reason for n in given.backends if (reason := backends.why_not(n, x)) is not None}
    for name, reason in absent.items():
        print(f"backend {name!r} cannot be measured here: {reason}", file=sys.stderr)
    given.backends = [name for name in given.backends if name not in absent]
    if not given.backends or (given.named and absent):
        return 1
    report = Report(gpu_device.describe(",".join(given.backends), given.commit), given.out)
    left_out = ("out", "warm", "commit", "named")
    report.options = {n: str(v) for n, v in vars(given).items() if n not in left_out}
    if absent:
        report.stages["backends left out"] = absent
    if built is not None:
        report.stages["build"] = built
    path = gpu_stages.sanitizer()
    sanitizes = "sanitizer" in given.stages and not given.no_sanitizer and path is not None
    reserve = FINISH_SECONDS + (min(SANITIZER_SECONDS, 0.2 * budget.left()) if sanitizes else 0)
    right = not any(result.get("failed") for result in (built or {}).values())
    try:
        alarm(None)
        if "tests" in given.stages:
            say("== tests")
            share = 0.45 if "bench" in given.stages else 0.85
            tests = gpu_stages.tests_and_warm_up(
                budget.until(share), lambda n: warm_jobs(given, n), os.cpu_count() or 1, given.backends
            )
            report.stages["tests"] = tests.record()
            report.save()
            say(f"  {tests.summary()}")
            for name, text in [*tests.failed.items()][:20]:
                say(f"  FAILED {name}\n    " + text.strip()[-600:].replace("\n", "\n    "))
            for reason in sorted(set(tests.skipped.values())):
                say(f"  skipped: {reason} ({list(tests.skipped.values()).count(reason)})")
            for text in tests.broken:
                say(f"  {text}")
            right &= tests.green
        device = gpu_device.Cuda()
        runners = contenders(given.peers, given.backends)
        todo = groups(given.workload, given.dtypes)
        if "races" in given.stages:
            say("== races")
            limit = min(40.0, 0.15 * budget.left(reserve))
            alarm(2 * limit)
            own = [g for g in todo if g.workload.batch <= 256 or g.workload.name == "flash-mnist"]
            first, *others = given.backends
            repeated = {first: runners["ours"]} | {name: runners[name] for name in others}
            right &= run_races(report, repeated, device, own, given.repeats, Budget(limit, budget.clock))
            report.save()
        if "bench" in given.stages:
            say("== bench")
            alarm(budget.left(reserve))
            right &= run_bench(
                report, runners, device, todo, given, Budget(budget.left(reserve), budget.clock)
            )
        alarm(None)
        device.release()
        if "sanitizer" in given.stages and not given.no_sanitizer:
            say("== compute-sanitizer")
            if path is None:
                report.stages["sanitizer"] = "not installed"
                say("  not installed")
            else:
                found = gpu_stages.sanitize(path, budget.deadline - FINISH_SECONDS / 2, given.backends[::-1])
                report.stages["sanitizer"] = found
                for tool, result in found.items():
                    say(f"  {tool}: {result['state']}: {result['text']}")
                    right &= result["state"] != "errors"
    except OutOfTime:
        say("the time is up")
        right = False
    finally:
        alarm(None)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        finish(report)
    say("all that ran is right" if right else "SOMETHING IS WRONG, see above")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
