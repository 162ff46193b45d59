"""y = x * softmax(scores) over the positions of a set, one softmax per set and feature: kernels and launches.

The attention block of You & Korhonen, *Attention Boosted Deep Networks for Video Classification*, ICIP 2020.

    x, scores, y (B, L, M)     stats (2, B, M): greatest score, sum of exponentials
    a = softmax over L of scores       y = x a       dx = a dy       dscores = a (dy x - sum_l a dy x)

A program takes one set and BLOCK_M features; a column of its tiles [BLOCK_L, BLOCK_M] is one softmax. With
ONE_BLOCK the tile holds the whole set, stays in registers, and everything is read once. Otherwise the
positions are walked over twice, for the sums and to write; the second time they mostly come from the cache.

x, scores and dy come with all their strides and are never copied: scores of a layer over time are a
transposed (B, M, L), dy of a sum or a mean has strides of 0. What is returned is contiguous. One program adds
up a column, in an order that shapes and strides fix, so equal calls give equal bits. Not measured on a GPU.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, plan
from .common import LENGTHS, PADDED, columns, divide, load_tile, valid_count, wide

# Kernels


@triton.jit
def _load_scores(base, l, cols, row_stride, col_stride, valid, there, ACC: tl.constexpr):
    """Scores [BL, BM], -inf where the position is excluded."""
    s = load_tile(base, l, cols, row_stride, col_stride, valid, there).to(ACC)
    return tl.where(valid[:, None], s, float("-inf"))


@triton.jit
def _level(greatest):
    """What is subtracted from the scores of a column; 0 if none takes part."""
    return tl.where(greatest == float("-inf"), 0.0, greatest)


@triton.jit
def _inverse(total, ACC: tl.constexpr):
    """1 / total, 1 if no position takes part; NaN stays NaN."""
    return divide(tl.full(total.shape, 1.0, ACC), tl.where(total == 0, 1.0, total), ACC)


@triton.jit
def _where_taken(s, value):
    """`value` where the position takes part, 0 where it does not, whatever x and dy hold there."""
    return tl.where(s == float("-inf"), 0.0, value)


@triton.jit(do_not_specialize=["batch", "length", "feature_blocks"])
def softmax_weight_forward(
    x_ptr, scores_ptr, lengths_ptr, y_ptr, stats_ptr,
    batch, length, M, feature_blocks, x_b, x_l, x_m, scores_b, scores_l, scores_m,
    LAYOUT: tl.constexpr, ONE_BLOCK: tl.constexpr, ACC: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """y and stats of BLOCK_M features of one set."""
    b = tl.program_id(0) // feature_blocks
    cols, there = columns(wide(tl.program_id(0) % feature_blocks) * BLOCK_M, M, BLOCK_M)
    count = valid_count(b, wide(length), lengths_ptr, batch, LAYOUT)
    x_base, scores_base = x_ptr + wide(b) * x_b, scores_ptr + wide(b) * scores_b
    y_base = y_ptr + wide(b) * length * M
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty

    greatest = tl.full([BLOCK_M], float("-inf"), ACC)
    total = tl.zeros([BLOCK_M], ACC)
    if ONE_BLOCK:
        l = wide(0) + tl.arange(0, BLOCK_L)
        s = _load_scores(scores_base, l, cols, scores_l, scores_m, l < count, there, ACC)
        x = load_tile(x_base, l, cols, x_l, x_m, l < count, there).to(ACC)
        greatest = tl.max(s, axis=0)
        p = tl.exp(s - _level(greatest)[None, :])
        total = tl.sum(p, axis=0)
        y = _where_taken(s, p * _inverse(total, ACC)[None, :] * x)
        out = y_base + l[:, None] * M + cols[None, :]
        tl.store(out, y.to(DTYPE), (l < length)[:, None] & there[None, :])
    else:
        for l0 in range(0, count, BLOCK_L):
            l = wide(l0) + tl.arange(0, BLOCK_L)
            s = _load_scores(scores_base, l, cols, scores_l, scores_m, l < count, there, ACC)
            higher = tl.maximum(greatest, tl.max(s, axis=0))
            level = _level(higher)
            total = total * tl.exp(greatest - level) + tl.sum(tl.exp(s - level[None, :]), axis=0)
            greatest = higher
        level, inverse = _level(greatest), _inverse(total, ACC)
        for l0 in range(0, length, BLOCK_L):
            l = wide(l0) + tl.arange(0, BLOCK_L)
            s = _load_scores(scores_base, l, cols, scores_l, scores_m, l < count, there, ACC)
            x = load_tile(x_base, l, cols, x_l, x_m, l < count, there).to(ACC)
            y = _where_taken(s, tl.exp(s - level[None, :]) * inverse[None, :] * x)
            out = y_base + l[:, None] * M + cols[None, :]
            tl.store(out, y.to(DTYPE), (l < length)[:, None] & there[None, :])
    tl.store(stats_ptr + wide(b) * M + cols, greatest, there)
    tl.store(stats_ptr + (wide(batch) + b) * M + cols, total, there)


@triton.jit(do_not_specialize=["batch", "length", "feature_blocks"])
def softmax_weight_backward(
    dy_ptr, x_ptr, scores_ptr, lengths_ptr, stats_ptr, dx_ptr, dscores_ptr,
    batch, length, M, feature_blocks, dy_b, dy_l, dy_m, x_b, x_l, x_m, scores_b, scores_l, scores_m,
    LAYOUT: tl.constexpr, ONE_BLOCK: tl.constexpr, NEED_X: tl.constexpr, NEED_SCORES: tl.constexpr,
    ACC: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """dx and dscores, what is needed of them, of BLOCK_M features of one set."""
    b = tl.program_id(0) // feature_blocks
    cols, there = columns(wide(tl.program_id(0) % feature_blocks) * BLOCK_M, M, BLOCK_M)
    count = valid_count(b, wide(length), lengths_ptr, batch, LAYOUT)
    dy_base, x_base = dy_ptr + wide(b) * dy_b, x_ptr + wide(b) * x_b
    scores_base = scores_ptr + wide(b) * scores_b
    dx_base, dscores_base = dx_ptr + wide(b) * length * M, dscores_ptr + wide(b) * length * M

    greatest = tl.load(stats_ptr + wide(b) * M + cols, there, other=0)
    total = tl.load(stats_ptr + (wide(batch) + b) * M + cols, there, other=1)
    level, inverse = _level(greatest), _inverse(total, ACC)
    if ONE_BLOCK:
        l = wide(0) + tl.arange(0, BLOCK_L)
        s = _load_scores(scores_base, l, cols, scores_l, scores_m, l < count, there, ACC)
        dy = load_tile(dy_base, l, cols, dy_l, dy_m, l < count, there).to(ACC)
        a = tl.exp(s - level[None, :]) * inverse[None, :]
        at = l[:, None] * M + cols[None, :]
        inside = (l < length)[:, None] & there[None, :]
        if NEED_SCORES:
            e = dy * load_tile(x_base, l, cols, x_l, x_m, l < count, there).to(ACC)
            mean = tl.sum(_where_taken(s, a * e), axis=0)
            dscores = _where_taken(s, a * (e - mean[None, :]))
            tl.store(dscores_base + at, dscores.to(dscores_ptr.dtype.element_ty), inside)
        if NEED_X:
            tl.store(dx_base + at, _where_taken(s, a * dy).to(dx_ptr.dtype.element_ty), inside)
    else:
        mean = tl.zeros([BLOCK_M], ACC)
        if NEED_SCORES:
            for l0 in range(0, count, BLOCK_L):
                l = wide(l0) + tl.arange(0, BLOCK_L)
                s = _load_scores(scores_base, l, cols, scores_l, scores_m, l < count, there, ACC)
                dy = load_tile(dy_base, l, cols, dy_l, dy_m, l < count, there).to(ACC)
                e = dy * load_tile(x_base, l, cols, x_l, x_m, l < count, there).to(ACC)
                a = tl.exp(s - level[None, :]) * inverse[None, :]
                mean += tl.sum(_where_taken(s, a * e), axis=0)
        for l0 in range(0, length, BLOCK_L):
            l = wide(l0) + tl.arange(0, BLOCK_L)
            s = _load_scores(scores_base, l, cols, scores_l, scores_m, l < count, there, ACC)
            dy = load_tile(dy_base, l, cols, dy_l, dy_m, l < count, there).to(ACC)
            a = tl.exp(s - level[None, :]) * inverse[None, :]
            at = l[:, None] * M + cols[None, :]
            inside = (l < length)[:, None] & there[None, :]
            if NEED_SCORES:
                e = dy * load_tile(x_base, l, cols, x_l, x_m, l < count, there).to(ACC)
                dscores = _where_taken(s, a * (e - mean[None, :]))
                tl.store(dscores_base + at, dscores.to(dscores_ptr.dtype.element_ty), inside)
            if NEED_X:
                tl.store(dx_base + at, _where_taken(s, a * dy).to(dx_ptr.dtype.element_ty), inside)


# Tiles

# Nothing here was measured. Memory bounds both passes, so a tile should read whole lines and keep many bytes
# under way; arithmetic is some ten instructions an element.
# - A row of a tile is 128 bytes where it can be, a line of the cache, or more. 64 bytes, two sectors, waste
#   none either, and are what a tall tile or a small batch gets.
# - 2048 elements are 4 to 8 KB of each operand under way, and so small a program leaves room for several on a
#   multiprocessor, whose loads overlap.
# - A thread holds 16 elements in the forward and 8 in the backward, which has up to four tiles alive (half of
#   that in float64). With 16 in the backward, `make aot` finds spills where rows are not aligned.
# - A set that one program of 16 warps can hold with rows of 64 bytes is read once: L up to 256 in half types
#   and 512 in the others, half of that in the backward, more where M is smaller than such a row.
# - Longer sets are streamed, 8 elements a thread: with 16, transposed operands take over 200 registers.
TILE = {2: 2048, 4: 2048, 8: 1024}  # elements, by element size
WARPS = {False: 4, True: 8}  # of such a tile: forward, backward
ROW, LEAST_ROW = 128, 64  # bytes of a tile's row
STREAM_WARPS, MOST_WARPS = 8, 16


@dataclass(frozen=True)
class Tiles:
    """How a pass is launched."""

    block_l: int
    block_m: int
    warps: int
    one_block: bool  # whether a tile holds all positions of a set
    feature_blocks: int


def tiles(batch: int, length: int, features: int, itemsize: int, *, backward: bool) -> Tiles:
    """Tiles of a call with these B, L, M and size of x's elements."""
    warp = TILE[itemsize] // WARPS[backward]  # elements of a warp
    widest = plan.power_of_two(features)
    least = min(LEAST_ROW // itemsize, widest)
    whole = max(plan.power_of_two(length), 2)
    one_block = whole * least <= MOST_WARPS * warp
    if one_block:
        block_m = min(max(TILE[itemsize] // whole, least), widest)
    else:
        block_m = min(ROW // itemsize, widest)
    while block_m > least and batch * triton.cdiv(features, block_m) < plan.PROGRAMS:
        block_m //= 2
    block_l = whole if one_block else TILE[itemsize] // block_m
    warps = max(block_l * block_m // warp, 1) if one_block else STREAM_WARPS
    return Tiles(block_l, block_m, warps, one_block, triton.cdiv(features, block_m))


# Launches

_DTYPES = {
    torch.float16: tl.float32,
    torch.bfloat16: tl.float32,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def empty(x: Tensor, *shape: int, dtype: torch.dtype) -> Tensor:
    """Everything a call allocates comes from here."""
    return x.new_empty(shape, dtype=dtype)


def _accumulation(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check(x: Tensor, scores: Tensor, lengths: Tensor | None) -> None:
    """Refuse operands that would make a kernel leave its tensors; `fastac.functional` explains to people."""
    good = x.dim() == 3 and x.dtype in _DTYPES and x.size(-1) > 0
    good = good and scores.shape == x.shape and scores.dtype in (x.dtype, torch.float32)
    if lengths is not None:
        good = good and tuple(lengths.shape) == (x.size(0),) and lengths.dtype == torch.int64
    good = good and all(t is None or t.device == x.device for t in (scores, lengths))
    if not good:
        raise RuntimeError("fastac: the operands' shapes, dtypes or devices contradict each other")


def _launch(
    kernel: Any,
    x: Tensor,
    scores: Tensor,
    lengths: Tensor | None,
    given: dict[str, Any],
    *,
    backward: bool,
) -> None:
    """One launch over all sets and features, with the arguments that both passes have and those given."""
    batch, length, features = x.shape
    if batch == 0:
        return
    found = tiles(batch, length, features, x.dtype.itemsize, backward=backward)
    arguments = {
        "x_ptr": x, "scores_ptr": scores, "lengths_ptr": None if lengths is None else lengths.contiguous(),
        "batch": batch, "length": length, "M": features, "feature_blocks": found.feature_blocks,
        **dict(zip(("x_b", "x_l", "x_m"), x.stride(), strict=True)),
        **dict(zip(("scores_b", "scores_l", "scores_m"), scores.stride(), strict=True)),
        "LAYOUT": PADDED.value if lengths is None else LENGTHS.value, "ONE_BLOCK": found.one_block,
        "ACC": _DTYPES[x.dtype], "BLOCK_L": found.block_l, "BLOCK_M": found.block_m,
    }  # fmt: skip
    device = torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
    with device:
        launch.start(kernel, batch * found.feature_blocks, arguments | given, found.warps, stages=1)


def forward(x: Tensor, scores: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """y (B, L, M) in the dtype of x, and stats (2, B, M) in the accumulation type, both contiguous.

    x and scores (B, L, M) of any strides, scores in the dtype of x or float32; lengths (B,) int64 are clamped
    to 0...L. Anything else is a RuntimeError.
    """
    _check(x, scores, lengths)
    batch, _, features = x.shape
    y = empty(x, *x.shape, dtype=x.dtype)
    stats = empty(x, 2, batch, features, dtype=_accumulation(x))
    _launch(softmax_weight_forward, x, scores, lengths, {"y_ptr": y, "stats_ptr": stats}, backward=False)
    return y, stats


def backward(
    dy: Tensor, x: Tensor, scores: Tensor, lengths: Tensor | None, stats: Tensor, needs: int
) -> tuple[Tensor, Tensor]:
    """dx if bit 0 of `needs` is set and dscores if bit 1 is, contiguous; (0,) for one that is not.

    dy (B, L, M) in the dtype of x, of any strides; stats from `forward`. Anything else is a RuntimeError.
    """
    _check(x, scores, lengths)
    good = dy.shape == x.shape and dy.dtype == x.dtype and dy.device == stats.device == x.device
    good = good and tuple(stats.shape) == (2, x.size(0), x.size(2)) and stats.dtype == _accumulation(x)
    if not good:
        raise RuntimeError("fastac: dy and the saved tensors do not fit the operands")
    need_x, need_scores = bool(needs & 1), bool(needs & 2)
    dx = empty(x, *(x.shape if need_x else (0,)), dtype=x.dtype)
    dscores = empty(x, *(x.shape if need_scores else (0,)), dtype=scores.dtype)
    if (need_x or need_scores) and x.size(1) > 0:
        given = {
            "dy_ptr": dy, "stats_ptr": stats.contiguous(), "dx_ptr": dx, "dscores_ptr": dscores,
            **dict(zip(("dy_b", "dy_l", "dy_m"), dy.stride(), strict=True)),
            "NEED_X": need_x, "NEED_SCORES": need_scores,
        }  # fmt: skip
        _launch(softmax_weight_backward, x, scores, lengths, given, backward=True)
    return dx, dscores
