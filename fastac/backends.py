"""Which backend runs what: one predicate per backend, which answers yes (None) or no (its reason).

A backend asked for by name that cannot run a call raises with the reason. An automatic choice takes the first
backend that can, in the order of `PREDICATES`, and is logged once per plan on the logger "fastac".

The current choice is a plain module global: it can be read while torch.compile traces, which guards on it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from . import _native
from .checks import FLOATS

logger = logging.getLogger("fastac")

# Devices for which a backend with kernels exists or is meant to; the others use the reference.
_KERNEL_DEVICES = ("cpu", "cuda")


def transforming() -> bool:
    """Whether a `torch.func` transform or forward-mode differentiation is under way.

    The operators have no rules for these (a tangent would be lost without a word); the reference has.
    """
    return not is_compiling() and (
        forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None
    )


def _cuda(x: Tensor) -> str | None:
    return "not built"


def _triton(x: Tensor) -> str | None:
    return "not built"


def _cpu(x: Tensor) -> str | None:
    if x.device.type != "cpu":
        return f"x is on {x.device}, not on the CPU"
    if transforming():
        return "the kernels have no rules for torch.func transforms and forward-mode derivatives"
    return _native.why_not


def _reference(x: Tensor) -> str | None:
    return None


PREDICATES: dict[str, Callable[[Tensor], str | None]] = {
    "cuda": _cuda,
    "triton": _triton,
    "cpu": _cpu,
    "reference": _reference,
}

# The backend in force, None for the automatic choice. Set by FASTAC_BACKEND and by `backend`.
current: str | None = os.environ.get("FASTAC_BACKEND") or None

_logged: set[tuple[str, str, str]] = set()


def _known(name: str) -> str:
    if name not in PREDICATES:
        raise ValueError(f"backend must be one of {', '.join(PREDICATES)}, got {name!r}")
    return name


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run everything inside the block on one backend: "cpu", "triton", "cuda" or "reference".

    The choice holds for the whole process, all threads included; FASTAC_BACKEND does the same from outside. A
    call that the backend cannot run raises ValueError with the reason.

    Raises: ValueError for a name that is not a backend.
    """
    global current
    previous, current = current, _known(name)
    try:
        yield
    finally:
        current = previous


def why_not(name: str, x: Tensor) -> str | None:
    """Why a backend cannot run a call on x; None if it can."""
    if x.dtype not in FLOATS:
        return f"x is {x.dtype}"
    return PREDICATES[_known(name)](x)


def choose(x: Tensor, name: str | None = None) -> str:
    """The backend that runs a call on x: the named one, else the one in force, else the first that can.

    Raises: ValueError for an unknown name, or a named backend that cannot run the call.
    """
    name = current if name is None else name
    if name is not None:
        reason = why_not(name, x)
        if reason is not None:
            raise ValueError(f"backend {name!r} cannot run this call: {reason}")
        return name
    for candidate in PREDICATES:
        if why_not(candidate, x) is None:
            if not is_compiling():
                _log(candidate, x)
            return candidate
    raise AssertionError("the reference runs every call")


def _log(chosen: str, x: Tensor) -> None:
    key = (chosen, x.device.type, str(x.dtype))
    if key in _logged:
        return
    _logged.add(key)
    place = f"{key[1]}, {key[2]}"
    passed_over = [f"{n}: {why_not(n, x)}" for n in PREDICATES if n != chosen and why_not(n, x) is not None]
    if chosen != "reference":
        logger.info("backend %s for %s", chosen, place)
    elif x.device.type in _KERNEL_DEVICES:
        logger.warning("backend reference (plain torch, slow) for %s (%s)", place, "; ".join(passed_over))
    elif (chosen, x.device.type, "") not in _logged:
        _logged.add((chosen, x.device.type, ""))
        logger.warning(
            "no backend has kernels for %s devices: using the reference (plain torch)", x.device.type
        )
