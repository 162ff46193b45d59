"""`softmax_weight` against plain torch and `torch.compile` of it: `python -m benchmarks.softmax_weight`.

Correctness first, then all contenders alternating in one process whose C library keeps freed memory, ratios
round by round. One record per shape, mode, contender and number of threads is appended to
benchmarks/results/softmax_weight.csv.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import fastac

from . import machine
from .timing import Timings, alternate

OUTPUT = machine.ROOT / "benchmarks" / "results" / "softmax_weight.csv"
MODES = ("forward", "training")
RATIO, FLOOR = 2.0, 4.0
"""Allowed error: that of plain torch times RATIO, plus FLOOR eps of the largest value."""


@dataclass
class Shape:
    batch: int
    length: int
    in_features: int
    ragged: bool = False

    @property
    def name(self) -> str:
        sizes = f"({self.batch}, {self.length}, {self.in_features})"
        return f"{sizes} ragged" if self.ragged else sizes


SHAPES = [
    Shape(64, 25, 50),
    Shape(128, 25, 512),
    Shape(16, 30, 25088),
    Shape(4, 10, 100352),
    Shape(64, 300, 1024, ragged=True),
]

Call = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Case:
    """x, scores and dy (B, L, M), and lengths (B,) of a ragged shape, zero in excluded positions of dy."""

    x: Tensor
    scores: Tensor
    dy: Tensor
    lengths: Tensor | None

    def to(self, dtype: torch.dtype) -> Case:
        return Case(self.x.to(dtype), self.scores.to(dtype), self.dy.to(dtype), self.lengths)

    @property
    def rows(self) -> int:
        return self.x.shape[:2].numel() if self.lengths is None else int(self.lengths.sum())


def make(shape: Shape) -> Case:
    torch.manual_seed(0)
    x, scores, dy = torch.randn(3, shape.batch, shape.length, shape.in_features)
    lengths = torch.randint(1, shape.length + 1, (shape.batch,)) if shape.ragged else None
    if lengths is not None:
        dy[torch.arange(shape.length) >= lengths[:, None]] = 0
    return Case(x, scores, dy, lengths)


def plain(x: Tensor, scores: Tensor) -> Tensor:
    return x * scores.softmax(1)


def contenders(case: Case) -> dict[str, Call]:
    """By name; the mask of a ragged shape is made here, outside the timed region."""
    if case.lengths is None:
        eager: Call = plain
    else:
        excluded = (torch.arange(case.x.size(1)) >= case.lengths[:, None]).unsqueeze(-1)

        def eager(x: Tensor, scores: Tensor) -> Tensor:
            return x * scores.masked_fill(excluded, float("-inf")).softmax(1)

    return {
        "ours": lambda x, scores: fastac.softmax_weight(x, scores, lengths=case.lengths),
        "eager": eager,
        "compile": torch.compile(eager, dynamic=False),
    }


def closure(case: Case, call: Call, mode: str) -> Callable[[], tuple[Tensor, ...]]:
    """() -> (y,), or (y, dx, dscores)."""
    if mode == "forward":
        return lambda: (call(case.x, case.scores),)
    x, scores = case.x.detach().requires_grad_(), case.scores.detach().requires_grad_()

    def run() -> tuple[Tensor, ...]:
        y = call(x, scores)
        return (y, *torch.autograd.grad(y, (x, scores), case.dy))

    return run


def check(shape: Shape, case: Case, calls: dict[str, Call]) -> None:
    """Hold every contender against float64; raises RuntimeError naming the first result that is wrong."""
    double = case.to(torch.float64)
    exact = [t.detach() for t in closure(double, contenders(double)["eager"], "training")()]
    errors: dict[str, list[float]] = {}
    for name in ("eager", "ours", "compile"):
        found = closure(case, calls[name], "training")()
        errors[name] = [float((a.detach() - b).abs().max()) for a, b in zip(found, exact, strict=True)]
        for what, error, peer, truth in zip(
            ("y", "dx", "dscores"), errors[name], errors["eager"], exact, strict=True
        ):
            allowed = RATIO * peer + FLOOR * torch.finfo(torch.float32).eps * float(truth.abs().max())
            if not error <= allowed:
                raise RuntimeError(
                    f"{shape.name}: {what} of {name} is off by {error:.2e}, allowed {allowed:.2e}"
                )


def records(
    shape: Shape, case: Case, mode: str, timings: Timings, about: dict[str, object]
) -> list[dict[str, object]]:
    element = case.x.element_size() * shape.in_features * case.rows
    moved = element * (3 if mode == "forward" else 8)  # x, scores, y; and dy, x, scores, dx, dscores
    rows = []
    for name in timings.seconds:
        lower, upper = timings.quartiles(name)
        rows.append(
            about
            | {"batch": shape.batch, "length": shape.length, "in_features": shape.in_features,
               "ragged": shape.ragged, "rows": case.rows, "mode": mode, "dtype": "float32", "contender": name,
               "median_s": timings.median(name), "quartile1_s": lower, "quartile3_s": upper,
               "time_over_ours": timings.ratio(name, "ours"),
               "gbytes_per_s": moved / timings.median(name) / 1e9,
               "page_faults": timings.faults[name], "rounds": timings.rounds}
        )  # fmt: skip
    return rows


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.softmax_weight", description=__doc__)
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[1, 2], help="threads of torch (default 1 2)"
    )
    parser.add_argument("--rounds", type=int, default=30, help="at most this many per shape (default 30)")
    parser.add_argument("--budget", type=float, default=2.0, help="seconds per shape and mode (default 2)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="CSV file to append to")
    return parser.parse_args()


def main() -> int:
    given = arguments()
    machine.reexecute(False, "benchmarks.softmax_weight")
    machine.prime(1)
    rows: list[dict[str, object]] = []
    for shape in SHAPES:
        case = make(shape)
        for threads in given.threads:
            torch.set_num_threads(threads)
            torch._dynamo.reset()
            about = machine.describe(fastac.backends.choose(case.x, None, "softmax_weight"))
            about.pop("malloc")
            calls = contenders(case)
            check(shape, case, calls)
            for mode in MODES:
                closures = {name: closure(case, call, mode) for name, call in calls.items()}
                timings = alternate(closures, rounds=given.rounds, budget=given.budget)
                rows += records(shape, case, mode, timings, about)
                ratios = ", ".join(f"{n} {timings.ratio(n, 'ours'):.2f}x" for n in calls if n != "ours")
                ours = 1e3 * timings.median("ours")
                print(f"{shape.name}, {threads} threads, {mode}: ours {ours:.3f} ms, {ratios}", flush=True)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    fresh = not given.output.exists()
    with given.output.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerows(rows)
    print(f"saved {given.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
