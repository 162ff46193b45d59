"""What the kernels share: which rows a program handles, loads that skip excluded rows, products, pivots.

    x (B, L, M) or packed (T, M), any strides    "row" counts over all sets: b L + l, or the packed row
    block                                        BLOCK_L positions of one set: what one program handles

Every offset into a tensor is computed in 64 bits, before it is multiplied by a stride.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Values of the constant LAYOUT
PADDED = tl.constexpr(0)
LENGTHS = tl.constexpr(1)
MASK = tl.constexpr(2)
PACKED = tl.constexpr(3)

# Values of the constant WEIGHTING
AVERAGE = tl.constexpr(0)  # Eq. 3: every score is 0
SCORES = tl.constexpr(1)  # the caller's scores, or those the forward kept
LINEAR = tl.constexpr(2)  # Eq. 4: s = W x (+ position bias)


@triton.jit
def wide(value):
    """An integer in 64 bits, also one that Triton took for a constant."""
    return tl.full([], 0, tl.int64) + value


@triton.jit
def _offset(offsets_ptr, i, length):
    """offsets[i], clamped to the rows that there are; offsets[0] is 0 whatever the tensor says."""
    value = tl.where(i > 0, tl.load(offsets_ptr + i).to(tl.int64), 0)
    return tl.minimum(tl.maximum(value, 0), length)


@triton.jit
def first_block(offsets_ptr, b, length, blocks, LAYOUT: tl.constexpr, BLOCK_L: tl.constexpr):
    """Index of the first block of set b.

    Padded sets have `blocks` each. A packed set gets the blocks from offsets[b] // BLOCK_L + b on: at least
    as many as it needs and at most one more, whatever its length, so the host need not know any length.
    """
    if LAYOUT == PACKED:
        return _offset(offsets_ptr, b, length) // BLOCK_L + b
    else:
        return wide(b) * blocks


@triton.jit
def set_rows(b, offsets_ptr, batch, length, LAYOUT: tl.constexpr):
    """The row of position 0 of set b, and its positions, valid or not.

    `length` is L, or T when packed. The packed rows behind the last set count as a set of their own, number
    `batch`, none of whose positions is valid.
    """
    if LAYOUT == PACKED:
        row = _offset(offsets_ptr, b, length)
        end = tl.where(b < batch, _offset(offsets_ptr, tl.minimum(b + 1, batch), length), length)
        return row, tl.maximum(end - row, 0)
    else:
        return wide(b) * length, wide(length)


@triton.jit
def locate(pid, offsets_ptr, batch, length, blocks, LAYOUT: tl.constexpr, BLOCK_L: tl.constexpr):
    """The set b of block `pid`, and the block's number inside it."""
    if LAYOUT == PACKED:
        low = pid * 0
        high = low + batch
        while low < high:  # the last set that begins at or before this block
            middle = (low + high + 1) // 2
            begins = first_block(offsets_ptr, middle, length, blocks, LAYOUT, BLOCK_L) <= pid
            low = tl.where(begins, middle, low)
            high = tl.where(begins, high, middle - 1)
        return low, pid - first_block(offsets_ptr, low, length, blocks, LAYOUT, BLOCK_L)
    else:
        return pid // blocks, (pid % blocks).to(tl.int64)


@triton.jit
def valid_count(b, positions, lengths_ptr, batch, LAYOUT: tl.constexpr):
    """How many leading positions of set b may be valid."""
    if LAYOUT == LENGTHS:
        return tl.minimum(tl.maximum(tl.load(lengths_ptr + b).to(tl.int64), 0), positions)
    else:
        return tl.where(b < batch, positions, 0)


@triton.jit
def is_valid(b, l, count, mask_ptr, mask_b, mask_l, LAYOUT: tl.constexpr):
    """Which positions l of set b take part."""
    valid = l < count
    if LAYOUT == MASK:
        kept = tl.load(mask_ptr + wide(b) * mask_b + l * mask_l, valid, other=0)
        # A maximum over one value: without it Triton lays out the products for the mask's 8 bits, which
        # float64 has no instruction for.
        valid = valid & (tl.max(kept.to(tl.int32)[:, None], axis=1) != 0)
    return valid


@triton.jit
def set_base(x_ptr, b, row, x_b, x_l, LAYOUT: tl.constexpr):
    """Address of position 0 of set b in a tensor (B, L, ...) or (T, ...)."""
    if LAYOUT == PACKED:
        return x_ptr + row * x_l
    else:
        return x_ptr + wide(b) * x_b


@triton.jit
def load_tile(base, rows, cols, row_stride, col_stride, row_mask, col_mask):
    """A tile [rows, cols], 0 where masked; rows and cols are int64."""
    address = base + rows[:, None] * row_stride + cols[None, :] * col_stride
    return tl.load(address, row_mask[:, None] & col_mask[None, :], other=0)


@triton.jit
def columns(m0, M, BLOCK_M: tl.constexpr):
    """Features m0 … m0 + BLOCK_M as int64, and which of them exist."""
    cols = (m0 + tl.arange(0, BLOCK_M)).to(tl.int64)
    return cols, cols < M


# Products. A computed operand meets the matrix instruction rounded to the dtype of x.


@triton.jit
def narrow(t, DTYPE: tl.constexpr):
    """t [R, C] rounded to DTYPE, and the factor [R, 1] to multiply it by.

    For half types each row is divided by its largest value. So none leaves the range of float16, and weights
    that are all equal stay exact: their common rounding would not average out.
    """
    if DTYPE == tl.float16 or DTYPE == tl.bfloat16:
        largest = tl.max(tl.abs(t), axis=1, keep_dims=True)
        scale = tl.where(largest > 0, largest, 1.0)
        return (t / scale).to(DTYPE), scale
    else:
        return t, tl.full([1, 1], 1.0, DTYPE)


@triton.jit
def product(narrowed, scale, tile, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """What `narrow` returned times a tile in the same dtype, accumulated in ACC."""
    found = tl.dot(narrowed, tile, input_precision=PRECISION, out_dtype=ACC)
    if tile.dtype == tl.float16 or tile.dtype == tl.bfloat16:
        found = found * scale
    return found


# Pivots. Features often share a large component along the all-ones direction, which beta or the softmax's
# gradient cancels. The kernels therefore work on d_l = x_l - rho_l, rho_l near the mean of x_l: rounding then
# concerns d, and the all-ones part is added in the accumulation type. Half types enter most products as they
# are (x - rho would be rounded); there the rounding of the other operand is what rho corrects. Not so in the
# Gram form: x xᵀ has rho squared in it, and a float32 sum would lose d beside that.


@triton.jit
def pivots(tile, M, BLOCK_M: tl.constexpr, ACC: tl.constexpr, SUBTRACTED: tl.constexpr):
    """rho [R] of the first BLOCK_M features of every row of a tile, 0 for rows that were masked.

    Their mean. If it is SUBTRACTED from x, in the dtype of x, then only where it is at least twice their
    deviation, else 0: x - rho is then exact for nearly all features. A smaller pivot would do harm: what is
    left over from adding it back is the same for all features and does not average out.
    """
    count = tl.minimum(M, BLOCK_M)
    x = tile.to(ACC)
    mean = tl.sum(x, axis=1) / count
    if SUBTRACTED:
        dominant = 5 * mean * mean > 4 * (tl.sum(x * x, axis=1) / count)
        return tl.where(dominant, mean, 0.0).to(tile.dtype).to(ACC)
    else:
        return mean


@triton.jit
def set_pivot(
    base, b, count, mask_ptr, mask_b, mask_l, x_l, x_m, M,
    LAYOUT: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr, ACC: tl.constexpr,
    SUBTRACTED: tl.constexpr,
):  # fmt: skip
    """One pivot for the whole set, that of its first valid position; 0 if none is near its start."""
    first = count * 0
    if LAYOUT == MASK:
        first = count
        start = count * 0
        while start < tl.minimum(first, 16 * BLOCK_L):  # ends with the block that has the first valid one
            l = start + tl.arange(0, BLOCK_L)
            valid = is_valid(b, l, count, mask_ptr, mask_b, mask_l, LAYOUT)
            first = tl.minimum(first, tl.min(tl.where(valid, l, count), axis=0))
            start += BLOCK_L
    cols, there = columns(0, M, BLOCK_M)
    x = tl.load(base + first * x_l + cols * x_m, there & (first < count), other=0)
    return tl.sum(pivots(x[None, :], M, BLOCK_M, ACC, SUBTRACTED), axis=0)


@triton.jit
def divide(a, b, ACC: tl.constexpr):
    """a / b. A correctly rounded float32 quotient is a function call, around which registers spill."""
    q = a / b  # within 2 ulp in float32
    if ACC != tl.float64:
        better = tl.fma(tl.fma(-q, b, a), 1.0 / b, q)
        q = tl.where(tl.abs(better) < float("inf"), better, q)
    return q


@triton.jit
def scale_of(norm, N, EPS: tl.constexpr, SHIFT: tl.constexpr, ACC: tl.constexpr):
    """c = 1 / (sqrt(N) max(||u||, eps)) of Eq. 7; 1 without shift."""
    one = tl.full(norm.shape, 1.0, ACC)
    if SHIFT:
        return divide(one, root(one * N, ACC) * tl.maximum(norm, tl.full(norm.shape, EPS, ACC)), ACC)
    else:
        return one


@triton.jit
def is_normalised(norm, EPS: tl.constexpr, ACC: tl.constexpr):
    """Whether ||u|| >= eps; below it y is linear in u."""
    return norm >= tl.full(norm.shape, EPS, ACC)


@triton.jit
def root(a, ACC: tl.constexpr):
    """The square root; as for `divide`."""
    found = tl.sqrt(a)
    if ACC != tl.float64:
        better = tl.fma(tl.fma(-found, found, a), 0.5 / found, found)
        found = tl.where(tl.abs(better) < float("inf"), better, found)
    return found
