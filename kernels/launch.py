"""From the operators' arguments to kernel launches, for the `triton` backend.

The three functions take the arguments of the operators of `fastac.ops`. They allocate, plan and launch on the
current stream of x's device; they never wait for it and never read a value from it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import plan
from .backward import backward_blocks, backward_sums
from .common import AVERAGE, LENGTHS, LINEAR, MASK, PACKED, PADDED, SCORES
from .forward import forward_blocks, forward_combine
from .plan import Config
from .reduce import backward_reduce

_LAYOUTS = {"padded": PADDED.value, "lengths": LENGTHS.value, "mask": MASK.value, "packed": PACKED.value}
_WEIGHTINGS = {"average": AVERAGE.value, "scores": SCORES.value, "linear": LINEAR.value}


class Call:
    """The checked operands of one call, their strides, and what all kernels have in common."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor | None,
        scores: Tensor | None,
        position_bias: Tensor | None,
        alpha: Tensor | None,
        beta: Tensor | None,
        lengths: Tensor | None,
        mask: Tensor | None,
        offsets: Tensor | None,
        eps: float,
        max_length: int | None,
        kept: bool,
    ) -> None:
        _check(x, weight, scores, position_bias, alpha, beta, lengths, mask, offsets)
        self.x, self.weight, self.scores, self.bias, self.mask = x, weight, scores, position_bias, mask
        self.alpha, self.beta, self.lengths, self.offsets = (
            None if t is None else t.contiguous() for t in (alpha, beta, lengths, offsets)
        )
        self.eps = eps
        self.problem = plan.problem(x, weight, scores, alpha, lengths, mask, offsets, max_length, kept)
        p = self.problem
        self.acc = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.packed = p.layout == "packed"
        strides = (0, *x.stride()) if self.packed else x.stride()
        self.x_strides = dict(zip(("x_b", "x_l", "x_m"), strides, strict=True))
        self.sizes = {"batch": p.batch, "length": p.length, "M": p.features, "N": p.units}
        self.ragged = {"lengths_ptr": self.lengths, "offsets_ptr": self.offsets}
        self.masks = dict(
            zip(("mask_b", "mask_l"), mask.stride() if mask is not None else (0, 0), strict=True)
        )
        self.mask_bytes = None if mask is None else mask.view(torch.uint8)
        self.layout = _LAYOUTS[p.layout]
        self.precision = "tf32" if self.problem.relaxed else "ieee"
        # Products among computed values: nearly full float32, by matrix instructions where x is a half type.
        half = x.dtype in (torch.float16, torch.bfloat16)
        self.small_precision = "tf32x3" if half and torch.version.hip is None else self.precision

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Everything a call allocates comes from here; `dtype` is the accumulation type unless given."""
        return self.x.new_empty(shape, dtype=dtype or self.acc)

    @functools.cached_property
    def inputs(self) -> dict[str, Any]:
        """The operands both passes read, by the kernels' names for them."""
        weight_n, weight_m = (0, 0) if self.weight is None else self.weight.stride()
        scores_b, scores_n, scores_l = (0, 0, 0)
        if self.scores is not None:
            scores_b, scores_n, scores_l = (0, *self.scores.stride()) if self.packed else self.scores.stride()
        bias_n, bias_l = (0, 0) if self.bias is None else self.bias.stride()
        return {
            "x_ptr": self.x, "weight_ptr": self.weight, "scores_ptr": self.scores, "bias_ptr": self.bias,
            "alpha_ptr": self.alpha, "beta_ptr": self.beta, "mask_ptr": self.mask_bytes, **self.ragged,
            **self.sizes, "bias_length": 0 if self.bias is None else self.bias.size(1),
            **self.x_strides, "weight_n": weight_n, "weight_m": weight_m,
            "scores_b": scores_b, "scores_n": scores_n, "scores_l": scores_l,
            "bias_n": bias_n, "bias_l": bias_l, **self.masks,
            "EPS": self.eps, "WEIGHTING": _WEIGHTINGS[self.problem.weighting], "BIAS": self.bias is not None,
            "SHIFT": self.alpha is not None, "LAYOUT": self.layout, "ACC": _DTYPES[self.acc],
            "PRECISION": self.precision,
        }  # fmt: skip

    def device(self) -> contextlib.AbstractContextManager[Any]:
        """Launches inside go to x's device."""
        return torch.cuda.device(self.x.device) if self.x.is_cuda else contextlib.nullcontext()


_DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


def _check(
    x: Tensor,
    weight: Tensor | None,
    scores: Tensor | None,
    position_bias: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    offsets: Tensor | None,
) -> None:
    """Refuse operands that would make a kernel leave its tensors; `fastac.functional` explains to people."""
    packed = offsets is not None
    good = x.dim() == (2 if packed else 3) and x.dtype in _POINTERS and x.size(-1) > 0
    good = good and sum(t is not None for t in (lengths, mask, offsets)) <= 1
    good = good and not (weight is not None and scores is not None) and (alpha is None) == (beta is None)
    if good:
        batch = x.size(0) if offsets is None else offsets.numel() - 1
        units, features = (1 if alpha is None else alpha.numel()), x.size(-1)
        if weight is not None:
            good = weight.dim() == 2 and weight.size(1) == features and weight.dtype == x.dtype
            units = weight.size(0)
        if scores is not None:
            units = scores.size(-2) if scores.dim() >= 2 else 0
            shape = (units, x.size(0)) if packed else (batch, units, x.size(1))
            good = tuple(scores.shape) == shape and scores.dtype in (x.dtype, torch.float32)
        for t in (alpha, beta):
            good = good and (
                t is None or (tuple(t.shape) == (units,) and t.dtype in (x.dtype, torch.float32))
            )
        if position_bias is not None:
            good = good and weight is not None and position_bias.dim() == 2 and position_bias.size(0) == units
            good = good and position_bias.dtype in (x.dtype, torch.float32)
            good = good and (packed or position_bias.size(1) >= x.size(1))
        if lengths is not None:
            good = good and tuple(lengths.shape) == (batch,) and lengths.dtype == torch.int64
        if mask is not None:
            good = good and mask.shape == x.shape[:2] and mask.dtype == torch.bool
        if offsets is not None:
            good = good and offsets.dim() == 1 and batch >= 0 and offsets.dtype == torch.int64
        good = good and units > 0
        tensors = (weight, scores, position_bias, alpha, beta, lengths, mask, offsets)
        good = good and all(t is None or t.device == x.device for t in tensors)
    if not good:
        raise RuntimeError("fastac: the operands' shapes, dtypes or devices contradict each other")


_POINTERS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def start(kernel: Any, grid: int, arguments: dict[str, Any], warps: int, stages: int) -> None:
    """Every launch goes through here, those under `triton.autotune` excepted."""
    kernel[(grid,)](**arguments, num_warps=warps, num_stages=stages)


def _launch(kernel: Any, name: str, grid: int, config: Config, call: Call, arguments: dict[str, Any]) -> None:
    """One launch of `grid` programs."""
    if grid == 0:
        return
    blocks = {"BLOCK_L": "block_l", "BLOCK_N": "block_n", "BLOCK_M": "block_m", "BLOCK_R": "block_l"}
    taken = set(kernel.arg_names)
    arguments |= {k: getattr(config, v) for k, v in blocks.items() if k in taken}
    if plan.autotunes() and call.x.is_cuda:
        p = call.problem
        tuned = _tuned(kernel, name, config, p.itemsize, p.weighting, p.layout)
        del arguments["BLOCK_M"]
        tuned[(grid,)](**arguments)
    else:
        start(kernel, grid, arguments, config.warps, config.stages)


@functools.cache
def _tuned(
    kernel: Any, name: str, config: Config, itemsize: int, weighting: str, layout: str
) -> Callable[..., Any]:
    """The kernel behind `triton.autotune` over the neighbours of a configuration.

    One tuner for every class of calls; it times again for other features, units and constants.
    """
    keys = [name for name in kernel.arg_names if name.isupper() and name != "BLOCK_M"]  # M, N, constants
    found: Callable[..., Any] = triton.autotune(
        configs=[
            triton.Config({"BLOCK_M": c.block_m}, num_warps=c.warps, num_stages=c.stages)
            for c in plan.neighbours(config, itemsize, name)
        ],
        key=keys,
        restore_value=["mix_ptr"] if name == "backward" else [],
    )(kernel)
    return found


def _forward(call: Call, *, training: bool) -> tuple[Tensor, Tensor, Tensor]:
    p, x = call.problem, call.x
    planned = plan.forward_plan(p)
    y = call.empty(p.batch, p.units, p.features, dtype=x.dtype)
    stats = call.empty(3, p.batch, p.units) if training else call.empty(0)
    kept = training and p.kept and call.weight is not None
    saved = call.empty(*x.shape[:-1], p.units) if kept else call.empty(0)
    if y.numel() == 0:
        return y, stats, saved
    partial = partial_stats = None
    if planned.split:
        partial = call.empty(planned.all_blocks, p.units, p.features)
        partial_stats = call.empty(3, planned.all_blocks, p.units)
    with call.device():
        arguments = call.inputs | {
            "y_ptr": y, "stats_ptr": stats, "saved_ptr": saved,
            "partial_ptr": partial, "partial_stats_ptr": partial_stats,
            "blocks": planned.blocks, "all_blocks": planned.all_blocks, "unit_blocks": planned.unit_blocks,
            "STATS": training, "SAVE_SCORES": kept, "SPLIT": planned.split,
        }  # fmt: skip
        _launch(forward_blocks, "forward", planned.grid, planned.config, call, arguments)
        if planned.split:
            combined = {
                "alpha_ptr": call.alpha, "beta_ptr": call.beta, **call.ragged, "partial_ptr": partial,
                "partial_stats_ptr": partial_stats, "y_ptr": y, "stats_ptr": stats, **call.sizes,
                "blocks": planned.blocks, "all_blocks": planned.all_blocks, "EPS": call.eps,
                "SHIFT": call.alpha is not None, "LAYOUT": call.layout, "STATS": training,
                "ACC": _DTYPES[call.acc], "BLOCK_L": planned.config.block_l,
                "ONE_TILE": p.features <= planned.combine_m, "BLOCK_C": planned.combine_c,
                "BLOCK_M": planned.combine_m,
            }  # fmt: skip
            start(forward_combine, p.batch * p.units, combined, warps=8, stages=2)
    return y, stats, saved


def inference(
    x: Tensor,
    weight: Tensor | None,
    scores: Tensor | None,
    position_bias: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    offsets: Tensor | None,
    eps: float,
    max_length: int | None = None,
) -> Tensor:
    """y alone."""
    call = Call(
        x, weight, scores, position_bias, alpha, beta, lengths, mask, offsets, eps, max_length, kept=False
    )
    return _forward(call, training=False)[0]


def forward(
    x: Tensor,
    weight: Tensor | None,
    scores: Tensor | None,
    position_bias: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    offsets: Tensor | None,
    eps: float,
    save_scores: bool,
    max_length: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the softmax statistics and ||u||, and the scores if they are to be kept."""
    call = Call(
        x,
        weight,
        scores,
        position_bias,
        alpha,
        beta,
        lengths,
        mask,
        offsets,
        eps,
        max_length,
        kept=save_scores,
    )
    return _forward(call, training=True)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    scores: Tensor | None,
    position_bias: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    offsets: Tensor | None,
    eps: float,
    y: Tensor,
    stats: Tensor,
    saved_scores: Tensor,
    needs: int,
    max_length: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the first six operands that `needs` asks for by its bits, (0,) for the others."""
    kept = saved_scores.numel() > 0
    call = Call(
        x, weight, scores, position_bias, alpha, beta, lengths, mask, offsets, eps, max_length, kept=kept
    )
    p = call.problem
    _check_saved(call, dy, y, stats, saved_scores)
    operands = (x, weight, scores, position_bias, alpha, beta)
    wanted = [t is not None and bool(needs >> i & 1) for i, t in enumerate(operands)]
    grads = [
        call.empty(*t.shape, dtype=t.dtype) if t is not None and w else (dy if t is None else t).new_empty(0)
        for t, w in zip(operands, wanted, strict=True)
    ]
    if not any(wanted):
        return tuple(grads)  # type: ignore[return-value]
    if p.batch == 0 or p.rows == 0:
        for t in grads:
            t.zero_()
        if p.batch == 0:
            return tuple(grads)  # type: ignore[return-value]
    dx, dweight, dscores, dbias, dalpha, dbeta = grads
    need_x, need_weight, need_scores, need_bias, *need_shift = wanted
    planned = plan.backward_plan(p)

    mix = call.empty(2, p.rows, p.units)
    pivots = call.empty(2, p.rows)
    means = call.empty(4, p.batch, p.units)
    sums = call.empty(planned.all_blocks, p.units) if planned.split else None
    dshift = call.empty(2, p.batch, p.units)
    parts = planned.splits > 1 and need_weight
    partial = call.empty(planned.splits, p.units, p.features) if parts else None
    counters = call.empty(planned.tiles, dtype=torch.int32) if parts else None
    with call.device():
        dscores_strides = (0, p.rows) if call.packed else (p.units * p.length, p.length)
        arguments = call.inputs | {
            "dy_ptr": dy, "y_ptr": y.contiguous(), "stats_ptr": stats.contiguous(),
            "saved_ptr": saved_scores.contiguous(), "dx_ptr": dx, "dscores_ptr": dscores,
            "mix_ptr": mix, "pivots_ptr": pivots, "means_ptr": means, "sums_ptr": sums,
            "dshift_ptr": dshift, "counters_ptr": counters, "counters": planned.tiles if parts else 0,
            "blocks": planned.blocks, "rows": p.rows,
            **dict(zip(("dy_b", "dy_n", "dy_m"), dy.stride(), strict=True)),
            "dscores_b": dscores_strides[0], "dscores_n": dscores_strides[1],
            "SAVED": kept, "GRAM": planned.gram, "NEED_X": need_x, "NEED_SCORES": need_scores,
            "SMALL_PRECISION": call.small_precision,
            "ONE_UNIT_BLOCK": p.units <= planned.config.block_n,
        }  # fmt: skip
        for first, second in ((True, False), (False, True)) if planned.split else ((True, True),):
            launched = arguments | {"FIRST": first, "SECOND": second}
            _launch(backward_blocks, "backward", planned.grid, planned.config, call, launched)
            if first and not second:
                summed = {
                    "alpha_ptr": call.alpha, "beta_ptr": call.beta, **call.ragged,
                    "stats_ptr": arguments["stats_ptr"], "sums_ptr": sums, "means_ptr": means,
                    "dshift_ptr": dshift, **call.sizes, "blocks": planned.blocks, "EPS": eps,
                    "SHIFT": alpha is not None, "LAYOUT": call.layout, "ACC": _DTYPES[call.acc],
                    "BLOCK_L": planned.config.block_l, "BLOCK_N": 32, "BLOCK_C": 64,
                }  # fmt: skip
                start(backward_sums, p.batch * triton.cdiv(p.units, 32), summed, warps=4, stages=2)
        _reduce(call, planned, mix, pivots, dshift, partial, counters, dweight, dbias, dalpha, dbeta,
                need_weight, need_bias, any(need_shift))  # fmt: skip
    return dx, dweight, dscores, dbias, dalpha, dbeta


def _reduce(
    call: Call,
    planned: plan.BackwardPlan,
    mix: Tensor,
    pivots: Tensor,
    dshift: Tensor,
    partial: Tensor | None,
    counters: Tensor | None,
    dweight: Tensor,
    dbias: Tensor,
    dalpha: Tensor,
    dbeta: Tensor,
    need_weight: bool,
    need_bias: bool,
    need_shift: bool,
) -> None:
    """Launch the sums over all sets."""
    p, block = call.problem, planned.reduce
    if need_shift:  # both come from one sum
        dalpha = dalpha if dalpha.numel() else call.empty(p.units)
        dbeta = dbeta if dbeta.numel() else call.empty(p.units)
    weight_programs = planned.tiles * planned.splits if need_weight else 0
    shift_programs = triton.cdiv(p.units, 16) if need_shift else 0
    bias_programs = 0
    if need_bias:
        bias_programs = triton.cdiv(p.units, block.block_n) * triton.cdiv(dbias.size(1), block.block_l)
    arguments = {
        "x_ptr": call.x, "mask_ptr": call.mask_bytes, **call.ragged, "mix_ptr": mix, "pivots_ptr": pivots,
        "dshift_ptr": dshift, "partial_ptr": partial, "counters_ptr": counters,
        "dweight_ptr": dweight, "dbias_ptr": dbias, "dalpha_ptr": dalpha, "dbeta_ptr": dbeta,
        **call.sizes, "rows": p.rows, "bias_length": dbias.size(1) if need_bias else 0,
        "splits": planned.splits, "rows_per_split": planned.rows_per_split,
        "weight_programs": weight_programs, "shift_programs": shift_programs,
        **call.x_strides, **call.masks,
        "NEED_WEIGHT": need_weight, "NEED_BIAS": need_bias, "NEED_SHIFT": need_shift, "LAYOUT": call.layout,
        "ACC": _DTYPES[call.acc], "PRECISION": call.precision, "BLOCK_P": 16,
    }  # fmt: skip
    _launch(
        backward_reduce, "reduce", weight_programs + shift_programs + bias_programs, block, call, arguments
    )


def _check_saved(call: Call, dy: Tensor, y: Tensor, stats: Tensor, saved_scores: Tensor) -> None:
    """Refuse what no forward of this call returned."""
    p, x = call.problem, call.x
    shape = (p.batch, p.units, p.features)
    good = tuple(dy.shape) == tuple(y.shape) == shape and dy.dtype == y.dtype == x.dtype
    good = good and tuple(stats.shape) == (3, p.batch, p.units) and stats.dtype == call.acc
    if saved_scores.numel():
        kept = (*x.shape[:-1], p.units)
        good = good and call.weight is not None and tuple(saved_scores.shape) == kept
        good = good and saved_scores.dtype == call.acc
    good = good and all(t.device == x.device for t in (dy, y, stats, saved_scores))
    if not good:
        raise RuntimeError("fastac: dy and the saved tensors do not fit the operands")
