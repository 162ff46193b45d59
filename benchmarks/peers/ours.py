"""The package itself, through its public functions."""

from __future__ import annotations

from typing import Any

from ..workloads import Case
from .base import SAME, Prepared


class Ours:
    """fastac through its public functions.

    `backend` "cpu" insists that the native library is there and then calls without naming a backend, as a
    user does; any other name is passed on.
    """

    name = "ours"
    computes = SAME

    def __init__(self, backend: str = "cpu") -> None:
        import fastac

        self.arguments: dict[str, str] = {}
        if backend == "cpu":
            from fastac import _native

            if not _native.available:
                raise SystemExit(
                    f"The native kernels are not there ({_native.why_not}); build them, or name another "
                    "backend to measure with --backend, for example --backend reference."
                )
        else:
            self.arguments["backend"] = backend
        self.backend = backend
        self.note = f"fastac, backend {backend}"
        self.cluster = fastac.attention_cluster
        self.pool = fastac.attention_pool

    def prepare(self, case: Case) -> Prepared:
        function = self.pool if case.workload.scores == "given" else self.cluster
        arguments: dict[str, Any] = dict(self.arguments)
        if case.offsets is not None:
            arguments["offsets"] = case.offsets
        if not arguments:
            return Prepared(case, function, case.x)
        return Prepared(case, lambda x, mix, a, b: function(x, mix, a, b, **arguments), case.x)
