"""Sets of different lengths: packed, nested, padded with lengths and padded with a mask."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..measure import Options, Ready, make_contenders, prepare, records_of, say
from ..peers import SAME, Ours, Prepared, padded
from ..records import Record
from ..timing import alternate
from ..workloads import MODES, WORKLOADS, Case

NAME = "layouts"
WORKLOAD_NAME = "ragged"
PEER_NAMES = ("eager", "compile")

OURS = {"ours": "packed", "ours (nested)": "nested", "ours (lengths)": "padded", "ours (mask)": "padded"}
"""Our contenders, and the layout of each."""


class InLayout:
    """Ours with x in another layout."""

    computes = SAME

    def __init__(self, ours: Ours, name: str) -> None:
        self.ours, self.name = ours, name

    def prepare(self, case: Case) -> Prepared:
        if self.name == "ours":
            return self.ours.prepare(case)
        cluster, arguments = self.ours.cluster, dict(self.ours.arguments)
        assert case.offsets is not None
        if self.name == "ours (nested)":
            nested = torch.nested.nested_tensor_from_jagged(
                case.x, case.offsets, max_seqlen=int(case.offsets.diff().max())
            )
            return Prepared(case, lambda x, w, a, b: cluster(x, w, a, b, **arguments), nested)
        x, mask = padded(case)
        assert mask is not None
        limits: dict[str, Tensor] = {"mask": mask}
        if self.name == "ours (lengths)":
            limits = {"lengths": case.offsets.diff()}
        return Prepared(case, lambda x, w, a, b: cluster(x, w, a, b, **limits, **arguments), x, mask)


def checked(options: Options) -> Ready:
    """Everyone in every layout, held against float64; ours in any layout to the bounds of ours."""
    contenders = make_contenders(options, PEER_NAMES)
    ours = contenders.pop("ours")
    every = {name: InLayout(ours, name) for name in OURS} | contenders
    return prepare(WORKLOADS[WORKLOAD_NAME].reduced(options.divide_batch), every, MODES)


def run(options: Options, errors: dict[str, list[str]]) -> Iterator[Record]:
    """Sets of different lengths: ours packed, nested, padded with lengths or a mask; peers padded."""
    ready = checked(options)
    errors[f"{NAME}: {WORKLOAD_NAME}"] = ready.errors
    for mode in MODES:
        timings = alternate(ready.closures(mode, SAME), rounds=options.rounds, budget=options.budget)
        say(f"  {mode}: ours packed {1e3 * timings.median('ours'):.3f} ms, {timings.rounds} rounds")
        yield from records_of(NAME, ready, mode, timings, {n: OURS.get(n, "padded") for n in ready.computes})
