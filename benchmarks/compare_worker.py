"""One side of `bench_compare`: a process with the `fastac` of one tree, which checks and times calls.

`python compare_worker.py TREE` reads one request per line from its standard input and answers each with one
line, both JSON. The harness is that of the tree this file stands in, whatever TREE has of its own, so that
both sides are measured alike.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent.parent
PROVENANCE = "fastac.provenance"
PAUSE = 0.02
"""Seconds of sleep after a timed block: threads that wait for more work spin for some milliseconds."""

Closure = Callable[[], object]


def adopt(tree: Path) -> None:
    """Make `fastac` that of the tree, and `benchmarks` that of this file's tree.

    Raises: RuntimeError if another `fastac` is imported.
    """
    # The finder of an editable install would fill in what an older tree lacks.
    sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in str(getattr(f, "__module__", ""))]
    sys.path.insert(0, str(tree))
    import fastac

    fastac.__path__.append(str(tree))  # the build maps the folder `kernels` to fastac.kernels
    sys.path[0] = str(HERE)
    if importlib.util.find_spec(PROVENANCE) is None:  # the harness needs it, and older trees have none
        load(PROVENANCE, HERE / "fastac" / "provenance.py")
    refuse_strangers(tree)


def load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def refuse_strangers(tree: Path) -> None:
    """Raise RuntimeError if a module of `fastac` came from outside the tree."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name.split(".")[0] != "fastac" or file is None or name == PROVENANCE:
            continue
        if tree.resolve() not in Path(file).resolve().parents:
            raise RuntimeError(f"{name} was imported from {file}, not from {tree}")


class Side:
    """The subject at hand, ready to be timed in the modes in which it is right."""

    def __init__(self, threads: int, prime: int) -> None:
        import torch

        from benchmarks import machine
        from benchmarks.peers import Ours

        torch.set_num_threads(threads)
        if prime:
            machine.prime(prime)
        self.ours = Ours()
        self.closures: dict[str, Closure] = {}

    def prepare(
        self, subject: dict[str, Any], dtype: str, modes: Iterable[str], check: bool
    ) -> dict[str, Any]:
        """By mode {"right": line}, {"wrong": text} or {"cannot": reason}; without `check` nothing is wrong.

        A wrong result, far from that in float64, is told from a call that could not be made, which an older
        tree may not know.
        """
        import torch

        from benchmarks.correctness import Red
        from benchmarks.peers import reason_of

        self.closures = {}
        ready = cluster if subject["kind"] == "cluster" else softmax_weight
        outcome: dict[str, Any] = {}
        for mode in modes:
            try:
                closure, line = ready(self.ours, subject["sizes"], getattr(torch, dtype), mode, check)
            except Red as wrong:
                outcome[mode] = {"wrong": str(wrong)}
            except Exception as error:  # whatever this tree cannot do, the table says it
                outcome[mode] = {"cannot": reason_of(error)}
            else:
                outcome[mode] = {"right": line}
                self.closures[mode] = closure
        return outcome

    def time(self, mode: str, repeats: int) -> float:
        """Seconds per call."""
        from benchmarks.timing import timed

        gc.collect()
        gc.disable()
        try:
            taken, _ = timed(self.closures[mode], repeats)
        finally:
            gc.enable()
        time.sleep(PAUSE)
        return taken / repeats


def cluster(ours: Any, sizes: dict[str, Any], dtype: Any, mode: str, check: bool) -> tuple[Closure, str]:
    """A named workload: its call in a mode, and the errors found if they are looked for."""
    from benchmarks import correctness
    from benchmarks.workloads import Workload, make_case

    case = make_case(Workload(**sizes), dtype)
    prepared = ours.prepare(case)
    line = correctness.check(case, {"ours": prepared}, [mode])[0] if check else "not checked"
    return prepared.closure(mode), line


def softmax_weight(
    ours: Any, sizes: dict[str, Any], dtype: Any, mode: str, check: bool
) -> tuple[Closure, str]:
    """The same for a shape of `softmax_weight`; ours is that of this tree's package, whatever `ours` is."""
    import torch

    import fastac
    from benchmarks import softmax_weight as harness
    from benchmarks.correctness import Red
    from benchmarks.peers import Unavailable

    if not hasattr(fastac, "softmax_weight"):
        raise Unavailable("this tree has no softmax_weight")
    if mode not in harness.MODES:
        raise Unavailable(f"softmax_weight is measured in {' and '.join(harness.MODES)} only")
    shape = harness.Shape(**sizes)
    case = harness.make(shape).to(dtype)
    lengths = case.lengths
    excluded = None if lengths is None else torch.arange(shape.length)[:, None] >= lengths[:, None, None]

    def plain(x: Any, scores: Any) -> Any:
        return harness.plain(x, scores if excluded is None else scores.masked_fill(excluded, float("-inf")))

    def call(x: Any, scores: Any) -> Any:
        return fastac.softmax_weight(x, scores, lengths=lengths)

    if not check:
        return harness.closure(case, call, mode), "not checked"
    exact = harness.closure(case.to(torch.float64), plain, mode)()
    eager, found = (harness.closure(case, either, mode)() for either in (plain, call))
    largest = 0.0
    for name, mine, peer, truth in zip(("y", "dx", "dscores"), found, eager, exact, strict=False):
        size = float(truth.detach().abs().max())
        error, reached = (float((t.detach().double() - truth.detach()).abs().max()) for t in (mine, peer))
        allowed = harness.RATIO * reached + harness.FLOOR * torch.finfo(dtype).eps * size
        if not error <= allowed:
            raise Red(f"{mode}: {name} of ours is off by {error:.2e}, allowed {allowed:.2e}")
        largest = max(largest, error / size)
    return harness.closure(case, call, mode), f"{mode}: ours {largest:.1e}"


def serve(tree: Path) -> None:
    """Answer requests until the standard input ends. What others print goes to the standard error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the asking process, which ends this one
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    adopt(tree)
    side: Side | None = None
    for line in sys.stdin:
        request = json.loads(line)
        what = request.pop("do")
        if what == "start":
            side = Side(**request)
            from benchmarks import machine

            answer: Any = {"isa": machine.isa()}
        elif side is None:
            raise RuntimeError(f"{what!r} was asked before 'start'")
        elif what == "prepare":
            answer = side.prepare(**request)
            refuse_strangers(tree)
        else:
            answer = side.time(**request)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]).resolve())
