"""Which backend runs what: one predicate per backend, which answers yes (None) or no (its reason).

A backend asked for by name that cannot run a call raises with the reason. An automatic choice takes the first
backend of `AUTOMATIC` for the device of x that can and that need not be asked for by name, and is logged once
per plan on the logger "fastac". Between cuda and triton the table of measured winners decides; where it has
no entry, triton is preferred.

The current choice is a plain module global: it can be read while torch.compile traces, which guards on it.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from . import _cuda as _cuda_library
from . import _native
from .checks import FLOATS

logger = logging.getLogger("fastac")

Parameters = ParamSpec("Parameters")
Returned = TypeVar("Returned")

_NO_RULES = "the kernels have no rules for torch.func transforms and forward-mode derivatives"
_TRITON = (3, 6)  # the oldest that the kernels are tested with
_CAPABILITY = (8, 0)  # the oldest that the kernels are compiled for


def transforming() -> bool:
    """Whether a `torch.func` transform or forward-mode differentiation is under way.

    The operators have no rules for these (a tangent would be lost without a word); the reference has.
    """
    return not is_compiling() and (
        forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None
    )


def _constant(function: Callable[Parameters, Returned]) -> Callable[Parameters, Returned]:
    """Let torch.compile call `function` as it traces and take the result for a constant.

    `torch.compiler.assume_constant_result` without its import of torch._dynamo, and with that of Triton.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@functools.cache
def triton_version() -> str | None:
    """The version of the installed Triton, without importing it; None if there is none."""
    try:
        if importlib.util.find_spec("triton") is None:
            return None
    except (ImportError, ValueError):
        return None
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # builds of other names provide the module too
        names = importlib.metadata.packages_distributions().get("triton")
        return importlib.metadata.version(names[0]) if names else "unknown"


@_constant
def _triton_installed() -> str | None:
    """Why the installed Triton cannot be used, None if it can."""
    version = triton_version()
    if version is None:
        return "triton is not installed"
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < _TRITON:
        return f"triton {_TRITON[0]}.{_TRITON[1]} or later is needed, version {version} is installed"
    return None


@_constant
def interpreting() -> bool:
    """Whether TRITON_INTERPRET=1 asks for Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@_constant
def _triton_compiles() -> bool:
    """Whether Triton was imported without TRITON_INTERPRET=1, which it reads as it defines its functions."""
    standard = sys.modules.get("triton.language.standard")
    return standard is not None and type(standard.cdiv).__name__ != "InterpretedFunction"


@functools.cache
def _capability(index: int | None) -> tuple[int, int] | None:
    """Capability of a CUDA device; None without a GPU, where only fake tensors are on such a device."""
    return torch.cuda.get_device_capability(index) if torch.cuda.is_available() else None


@_constant
def _too_old(index: int | None) -> str | None:
    """Why the kernels cannot run on a CUDA device, None if they can."""
    found = None if torch.version.hip is not None else _capability(index)
    if found is None or found >= _CAPABILITY:
        return None
    least = ".".join(map(str, _CAPABILITY))
    return f"CUDA capability {least} or later is needed, x is on a GPU of {found[0]}.{found[1]}"


def _triton(x: Tensor) -> str | None:
    if transforming():
        return _NO_RULES
    reason = _triton_installed()
    if reason is not None:
        return reason
    if x.device.type == "cpu":
        if not interpreting():
            return "x is on cpu; Triton runs there only in its interpreter (TRITON_INTERPRET=1)"
        if _triton_compiles():
            return "x is on cpu, and TRITON_INTERPRET=1 was set after Triton was imported"
        return None
    if x.device.type != "cuda":
        return f"x is on {x.device}, not on a CUDA device"
    return _too_old(x.device.index)


def _triton_by_name(x: Tensor) -> str | None:
    if interpreting():
        return "runs in Triton's interpreter, only when asked for by name"
    if x.device.type == "cuda" and torch.version.hip is not None:
        return "compiled for AMD GPUs but never run on one, only when asked for by name"
    return None


_emulated = _constant(_cuda_library.emulated)


def _cuda(x: Tensor) -> str | None:
    if transforming():
        return _NO_RULES
    if x.device.type == "cpu" and _emulated():
        return None
    if _cuda_library.why_not is not None:
        return _cuda_library.why_not
    if x.device.type != "cuda":
        return f"x is on {x.device}, not on a CUDA device"
    return _too_old(x.device.index) or _unusable(x.device.index)


@_constant
def _unusable(index: int | None) -> str | None:
    """Why the CUDA library cannot run on a CUDA device, None if it can."""
    return _cuda_library.unusable(index)


def _gpu_name(index: int | None) -> str:
    """Name of a CUDA device; empty without a GPU, where only fake tensors are on such a device."""
    return torch.cuda.get_device_name(index) if torch.cuda.is_available() else ""


@_constant
def _is_measured(index: int | None) -> bool:
    """Whether cuda and triton were measured on a CUDA device."""
    return bool(_cuda_library.measured().get(_gpu_name(index)))


@_constant
def _winner(index: int | None, calls: str) -> str | None:
    """Which of cuda and triton measured faster with a class of calls on a CUDA device; None if none was."""
    return _cuda_library.measured().get(_gpu_name(index), {}).get(calls)


def _slower(name: str, x: Tensor) -> str | None:
    """Why the other one of cuda and triton is preferred on a CUDA device, None if it is not."""
    other = "triton" if name == "cuda" else "cuda"
    if x.device.type != "cuda" or why_not(other, x) is not None or (other == "triton" and _triton_by_name(x)):
        return None
    index = x.device.index
    # What is said about L, torch.compile guards: only where it matters.
    calls = _cuda_library.workload(x) if _is_measured(index) else ""
    winner = _winner(index, calls)
    if winner is None:
        return "not measured on this GPU; triton is preferred" if name == "cuda" else None
    return None if winner == name else f"measured slower than {other} on this GPU ({calls})"


def _cuda_by_name(x: Tensor) -> str | None:
    return "runs in the emulation, only when asked for by name" if x.device.type == "cpu" else None


def _cpu(x: Tensor) -> str | None:
    if x.device.type != "cpu":
        return f"x is on {x.device}, not on the CPU"
    if transforming():
        return _NO_RULES
    return _native.why_not


def _reference(x: Tensor) -> str | None:
    return None


PREDICATES: dict[str, Callable[[Tensor], str | None]] = {
    "cuda": _cuda,
    "triton": _triton,
    "cpu": _cpu,
    "reference": _reference,
}

# Backends that an automatic choice considers, best first, by device type; other devices use the reference.
AUTOMATIC: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "reference"),
    "cuda": ("cuda", "triton", "reference"),
}

# Backends that lack an operator; what is not named here every backend has.
LACKING: dict[str, tuple[str, ...]] = {"softmax_weight": ("cuda",)}
_CLUSTER = "attention_cluster"

# The backend in force, None for the automatic choice. Set by FASTAC_BACKEND and by `backend`.
current: str | None = os.environ.get("FASTAC_BACKEND") or None

_logged: set[tuple[str, str, str]] = set()


class BackendError(ValueError):
    """A backend asked for by name cannot run a call; the message has the reason."""


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


def why_not(name: str, x: Tensor, operator: str = _CLUSTER) -> str | None:
    """Why a backend cannot run a call on x; None if it can."""
    if x.dtype not in FLOATS:
        return f"x is {x.dtype}"
    predicate = PREDICATES[_known(name)]
    if name in LACKING.get(operator, ()):
        return f"the {name} backend has no {operator}"
    return predicate(x)


def passed_over(name: str, x: Tensor, operator: str = _CLUSTER) -> str | None:
    """Why an automatic choice leaves a backend out: it cannot run the call on x, must be asked for by name,
    or another one is preferred.
    """
    reason = why_not(name, x, operator)
    if reason is not None or name not in ("cuda", "triton"):
        return reason
    by_name = _cuda_by_name(x) if name == "cuda" else _triton_by_name(x)
    return by_name or (None if operator in LACKING else _slower(name, x))


def choose(x: Tensor, name: str | None = None, operator: str = _CLUSTER) -> str:
    """The backend that runs a call on x: the named one, else the one in force, else the automatic choice.

    Raises: ValueError for an unknown name, BackendError for a named backend that cannot run the call.
    """
    name = current if name is None else name
    if name is not None:
        reason = why_not(name, x, operator)
        if reason is not None:
            raise BackendError(f"backend {name!r} cannot run this call: {reason}")
        return name
    for candidate in AUTOMATIC.get(x.device.type, ("reference",)):
        if passed_over(candidate, x, operator) is None:
            if not is_compiling():
                _log(candidate, x, operator)
            return candidate
    raise AssertionError("the reference runs every call")


def _log(chosen: str, x: Tensor, operator: str) -> None:
    place = f"{x.device.type}, {x.dtype}"
    if operator != _CLUSTER:
        place = f"{operator}, {place}"
    key = (chosen, x.device.type, place)
    if key in _logged:
        return
    _logged.add(key)
    reasons = {n: passed_over(n, x, operator) for n in PREDICATES if n != chosen}
    if chosen != "reference":
        logger.info("backend %s for %s", chosen, place)
    elif x.device.type in AUTOMATIC:
        told = "; ".join(f"{n}: {reason}" for n, reason in reasons.items() if reason is not None)
        logger.warning("backend reference (plain torch, slow) for %s (%s)", place, told)
    elif (chosen, x.device.type, "") not in _logged:
        _logged.add((chosen, x.device.type, ""))
        logger.warning(
            "no backend has kernels for %s devices: using the reference (plain torch)", x.device.type
        )
