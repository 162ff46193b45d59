"""The CUDA library `fastac/_C_cuda.abi3.so`: loaded where torch has CUDA, or a reason why not.

It registers CUDA implementations of the operators that `fastac.ops` defines. Loading it does not touch CUDA.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensor

from . import _native

PATH = Path(__file__).resolve().parent / "_C_cuda.abi3.so"
MEASURED = Path(__file__).resolve().parent / "measured.json"
LAYOUTS = ("padded", "lengths", "mask", "packed")
WEIGHTINGS = ("average", "scores", "fc1")
FORWARD_KERNELS = ("ForwardBlocks", "ForwardCluster")
FORMS = ("direct", "Gram (y is not read)", "direct, sets split", "Gram, by clusters (y is not read)")
BACKWARD_KERNELS = (  # of each form
    "BackwardBlocks",
    "BackwardBlocks",
    "BackwardBlocks + BackwardSums + BackwardBlocks",
    "BackwardCluster",
)
FORWARD = (
    "kernel", "block_l", "block_n", "cluster", "resident", "stages", "shared", "split", "positions", "blocks",
    "unit_blocks", "grid", "launches", "scratch", "bytes", "operations",
)  # fmt: skip
BACKWARD = (
    "form", "block_l", "block_n", "cluster", "resident", "stages", "shared", "blocks", "grid", "launches",
    "scratch", "tiles", "splits", "rows_per_split", "bytes", "operations",
)  # fmt: skip
# Bytes of shared memory that a block may have, and the capability: what plans are for where there is no GPU.
ASSUMED = (227 << 10, 90)


def _load() -> str | None:
    """Load the library; the reason if that cannot be done, else None."""
    if not PATH.is_file():
        return "not built (FASTAC_CUDA=0, or no nvcc was found when fastac was installed)"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    if not _native.available:
        return f"needs the native library: {_native.why_not}"
    try:
        torch.ops.load_library(str(PATH))
    except (OSError, RuntimeError) as error:
        return f"the CUDA library {PATH.name} does not load: {error}"
    return None


why_not = _load()


def emulated() -> bool:
    """Whether a library that runs the kernels on the CPU is loaded, which only tests do."""
    found: bool = torch._C._dispatch_has_kernel_for_dispatch_key("fastac::cuda_forward", "CPU")
    return found


@functools.cache
def limits(index: int | None) -> tuple[int, int]:
    """Shared memory of a block in bytes, and capability, for which a device's plans are made.

    The capability is that of what the library holds for the device, which may be an older GPU's PTX. Without
    a GPU it is `ASSUMED`. Raises: RuntimeError if the library or the driver has nothing for the device.
    """
    if not torch.cuda.is_available():
        return ASSUMED
    shared, capability = torch.ops.fastac.cuda_limits(torch.cuda.current_device() if index is None else index)
    return shared, capability


@functools.cache
def unusable(index: int | None) -> str | None:
    """Why the library cannot run on a device, None if it can."""
    try:
        limits(index)
    except RuntimeError as error:
        # Torch puts a place in the sources before what was said.
        return (
            f"the CUDA library cannot run on this GPU: {str(error).splitlines()[0].rpartition('fastac: ')[2]}"
        )
    return None


def in_vectors(x: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernels can read rows of x, as a tensor of this dtype, 16 bytes at a time.

    A fake tensor, which is nowhere, counts as aligned.
    """
    has_address = x.numel() > 0 and x.dtype == dtype and not isinstance(x, FakeTensor)
    if has_address and x.data_ptr() % 16 != 0:
        return False
    *rows, columns = zip(x.shape, x.stride(), strict=True)
    contiguous = columns[0] <= 1 or columns[1] == 1
    return contiguous and all(n <= 1 or stride * dtype.itemsize % 16 == 0 for n, stride in rows)


def plan(
    batch: int,
    length: int,
    longest: int,
    features: int,
    units: int,
    itemsize: int,
    layout: str,
    weighting: str,
    shift: bool,
    kept: bool,
    needs_x: bool,
    needs_weight: bool,
    x_vectors: bool,
    weight_vectors: bool,
    dy_vectors: bool,
    shared: int,
    capability: int,
) -> tuple[dict[str, int], dict[str, int]]:
    """The plans of the forward and of the backward pass, by the names of `FORWARD` and `BACKWARD`.

    Args:
        batch, length, longest, features, units: B, L (T when packed), a bound of the set lengths, M, N.
        layout, weighting: of `LAYOUTS` and `WEIGHTINGS`.
        kept: whether the forward keeps the scores.
        needs_x, needs_weight: whether the backward makes dX and dW.
        x_vectors, weight_vectors, dy_vectors: as `in_vectors` has it.
        shared, capability: as `limits` returns them.
    """
    library = torch.ops.fastac
    planner = library.cuda_plan if why_not is None else library.emulated_plan
    fields: list[int] = planner(
        batch,
        length,
        longest,
        features,
        units,
        itemsize,
        LAYOUTS.index(layout),
        WEIGHTINGS.index(weighting),
        shift,
        kept,
        needs_x,
        needs_weight,
        x_vectors,
        weight_vectors,
        dy_vectors,
        shared,
        capability,
    )
    names = FORWARD + BACKWARD
    if len(fields) != len(names):
        raise RuntimeError("the CUDA library is of another version than fastac; build it again")
    return (
        dict(zip(FORWARD, fields[: len(FORWARD)], strict=True)),
        dict(zip(BACKWARD, fields[len(FORWARD) :], strict=True)),
    )


def describe(forward: dict[str, int], backward: dict[str, int], needs_weight: bool) -> dict[str, object]:
    """Both plans for people: `fastac.explain` prints it."""

    def blocks(p: dict[str, int]) -> str:
        memory = f"{p['shared']} bytes of shared memory"
        if p["cluster"] > 1:
            clusters = f"at most {p['grid'] // p['cluster']} clusters of {p['cluster']} blocks"
            tile = f"tiles L {p['block_l']} x N {p['block_n']}"
            return f"{clusters}, {tile}, {memory} with W and x of {p['stages']} sets in it"
        tile = f"{p.get('positions', p['block_l'])} positions, tiles L {p['block_l']} x N {p['block_n']}"
        x = "all of x" if p["resident"] else f"{p['stages']} tiles of x"
        return f"{p['grid']} blocks of {tile}, {memory} with {x} in it"

    launches = FORWARD_KERNELS[forward["kernel"]] + (" + ForwardCombine" if forward["split"] else "")
    parts = f"{backward['tiles']} tiles x {backward['splits']} parts of {backward['rows_per_split']} rows"
    return {
        "configurations": "the model of csrc/cuda/plan.h, not measured",
        "forward": f"{launches}, {blocks(forward)}",
        "forward scratch": f"{forward['scratch']} bytes",
        "forward estimate": f"{forward['bytes']} bytes, {forward['operations']} operations",
        "backward": f"{BACKWARD_KERNELS[backward['form']]} + BackwardReduce, {blocks(backward)}",
        "backward form": FORMS[backward["form"]],
        "backward scratch": f"{backward['scratch']} bytes",
        "backward estimate": f"{backward['bytes']} bytes, {backward['operations']} operations",
        "weight gradient": parts if needs_weight else "none",
    }


# Which of cuda and triton measured faster, GPU name -> class of calls -> backend. A class is what `workload`
# returns.


@functools.cache
def measured() -> dict[str, dict[str, str]]:
    """The table of measured winners."""
    found: dict[str, dict[str, str]] = json.loads(MEASURED.read_text())
    return found


def workload(x: torch.Tensor) -> str:
    """The class of calls that share a winner: the size of an element of x, and how long its sets are."""
    length = "packed" if x.dim() == 2 else "long" if x.size(1) > 64 else "short"
    return f"{8 * x.element_size()}-bit {length}"
