"""The backends under test, and what makes one active: instruction set, interpreter, emulation, guards."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import os
from collections.abc import Callable, Iterator

import torch
from helpers import (
    CLUSTER_SIZES,
    DEFAULT_SIZES,
    INTERPRETED_SIZES,
    PAIR_SIZES,
    Case,
    Results,
    dispatch,
    rounded_y_noise,
    sizes_in_use,
)
from torch import Tensor

import fastac
from fastac import _native

ISA_NAMES = ("baseline", "avx2", "avx512", "avx512_bf16", "avx512_bf16_dot")
PAIRS = ISA_NAMES.index("avx512_bf16_dot")  # its own kernels are for bfloat16 only


@dataclasses.dataclass(frozen=True)
class Backend:
    """A backend under test.

    Args:
        name: as `fastac.backend` takes it.
        isa: for "cpu", the instruction set it is forced to, an index of `ISA_NAMES`.
        capability: for "cuda", the GPU that is emulated, 10 major + minor.
    """

    name: str
    isa: int | None = None
    capability: int | None = None

    def __str__(self) -> str:
        if self.isa is not None:
            return f"{self.name}-{ISA_NAMES[self.isa]}"
        return self.name if self.capability is None else f"{self.name}-sm_{self.capability}"

    @property
    def interpreted(self) -> bool:
        """Whether the kernels run in Triton's interpreter: loops over combinations are then cut short."""
        return self.name == "triton"

    def form_noise(self, case: Case, dy: Tensor) -> Results | None:
        """How far results may be apart because strides and layouts decide about the form of the backward."""
        clusters = self.name == "cuda" and (self.capability or 90) >= 90
        return rounded_y_noise(case, dy) if clusters else None

    def affordable(self, B: int, L: int, M: int, N: int) -> tuple[int, int, int, int]:
        """These sizes, or in the interpreter smaller ones with the same edges."""
        if not self.interpreted:
            return B, L, M, N
        smaller = {
            (1, 1000, 48, 129): (1, 20, 17, 129),
            (1, 300, 129, 33): (1, 300, 37, 3),
            (40, 3, 17, 4): (9, 3, 17, 4),
        }
        return smaller.get((B, L, M, N), (B, L, min(M, 521), N))

    def __call__(self, case: Case) -> Tensor:
        """y (B, N, M) by this backend through the public functions."""
        return dispatch(fastac.attention_cluster, fastac.attention_pool, case, backend=self.name)

    @contextlib.contextmanager
    def active(self, *, guarded: bool = True) -> Iterator[Backend]:
        """Force the instruction set; poison and guard what the kernels allocate; assert no guard was hit."""
        contexts = {"cpu": self._forced, "triton": self._interpreted, "cuda": self._emulated}
        with contexts[self.name](guarded) if self.name in contexts else contextlib.nullcontext():
            yield self

    @contextlib.contextmanager
    def _forced(self, guarded: bool) -> Iterator[None]:
        if self.isa is None:
            raise AssertionError(f"the native kernels are not there: {_native.why_not}")
        before = torch.ops.fastac.cpu_set_isa(self.isa)
        if self.isa == PAIRS:
            sizes_in_use.update(PAIR_SIZES)
        try:
            with _guards(torch.ops.fastac.cpu_guard, guarded):
                yield
        finally:
            torch.ops.fastac.cpu_set_isa(before)
            sizes_in_use.update(DEFAULT_SIZES)

    @contextlib.contextmanager
    def _interpreted(self, guarded: bool) -> Iterator[None]:
        sizes_in_use.update(INTERPRETED_SIZES)
        try:
            with _guarded_triton() if guarded else contextlib.nullcontext():
                yield
        finally:
            sizes_in_use.update(DEFAULT_SIZES)

    @contextlib.contextmanager
    def _emulated(self, guarded: bool) -> Iterator[None]:
        import cuda_operators  # here, since it needs what builds the emulation, which tests/gpu does without

        cuda_operators.load()
        shared, capability = cuda_operators.GPUS[self.capability or 90]
        torch.ops.fastac.emulated_device(shared, capability)
        if capability >= 90:
            sizes_in_use.update(CLUSTER_SIZES)
        try:
            with _guards(torch.ops.fastac.emulated_guard, guarded):
                yield
        finally:
            torch.ops.fastac.emulated_device(*cuda_operators.GPUS[90])
            sizes_in_use.update(DEFAULT_SIZES)


@contextlib.contextmanager
def _guards(guard: Callable[[bool], int], guarded: bool) -> Iterator[None]:
    """With the guards of C++ allocations switched on, if `guarded`; asserts that none was hit."""
    guard(guarded)
    try:
        yield
        damaged = guard(False)
        assert damaged == 0, f"{damaged} bytes outside the outputs were written"
    finally:
        guard(False)


GUARD = 64
"""Elements before and behind everything that the Triton backend allocates in a guarded test."""


@contextlib.contextmanager
def _guarded_triton() -> Iterator[None]:
    """Fill what the Triton backend allocates with NaN, within guard bands that must stay as they are."""
    from fastac.kernels import launch, softmax_weight

    bands: list[Tensor] = []

    def guarded(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        numel = math.prod(shape)
        whole = torch.empty(numel + 2 * GUARD, dtype=dtype).fill_(
            float("nan") if dtype.is_floating_point else -7
        )
        bands.extend((whole[:GUARD], whole[GUARD + numel :]))
        return whole[GUARD : GUARD + numel].view(shape)

    def empty(call: launch.Call, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return guarded(shape, dtype or call.acc)

    def empty_like(x: Tensor, *shape: int, dtype: torch.dtype) -> Tensor:
        return guarded(shape, dtype)

    original, launch.Call.empty = launch.Call.empty, empty  # type: ignore[method-assign]
    other, softmax_weight.empty = softmax_weight.empty, empty_like
    try:
        yield
        damaged = sum(int((b != -7).sum() if b.dtype == torch.int32 else (~b.isnan()).sum()) for b in bands)
        assert damaged == 0, f"{damaged} elements outside the outputs were written"
    finally:
        launch.Call.empty = original  # type: ignore[method-assign]
        softmax_weight.empty = other


def _native_backends() -> list[Backend]:
    if _native.available:
        supported = torch.ops.fastac.cpu_supported_isas()
        return [Backend("cpu", isa) for isa in range(len(ISA_NAMES)) if supported >> isa & 1]
    if os.environ.get("FASTAC_NATIVE") == "0":
        return []
    return [Backend("cpu")]  # fails with the reason


NATIVE = _native_backends()
"""The native backend under each instruction set of this processor; empty only if FASTAC_NATIVE=0."""
TRITON = [Backend("triton")] if importlib.util.find_spec("triton") is not None else []
"""The Triton backend; conftest.py makes Triton interpret its kernels."""
CUDA = [Backend("cuda")] if os.environ.get("FASTAC_NATIVE") != "0" else []
"""The kernels of csrc/cuda, emulated on the CPU, clusters included; they need a C++ compiler."""
PORTABLE = [dataclasses.replace(b, capability=80) for b in CUDA]
"""The same without clusters."""
BACKENDS = [Backend("reference"), *NATIVE, *TRITON, *CUDA, *PORTABLE]
"""Every backend the operator tests run on. A new one joins here."""
KERNELS = [*NATIVE[-1:], *TRITON, *CUDA]
"""Every backend with kernels, the native one with the widest instruction set only."""
