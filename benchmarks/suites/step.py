"""A whole training step: cluster, dropout, linear layer, cross entropy, backward, RMSprop; x is frozen.

Ours is `fastac.models.AttentionClusterClassifier`. The peers are the same classifier with the cluster in
plain torch, eager and compiled.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..correctness import Red
from ..measure import Options, say
from ..peers import SAME, Ours, plain_cluster, reason_of
from ..records import Record, measured, record
from ..timing import Floor, alternate
from ..workloads import WORKLOADS, Case, Workload, make_case

NAME = "step"
CLASSES = {"kinetics-rgb": 400, "kinetics-flow": 400, "yt8m-rgb": 400, "flash-mnist": 1024}
"""Workloads, with the classes told apart."""

PEER_NAMES = ("eager", "compile")
DROPOUT = 0.5
CHECKED_STEPS = 3
CLOSE = 1e-4
"""Relative difference of losses that is still agreement: rounding grows from step to step."""


class PlainClassifier(nn.Module):
    """What a user writes."""

    def __init__(self, in_features: int, cluster_size: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(cluster_size, in_features))
        self.alpha = nn.Parameter(torch.empty(cluster_size))
        self.beta = nn.Parameter(torch.empty(cluster_size))
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(cluster_size * in_features, classes)

    def forward(self, x: Tensor) -> Tensor:
        y = plain_cluster(x, self.weight, self.alpha, self.beta)
        scores: Tensor = self.fc(self.dropout(y.flatten(1)))
        return scores


def our_classifier(w: Workload, classes: int, dropout: float) -> nn.Module:
    from fastac.models import AttentionClusterClassifier

    sizes = {"in_features": w.in_features, "cluster_size": w.cluster_size}
    return AttentionClusterClassifier({"features": sizes}, classes, dropout=dropout)


def fill(model: nn.Module, case: Case) -> None:
    """The case's weight, alpha and beta, and a last layer drawn from a fixed seed."""
    generator = torch.Generator().manual_seed(2)
    mine = {"weight": case.mix, "alpha": case.alpha, "beta": case.beta}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            last = name.rsplit(".", 1)[-1]
            if name.startswith("fc."):
                bound = 1 / math.sqrt(model.get_submodule("fc").in_features)
                parameter.uniform_(-bound, bound, generator=generator)
            else:
                parameter.copy_(mine[last])


@dataclass
class Step:
    """A model with its optimiser; calling it makes one step and returns the loss before it."""

    model: nn.Module
    x: Tensor
    labels: Tensor
    context: Callable[[], Any] = nullcontext
    compiled: bool = False
    forward: Callable[[Tensor], Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.RMSprop(self.model.parameters(), lr=1e-4, foreach=True)
        model, labels = self.model, self.labels

        def loss(x: Tensor) -> Tensor:
            return F.cross_entropy(model(x), labels)

        self.forward = torch.compile(loss, fullgraph=True) if self.compiled else loss

    def __call__(self) -> Tensor:
        with self.context():
            self.optimizer.zero_grad(set_to_none=True)
            loss = self.forward(self.x)
            loss.backward()
            self.optimizer.step()
        return loss.detach()


def make_step(name: str, case: Case, labels: Tensor, classes: int, dropout: float, backend: str) -> Step:
    """The step of a contender, from the same state for all."""
    w = case.workload
    context: Callable[[], Any] = nullcontext
    if name == "ours":
        model = our_classifier(w, classes, dropout)
        if backend != "cpu":
            from fastac.backends import backend as in_force

            context = functools.partial(in_force, backend)
    else:
        model = PlainClassifier(w.in_features, w.cluster_size, classes, dropout)
    fill(model, case)
    return Step(model.train(), case.x, labels, context, compiled=name == "compile")


def agree(workload: Workload, losses: dict[str, list[float]]) -> str:
    """A line with the losses; raises `Red` unless all contenders have those of the first."""
    first, *others = losses
    for name in others:
        for step, (a, b) in enumerate(zip(losses[first], losses[name], strict=True)):
            if not math.isclose(a, b, rel_tol=CLOSE):
                raise Red(f"{workload.name}: loss of step {step} is {b:.7g} of {name}, {a:.7g} of {first}")
    if not losses[first][-1] < losses[first][0]:
        raise Red(f"{workload.name}: the loss does not fall: {losses[first]}")
    largest = max(abs(b / a - 1) for name in losses for a, b in zip(losses[first], losses[name], strict=True))
    return f"losses of the first {len(losses[first])} steps: largest relative difference {largest:.1e}"


def operations(workload: Workload, rows: int, classes: int) -> int:
    """Those of the cluster with x frozen, and three products of the last layer."""
    last = 3 * 2 * workload.batch * workload.cluster_size * workload.in_features * classes
    return workload.operations(rows, "frozen") + last


def checked_steps(
    workload: Workload, classes: int, names: list[str], backend: str
) -> tuple[Case, dict[str, Step], dict[str, str], str]:
    """The case, steps with dropout by contender, reasons of those that fail, and the line of `agree`.

    Losses are compared without dropout: a compiled model draws other random numbers.
    """
    case = make_case(workload)
    labels = torch.randint(classes, (workload.batch,), generator=torch.Generator().manual_seed(3))
    torch._dynamo.reset()
    losses: dict[str, list[float]] = {}
    reasons: dict[str, str] = {}
    for name in names:
        try:
            step = make_step(name, case, labels, classes, 0.0, backend)
            losses[name] = [step().item() for _ in range(CHECKED_STEPS)]
        except Exception as error:
            if name == "ours":
                raise
            reasons[name] = reason_of(error)
        step = None
    line = agree(workload, losses)
    torch._dynamo.reset()  # what was compiled without dropout has done its part
    ready = {name: make_step(name, case, labels, classes, DROPOUT, backend) for name in losses}
    return case, ready, reasons, line


def run(options: Options, errors: dict[str, list[str]]) -> Iterator[Record]:
    """A whole training step of the classifier, x frozen: ours, eager, torch.compile of the model."""
    Ours(options.backend)  # says what is missing
    names = ["ours", *(p for p in PEER_NAMES if p in options.peers)]
    for name, classes in CLASSES.items():
        workload = WORKLOADS[name].reduced(options.divide_batch)
        say(f"step of {name}: {workload.describe()}, {classes} classes; checking ...")
        case, ready, reasons, line = checked_steps(workload, classes, names, options.backend)
        errors[f"{NAME}: {name}"] = [line]
        floor = Floor()
        timings = alternate(
            ready | {floor.name: floor}, rounds=options.rounds, budget=options.budget, patience=0.2
        )
        say(f"  ours {1e3 * timings.median('ours'):.2f} ms, {timings.rounds} rounds")
        count = operations(workload, case.rows, classes)
        for contender in names:
            common = {
                "suite": NAME, "mode": "step", "dtype": "float32", "layout": "dense",
                "contender": contender, "computes": SAME,
            }  # fmt: skip
            if contender in ready:
                figures = measured(timings, contender, operations=count, floor=floor)
                yield record(workload, case.rows, **common, **figures)
            else:
                yield record(workload, case.rows, **common, operations=count, reason=reasons[contender])
        del ready
