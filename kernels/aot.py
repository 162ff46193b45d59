"""Compile the kernels without a GPU: `python -m fastac.kernels.aot`.

Every launch that a call makes goes through `launch.start`. Here calls are made with tensors of the meta device,
which have no memory, and `start` takes note instead of launching: what is compiled is what a GPU would run, with
the tiles `plan` chose, specialised as Triton specialises the arguments. The table that is printed has a line for
each configuration, and the exit status is 1 if one of them breaks a rule of `failures`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import plan

LIMIT = 40  # configurations of a target that are compiled without --all

# They multiply no tiles, so they hold no matrix instruction, and their tiles are not among the planned ones.
WITHOUT_DOT = ("forward_combine", "backward_sums")


@dataclass(frozen=True)
class Target:
    """A chip to compile for, and what one program may have there."""

    name: str
    backend: str  # cuda or hip
    arch: int | str
    warp_size: int
    shared: int  # bytes of shared memory
    matrix: tuple[str, ...]  # mnemonics of its matrix instructions on floating-point numbers
    tensor_memory: int = 0  # columns
    gpus: tuple[str, ...] = ()  # what names of such GPUs contain


_NVIDIA = ("HMMA", "DMMA")
TARGETS = {
    t.name: t
    for t in (
        Target("sm_80", "cuda", 80, 32, 163 << 10, _NVIDIA, gpus=("A100", "A800")),
        Target("sm_90", "cuda", 90, 32, 227 << 10, (*_NVIDIA, "HGMMA"), gpus=("H100", "H200", "H800", "GH200")),
        Target("sm_100", "cuda", 100, 32, 227 << 10, (*_NVIDIA, "UTCHMMA"), 512, ("B100", "B200")),
        Target("sm_120", "cuda", 120, 32, 99 << 10, _NVIDIA, gpus=("RTX 50", "RTX PRO")),
        Target("gfx942", "hip", "gfx942", 64, 64 << 10, ("v_mfma",), gpus=("MI300", "MI325")),
        Target("gfx950", "hip", "gfx950", 64, 160 << 10, ("v_mfma",), gpus=("MI350", "MI355")),
    )
}


# Calls


@dataclass(frozen=True)
class Call:
    """Operands of a forward pass with statistics, one without, and a backward pass."""

    batch: int  # B
    length: int  # L; a packed x has B L rows
    features: int  # M
    units: int  # N
    dtype: torch.dtype
    weighting: str = "linear"  # one of plan.WEIGHTINGS
    bias: bool = False
    shift: bool = True
    layout: str = "padded"  # one of plan.LAYOUTS
    kept: bool = False  # whether the forward keeps the scores
    frozen: bool = False  # whether x takes no gradient
    mixed: bool = False  # the small operands are float32 whatever x is, as under autocast
    strided: bool = False  # x and dy are transposed
    relaxed: bool = False  # float32 products may be TensorFloat-32


# B, L, M, N of the workloads in benchmarks/workloads.py; tests/test_aot.py compares the two.
WORKLOADS: dict[str, tuple[tuple[int, int, int, int], dict[str, str]]] = {
    "kinetics-rgb": ((256, 25, 1536, 64), {}),
    "kinetics-flow": ((256, 25, 1536, 32), {}),
    "ucf-resnet": ((256, 20, 2048, 64), {}),
    "flash-mnist": ((1024, 25, 50, 64), {}),
    "yt8m-rgb": ((64, 300, 1024, 128), {}),
    "yt8m-audio": ((64, 300, 128, 32), {}),
    "ragged": ((256, 300, 1024, 64), {"layout": "packed"}),
    "mil-bag": ((1, 131072, 1024, 8), {"weighting": "scores"}),
    "online": ((1, 25, 1536, 64), {}),
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
FORMS: tuple[dict[str, Any], ...] = (
    {"weighting": "linear"},
    {"weighting": "linear", "bias": True},
    {"weighting": "average"},
    {"weighting": "scores"},
)
LENGTHS = (1, 16, 17, 32, 64, 65, 128, 129, 300)
UNITS = (1, 8, 16, 17, 32, 64, 128, 129)
FEATURES = (1, 8, 50, 67)  # M besides the workloads'
ONE_BLOCK, SPLIT = (256, 25, 1024, 64), (64, 300, 1024, 64)


def _keeps(sizes: tuple[int, int, int, int], dtype: torch.dtype, weighting: str) -> bool:
    """The rule of `fastac.ops.keeps_scores`, from sizes."""
    from .. import ops

    _, length, features, units = sizes
    x, weight = (torch.empty(n, features, dtype=dtype, device="meta") for n in (length, units))
    return ops.keeps_scores(x, weight if weighting == "linear" else None, dtype)


def calls() -> Iterator[Call]:
    """The calls whose launches are compiled, those of the named workloads first.

    Every size class occurs with the plain flags, and every combination of flags at a size that fits one block
    and at one that is split. Sizes and flags change a kernel in different places, so their product is left out.
    """
    for sizes, given in WORKLOADS.values():
        for dtype, shift in itertools.product(DTYPES, (True, False)):
            kept = _keeps(sizes, dtype, given.get("weighting", "linear"))
            for frozen in (False, True):
                yield Call(*sizes, dtype, **given, shift=shift, kept=kept, frozen=frozen)  # type: ignore[arg-type]
    for dtype, sizes, form in itertools.product(DTYPES, (ONE_BLOCK, SPLIT), FORMS):
        keeps = (False, True) if form["weighting"] == "linear" else (False,)
        for shift, layout, kept, frozen in itertools.product(
            (True, False), plan.LAYOUTS, keeps, (False, True)
        ):
            yield Call(*sizes, dtype, **form, shift=shift, layout=layout, kept=kept, frozen=frozen)
        half = dtype.itemsize == 2
        if half:
            yield Call(*sizes, dtype, **form, mixed=True)
        yield Call(*sizes, dtype, **form, strided=True)
        if dtype == torch.float32:
            yield Call(*sizes, dtype, **form, relaxed=True)
    for dtype, length, units in itertools.product(DTYPES, LENGTHS, UNITS):
        for weighting in ("linear", "scores"):
            yield Call(256, length, 1024, units, dtype, weighting)
        yield Call(1, length, 1024, units, dtype)
    for dtype, features, length in itertools.product(DTYPES, FEATURES, (25, 300)):
        yield Call(64, length, features, 64, dtype)
    for dtype in DTYPES:  # strides beyond 32 bits
        yield Call(2, 1 << 22, 1024, 8, dtype)
        yield Call(2, 1 << 22, 1024, 8, dtype, "scores")


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def recording(target: Target, gpu: str = "") -> Iterator[list[tuple[Any, dict[str, Any], int, int]]]:
    """Inside, launches append (kernel, arguments, warps, stages) to the list instead.

    They are planned for the GPU of this name and with the rules of the target's vendor.
    """
    from . import launch

    found: list[tuple[Any, dict[str, Any], int, int]] = []

    def start(kernel: Any, grid: int, arguments: dict[str, Any], warps: int, stages: int) -> None:
        found.append((kernel, dict(arguments), warps, stages))

    problem = plan.problem

    def planned(*arguments: Any, **named: Any) -> plan.Problem:
        return dataclasses.replace(problem(*arguments, **named), gpu=gpu)

    with (
        _replaced(launch, "start", start),
        _replaced(plan, "problem", planned),
        _replaced(torch.version, "hip", "0.0" if target.backend == "hip" else None),
    ):
        yield found


def perform(call: Call) -> None:
    """Make the call on the meta device."""
    from . import launch

    def empty(*shape: int, dtype: torch.dtype = call.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    small = torch.float32 if call.mixed else call.dtype
    b, length, m, n = call.batch, call.length, call.features, call.units
    packed = call.layout == "packed"
    rows = (b * length,) if packed else (b, length)
    x, dy = empty(*rows, m), empty(b, n, m)
    if call.strided:
        x = empty(*rows[:-1], m, rows[-1]).transpose(-1, -2)
        dy = empty(b, m, n).transpose(-1, -2)
    weight = empty(n, m) if call.weighting == "linear" else None
    scores = None
    if call.weighting == "scores":
        scores = empty(n, b * length, dtype=small) if packed else empty(b, n, length, dtype=small)
    bias = empty(n, length, dtype=small) if call.bias else None
    alpha = empty(n, dtype=small) if call.shift else None
    ragged = (
        empty(b, dtype=torch.int64) if call.layout == "lengths" else None,
        empty(b, length, dtype=torch.bool) if call.layout == "mask" else None,
        empty(b + 1, dtype=torch.int64) if packed else None,
    )
    operands = (x, weight, scores, bias, alpha, alpha, *ragged, 1e-12)
    longest = length if packed else None
    if call.weighting == "average" and alpha is None:
        dy = dy[:, :1]  # one unit
    launch.inference(*operands, longest)
    y, stats, saved = launch.forward(*operands, call.kept, longest)
    needs = 0b111110 if call.frozen else 0b111111
    launch.backward(dy, *operands, y, stats, saved, needs, longest)


# Jobs


_POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}
_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}


@dataclass(frozen=True)
class Job:
    """One kernel, specialised: what Triton makes one binary of."""

    kernel: str
    signature: tuple[tuple[str, str], ...]  # parameter -> type, "constexpr" if it is a constant
    constants: tuple[tuple[str, Any], ...]
    attributes: tuple[tuple[str, str], ...]  # parameter -> letters that Triton's `parse_attr` takes
    warps: int
    stages: int
    default: bool = field(default=True, compare=False)  # not only tried by FASTAC_AUTOTUNE=1

    def constant(self, name: str) -> Any:
        """Value of a constant, None if the kernel has none of this name."""
        return dict(self.constants).get(name)

    @property
    def dtype(self) -> str:
        """Of x, or of y where the kernel does not take x."""
        types = dict(self.signature)
        return _NAMES[types.get("x_ptr", types.get("y_ptr", "")).removeprefix("*")]

    @property
    def tile(self) -> dict[str, int]:
        """The tile sizes: L (R in backward_reduce), N, M, C, P."""
        return {k.removeprefix("BLOCK_"): v for k, v in self.constants if k.startswith("BLOCK_")}

    @property
    def flags(self) -> list[str]:
        """The constants that are not tile sizes, and the specialisations that matter."""
        found = []
        for name, value in self.constants:
            if name == "WEIGHTING":
                found.append(plan.WEIGHTINGS[value])
            elif name == "LAYOUT":
                found.append(plan.LAYOUTS[value])
            elif value is True:
                found.append(name.lower())
            elif name == "PRECISION" and value != "ieee":
                found.append(value)
        types, aligned = dict(self.signature), {name for name, _ in self.attributes}
        if types.get("x_m", "constexpr") != "constexpr" or types.get("dy_m", "constexpr") != "constexpr":
            found.append("strided")
        if types["M"] != "constexpr" and "M" not in aligned:
            found.append("odd-M")
        if types.get("x_b") == "i64":
            found.append("64-bit strides")
        return found

    @property
    def needs_matrix(self) -> bool:
        """Whether the binary must hold a matrix instruction: half types, and float32 as TensorFloat-32."""
        half = self.dtype in ("bfloat16", "float16") or self.constant("PRECISION") == "tf32"
        if self.kernel == "backward_reduce":
            half = half and self.constant("NEED_WEIGHT")
        return half and self.kernel not in WITHOUT_DOT


def specialise(
    parameters: Iterable[tuple[str, bool]], arguments: dict[str, Any]
) -> tuple[dict[str, str], dict[str, Any], dict[str, str]]:
    """Signature, constants and attributes of a launch, as Triton derives them from its arguments.

    `parameters` are the names and whether they are declared constants. None and the integer 1 become constants.
    Tensors start at multiples of 16 bytes, and so does whatever integer 16 divides ("D"); "S" says that a
    tensor has less than 2 GB.
    """
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[str, str] = {}
    for name, constant in parameters:
        value = arguments[name]
        signature[name] = "constexpr"
        if isinstance(value, Tensor):
            signature[name] = _POINTERS[value.dtype]
            small = value.untyped_storage().nbytes() < 2**31
            attributes[name] = "DS" if small else "D"
        elif constant or value is None or value == 1:
            constants[name] = value
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[name] = "D"
    return signature, constants, attributes


def job(kernel: Any, arguments: dict[str, Any], warps: int, stages: int, default: bool = True) -> Job:
    """The job of one launch."""
    parameters = [(p.name, p.is_constexpr) for p in kernel.params]
    signature, constants, attributes = specialise(parameters, arguments)
    return Job(
        kernel.__name__,
        tuple(signature.items()),
        tuple(constants.items()),
        tuple(attributes.items()),
        warps,
        stages,
        default,
    )


def gpus(target: Target) -> list[str]:
    """The GPUs of `winners.json` that are of this target."""
    unknown = [g for g in plan.winners() if not any(s in g for t in TARGETS.values() for s in t.gpus)]
    if unknown:
        raise ValueError(f"winners.json names a GPU that no target of kernels/aot.py lists: {unknown[0]!r}")
    return [g for g in plan.winners() if any(s in g for s in target.gpus)]


def jobs(target: Target, neighbours: bool) -> list[Job]:
    """Every job of the target, each once, in the order of `calls`; the neighbours behind the defaults."""
    found: dict[Job, None] = {}
    near: dict[Job, None] = {}
    for gpu in ("", *gpus(target)):
        with recording(target, gpu) as launches:
            for call in calls():
                launches.clear()
                before = torch.get_float32_matmul_precision()
                torch.set_float32_matmul_precision("high" if call.relaxed else "highest")
                try:
                    perform(call)
                finally:
                    torch.set_float32_matmul_precision(before)
                for kernel, arguments, warps, stages in launches:
                    found.setdefault(job(kernel, arguments, warps, stages))
                    if neighbours and _plain(call):
                        for other in _neighbours(kernel, arguments, warps, stages):
                            near.setdefault(other)
    return [*found, *(j for j in near if j not in found)]


def _plain(call: Call) -> bool:
    """Whether the neighbours of its launches are compiled: one call per size class."""
    return call == Call(call.batch, call.length, call.features, call.units, call.dtype, call.weighting)


def _neighbours(kernel: Any, arguments: dict[str, Any], warps: int, stages: int) -> Iterator[Job]:
    if kernel.__name__ in WITHOUT_DOT:
        return
    block_l = arguments.get("BLOCK_L", arguments.get("BLOCK_R"))
    config = plan.Config(block_l, arguments["BLOCK_N"], arguments["BLOCK_M"], warps, stages)
    for other in plan.neighbours(config, arguments["x_ptr"].dtype.itemsize)[1:]:
        changed = arguments | {"BLOCK_M": other.block_m}
        yield job(kernel, changed, other.warps, other.stages, default=False)


def select(found: Sequence[Job], limit: int) -> list[Job]:
    """At most `limit` of the jobs: each kernel, dtype and form first, then whatever shows most that is new.

    The choice depends on the jobs and their order only.
    """

    def first(j: Job) -> tuple[Any, ...]:
        return j.kernel, j.dtype, j.constant("WEIGHTING")

    def second(j: Job) -> set[tuple[Any, ...]]:
        size = 2 if j.dtype in ("bfloat16", "float16") else j.dtype
        tiles = {(j.kernel, size, *item) for item in j.tile.items()}
        return tiles | {(j.kernel, size, flag) for flag in j.flags}

    left = {j: (first(j), second(j)) for j in found}
    chosen: list[Job] = []
    seen: set[tuple[Any, ...]] = set()
    while left and len(chosen) < limit:
        best = max(left, key=lambda j: (left[j][0] not in seen, len(left[j][1] - seen)))
        one, many = left.pop(best)
        seen |= {one} | many
        chosen.append(best)
    return [j for j in found if j in set(chosen)]


# Compiling


@dataclass
class Row:
    """What became of one job on one target."""

    target: str
    job: Job
    registers: int = 0
    spills: int = 0  # instructions that store or load spilled registers
    stack: int = 0  # bytes
    shared: int = 0  # bytes
    tensor_memory: int = 0  # columns
    matrix: dict[str, int] = field(default_factory=dict)  # mnemonic -> occurrences
    seconds: float = 0.0
    error: str = ""

    def record(self) -> dict[str, Any]:
        """For JSON."""
        j = self.job
        return {
            "target": self.target,
            "kernel": j.kernel,
            "dtype": j.dtype,
            "default": j.default,
            "tile": j.tile,
            "warps": j.warps,
            "stages": j.stages,
            "flags": j.flags,
            "registers": self.registers,
            "spills": self.spills,
            "stack_bytes": self.stack,
            "shared_bytes": self.shared,
            "tensor_memory_columns": self.tensor_memory,
            "matrix_instructions": self.matrix,
            "seconds": round(self.seconds, 2),
            "error": self.error,
            "failures": failures(self),
        }


def failures(row: Row) -> list[str]:
    """The rules that the row breaks. AMD GPUs need no more than a binary."""
    target = TARGETS[row.target]
    if row.error:
        return [f"does not compile: {row.error}"]
    if target.backend != "cuda":
        return []
    found = []
    if row.job.default and (row.spills or row.stack):
        found.append(f"spills: {row.spills} instructions, {row.stack} bytes of stack")
    if row.shared > target.shared:
        found.append(f"needs {row.shared} bytes of shared memory, the chip has {target.shared}")
    if row.tensor_memory > target.tensor_memory:
        found.append(f"needs {row.tensor_memory} columns of tensor memory, the chip has {target.tensor_memory}")
    if row.job.needs_matrix and not row.matrix:
        found.append(f"has no matrix instruction ({', '.join(target.matrix)})")
    return found


def compile_job(job: Job, name: str) -> Row:
    """Compile a job for the target of this name and look at the binary."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend

    target, row = TARGETS[name], Row(name, job)
    began = time.perf_counter()
    try:
        module = "reduce" if job.kernel == "backward_reduce" else job.kernel.split("_")[0]
        kernel = getattr(importlib.import_module(f"{__package__}.{module}"), job.kernel)
        gpu = GPUTarget(target.backend, target.arch, target.warp_size)
        backend = make_backend(gpu)
        places = {parameter: i for i, (parameter, _) in enumerate(job.signature)}
        source = ASTSource(
            fn=kernel,
            signature=dict(job.signature),
            constexprs={(places[k],): v for k, v in job.constants},
            attrs={(places[k],): backend.parse_attr(v) for k, v in job.attributes},
        )
        options = {"num_warps": job.warps, "num_stages": job.stages}
        binary = triton.compile(source, target=gpu, options=options)
        row.shared = binary.metadata.shared
        row.tensor_memory = getattr(binary.metadata, "tmem_size", None) or 0
        (_inspect_cuda if target.backend == "cuda" else _inspect_hip)(row, binary.asm)
    except Exception as error:  # whatever the compiler raises is a line of the table
        text = " ".join(str(e) for e in (error, error.__cause__) if e is not None).split()
        row.error = f"{type(error).__name__}: {' '.join(text)[-300:]}"
    row.seconds = time.perf_counter() - began
    return row


def _inspect_cuda(row: Row, asm: dict[str, Any]) -> None:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(asm["cubin"])

        def run(tool: str, option: str) -> str:
            done = subprocess.run([tools / tool, option, cubin], capture_output=True, text=True, check=True)
            return done.stdout

        usage = re.search(r"REG:(\d+) STACK:(\d+)", run("cuobjdump", "-res-usage"))
        if usage is None:
            raise RuntimeError("cuobjdump printed no register count")
        row.registers, row.stack = int(usage[1]), int(usage[2])
        count_sass(row, run("nvdisasm", "-c"))


def count_sass(row: Row, sass: str) -> None:
    """Fill in the spills and the matrix instructions from what nvdisasm prints."""
    row.spills = len(re.findall(r"\b(?:STL|LDL)\b", sass))
    counts = {m: len(re.findall(rf"\b{m}\b", sass)) for m in TARGETS[row.target].matrix}
    row.matrix = {m: n for m, n in counts.items() if n}


def _inspect_hip(row: Row, asm: dict[str, Any]) -> None:
    def value(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", asm["amdgcn"])
        if found is None:
            raise RuntimeError(f"the assembly names no {name}")
        return int(found[1])

    row.registers, row.spills = value("vgpr_count"), value("vgpr_spill_count")
    row.stack = value("private_segment_fixed_size")
    count = len(re.findall(r"\bv_mfma_", asm["amdgcn"]))
    row.matrix = {"v_mfma": count} if count else {}


def compile_all(found: Sequence[tuple[Job, str]], workers: int) -> Iterator[Row]:
    """Compile in `workers` processes; rows come as they are ready."""
    context = multiprocessing.get_context("spawn")
    lost: list[tuple[Job, str]] = []
    with ProcessPoolExecutor(workers, context) as pool:
        futures: dict[Future[Row], tuple[Job, str]] = {pool.submit(compile_job, *f): f for f in found}
        for future in as_completed(futures):
            try:
                yield future.result()
            except BrokenProcessPool:
                lost.append(futures[future])
    # A compiler that aborts takes its process along, and with it the jobs that waited: one at a time, then.
    for one, name in lost:
        with ProcessPoolExecutor(1, context) as pool:
            try:
                yield pool.submit(compile_job, one, name).result()
            except BrokenProcessPool:
                yield Row(name, one, error="the compiler aborted")


# The command line


_COLUMNS: dict[str, Callable[[Row], str]] = {
    "kernel": lambda r: r.job.kernel,
    "dtype": lambda r: r.job.dtype,
    "tile": lambda r: " ".join(f"{k}{v}" for k, v in r.job.tile.items()),
    "warps": lambda r: str(r.job.warps),
    "stages": lambda r: str(r.job.stages),
    "regs": lambda r: str(r.registers),
    "spills": lambda r: f"{r.spills}/{r.stack} B",
    "shared": lambda r: str(r.shared),
    "matrix": lambda r: " ".join(f"{k} {v}" for k, v in r.matrix.items()) or "none",
    "s": lambda r: f"{r.seconds:.1f}",
    "flags": lambda r: " ".join([*r.job.flags, *([] if r.job.default else ["(autotune)"])]),
    "": lambda r: "FAILS" if failures(r) else "",
}


def table(rows: Sequence[Row]) -> str:
    """The rows as columns of text under a header."""
    lines = [list(_COLUMNS), *([text(r) for text in _COLUMNS.values()] for r in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(line.rstrip() for line in padded)


def report(rows: Sequence[Row]) -> tuple[str, int]:
    """What is printed, one table per target and the failures behind it; and the exit status."""
    parts = []
    for name in dict.fromkeys(r.target for r in rows):
        mine, target = [r for r in rows if r.target == name], TARGETS[name]
        kind = "compiled, never run" if target.backend == "hip" else "compiled"
        seconds = sum(r.seconds for r in mine)
        parts.append(
            f"== {name}: {len(mine)} configurations {kind}, {seconds:.0f} s of compiling, at most "
            f"{target.shared} bytes of shared memory"
        )
        parts.append(table(mine))
    failed = [(r, why) for r in rows for why in failures(r)]
    for r, why in failed:
        tile = _COLUMNS["tile"](r)
        parts.append(
            f"FAILS {r.target} {r.job.kernel} {r.job.dtype} {tile}, {r.job.warps} warps, "
            f"{r.job.stages} stages, {_COLUMNS['flags'](r)}: {why}"
        )
    broken = len({id(r) for r, _ in failed})
    parts.append(f"{len(rows)} configurations, {broken} failed" if broken else f"{len(rows)} configurations, all good")
    return "\n".join(parts), 1 if failed else 0


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fastac.kernels.aot",
        description="Compile the Triton kernels for GPUs that need not be there.",
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help=f"every configuration and those that FASTAC_AUTOTUNE=1 tries; else at most {LIMIT} per target",
    )
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="only this target (repeatable)")
    parser.add_argument("--kernel", action="append", metavar="NAME", help="only this kernel (repeatable)")
    parser.add_argument("--jobs", type=_positive, default=min(os.cpu_count() or 1, 8), help="processes")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the table there")
    parser.add_argument("--list", action="store_true", help="name the configurations and compile none")
    return parser.parse_args(argv)


def _unready() -> str | None:
    """Why nothing can be compiled here, None if it can."""
    interpreter = os.environ.get("TRITON_INTERPRET", "")
    if interpreter.lower() in ("1", "true", "on", "yes", "y"):
        return f"TRITON_INTERPRET must not be set while compiling, it is {interpreter!r}"
    try:
        importlib.import_module("triton")
    except ModuleNotFoundError as error:
        return f'the kernels cannot be compiled, {error.name} is not installed: pip install "fastac[triton]"'
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Compile and print; 0 if all is good, 1 if a rule is broken, 2 if nothing can be compiled here."""
    arguments = _arguments(argv)
    unready = _unready()
    if unready is not None:
        print(unready, file=sys.stderr)
        return 2
    found = []
    for name in arguments.target or TARGETS:
        mine = _of_target(TARGETS[name].backend, name, arguments.all)
        found += [(j, name) for j in mine if not arguments.kernel or j.kernel in arguments.kernel]
    if not found:
        print(f"no kernel is called {' or '.join(arguments.kernel)}", file=sys.stderr)
        return 2
    order = {f: i for i, f in enumerate(found)}
    rows = [Row(name, j) for j, name in found]
    text, status = "", 0
    if arguments.list:
        text = "\n".join(f"{r.target}  {line}" for r, line in zip(rows, table(rows).splitlines()[1:], strict=True))
    else:
        for row in compile_all(found, arguments.jobs):
            rows[order[row.job, row.target]] = row
        text, status = report(rows)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([r.record() for r in rows], indent=1) + "\n")
    return status


@functools.cache
def _of_target(backend: str, name: str, everything: bool) -> list[Job]:
    found = jobs(TARGETS[name], neighbours=everything)
    return found if everything else select(found, LIMIT)


if __name__ == "__main__":
    sys.exit(main())
