"""A contender made ready for one case, and the calls of it that are timed.

A contender has a `name`, a `note`, what it `computes`, and `prepare(case)`, which raises `Unavailable` where
it cannot run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..timing import Staged
from ..workloads import MODES, Case

SAME, ANOTHER = "the same", "another pooling"

Closure = Callable[[], tuple[Tensor, ...]]


class Unavailable(Exception):
    """The contender cannot run this workload, or this mode of it; the message says why."""


def reason_of(error: Exception) -> str:
    """An error as a reason for a table: what `Unavailable` says, else the type and the first line.

    Of an exception that torch.compile met while it traced, that exception.
    """
    if isinstance(error, Unavailable):
        return str(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    for line in lines:
        _, met, exception = line.partition("raised exception ")
        if met:
            return exception[:240]
    return f"{type(error).__name__}: {lines[0]}"[:240] if lines else type(error).__name__


def forget_other_cases(case: Case) -> None:
    """Reset torch.compile once per case: shapes of an earlier one would make those of this one dynamic."""
    if not case.__dict__.get("_alone"):
        torch._dynamo.reset()
        case.__dict__["_alone"] = True


def padded(case: Case) -> tuple[Tensor, Tensor | None]:
    """The padded x and its mask, made once for all contenders of a case."""
    found = case.__dict__.get("_padded")
    if found is None:
        found = case.__dict__["_padded"] = case.padded()
    return found


@dataclass
class Prepared:
    """A contender made ready for one case: layout and masks are built here, outside the timed region."""

    case: Case
    call: Callable[..., Tensor]  # (x, weight or scores, alpha, beta) -> y (B, N, M)
    x: Tensor  # in the layout the contender takes
    mask: Tensor | None = None  # of the rows of x that take part, where x is padded
    reasons: dict[str, str] = field(default_factory=dict)
    """The modes that it cannot run, with the reason."""

    computes = SAME

    def bound(self, learns: bool) -> tuple[Callable[[Tensor], Tensor], dict[str, Tensor]]:
        """x -> y with parameters that require grad or not, and those parameters by name."""
        case, call = self.case, self.call
        mix, alpha, beta = (t.detach().requires_grad_(learns) for t in (case.mix, case.alpha, case.beta))
        return lambda x: call(x, mix, alpha, beta), {"mix": mix, "alpha": alpha, "beta": beta}

    def upstream(self, y: Tensor) -> Tensor:
        """The gradient of y that a backward starts from."""
        return self.case.dy

    def closure(self, mode: str) -> Closure:
        """One run of a mode: () -> (y,) or (y, dx unless frozen, gradients of the parameters).

        A backward gives the gradients alone, and is a `timing.Staged`: its forward is set-up.
        Raises: `Unavailable` in a mode that has a reason not to run.
        """
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        if mode in self.reasons:
            raise Unavailable(self.reasons[mode])
        learns = mode != "forward"
        call, learned = self.bound(learns)
        x = self.x.detach().requires_grad_(mode in ("training", "backward"))
        if not learns:
            return lambda: (call(x),)
        wanted = [t for t in (x, *learned.values()) if t.requires_grad]
        if mode == "backward":
            return Staged(lambda: call(x), lambda y: torch.autograd.grad(y, wanted, self.upstream(y)))

        def run() -> tuple[Tensor, ...]:
            y = call(x)
            return (y, *torch.autograd.grad(y, wanted, self.upstream(y)))

        return run

    def comparable(self, mode: str, results: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Results by name; dx as the rows of x that take part, (T, M), whatever the layout."""
        names = [] if mode == "backward" else ["y"]
        names += ["dx"] if mode in ("training", "backward") else []
        names += [] if mode == "forward" else [f"d{name}" for name in self.bound(False)[1]]
        named = dict(zip(names, results, strict=True))
        if "dx" in named:
            dx = named["dx"]
            if dx.is_nested:
                named["dx"] = dx.values()
            else:
                named["dx"] = dx.flatten(0, -2) if self.mask is None else dx[self.mask]
        return named


@dataclass
class PreparedPooling(Prepared):
    """Another pooling: a module with parameters of its own; `call` is (module, x, mask) -> y."""

    module: nn.Module = field(default_factory=nn.Module)
    dy: Tensor | None = None

    computes = ANOTHER

    def bound(self, learns: bool) -> tuple[Callable[[Tensor], Tensor], dict[str, Tensor]]:
        """x -> y with a copy of the module."""
        module = copy.deepcopy(self.module).requires_grad_(learns)
        call, mask = self.call, self.mask
        return lambda x: call(module, x, mask), dict(module.named_parameters())

    def upstream(self, y: Tensor) -> Tensor:
        """Random normal in y's shape, the same numbers in every dtype; made at the first call."""
        if self.dy is None:
            generator = torch.Generator().manual_seed(1)
            self.dy = torch.randn(y.shape, generator=generator).to(y.device, y.dtype)
        return self.dy

    def part(self, sets: int, positions: int, dtype: torch.dtype) -> PreparedPooling:
        """The same pooling of the first positions of the first sets, in another dtype."""
        return replace(
            self,
            x=self.x[:sets, :positions].to(dtype),
            mask=None if self.mask is None else self.mask[:sets, :positions],
            module=copy.deepcopy(self.module).to(dtype),
            dy=None,
        )
