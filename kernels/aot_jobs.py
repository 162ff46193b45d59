"""What `python -m fastac.kernels.aot` compiles: targets, calls, and the launches that the calls make.

Every launch goes through `launch.start`. Here calls are made with tensors of the meta device, which have no
memory, and `start` takes note instead of launching: what is compiled is what a GPU would run, with the tiles
that `plan` chose, specialised as Triton specialises the arguments.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import heapq
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import plan

SPECIAL = ("strided", "odd-M", "64-bit strides", "mixed")  # flags that are no constants of a kernel
LIMIT = 40  # configurations of a target that are compiled without --all
SOFTMAX_WEIGHT_LIMIT = 20  # and those of softmax_weight beside them

SOFTMAX_WEIGHT = ("softmax_weight_forward", "softmax_weight_backward")
# They multiply no tiles, so they hold no matrix instruction, and their tiles are not among the planned ones.
WITHOUT_DOT = ("forward_combine", "backward_sums", *SOFTMAX_WEIGHT)


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
        Target(
            "sm_90", "cuda", 90, 32, 227 << 10, (*_NVIDIA, "HGMMA"), gpus=("H100", "H200", "H800", "GH200")
        ),
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

    def plain(self) -> Call:
        """The call of the same sizes whose neighbours are compiled."""
        return Call(self.batch, self.length, self.features, self.units, self.dtype, self.weighting)


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


def workload_calls() -> Iterator[Call]:
    """The calls of the named workloads."""
    for sizes, given in WORKLOADS.values():
        for dtype, shift in itertools.product(DTYPES, (True, False)):
            kept = _keeps(sizes, dtype, given.get("weighting", "linear"))
            for frozen in (False, True):
                yield Call(*sizes, dtype, **given, shift=shift, kept=kept, frozen=frozen)  # type: ignore[arg-type]


def class_calls() -> Iterator[Call]:
    """Every size class with the plain flags; every combination of flags, for one block per set and for more.

    Sizes and flags change a kernel in different places, so their product is left out.
    """
    for dtype, sizes, form in itertools.product(DTYPES, (ONE_BLOCK, SPLIT), FORMS):
        keeps = (False, True) if form["weighting"] == "linear" else (False,)
        for shift, layout, kept, frozen in itertools.product(
            (True, False), plan.LAYOUTS, keeps, (False, True)
        ):
            yield Call(*sizes, dtype, **form, shift=shift, layout=layout, kept=kept, frozen=frozen)
        if dtype.itemsize == 2:
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


@dataclass(frozen=True)
class SoftmaxWeightCall:
    """Operands of a forward and a backward pass of softmax_weight."""

    batch: int  # B
    length: int  # L
    features: int  # M
    dtype: torch.dtype
    layout: str = "padded"  # or lengths
    needs: int = 3  # bits of the backward's operator
    mixed: bool = False  # the scores are float32 whatever x is
    strided: bool = False  # x, scores and dy are transposed


# B, L, M and layout of the shapes in benchmarks/softmax_weight.py; tests/test_aot.py compares the two.
SOFTMAX_WEIGHT_WORKLOADS = (
    (64, 25, 50, "padded"),
    (128, 25, 512, "padded"),
    (16, 30, 25088, "padded"),
    (4, 10, 100352, "padded"),
    (64, 300, 1024, "lengths"),
)
SOFTMAX_WEIGHT_LENGTHS = (1, 7, 16, 64, 128, 256, 512, 513, 100_000)


def softmax_weight_workloads() -> Iterator[SoftmaxWeightCall]:
    """The calls of the benchmark."""
    for (batch, length, features, layout), dtype in itertools.product(SOFTMAX_WEIGHT_WORKLOADS, DTYPES):
        yield SoftmaxWeightCall(batch, length, features, dtype, layout)


def softmax_weight_classes() -> Iterator[SoftmaxWeightCall]:
    """Every size class with the plain flags; every combination of flags, for one block per set and more."""
    for dtype, length in itertools.product(DTYPES, (25, 1000)):
        sizes = (256, length, 1024)
        for layout, needs in itertools.product(("padded", "lengths"), (1, 2, 3)):
            yield SoftmaxWeightCall(*sizes, dtype, layout, needs)
        yield SoftmaxWeightCall(*sizes, dtype, strided=True)
        if dtype != torch.float32:
            yield SoftmaxWeightCall(*sizes, dtype, mixed=True)
    for dtype, length, batch in itertools.product(DTYPES, SOFTMAX_WEIGHT_LENGTHS, (1, 256)):
        yield SoftmaxWeightCall(batch, length, 1024, dtype)
    for dtype, features, length in itertools.product(DTYPES, FEATURES, (25, 1000, 100_000)):
        yield SoftmaxWeightCall(64, length, features, dtype)
    for dtype in DTYPES:  # strides beyond 32 bits
        yield SoftmaxWeightCall(2, 1 << 22, 1024, dtype)


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def recording(backend: str, gpu: str = "") -> Iterator[list[tuple[Any, dict[str, Any], int, int]]]:
    """Inside, launches append (kernel, arguments, warps, stages) to the list instead.

    They are planned for the GPU of this name, and for the backend cuda or hip.
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
        _replaced(torch.version, "hip", "0.0" if backend == "hip" else None),
    ):
        yield found


def perform(call: Call | SoftmaxWeightCall) -> None:
    """Make the call on the meta device."""
    if isinstance(call, SoftmaxWeightCall):
        _perform_softmax_weight(call)
        return
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


def _perform_softmax_weight(call: SoftmaxWeightCall) -> None:
    from . import softmax_weight

    def empty(dtype: torch.dtype) -> Tensor:
        if call.strided:
            shape = (call.batch, call.features, call.length)
            return torch.empty(shape, dtype=dtype, device="meta").transpose(1, 2)
        return torch.empty((call.batch, call.length, call.features), dtype=dtype, device="meta")

    x, dy = empty(call.dtype), empty(call.dtype)
    scores = empty(torch.float32 if call.mixed else call.dtype)
    lengths = None
    if call.layout == "lengths":
        lengths = torch.empty(call.batch, dtype=torch.int64, device="meta")
    _, stats = softmax_weight.forward(x, scores, lengths)
    softmax_weight.backward(dy, x, scores, lengths, stats, call.needs)


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
    origin: str = field(default="class", compare=False)  # the call it is from: workload, class, or neighbour

    def constant(self, name: str) -> Any:
        """Value of a constant, None if the kernel has none of this name."""
        return dict(self.constants).get(name)

    @property
    def default(self) -> bool:
        """Whether it is not only tried by FASTAC_AUTOTUNE=1."""
        return self.origin != "neighbour"

    @property
    def configuration(self) -> tuple[Any, ...]:
        """Kernel, form, dtype, tiles, warps and stages, whatever the flags."""
        form = tuple(self.constant(name) for name in ("SPLIT", "GRAM", "FIRST", "SECOND", "ONE_BLOCK"))
        return self.kernel, form, self.dtype, tuple(self.tile.items()), self.warps, self.stages

    @property
    def dtype(self) -> str:
        """Of x, or of y where the kernel does not take x, or of the sums where it takes neither."""
        types = dict(self.signature)
        x = types.get("x_ptr") or types.get("y_ptr") or types["stats_ptr"]
        return _NAMES[x.removeprefix("*")]

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
        if any(types.get(name, "constexpr") != "constexpr" for name in ("x_m", "dy_m")):
            found.append("strided")
        if types["M"] != "constexpr" and "M" not in aligned:
            found.append("odd-M")
        if types.get("x_b") == "i64":
            found.append("64-bit strides")
        small = {
            types.get(name, "constexpr") for name in ("alpha_ptr", "bias_ptr", "scores_ptr", "dalpha_ptr")
        }
        if not small <= {"constexpr", types.get("x_ptr", types.get("y_ptr"))}:
            found.append("mixed")
        return found

    @property
    def needs_matrix(self) -> bool:
        """Whether the binary must hold a matrix instruction: half types, and float32 as TensorFloat-32."""
        half = self.dtype in ("bfloat16", "float16") or self.constant("PRECISION") == "tf32"
        if self.kernel == "backward_reduce":
            half = half and self.constant("NEED_WEIGHT")
        if self.kernel == "backward_blocks":  # the second part alone multiplies for dx only
            half = half and (self.constant("FIRST") or self.constant("NEED_X"))
        return half and self.kernel not in WITHOUT_DOT


def specialise(
    parameters: Iterable[tuple[str, bool]], arguments: dict[str, Any], general: Collection[str] = ()
) -> tuple[dict[str, str], dict[str, Any], dict[str, str]]:
    """Signature, constants and attributes of a launch, as Triton derives them from its arguments.

    `parameters`: names, and whether they are declared constants. None and the integer 1 become constants.
    `general`: integers that are declared not to be specialised, so that their values do not matter.
    "D" marks integers that 16 divides, and tensors, since they start at multiples of 16 bytes; "S" tensors of
    less than 2 GB.
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
        elif constant or value is None or (value == 1 and name not in general):
            constants[name] = value
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and name not in general:
                attributes[name] = "D"
    return signature, constants, attributes


def job(kernel: Any, arguments: dict[str, Any], warps: int, stages: int, origin: str = "class") -> Job:
    """The job of one launch."""
    parameters = [(p.name, p.is_constexpr) for p in kernel.params]
    general = {p.name for p in kernel.params if p.do_not_specialize}
    signature, constants, attributes = specialise(parameters, arguments, general)
    return Job(
        kernel.__name__,
        tuple(signature.items()),
        tuple(constants.items()),
        tuple(attributes.items()),
        warps,
        stages,
        origin,
    )


def gpus(target: Target) -> list[str]:
    """The GPUs of `winners.json` that are of this target."""
    unknown = [g for g in plan.winners() if not any(s in g for t in TARGETS.values() for s in t.gpus)]
    if unknown:
        raise ValueError(
            f"winners.json names a GPU that no target of kernels/aot_jobs.py lists: {unknown[0]!r}"
        )
    return [g for g in plan.winners() if any(s in g for s in target.gpus)]


def jobs(target: Target, neighbours: bool) -> list[Job]:
    """Every job of the target once: of the workloads, of the size classes, and neighbours if asked for."""
    return list(_jobs(target.backend, tuple(gpus(target)), neighbours))


@functools.cache
def _jobs(backend: str, names: tuple[str, ...], neighbours: bool) -> tuple[Job, ...]:
    found: dict[Job, None] = {}
    near: dict[Job, None] = {}
    of_calls: list[tuple[str, Call | SoftmaxWeightCall]] = [
        *(("workload", c) for c in workload_calls()),
        *(("workload", c) for c in softmax_weight_workloads()),
        *(("class", c) for c in class_calls()),
        *(("class", c) for c in softmax_weight_classes()),
    ]
    precision = torch.get_float32_matmul_precision()
    for gpu in ("", *names):
        with recording(backend, gpu) as launches:
            for origin, call in of_calls:
                launches.clear()
                relaxed = isinstance(call, Call) and call.relaxed
                torch.set_float32_matmul_precision("high" if relaxed else "highest")
                try:
                    perform(call)
                finally:
                    torch.set_float32_matmul_precision(precision)
                for kernel, arguments, warps, stages in launches:
                    found.setdefault(job(kernel, arguments, warps, stages, origin))
                    if neighbours and isinstance(call, Call) and call == call.plain():
                        for other in _neighbours(kernel, arguments, warps, stages):
                            near.setdefault(other)
    return (*found, *(j for j in near if j not in found))


def _neighbours(kernel: Any, arguments: dict[str, Any], warps: int, stages: int) -> Iterator[Job]:
    if kernel.__name__ in WITHOUT_DOT:
        return
    block_l = arguments.get("BLOCK_L", arguments.get("BLOCK_R"))
    config = plan.Config(block_l, arguments["BLOCK_N"], arguments["BLOCK_M"], warps, stages)
    name = {"forward_blocks": "forward", "backward_blocks": "backward"}.get(kernel.__name__, "reduce")
    for other in plan.neighbours(config, arguments["x_ptr"].dtype.itemsize, name)[1:]:
        changed = arguments | {"BLOCK_M": other.block_m}
        yield job(kernel, changed, other.warps, other.stages, "neighbour")


Facets = dict[tuple[Any, ...], int]


def cover(
    found: Sequence[Job], keep: Iterable[Job], facets: Callable[[Job], Facets], limit: int
) -> list[Job]:
    """The jobs to keep, and of the others always the one whose unseen facets weigh most; at most `limit`.

    The choice depends on the jobs and their order only.
    """
    weights = [facets(j) for j in found]
    chosen: dict[Job, None] = {}
    seen: set[tuple[Any, ...]] = set()

    def gain(i: int) -> int:
        return sum(w for facet, w in weights[i].items() if facet not in seen)

    kept = set(keep)
    for i, j in enumerate(found):
        if j in kept and len(chosen) < limit:
            chosen.setdefault(j)
            seen.update(weights[i])
    # A gain only shrinks, so the first of the queue whose gain is still what it was is the greatest.
    queue = [(-gain(i), i) for i in range(len(found))]
    heapq.heapify(queue)
    while queue and len(chosen) < limit:
        before, i = heapq.heappop(queue)
        now = -gain(i)
        if now == 0:
            continue
        if now != before:
            heapq.heappush(queue, (now, i))
            continue
        chosen.setdefault(found[i])
        seen.update(weights[i])
    return [j for j in found if j in chosen]


def select(found: Sequence[Job], limit: int = LIMIT) -> list[Job]:
    """At most `limit` jobs: the workloads' first, each dtype and form, then what shows most new."""

    def facets(j: Job) -> Facets:
        size = "half" if j.dtype in ("bfloat16", "float16") else j.dtype
        shown: Facets = {(j.kernel, size, *item): 1 for item in j.tile.items()}
        shown |= {(j.kernel, size, flag): 1 for flag in j.flags}
        if j.kernel in SOFTMAX_WEIGHT:
            shown |= {(j.kernel, flag): 10 for flag in j.flags if flag in SPECIAL}
        # With any dtype: every value of every constant, the flags' False too.
        constants = [(k, v) for k, v in j.constants if k.isupper() and not k.startswith("BLOCK_")]
        shown |= {(j.kernel, *item): 50 for item in constants if item[0] not in ("ACC", "EPS")}
        return shown | {("form", j.kernel, j.dtype, j.constant("WEIGHTING")): 1000}

    firsts: dict[tuple[str, str], Job] = {}
    for j in found:
        firsts.setdefault((j.kernel, j.dtype if j.constant("WEIGHTING") is not None else ""), j)
    return cover(found, firsts.values(), facets, limit)


def thin(found: Sequence[Job]) -> list[Job]:
    """For --all: the workloads' jobs, every configuration, every pair of flags for each kernel and dtype.

    All combinations of configurations, flags and specialisations would be 50,000 compilations per target.
    """

    def facets(j: Job) -> Facets:
        shown: Facets = {j.configuration: 1}
        if j.default:
            constants = [(k, v) for k, v in j.constants if k.isupper() and not k.startswith("BLOCK_")]
            flags = [*constants, *((f, True) for f in j.flags if f in SPECIAL)]
            shown |= {(j.kernel, j.dtype, *two): 1 for two in itertools.combinations(flags, 2)}
        return shown

    # Among jobs that show the same line in the table, one does.
    lines: dict[tuple[Any, ...], Job] = {}
    for j in found:
        if j.origin == "workload":
            lines.setdefault((j.configuration, *j.flags), j)
    return cover(found, lines.values(), facets, len(found))


def of_target(target: Target, everything: bool) -> list[Job]:
    """What is compiled for the target; AMD GPUs get no neighbours."""
    if not everything:
        every = jobs(target, neighbours=False)
        cluster = [j for j in every if j.kernel not in SOFTMAX_WEIGHT]
        rest = [j for j in every if j.kernel in SOFTMAX_WEIGHT]
        return select(cluster) + select(rest, SOFTMAX_WEIGHT_LIMIT)
    return thin(jobs(target, neighbours=target.backend == "cuda"))
