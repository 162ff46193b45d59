"""Forward kernels.

    forward_blocks    one program for BLOCK_L positions of a set and BLOCK_N units. A set that fits one block
                      is finished here; otherwise every block leaves its share of z, its greatest score and
                      the sum of its exponentials
    forward_combine   what the blocks of a set left, put together

Long et al., *Attention Clusters*, CVPR 2018: equation numbers are theirs. Tiles are named in brackets.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import (
    LINEAR,
    SCORES,
    columns,
    divide,
    first_block,
    is_valid,
    load_tile,
    locate,
    pivots,
    root,
    scale_of,
    set_base,
    set_pivot,
    set_rows,
    valid_count,
    wide,
)


@triton.jit(do_not_specialize=["batch", "length", "blocks", "unit_blocks", "all_blocks", "bias_length"])
def forward_blocks(
    x_ptr, weight_ptr, scores_ptr, bias_ptr, alpha_ptr, beta_ptr, lengths_ptr, mask_ptr, offsets_ptr,
    y_ptr,  # (B, N, M)
    stats_ptr,  # (3, B, N) greatest score, sum of exponentials, ||u||
    saved_ptr,  # (rows, N) scores
    partial_ptr,  # (blocks, N, M) shares of z, not yet divided by the sum
    partial_stats_ptr,  # (3, blocks, N) greatest score, sum of exponentials, pivot of the set
    batch, length, M, N, blocks, unit_blocks, all_blocks, bias_length,
    x_b, x_l, x_m, weight_n, weight_m, scores_b, scores_n, scores_l, bias_n, bias_l, mask_b, mask_l,
    EPS: tl.constexpr, WEIGHTING: tl.constexpr, BIAS: tl.constexpr, SHIFT: tl.constexpr,
    LAYOUT: tl.constexpr, STATS: tl.constexpr, SAVE_SCORES: tl.constexpr, SPLIT: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """y, or with SPLIT the shares of one block; one program per block and BLOCK_N units."""
    pid = tl.program_id(0) // unit_blocks
    n = (tl.program_id(0) % unit_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    units = n < N
    n = n.to(tl.int64)
    b, block = locate(pid, offsets_ptr, batch, length, blocks, LAYOUT, BLOCK_L)
    row, positions = set_rows(b, offsets_ptr, batch, length, LAYOUT)
    count = valid_count(b, positions, lengths_ptr, batch, LAYOUT)
    if not SPLIT:  # one block is all there is, even where a set is longer than the caller's max_length
        count = tl.minimum(count, BLOCK_L)
    l = block * BLOCK_L + tl.arange(0, BLOCK_L)
    # The blocks of a set that hold none of its positions, the first one excepted, have nothing to do.
    if b < batch and (block == 0 or block * BLOCK_L < count):
        valid = is_valid(b, l, count, mask_ptr, mask_b, mask_l, LAYOUT)
        base = set_base(x_ptr, b, row, x_b, x_l, LAYOUT)
        DTYPE: tl.constexpr = x_ptr.dtype.element_ty
        HALF: tl.constexpr = DTYPE == tl.float16 or DTYPE == tl.bfloat16

        cols, there = columns(0, M, BLOCK_M)
        rho = pivots(load_tile(base, l, cols, x_l, x_m, valid, there), M, BLOCK_M, ACC, not HALF)  # [BL]

        # Scores
        s = tl.zeros([BLOCK_N, BLOCK_L], ACC)
        if WEIGHTING == LINEAR:  # Eq. 4: s = W x
            for m0 in range(0, M, BLOCK_M):
                cols, there = columns(m0, M, BLOCK_M)
                x = load_tile(base, l, cols, x_l, x_m, valid, there)
                w = load_tile(weight_ptr, n, cols, weight_n, weight_m, units, there)
                s += tl.dot(w, tl.trans(x), input_precision=PRECISION, out_dtype=ACC)
            if BIAS:
                in_bias = valid & (l < bias_length)
                s += load_tile(bias_ptr, n, l, bias_n, bias_l, units, in_bias).to(ACC)
        elif WEIGHTING == SCORES:
            scores_base = set_base(scores_ptr, b, row, scores_b, scores_l, LAYOUT)
            s = load_tile(scores_base, n, l, scores_n, scores_l, units, valid).to(ACC)
        if SAVE_SCORES:
            kept = saved_ptr + (row + l)[None, :] * N + n[:, None]
            tl.store(kept, s, units[:, None] & valid[None, :])

        # Softmax over L
        s = tl.where(valid[None, :], s, float("-inf"))
        greatest = tl.max(s, axis=1)  # [BN]
        peak = tl.where(greatest == float("-inf"), 0.0, greatest)
        p = tl.exp(s - peak[:, None])
        total = tl.sum(p, axis=1)
        scale = tl.full([BLOCK_N], 1.0, ACC)
        if not SPLIT:
            scale = divide(scale, tl.where(total > 0, total, 1.0), ACC)

        # Eq. 2: z = a x with a = p / total, p <= 1 (equal scores have p = 1, which every dtype holds), as a
        # product `core` and what is left over, the same for all features
        p_narrow = p.to(DTYPE)
        pivot = tl.zeros([], ACC)
        if HALF:  # core = p_h x, rest = (p - p_h) rho
            rest = tl.sum((p - p_narrow.to(ACC)) * rho[None, :], axis=1)
        else:  # core = p d, rest = p (rho - pivot), and the pivot
            pivot = set_pivot(
                base, b, count, mask_ptr, mask_b, mask_l, x_l, x_m, M,
                LAYOUT, BLOCK_L, BLOCK_M, ACC, not HALF,
            )  # fmt: skip
            rest = tl.sum(p * tl.where(valid, rho - pivot, 0.0)[None, :], axis=1)
        rest *= scale

        if SPLIT:
            tl.store(partial_stats_ptr + wide(pid) * N + n, greatest, units)
            tl.store(partial_stats_ptr + (wide(pid) + all_blocks) * N + n, total, units)
            tl.store(partial_stats_ptr + (wide(pid) + 2 * wide(all_blocks)) * N + n, pivot + 0 * total, units)
            for m0 in range(0, M, BLOCK_M):
                cols, there = columns(m0, M, BLOCK_M)
                x = load_tile(base, l, cols, x_l, x_m, valid, there)
                if not HALF:
                    x = tl.where(valid[:, None] & there[None, :], x - rho[:, None], 0.0)
                z = tl.dot(p_narrow, x, input_precision=PRECISION, out_dtype=ACC) + rest[:, None]
                out = partial_ptr + (wide(pid) * N + n)[:, None] * M + cols[None, :]
                tl.store(out, z, units[:, None] & there[None, :])
        else:
            if SHIFT:
                # u = alpha z + beta = gain core + tau
                alpha = tl.load(alpha_ptr + n, units, other=0).to(ACC)
                beta = tl.load(beta_ptr + n, units, other=0).to(ACC)
                gain = alpha * scale
                tau = alpha * rest + (alpha * tl.where(total > 0, pivot, 0.0) + beta)
            else:
                gain = scale
                tau = rest + tl.where(total > 0, pivot, 0.0)
            factor = tl.full([BLOCK_N], 1.0, ACC)
            norm = tl.zeros([BLOCK_N], ACC)
            if SHIFT:
                squares = tl.zeros([BLOCK_N], ACC)
                for m0 in range(0, M, BLOCK_M):
                    cols, there = columns(m0, M, BLOCK_M)
                    x = load_tile(base, l, cols, x_l, x_m, valid, there)
                    if not HALF:
                        x = tl.where(valid[:, None] & there[None, :], x - rho[:, None], 0.0)
                    core = tl.dot(p_narrow, x, input_precision=PRECISION, out_dtype=ACC)
                    u = tl.where(there[None, :], gain[:, None] * core + tau[:, None], 0.0)
                    squares += tl.sum(u * u, axis=1)
                norm = root(squares, ACC)
                factor = scale_of(norm, N, EPS, SHIFT, ACC)  # Eq. 7: y = u / (sqrt(N) max(||u||, eps))
            for m0 in range(0, M, BLOCK_M):
                cols, there = columns(m0, M, BLOCK_M)
                x = load_tile(base, l, cols, x_l, x_m, valid, there)
                if not HALF:
                    x = tl.where(valid[:, None] & there[None, :], x - rho[:, None], 0.0)
                core = tl.dot(p_narrow, x, input_precision=PRECISION, out_dtype=ACC)
                u = gain[:, None] * core + tau[:, None]
                out = y_ptr + (wide(b) * N + n)[:, None] * M + cols[None, :]
                tl.store(out, (u * factor[:, None]).to(DTYPE), units[:, None] & there[None, :])
            if STATS:
                at = wide(b) * N + n
                tl.store(stats_ptr + at, greatest, units)
                tl.store(stats_ptr + wide(batch) * N + at, total, units)
                tl.store(stats_ptr + 2 * wide(batch) * N + at, norm, units)


@triton.jit
def _combined(
    partial_ptr, partial_stats_ptr, first, parts, n, M, N, m0, level, inverse, alpha, tau,
    ACC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """u = alpha z + beta (Eq. 7) of one unit from the shares of all blocks; 0 beyond M. [BM]"""
    cols, there = columns(m0, M, BLOCK_M)
    core = tl.zeros([BLOCK_M], ACC)
    for c0 in range(0, parts, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        peaks = tl.load(partial_stats_ptr + (first + c) * N + n, c < parts, other=float("-inf"))  # [BC]
        shares = load_tile(partial_ptr + n * M, (first + c) * N, cols, M, 1, c < parts, there)  # [BC, BM]
        core += tl.sum(shares * (tl.exp(peaks - level) * inverse)[:, None], axis=0)
    return tl.where(there, alpha * core + tau, 0.0)


@triton.jit(do_not_specialize=["batch", "length", "blocks", "all_blocks"])
def forward_combine(
    alpha_ptr, beta_ptr, lengths_ptr, offsets_ptr, partial_ptr, partial_stats_ptr, y_ptr, stats_ptr,
    batch, length, M, N, blocks, all_blocks,
    EPS: tl.constexpr, SHIFT: tl.constexpr, LAYOUT: tl.constexpr, STATS: tl.constexpr, ACC: tl.constexpr,
    ONE_TILE: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """y of one unit of one set from the shares of its blocks, BLOCK_C of them at a time.

    With ONE_TILE (M <= BLOCK_M) they are read once, else twice: for ||u||, and to write y.
    """
    b = tl.program_id(0) // N
    n = (tl.program_id(0) % N).to(tl.int64)
    first = first_block(offsets_ptr, b, length, blocks, LAYOUT, BLOCK_L)
    _, positions = set_rows(b, offsets_ptr, batch, length, LAYOUT)
    count = valid_count(b, positions, lengths_ptr, batch, LAYOUT)
    parts = tl.maximum((count + BLOCK_L - 1) // BLOCK_L, 1)

    # The greatest score and the sum of exponentials over all blocks
    greatest = tl.full([], float("-inf"), ACC)
    total = tl.zeros([], ACC)
    for c0 in range(0, parts, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        at = (first + c) * N + n
        peaks = tl.load(partial_stats_ptr + at, c < parts, other=float("-inf"))  # [BC]
        sums = tl.load(partial_stats_ptr + wide(all_blocks) * N + at, c < parts, other=0)
        higher = tl.maximum(greatest, tl.max(peaks, axis=0))
        level = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(greatest - level) + tl.sum(sums * tl.exp(peaks - level), axis=0)
        greatest = higher
    level = tl.where(greatest == float("-inf"), 0.0, greatest)
    inverse = divide(tl.full([], 1.0, ACC), tl.where(total > 0, total, 1.0), ACC)
    pivot = tl.load(partial_stats_ptr + (first + 2 * wide(all_blocks)) * N + n)
    alpha = tl.full([], 1.0, ACC)
    tau = tl.where(total > 0, pivot, 0.0)
    if SHIFT:
        alpha = tl.load(alpha_ptr + n).to(ACC)
        tau = alpha * tau + tl.load(beta_ptr + n).to(ACC)

    squares = tl.zeros([], ACC)
    norm = tl.zeros([], ACC)
    factor = tl.full([], 1.0, ACC)
    u = tl.zeros([BLOCK_M], ACC)
    if SHIFT or ONE_TILE:
        for m0 in range(0, M, BLOCK_M):
            u = _combined(
                partial_ptr, partial_stats_ptr, first, parts, n, M, N, m0, level, inverse, alpha, tau,
                ACC, BLOCK_C, BLOCK_M,
            )  # fmt: skip
            squares += tl.sum(u * u, axis=0)
        if SHIFT:
            norm = root(squares, ACC)
            factor = scale_of(norm, N, EPS, SHIFT, ACC)  # Eq. 7: y = u / (sqrt(N) max(||u||, eps))
    for m0 in range(0, M, BLOCK_M):
        if not ONE_TILE:
            u = _combined(
                partial_ptr, partial_stats_ptr, first, parts, n, M, N, m0, level, inverse, alpha, tau,
                ACC, BLOCK_C, BLOCK_M,
            )  # fmt: skip
        cols, there = columns(m0, M, BLOCK_M)
        out = y_ptr + (wide(b) * N + n) * M + cols
        tl.store(out, (u * factor).to(y_ptr.dtype.element_ty), there)
    if STATS:
        at = wide(b) * N + n
        tl.store(stats_ptr + at, greatest)
        tl.store(stats_ptr + wide(batch) * N + at, total)
        tl.store(stats_ptr + 2 * wide(batch) * N + at, norm)
