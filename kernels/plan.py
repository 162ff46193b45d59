"""Launch planning: which kernels run, on what grid, with which tiles. Plain Python: no Triton, no device.

A plan depends on shapes, dtypes and the bound of the lengths, and the choice of tiles on the GPU's name where
`winners.json` has a measured entry for it; never on the number of multiprocessors. Equal calls give equal
bits.

The model behind the tiles, where nothing was measured:

- A program keeps BLOCK_L positions of one set and BLOCK_N units, and walks over the features BLOCK_M at a
  time. A set of at most `LONGEST` positions is one block; the smallest power of two that holds it, at least
  16 (what matrix instructions take), wastes least.
- Shared memory holds the tiles in flight: stages * BLOCK_M * (rows of the tiles) * element size. It is kept
  below `SHARED` where 32 features allow, so that two programs fit a multiprocessor that has 100 KB, which
  hides the latency of one behind the work of the other, and four one that has 227 KB.
- Bytes in flight: a multiprocessor of an H200 takes 33 GB/s of 4.3 TB/s, and a load takes somewhat less than
  a microsecond, so some 30 KB must be under way: two programs with two stages of 8 KB each, or more.
- Fewer than `PROGRAMS` programs leave multiprocessors idle: units are then cut finer, down to 16.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

WINNERS = Path(__file__).resolve().parent / "winners.json"
LONGEST = {2: 256, 4: 64, 8: 32}  # positions of a forward block, by element size
LONGEST_BACKWARD = {2: 64, 4: 32, 8: 16}
LONGEST_GRAM = 32  # G = d dᵀ and what becomes of it stay in registers
# By element size. In float32 its error on frames that nearly cancel (||d|| = 100 ||u||) is 6 times that of
# plain torch; a half type's own rounding is far above it.
GRAM = (2,)
UNITS = {2: 64, 4: 32, 8: 16}  # units of a tile, by element size
UNITS_BACKWARD = {2: 64, 4: 64, 8: 16}
SHARED = 48 << 10  # bytes of a program's tiles in flight
COMBINED = 16 << 10  # bytes of a tile of `forward_combine`, which stays in registers
PROGRAMS = 128  # what keeps a large GPU busy
ROWS = {2: 64, 4: 32, 8: 16}  # rows of x that a step of the weight gradient takes
SMALLEST = 16  # what matrix instructions take, in every direction
LAYOUTS = ("padded", "lengths", "mask", "packed")
WEIGHTINGS = ("average", "scores", "linear")


@dataclass(frozen=True)
class Config:
    """Tile sizes of one kernel, and how it is compiled."""

    block_l: int
    block_n: int
    block_m: int
    warps: int
    stages: int

    def __str__(self) -> str:
        tile = f"L {self.block_l} x N {self.block_n} x M {self.block_m}"
        return f"{tile}, {self.warps} warps, {self.stages} stages"


@dataclass(frozen=True)
class Problem:
    """What a plan depends on."""

    batch: int  # B
    length: int  # L, or T when packed
    longest: int  # an upper bound of the positions of a set
    features: int  # M
    units: int  # N
    itemsize: int  # of x
    weighting: str  # one of WEIGHTINGS
    layout: str  # one of LAYOUTS
    shift: bool = True
    kept: bool = False  # whether the forward keeps the scores
    relaxed: bool = False  # whether float32 products may be TF32
    gpu: str = ""  # the device's name

    @property
    def rows(self) -> int:
        """Positions of all sets together, valid or not."""
        return self.length if self.layout == "packed" else self.batch * self.length


@dataclass(frozen=True)
class ForwardPlan:
    """Launches of a forward pass: `forward_blocks`, and `forward_combine` if `split`."""

    config: Config
    split: bool  # whether a set may have several blocks
    blocks: int  # blocks of every padded set
    all_blocks: int  # blocks of all sets
    unit_blocks: int
    combine_m: int  # features of a tile of `forward_combine`
    combine_c: int  # blocks of a tile of `forward_combine`

    @property
    def grid(self) -> int:
        """Programs of `forward_blocks`."""
        return self.all_blocks * self.unit_blocks


@dataclass(frozen=True)
class BackwardPlan:
    """Launches of a backward pass: `backward_blocks`, if split `backward_sums` and `backward_blocks` again,
    then `backward_reduce`.
    """

    config: Config
    gram: bool  # the Gram form, which does not read y
    split: bool
    blocks: int
    all_blocks: int
    reduce: Config  # block_l is the rows of a step
    splits: int  # parts of the rows in the weight gradient
    rows_per_split: int
    tiles: int  # tiles of the weight gradient

    @property
    def grid(self) -> int:
        """Programs of `backward_blocks`."""
        return self.all_blocks


def power_of_two(value: int) -> int:
    """The smallest power of two that is not below `value`."""
    return 1 << max(value - 1, 0).bit_length()


def _tile(value: int, largest: int) -> int:
    return min(max(power_of_two(value), SMALLEST), largest)


def _block_m(tile_rows: int, itemsize: int, features: int, stages: int) -> int:
    """Features of a tile: as many as `SHARED` allows with `stages` tiles in flight, 32 … 128.

    Full float32 has no matrix instruction, nor float64 on some GPUs: such products are unrolled over
    registers, which hold 32 features.
    """
    if itemsize > 2:
        return _tile(features, 32)
    room = SHARED // (stages * tile_rows * itemsize)
    return min(max(1 << max(room.bit_length() - 1, 0), 32), _tile(features, 128))


def _blocks(p: Problem, block_l: int) -> tuple[bool, int, int]:
    """Whether sets are split, the blocks of a padded set, the blocks of all sets."""
    blocks = max(math.ceil(p.length / block_l), 1)
    if p.layout == "packed":
        # What kernels/common.py's `first_block` deals out, and one for the rows behind the last set.
        return p.longest > block_l, 1, p.length // block_l + p.batch + 1
    return blocks > 1, blocks, p.batch * blocks


def dtype_class(itemsize: int) -> str:
    """Name of the configurations that dtypes of a size share."""
    return f"{8 * itemsize}-bit"


def key(kernel: str, itemsize: int, config: Config) -> str:
    """Under which name `winners.json` has a measured configuration: kernel, dtype, L class, N class."""
    return f"{kernel} {dtype_class(itemsize)} L{config.block_l} N{config.block_n}"


@functools.cache
def winners() -> dict[str, dict[str, dict[str, int]]]:
    """Measured configurations: GPU name -> key -> block_m, warps, stages."""
    found: dict[str, dict[str, dict[str, int]]] = json.loads(WINNERS.read_text())
    return found


def _best(kernel: str, p: Problem, config: Config) -> Config:
    """The measured winner on this GPU if there is one, else the model's choice."""
    found = winners().get(p.gpu, {}).get(key(kernel, p.itemsize, config))
    if found is None:
        return config
    block_m = min(found["block_m"], _tile(p.features, 1 << 30))
    return dataclasses.replace(config, block_m=block_m, warps=found["warps"], stages=found["stages"])


def neighbours(config: Config, itemsize: int, kernel: str = "forward") -> list[Config]:
    """What FASTAC_AUTOTUNE=1 tries: the configuration itself first, then one step in each direction.

    The tile in L and N stays, since the grid follows from it; in "reduce" that of M too.
    """
    found = [config]
    tile_rows = config.block_l + config.block_n * (2 if kernel == "backward" else 1)
    # A or dS, in float32 at least, comes in stages too.
    factor = config.block_l * config.block_n * max(itemsize, 4) if kernel == "backward" else 0
    for change in (
        {"block_m": config.block_m * 2},
        {"block_m": config.block_m // 2},
        {"warps": config.warps * 2},
        {"warps": config.warps // 2},
        {"stages": config.stages + 1},
        {"stages": config.stages - 1},
    ):
        other = dataclasses.replace(config, **change)
        sensible = min(32, config.block_m) <= other.block_m <= 256 and other.warps in (2, 4, 8)
        fits = other.stages * (other.block_m * tile_rows * itemsize + factor) <= 2 * SHARED
        if sensible and fits and other.stages >= 1 and (kernel != "reduce" or "block_m" not in change):
            found.append(other)
    return found


def forward_plan(p: Problem) -> ForwardPlan:
    """How a forward pass is launched."""
    block_l = _tile(p.longest, LONGEST[p.itemsize])
    split, blocks, all_blocks = _blocks(p, block_l)
    block_n = _tile(p.units, UNITS[p.itemsize])
    while block_n > SMALLEST and all_blocks * math.ceil(p.units / block_n) < PROGRAMS:
        block_n //= 2
    stages = 3 if p.itemsize == 2 else 2
    block_m = _block_m(block_l + block_n, p.itemsize, p.features, stages)
    warps = 8 if block_l * block_n > 4096 or p.itemsize > 2 else 4
    config = _best("forward", p, Config(block_l, block_n, block_m, warps, stages))
    accumulated = 8 if p.itemsize == 8 else 4
    combine_m = _tile(p.features, 8192 // accumulated)  # one tile holds all features of most sets
    combine_c = min(COMBINED // accumulated // combine_m, 64)
    unit_blocks = math.ceil(p.units / config.block_n)
    return ForwardPlan(config, split, blocks, all_blocks, unit_blocks, combine_m, combine_c)


def backward_plan(p: Problem) -> BackwardPlan:
    """How a backward pass is launched."""
    block_l = _tile(p.longest, LONGEST_BACKWARD[p.itemsize])
    split, blocks, all_blocks = _blocks(p, block_l)
    block_n = _tile(p.units, UNITS_BACKWARD[p.itemsize] // (2 if block_l > 32 else 1))
    # The Gram form saves reading y, N M elements, and costs 2 L² M operations for every block of units.
    gram = p.itemsize in GRAM and p.shift and not split and p.weighting != "average"
    gram = gram and block_l <= LONGEST_GRAM and p.longest <= 2 * p.units and p.features > 16
    tight = p.kept or (p.weighting == "scores" and p.layout == "mask")
    gram = gram and p.units <= (32 if tight else block_n)  # more do not fit the registers
    # Of all configurations, compiled by `make aot AOT_ARGS=--all`, the largest whose registers do not spill
    if p.itemsize == 2:
        stages, warps = 3 if gram else 2, 8 if gram or block_l * block_n >= 2048 else 4
        block_m = 32
        if block_l <= 32:
            block_m = _block_m(block_l + 2 * block_n, 2, p.features, stages)
            block_m = min(block_m, 32) if gram else block_m
            if p.features % 8 != 0:  # no 16-byte copies: features come through registers
                block_m = max(block_m // 2, SMALLEST)
    else:
        packed = p.layout == "packed"  # finding a block's set takes registers
        stages, warps = 1, 8 if p.itemsize == 4 and not p.relaxed and not packed else 4
        block_m = _tile(p.features, 16 if p.itemsize == 4 or packed else 32)
    config = _best("backward", p, Config(block_l, block_n, block_m, warps, stages))

    step = ROWS[p.itemsize]
    block_n = _tile(p.units, UNITS[p.itemsize])
    stages = 1 if p.itemsize == 8 or p.relaxed else 2
    block_m = _block_m(step + block_n, p.itemsize, p.features, stages)
    reduce = _best("reduce", p, Config(step, block_n, block_m, 4 if p.itemsize == 2 else 8, stages))
    tiles = math.ceil(p.units / reduce.block_n) * math.ceil(p.features / reduce.block_m)
    splits = 1
    if p.weighting == "linear":
        steps = max(math.ceil(p.rows / step), 1)
        splits = min(max(2 * PROGRAMS // tiles, 1), max(steps // 4, 1))
        per_split = math.ceil(steps / splits)
        splits = math.ceil(steps / per_split)
    else:
        per_split = 1
    return BackwardPlan(config, gram, split, blocks, all_blocks, reduce, splits, per_split * step, tiles)


# From the arguments of a call


def upper_bound(x: Tensor, offsets: Tensor | None, max_length: int | None) -> int:
    """An upper bound of the positions of a set; a device is never asked."""
    if offsets is None:
        return x.size(1)
    rows = x.size(0)
    if max_length is not None:
        return min(max_length, rows)
    if offsets.device.type == "cpu":
        return min(max(int(offsets.diff().max()), 0), rows) if offsets.numel() > 1 else 0
    return rows


@functools.cache
def _device_name(device: torch.device) -> str:
    """The GPU's name; empty for other devices, and for fake tensors where there is no GPU."""
    there = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_name(device) if there else ""


def _relaxed(dtype: torch.dtype) -> bool:
    """Whether torch's setting lets float32 products be TF32; other dtypes have one precision only."""
    nvidia = torch.version.hip is None
    return nvidia and dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def problem(
    x: Tensor,
    weight: Tensor | None,
    scores: Tensor | None,
    alpha: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    offsets: Tensor | None,
    max_length: int | None,
    kept: bool,
    dtype: torch.dtype | None = None,
) -> Problem:
    """What a plan for this call depends on. `dtype` is what x is computed in, if not its own (autocast)."""
    if weight is not None:
        units, weighting = weight.size(0), "linear"
    elif scores is not None:
        units, weighting = scores.size(-2), "scores"
    else:
        units, weighting = 1 if alpha is None else alpha.numel(), "average"
    given = [k for k, t in zip(LAYOUTS[1:], (lengths, mask, offsets), strict=True) if t is not None]
    return Problem(
        batch=x.size(0) if offsets is None else offsets.numel() - 1,
        length=x.size(0) if offsets is not None else x.size(1),
        longest=upper_bound(x, offsets, max_length),
        features=x.size(-1),
        units=units,
        itemsize=(x.dtype if dtype is None else dtype).itemsize,
        weighting=weighting,
        layout=given[0] if given else "padded",
        shift=alpha is not None,
        kept=kept,
        relaxed=_relaxed(dtype or x.dtype),
        gpu=_device_name(x.device.index or 0)
        if x.device.type == "cuda" and torch.cuda.is_available()
        else "",
    )


def autotunes() -> bool:
    """Whether FASTAC_AUTOTUNE=1 asks for configurations to be timed."""
    return os.environ.get("FASTAC_AUTOTUNE") == "1"


def describe(p: Problem) -> dict[str, object]:
    """The plan of both passes, for people: `fastac.explain` prints it."""
    forward, backward = forward_plan(p), backward_plan(p)
    source = "the model of kernels/plan.py"
    if p.gpu in winners():
        source = f"measured on {p.gpu} where kernels/winners.json has them, else {source}"
    launches = ["forward_blocks", "forward_combine"] if forward.split else ["forward_blocks"]
    behind = (
        ["backward_blocks", "backward_sums", "backward_blocks"] if backward.split else ["backward_blocks"]
    )
    behind.append("backward_reduce")
    accumulated = 8 if p.itemsize == 8 else 4
    shares = forward.all_blocks * p.units * (p.features + 3) if forward.split else 0
    mix = 2 * p.rows * (p.units + 1) + 5 * p.batch * p.units
    sums = backward.all_blocks * p.units if backward.split else 0
    parts = backward.splits * p.units * p.features if backward.splits > 1 else 0
    weight = f"{backward.tiles} tiles x {backward.splits} parts of {backward.rows_per_split} rows"
    return {
        "configurations": "timed at the first call" if autotunes() else source,
        "forward": f"{' + '.join(launches)}, {forward.grid} programs, {forward.config}",
        "forward scratch": f"{shares * accumulated} bytes",
        "backward": f"{' + '.join(behind)}, {backward.grid} programs, {backward.config}",
        "backward form": "Gram (y is not read)" if backward.gram else "direct",
        "backward scratch": f"{(mix + sums + parts) * accumulated} bytes",
        "weight gradient": f"{weight}, {backward.reduce}" if p.weighting == "linear" else "none",
    }
