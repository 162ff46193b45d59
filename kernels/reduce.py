"""Sums over all sets: dW = sum of dSᵀ x, and dalpha, dbeta and the position bias's gradient.

One launch. Every result is a sum in an order that depends on shapes only, so repeats agree bitwise.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import (
    LENGTHS,
    PACKED,
    columns,
    is_valid,
    load_tile,
    narrow,
    product,
    set_rows,
    valid_count,
    wide,
)


@triton.jit
def _weight_part(
    x_ptr, lengths_ptr, mask_ptr, offsets_ptr, mix_ptr, pivots_ptr,
    first, last, n, units, cols, there, batch, length, rows, N, x_b, x_l, x_m, mask_b, mask_l,
    LAYOUT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dSᵀ x over the rows first … last - 1. [BN, BM]"""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    HALF: tl.constexpr = DTYPE == tl.float16 or DTYPE == tl.bfloat16
    dw = tl.zeros([BLOCK_N, BLOCK_M], ACC)
    rest = tl.zeros([BLOCK_N], ACC)
    for r0 in range(first, last, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        if LAYOUT == PACKED:
            # Excluded rows are those behind the last set; b and l serve no other purpose.
            end, _ = set_rows(batch, offsets_ptr, batch, length, LAYOUT)
            valid = (r < last) & (r < end)
            x_at = r * x_l
        else:
            b = r // length
            l = r % length
            inside = r < last
            count = length + b * 0
            if LAYOUT == LENGTHS:
                count = tl.minimum(tl.load(lengths_ptr + b, inside, other=0).to(tl.int64), length)
            valid = inside & is_valid(b, l, tl.where(inside, count, 0), mask_ptr, mask_b, mask_l, LAYOUT)
            x_at = b * x_b + l * x_l
        x = load_tile(x_ptr, x_at, cols, 1, x_m, valid, there)  # [BR, BM]
        rho = tl.load(pivots_ptr + r, valid, other=0)
        ds = load_tile(mix_ptr + wide(rows) * N, n, r * N, 1, 1, units, valid)  # [BN, BR]
        ds_h, scale = narrow(ds, DTYPE)
        if not HALF:
            x = tl.where(valid[:, None] & there[None, :], x - rho[:, None], 0.0)
        dw += product(ds_h, scale, x, ACC, PRECISION)
        # The all-ones part of x: its common pivot drops out, since dS sums to 0 over every set.
        around = tl.load(pivots_ptr + rows + r, valid, other=0)
        rest += tl.sum(ds * around[None, :], axis=1)
        if HALF:
            rest -= tl.sum(ds_h.to(ACC) * scale * rho[None, :], axis=1)
    return dw + rest[:, None]


@triton.jit(
    do_not_specialize=[
        "batch",
        "length",
        "rows",
        "bias_length",
        "splits",
        "rows_per_split",
        "weight_programs",
        "shift_programs",
    ]
)
def backward_reduce(
    x_ptr, lengths_ptr, mask_ptr, offsets_ptr, mix_ptr, pivots_ptr, dshift_ptr,
    partial_ptr,  # scratch (splits, N, M), only if splits > 1
    counters_ptr,  # scratch (tiles of dW,) int32, zero before and after
    dweight_ptr, dbias_ptr, dalpha_ptr, dbeta_ptr,
    batch, length, rows, M, N, bias_length, splits, rows_per_split, weight_programs, shift_programs,
    x_b, x_l, x_m, mask_b, mask_l,
    NEED_WEIGHT: tl.constexpr, NEED_BIAS: tl.constexpr, NEED_SHIFT: tl.constexpr, LAYOUT: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The first `weight_programs` make dW, the next `shift_programs` dalpha and dbeta, the rest the bias."""
    pid = tl.program_id(0)
    unit_blocks = tl.cdiv(N, BLOCK_N)
    # Names are not shared by the branches: a name has one shape in all of them.
    if pid < weight_programs:
        if NEED_WEIGHT:
            split = pid % splits
            tile = pid // splits
            n = ((tile % unit_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
            units = n < N
            cols, there = columns((tile // unit_blocks) * BLOCK_M, M, BLOCK_M)
            first = wide(split) * rows_per_split
            dw = _weight_part(
                x_ptr, lengths_ptr, mask_ptr, offsets_ptr, mix_ptr, pivots_ptr,
                first, tl.minimum(first + rows_per_split, rows), n, units, cols, there,
                batch, length, rows, N, x_b, x_l, x_m, mask_b, mask_l,
                LAYOUT, ACC, PRECISION, BLOCK_N, BLOCK_M, BLOCK_R,
            )  # fmt: skip
            here = units[:, None] & there[None, :]
            at = n[:, None] * M + cols[None, :]
            if partial_ptr is None:
                tl.store(dweight_ptr + at, dw.to(dweight_ptr.dtype.element_ty), here)
            else:
                size = wide(N) * M
                tl.store(partial_ptr + split * size + at, dw, here)
                tl.debug_barrier()
                arrived = tl.atomic_add(counters_ptr + tile, 1, sem="acq_rel")
                if arrived == splits - 1:  # the last program of a tile sums its parts, in order
                    dw = tl.zeros([BLOCK_N, BLOCK_M], ACC)
                    for i in range(splits):
                        dw += tl.load(partial_ptr + i * size + at, here, other=0, cache_modifier=".cg")
                    tl.store(dweight_ptr + at, dw.to(dweight_ptr.dtype.element_ty), here)
                    tl.store(counters_ptr + tile, 0)
    elif pid < weight_programs + shift_programs:
        if NEED_SHIFT:
            shift_n = ((pid - weight_programs) * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)
            shift_units = shift_n < N
            all_sets = wide(batch) * N
            dalpha = tl.zeros([BLOCK_P], ACC)
            dbeta = tl.zeros([BLOCK_P], ACC)
            for b0 in range(0, batch, BLOCK_R):
                sets = (b0 + tl.arange(0, BLOCK_R)).to(tl.int64)
                some = sets < batch
                dalpha += tl.sum(load_tile(dshift_ptr, sets, shift_n, N, 1, some, shift_units), axis=0)
                dbeta += tl.sum(
                    load_tile(dshift_ptr + all_sets, sets, shift_n, N, 1, some, shift_units), axis=0
                )
            tl.store(dalpha_ptr + shift_n, dalpha.to(dalpha_ptr.dtype.element_ty), shift_units)
            tl.store(dbeta_ptr + shift_n, dbeta.to(dbeta_ptr.dtype.element_ty), shift_units)
    elif NEED_BIAS:
        part = pid - weight_programs - shift_programs
        bias_n = ((part % unit_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
        bias_units = bias_n < N
        l = ((part // unit_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
        dbias = tl.zeros([BLOCK_N, BLOCK_R], ACC)
        for b in range(batch):
            row, positions = set_rows(b, offsets_ptr, batch, length, LAYOUT)
            count = valid_count(b, positions, lengths_ptr, batch, LAYOUT)
            valid = is_valid(b, l, count, mask_ptr, mask_b, mask_l, LAYOUT)
            dbias += load_tile(mix_ptr + wide(rows) * N, bias_n, (row + l) * N, 1, 1, bias_units, valid)
        bias_at = dbias_ptr + bias_n[:, None] * bias_length + l[None, :]
        tl.store(
            bias_at, dbias.to(dbias_ptr.dtype.element_ty), bias_units[:, None] & (l < bias_length)[None, :]
        )
