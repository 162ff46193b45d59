"""The native library `fastac/_C.abi3.so`: found next to the package, loaded once, or a reason why not.

It registers CPU implementations of the operators that `fastac.ops` defines. Importing it never touches CUDA.
"""

from __future__ import annotations

from pathlib import Path

import torch

PATH = Path(__file__).resolve().parent / "_C.abi3.so"
ISA_NAMES = ("baseline", "avx2", "avx512", "avx512_bf16", "avx512_bf16_dot")


def _load() -> str | None:
    """Load the library; the reason if that cannot be done, else None."""
    if not PATH.is_file():
        return "the native library is not built (installed with FASTAC_NATIVE=0, or not built in place)"
    try:
        torch.ops.load_library(str(PATH))
    except (OSError, RuntimeError) as error:
        return f"the native library {PATH.name} does not load: {error}"
    return None


why_not = _load()
available = why_not is None


def isa() -> str:
    """Name of the instruction set in use; RuntimeError if FASTAC_CPU_ISA names one this CPU cannot run."""
    return ISA_NAMES[int(torch.ops.fastac.cpu_isa())]


def supported_isas() -> tuple[str, ...]:
    """Names of the instruction sets that this CPU can run."""
    mask = int(torch.ops.fastac.cpu_supported_isas())
    return tuple(name for i, name in enumerate(ISA_NAMES) if mask >> i & 1)


def plan(lengths: list[int], units: int, features: int) -> dict[str, object]:
    """How the library cuts up a call, by name; it depends on these arguments alone, never on the threads.

    Args:
        lengths: valid positions of every set.
        units: N.
        features: M.
    """
    if not available:
        return {}
    rows, unit_block, ranges, segments, chunks = torch.ops.fastac.cpu_plan(lengths, units, features)
    return {
        "instruction set": isa(),
        "threads": torch.get_num_threads(),
        "rows of x packed at a time": rows,
        "units of a forward task": unit_block,
        "ranges of sets, forward": ranges,
        "segments of split sets": segments,
        "partial sums, backward": chunks,
    }
