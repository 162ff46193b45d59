"""Backward kernels for x and the scores.

    backward_blocks   one program for BLOCK_L positions of a set and all units. FIRST makes from dY and x the
                      weights and e = dU xᵀ; SECOND makes dX. A set that fits one block has both in one launch
    backward_sums     between the two, for longer sets: what the softmax's gradient sums over all positions

With c = 1 / (sqrt(N) ||u||), or 1 / (sqrt(N) eps) below eps, and û = u / ||u||, or 0 below eps:

    dU = c (dY - û (û·dY))        e = dU xᵀ / c        A = c alpha a
    dS = A (e - rowsum(a e))      dX = Aᵀ dU / c + dSᵀ W
    dalpha = dU·z                 dbeta = dU·1

û comes from y = û / sqrt(N), or in the Gram form (GRAM; one block, which then need not read y) from
u = alpha a d + tau 1, d = x - rho 1, tau = alpha (a·rho) + beta, by way of G = d dᵀ.
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
    is_normalised,
    is_valid,
    load_tile,
    locate,
    narrow,
    pivots,
    product,
    scale_of,
    set_base,
    set_pivot,
    set_rows,
    valid_count,
    wide,
)


@triton.jit
def _weights(s, valid, greatest, total, ACC: tl.constexpr):
    """a = exp(s - greatest) / total, 0 where excluded. [BN, BL]"""
    s = tl.where(valid[None, :], s, float("-inf"))
    peak = tl.where(greatest == float("-inf"), 0.0, greatest)
    inverse = divide(tl.full(total.shape, 1.0, ACC), tl.where(total > 0, total, 1.0), ACC)
    return tl.exp(s - peak[:, None]) * inverse[:, None]


@triton.jit
def _shift_gradients(mean, ones, offset, alpha, beta, norm, c, M, EPS: tl.constexpr, ACC: tl.constexpr):
    """What a set adds to dalpha = dU·z and dbeta = dU·1, from rowsum(a e) and dU·1 / c. [BN]

    û·dU = 0 makes dalpha = -beta dbeta / alpha, which is the better conditioned of the two where beta is
    small against u.
    """
    dalpha = c * (mean + ones * offset)
    dbeta = c * ones
    through_beta = is_normalised(norm, EPS, ACC) & (alpha != 0) & (norm * norm >= 4 * M * beta * beta)
    safe = tl.where(through_beta, alpha, 1.0)
    return tl.where(through_beta, -beta * divide(dbeta, safe, ACC), dalpha), dbeta


@triton.jit(
    do_not_specialize=[
        "batch",
        "length",
        "blocks",
        "rows",
        "bias_length",
        "counters",
        "dscores_b",
        "dscores_n",
    ]
)
def backward_blocks(
    dy_ptr, x_ptr, weight_ptr, scores_ptr, bias_ptr, alpha_ptr, beta_ptr, lengths_ptr, mask_ptr, offsets_ptr,
    y_ptr, stats_ptr, saved_ptr,  # of the forward
    dx_ptr,  # (B, L, M) or (T, M)
    dscores_ptr,  # (B, N, L) or (N, T)
    mix_ptr,  # scratch (2, rows, N): A; and dS, or e between the launches
    pivots_ptr,  # scratch (2, rows): rho; and rho less the pivot of the set
    means_ptr,  # scratch (4, B, N): coefficient of y in dU / c, dU·1 / c, rowsum(a e), pivot
    sums_ptr,  # scratch (blocks, N): the block's part of rowsum(a e)
    dshift_ptr,  # scratch (2, B, N): dalpha and dbeta of every set
    counters_ptr,  # scratch (counters,) int32: set to zero here for `backward_reduce`
    batch, length, M, N, blocks, rows, bias_length, counters,
    dy_b, dy_n, dy_m, x_b, x_l, x_m, weight_n, weight_m, scores_b, scores_n, scores_l, bias_n, bias_l,
    mask_b, mask_l, dscores_b, dscores_n,
    EPS: tl.constexpr, WEIGHTING: tl.constexpr, BIAS: tl.constexpr, SHIFT: tl.constexpr,
    SAVED: tl.constexpr, LAYOUT: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
    GRAM: tl.constexpr, NEED_X: tl.constexpr, NEED_SCORES: tl.constexpr, ONE_UNIT_BLOCK: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, SMALL_PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The weights, e, and dX of one block."""
    pid = tl.program_id(0)
    b, block = locate(pid, offsets_ptr, batch, length, blocks, LAYOUT, BLOCK_L)
    row, positions = set_rows(b, offsets_ptr, batch, length, LAYOUT)
    count = valid_count(b, positions, lengths_ptr, batch, LAYOUT)
    if FIRST and SECOND:  # as in the forward
        count = tl.minimum(count, BLOCK_L)
    l = block * BLOCK_L + tl.arange(0, BLOCK_L)
    inside = l < positions
    valid = is_valid(b, l, count, mask_ptr, mask_b, mask_l, LAYOUT)
    base = set_base(x_ptr, b, row, x_b, x_l, LAYOUT)
    set_n = wide(b) * N
    all_sets = wide(batch) * N
    mix_at = (row + l) * N  # [BL]
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    HALF: tl.constexpr = DTYPE == tl.float16 or DTYPE == tl.bfloat16
    WITH_Y: tl.constexpr = SHIFT and not GRAM
    SUBTRACTED: tl.constexpr = GRAM or not HALF

    cols, there = columns(0, M, BLOCK_M)
    rho = pivots(load_tile(base, l, cols, x_l, x_m, valid, there), M, BLOCK_M, ACC, SUBTRACTED)  # [BL]
    gram_mix = tl.zeros([BLOCK_L, BLOCK_L], ACC)  # K = sum over units of A (û·dY) alpha a / ||u||
    gram_ones = tl.zeros([BLOCK_L], ACC)  # sum over units of A (û·dY) tau / ||u||

    if FIRST:
        if counters_ptr is not None:
            if pid == 0:
                for i in range(0, counters, 128):
                    at = i + tl.arange(0, 128)
                    tl.store(counters_ptr + at, tl.zeros([128], tl.int32), at < counters)
        if b < batch and (block == 0 or block * BLOCK_L < count):
            pivot = set_pivot(
                base, b, count, mask_ptr, mask_b, mask_l, x_l, x_m, M,
                LAYOUT, BLOCK_L, BLOCK_M, ACC, SUBTRACTED,
            )  # fmt: skip
            rest = tl.where(valid, rho - pivot, 0.0)  # [BL]
            tl.store(pivots_ptr + row + l, rho, valid)
            tl.store(pivots_ptr + rows + row + l, rest, valid)
            for n0 in range(0, 1 if ONE_UNIT_BLOCK else N, BLOCK_N):
                n = (n0 + tl.arange(0, BLOCK_N)).to(tl.int64)
                units = n < N
                # One sweep over the features: every product with x, and the sums of dY and y
                s = tl.zeros([BLOCK_N, BLOCK_L], ACC)  # W xᵀ
                p = tl.zeros([BLOCK_N, BLOCK_L], ACC)  # dY dᵀ
                dy_sum = tl.zeros([BLOCK_N], ACC)  # dY·1
                y_x = tl.zeros([BLOCK_N, BLOCK_L], ACC)  # y dᵀ
                y_sum = tl.zeros([BLOCK_N], ACC)  # y·1
                y_dy = tl.zeros([BLOCK_N], ACC)  # y·dY
                gram = tl.zeros([BLOCK_L, BLOCK_L], ACC)  # G = d dᵀ
                x_sum = tl.zeros([BLOCK_L], ACC)  # d·1
                for m0 in range(0, M, BLOCK_M):
                    cols, there = columns(m0, M, BLOCK_M)
                    x = load_tile(base, l, cols, x_l, x_m, valid, there)
                    dy = load_tile(dy_ptr + wide(b) * dy_b, n, cols, dy_n, dy_m, units, there)
                    if WEIGHTING == LINEAR and not SAVED:
                        w = load_tile(weight_ptr, n, cols, weight_n, weight_m, units, there)
                        s += tl.dot(w, tl.trans(x), input_precision=PRECISION, out_dtype=ACC)
                    if not HALF:
                        x = tl.where(valid[:, None] & there[None, :], x - rho[:, None], 0.0)
                    x_t = tl.trans(x)
                    p += tl.dot(dy, x_t, input_precision=PRECISION, out_dtype=ACC)
                    dy_sum += tl.sum(dy.to(ACC), axis=1)
                    if WITH_Y:
                        y = load_tile(y_ptr + set_n * M, n, cols, M, 1, units, there)
                        y_x += tl.dot(y, x_t, input_precision=PRECISION, out_dtype=ACC)
                        y_sum += tl.sum(y.to(ACC), axis=1)
                        y_dy += tl.sum(y.to(ACC) * dy.to(ACC), axis=1)
                    if GRAM and SHIFT:
                        if HALF:
                            x = tl.where(there[None, :], x - rho[:, None], 0.0).to(DTYPE)
                        gram += tl.dot(x, tl.trans(x), input_precision=PRECISION, out_dtype=ACC)
                        x_sum += tl.sum(x.to(ACC), axis=1)
                # Triton's compiler wants one use of each sum that a loop made.
                dy_sum += 0.0
                y_sum += 0.0
                y_dy += 0.0
                x_sum += 0.0
                if HALF:  # the products were with x itself
                    p -= dy_sum[:, None] * rho[None, :]
                    y_x -= y_sum[:, None] * rho[None, :]
                if SAVED:
                    s = tl.load(
                        saved_ptr + mix_at[None, :] + n[:, None], units[:, None] & valid[None, :], other=0
                    )
                elif WEIGHTING == SCORES:
                    scores_base = set_base(scores_ptr, b, row, scores_b, scores_l, LAYOUT)
                    s = load_tile(scores_base, n, l, scores_n, scores_l, units, valid).to(ACC)
                if WEIGHTING == LINEAR and BIAS and not SAVED:
                    in_bias = valid & (l < bias_length)
                    s += load_tile(bias_ptr, n, l, bias_n, bias_l, units, in_bias).to(ACC)

                greatest = tl.load(stats_ptr + set_n + n, units, other=0)
                total = tl.load(stats_ptr + all_sets + set_n + n, units, other=0)
                norm = tl.load(stats_ptr + 2 * all_sets + set_n + n, units, other=1)
                a = _weights(s, valid, greatest, total, ACC)  # [BN, BL]
                offset = tl.where(total > 0, pivot, 0.0)
                c = scale_of(norm, N, EPS, SHIFT, ACC)
                alpha = tl.full([BLOCK_N], 1.0, ACC)
                e = p
                ones = dy_sum
                coefficient = tl.zeros([BLOCK_N], ACC)
                if SHIFT:
                    alpha = tl.load(alpha_ptr + n, units, other=0).to(ACC)
                    beta = tl.load(beta_ptr + n, units, other=0).to(ACC)
                    if GRAM:
                        normalised = is_normalised(norm, EPS, ACC)
                        one = tl.full([BLOCK_N], 1.0, ACC)
                        inverse = tl.where(normalised, divide(one, tl.where(normalised, norm, 1.0), ACC), 0.0)
                        tau = alpha * tl.sum(a * rest[None, :], axis=1) + (alpha * offset + beta)
                        a_gram = tl.dot(a, gram, input_precision=SMALL_PRECISION, out_dtype=ACC)
                        # û·dY, then what û xᵀ and û·1 take off
                        along = (alpha * tl.sum(a * p, axis=1) + tau * dy_sum) * inverse
                        u_x = alpha[:, None] * a_gram + tau[:, None] * x_sum[None, :]
                        u_ones = alpha * tl.sum(a * x_sum[None, :], axis=1) + tau * M
                        e -= (along * inverse)[:, None] * u_x
                        ones -= along * inverse * u_ones
                        if NEED_X:
                            mixed = a * (alpha * c * along * inverse)[:, None]
                            gram_ones += tl.sum(mixed * tau[:, None], axis=0)
                            mixed_h, mixed_scale = narrow(tl.trans(mixed * alpha[:, None]), DTYPE)
                            gram_mix += product(mixed_h, mixed_scale, a.to(DTYPE), ACC, PRECISION)
                    else:
                        # û (û·dY) = N y (y·dY)
                        coefficient = tl.where(is_normalised(norm, EPS, ACC), N * y_dy, 0.0)
                        e -= coefficient[:, None] * y_x
                        ones -= coefficient * y_sum
                # e = dU xᵀ / c, less a part that is the same for all positions
                e += ones[:, None] * rest[None, :]
                mean = tl.sum(a * e, axis=1)
                weighted = a * (alpha * c)[:, None]  # A
                here = units[:, None] & valid[None, :]
                tl.store(mix_ptr + mix_at[None, :] + n[:, None], weighted, here)
                if SECOND:
                    e = weighted * (e - mean[:, None])  # dS
                    if SHIFT:
                        dalpha, dbeta = _shift_gradients(
                            mean, ones, offset, alpha, beta, norm, c, M, EPS, ACC
                        )
                        tl.store(dshift_ptr + set_n + n, dalpha, units)
                        tl.store(dshift_ptr + all_sets + set_n + n, dbeta, units)
                    if NEED_SCORES:
                        at = set_base(dscores_ptr, b, row, dscores_b, 1, LAYOUT)
                        at += n[:, None] * dscores_n + l[None, :]
                        ds = tl.where(here, e, 0.0).to(dscores_ptr.dtype.element_ty)
                        tl.store(at, ds, units[:, None] & inside[None, :])
                else:
                    tl.store(sums_ptr + wide(pid) * N + n, mean, units)
                    if block == 0:
                        tl.store(means_ptr + all_sets + set_n + n, ones, units)
                        tl.store(means_ptr + 3 * all_sets + set_n + n, offset, units)
                if WITH_Y and block == 0:
                    tl.store(means_ptr + set_n + n, coefficient, units)
                tl.store(mix_ptr + wide(rows) * N + mix_at[None, :] + n[:, None], e, here)
    if FIRST and SECOND:
        tl.debug_barrier()  # what this program stored is read below, by other threads

    if SECOND:
        work = b < batch and block * BLOCK_L < count
        if not FIRST:  # dS = A (e - rowsum(a e))
            for n0 in range(0, 1 if ONE_UNIT_BLOCK else N, BLOCK_N):
                n = (n0 + tl.arange(0, BLOCK_N)).to(tl.int64)
                units = n < N
                here = units[:, None] & (valid & work)[None, :]
                mean = tl.load(means_ptr + 2 * all_sets + set_n + n, units & work, other=0)
                a = tl.load(mix_ptr + mix_at[None, :] + n[:, None], here, other=0)
                e_at = mix_ptr + wide(rows) * N + mix_at[None, :] + n[:, None]
                ds = a * (tl.load(e_at, here, other=0) - mean[:, None])
                tl.store(e_at, ds, here)
                if NEED_SCORES:
                    at = set_base(dscores_ptr, b, row, dscores_b, 1, LAYOUT)
                    at += n[:, None] * dscores_n + l[None, :]
                    ds = tl.where(here, ds, 0.0).to(dscores_ptr.dtype.element_ty)
                    tl.store(at, ds, units[:, None] & inside[None, :])
            tl.debug_barrier()
        elif NEED_SCORES and not work:
            for n0 in range(0, 1 if ONE_UNIT_BLOCK else N, BLOCK_N):
                n = (n0 + tl.arange(0, BLOCK_N)).to(tl.int64)
                at = set_base(dscores_ptr, b, row, dscores_b, 1, LAYOUT)
                at += n[:, None] * dscores_n + l[None, :]
                zero = tl.zeros([BLOCK_N, BLOCK_L], dscores_ptr.dtype.element_ty)
                tl.store(at, zero, (n < N)[:, None] & inside[None, :])

        if NEED_X:
            gram_h, gram_scale = narrow(gram_mix, DTYPE)
            if GRAM and HALF:
                if not SAVED:  # there are registers to keep it where no scores are multiplied
                    rho = tl.load(pivots_ptr + row + l, valid, other=0)
                gram_ones -= tl.sum(gram_h.to(ACC) * gram_scale * rho[None, :], axis=1)
            units_there = tl.where(work, N, 0)
            for m0 in range(0, M, BLOCK_M):
                cols, there = columns(m0, M, BLOCK_M)
                dx = tl.zeros([BLOCK_L, BLOCK_M], ACC)
                for n0 in range(0, 1 if ONE_UNIT_BLOCK else units_there, BLOCK_N):
                    n = (n0 + tl.arange(0, BLOCK_N)).to(tl.int64)
                    units = n < units_there
                    dy = load_tile(dy_ptr + wide(b) * dy_b, n, cols, dy_n, dy_m, units, there)
                    a = load_tile(mix_ptr, mix_at, n, 1, 1, valid, units)  # [BL, BN]
                    if WITH_Y:
                        y = load_tile(y_ptr + set_n * M, n, cols, M, 1, units, there)
                        coefficient = tl.load(means_ptr + set_n + n, units, other=0)
                        if HALF:
                            a_y, a_y_scale = narrow(a * coefficient[None, :], DTYPE)
                            dx -= product(a_y, a_y_scale, y, ACC, PRECISION)
                        else:
                            dy = dy - coefficient[:, None] * y
                    a_h, a_scale = narrow(a, DTYPE)
                    dx += product(a_h, a_scale, dy, ACC, PRECISION)  # Aᵀ dU / c
                    if WEIGHTING == LINEAR:
                        w = load_tile(weight_ptr, n, cols, weight_n, weight_m, units, there)
                        ds = load_tile(mix_ptr + wide(rows) * N, mix_at, n, 1, 1, valid, units)
                        ds_h, ds_scale = narrow(ds, DTYPE)
                        dx += product(ds_h, ds_scale, w, ACC, PRECISION)  # dSᵀ W
                if GRAM and SHIFT:
                    x = load_tile(base, l, cols, x_l, x_m, valid, there)
                    if not HALF:
                        x = tl.where(valid[:, None] & there[None, :], x - rho[:, None], 0.0)
                    dx -= product(gram_h, gram_scale, x, ACC, PRECISION) + gram_ones[:, None]
                at = dx_ptr + (row + l)[:, None] * M + cols[None, :]
                dx = tl.where(valid[:, None], dx, 0.0)
                tl.store(at, dx.to(DTYPE), inside[:, None] & there[None, :])


@triton.jit(do_not_specialize=["batch", "length", "blocks"])
def backward_sums(
    alpha_ptr, beta_ptr, lengths_ptr, offsets_ptr, stats_ptr, sums_ptr, means_ptr, dshift_ptr,
    batch, length, M, N, blocks,
    EPS: tl.constexpr, SHIFT: tl.constexpr, LAYOUT: tl.constexpr, ACC: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """rowsum(a e) of one set and BLOCK_N units, and from it what the set adds to dalpha and dbeta."""
    unit_blocks = tl.cdiv(N, BLOCK_N)
    b = tl.program_id(0) // unit_blocks
    n = ((tl.program_id(0) % unit_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    units = n < N
    _, positions = set_rows(b, offsets_ptr, batch, length, LAYOUT)
    count = valid_count(b, positions, lengths_ptr, batch, LAYOUT)
    first = first_block(offsets_ptr, b, length, blocks, LAYOUT, BLOCK_L)
    parts = tl.maximum((count + BLOCK_L - 1) // BLOCK_L, 1)
    mean = tl.zeros([BLOCK_N], ACC)
    for c0 in range(0, parts, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        mean += tl.sum(load_tile(sums_ptr, (first + c) * N, n, 1, 1, c < parts, units), axis=0)
    at = wide(b) * N + n
    all_sets = wide(batch) * N
    tl.store(means_ptr + 2 * all_sets + at, mean, units)
    if SHIFT:
        ones = tl.load(means_ptr + all_sets + at, units, other=0)
        norm = tl.load(stats_ptr + 2 * all_sets + at, units, other=1)
        c = scale_of(norm, N, EPS, SHIFT, ACC)
        offset = tl.load(means_ptr + 3 * all_sets + at, units, other=0)
        alpha = tl.load(alpha_ptr + n, units, other=0).to(ACC)
        beta = tl.load(beta_ptr + n, units, other=0).to(ACC)
        dalpha, dbeta = _shift_gradients(mean, ones, offset, alpha, beta, norm, c, M, EPS, ACC)
        tl.store(dshift_ptr + at, dalpha, units)
        tl.store(dshift_ptr + all_sets + at, dbeta, units)
