"""The C++ internals: the vector code of every instruction set against numpy and torch."""

from __future__ import annotations

import platform
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from helpers import generator
from native import ISAS, ROOT

pytestmark = pytest.mark.xdist_group("native")  # what is built once is shared

TORCH = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
GUARD = -7.25


@pytest.fixture(scope="module", params=ISAS)
def isa(request: pytest.FixtureRequest, harness: ModuleType) -> Any:
    found = harness.isa(request.param)
    if found is None:
        pytest.skip(f"this processor cannot run {request.param}")
    return found


@pytest.fixture(params=[np.float32, np.float64], ids=["float32", "float64"])
def real(request: pytest.FixtureRequest) -> type:
    """An accumulator type."""
    return request.param


@pytest.fixture(params=list(TORCH))
def storage(request: pytest.FixtureRequest) -> str:
    return request.param


def lanes(isa: Any, real: type) -> int:
    return int(isa.vector_bytes // np.dtype(real).itemsize)


def panel(isa: Any, real: type) -> int:
    return int(isa.tile_vectors) * lanes(isa, real)


def accumulator(storage: str) -> type:
    return np.float64 if storage == "float64" else np.float32


def is_double(real: type) -> bool:
    return real is np.float64


def quantize(values: np.ndarray, storage: str) -> tuple[np.ndarray, np.ndarray]:
    """The values rounded to a storage type: as the kernels take them, and as accumulators."""
    t = torch.from_numpy(np.ascontiguousarray(values)).to(TORCH[storage])
    raw = t.view(torch.int16).numpy() if t.element_size() == 2 else t.numpy()
    return raw, t.to(torch.float64 if storage == "float64" else torch.float32).numpy()


def to_panels(a: np.ndarray, width: int) -> np.ndarray:
    """(rows, M) as [M / width][rows][width], zero beyond M."""
    rows, features = a.shape
    padded = np.zeros((rows, -(-features // width) * width), a.dtype)
    padded[:, :features] = a
    return np.ascontiguousarray(padded.reshape(rows, -1, width).swapaxes(0, 1))


def close(got: np.ndarray, expected: np.ndarray, scale: np.ndarray | float, terms: int) -> None:
    """Within the rounding of a sum of `terms` numbers whose absolute values sum to `scale`."""
    bound = np.finfo(got.dtype).eps * (terms + 2) * (np.asarray(scale, np.float64) + 1e-30)
    error = np.abs(got.astype(np.float64) - expected)
    assert np.all(error <= bound), f"error {np.max(error / bound):.3g} of the bound"  # NaN fails


# Vectors


def test_every_instruction_set_is_here() -> None:
    """The files that hold kernels are those the module is built from: a new one is not left out."""
    files = (ROOT / "csrc" / "cpu").glob("*.cpp")
    assert sorted(ISAS) == sorted(p.stem for p in files if '#include "kernels.h"' in p.read_text())


def exponential(isa: Any, x: np.ndarray) -> np.ndarray:
    width = lanes(isa, x.dtype.type)
    padded = np.concatenate([x, np.zeros(-len(x) % width, x.dtype)])
    out = np.full_like(padded, GUARD)
    isa.exponential(x.dtype == np.float64, padded, out)
    return out[: len(x)]


def test_exponential(isa: Any, real: type) -> None:
    low, normal, high = (-708.0, -708.396, 709.0) if is_double(real) else (-87.0, -87.3365, 88.0)
    random = generator()
    x = np.concatenate(
        [
            random.uniform(low, high, 200_000),
            random.uniform(-2, 2, 50_000),
            -np.logspace(-40, 1, 10_000),
            np.log(2) * (np.arange(-120, 120) + 0.5),  # where the reduction changes
            [0.0, -0.0, low, 1.0, -1.0],
        ]
    ).astype(real)
    # The truth to more digits than `real` has; np.exp of longdouble is correct to its last place.
    truth = np.exp(x.astype(np.longdouble))
    ulp = np.spacing(truth.astype(real)).astype(np.longdouble)
    assert np.max(np.abs(exponential(isa, x) - truth) / ulp) <= 2
    assert exponential(isa, np.zeros(1, real))[0] == 1
    # Less than the least normal number counts as 0; between `low` and there the result is either.
    below = np.concatenate(
        [np.linspace(normal, 20 * normal, 5000), [-1e30, np.finfo(real).min, -np.inf]]
    ).astype(real)
    assert np.array_equal(exponential(isa, below), np.zeros_like(below))
    edge = np.linspace(normal, low, 1000).astype(real)
    got, expected = exponential(isa, edge), np.exp(edge)
    assert np.all((got == 0) | (np.abs(got - expected) <= 2 * np.spacing(expected)))
    nan = exponential(isa, np.array([np.nan, 0, -np.nan, -np.inf, 1], real))
    assert np.array_equal(np.isnan(nan), [True, False, True, False, False])


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_widen_every_pattern(isa: Any, harness: ModuleType, half: str) -> None:
    bits = np.arange(65536, dtype=np.uint16)
    got = np.full(65536, GUARD, np.float32)
    isa.load(harness.DType.__members__[half], bits, got)
    expected = torch.from_numpy(bits.view(np.int16)).view(TORCH[half]).float().numpy()
    nan = np.isnan(expected)
    assert np.array_equal(got.view(np.uint32)[~nan], expected.view(np.uint32)[~nan])
    assert np.all(np.isnan(got[nan]))
    assert np.array_equal(np.signbit(got), bits >= 0x8000)


def rounding_cases(half: str) -> np.ndarray:
    random = generator()
    every = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(TORCH[half]).double().numpy()
    every = np.sort(every[np.isfinite(every)])
    middle = ((every[1:] + every[:-1]) / 2).astype(np.float32)  # exact in float32: the ties
    beside = [np.nextafter(middle, np.float32(s)) for s in (-np.inf, np.inf)]
    bits = random.integers(0, 2**32, 300_000, dtype=np.uint32).view(np.float32)
    greatest = torch.finfo(TORCH[half]).max
    step = (
        greatest
        - torch.tensor(greatest, dtype=TORCH[half]).nextafter(torch.tensor(0.0, dtype=TORCH[half])).item()
    )
    with np.errstate(over="ignore"):
        edges = np.array([greatest + step * f for f in (0, 0.25, 0.5, 0.51, 1, 2)]).astype(np.float32)
    special = np.array([0.0, np.inf, np.finfo(np.float32).max, 1e-45, np.finfo(np.float32).tiny], np.float32)
    normal = random.standard_normal(100_000).astype(np.float32)
    subnormal = random.uniform(-1, 1, 100_000) * (2.0**-13 if half == "float16" else 2.0**-125)
    both = [every, middle, *beside, bits, edges, -edges, special, -special, normal, subnormal, normal * 3e4]
    return np.concatenate([c.astype(np.float32) for c in both])


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_narrow_rounds_as_torch(isa: Any, harness: ModuleType, half: str) -> None:
    x = rounding_cases(half)
    x = np.concatenate([x, np.zeros(-len(x) % 16, np.float32)])
    got = np.full(len(x), 0x1234, np.uint16)
    isa.store(harness.DType.__members__[half], x, got)
    expected = torch.from_numpy(x).to(TORCH[half])
    nan = np.isnan(x)
    assert 0 < nan.sum() < len(x) / 10
    bits = expected.view(torch.int16).numpy().view(np.uint16)
    wrong = (got != bits) & ~nan
    assert not wrong.any(), [
        (x[i].item().hex(), hex(got[i]), hex(bits[i])) for i in np.flatnonzero(wrong)[:5]
    ]
    # torch's own NaN patterns differ between its scalar and its vector code: any quiet NaN will do.
    back = torch.from_numpy(got.view(np.int16)).view(TORCH[half])
    assert bool(back[torch.from_numpy(nan)].isnan().all())
    assert np.all(got[nan] & (0x40 if half == "bfloat16" else 0x200))


def test_load_and_store_partial(isa: Any, harness: ModuleType, storage: str) -> None:
    kind, real = harness.DType.__members__[storage], accumulator(storage)
    width = lanes(isa, real)
    raw, values = quantize(generator().standard_normal(3 * width), storage)
    for count in range(width + 1):
        for at in (0, 1, 3 * width - count):  # the last ends where the array does
            vector = np.full(width, np.nan, real)
            isa.load_partial(kind, raw, at, count, vector)
            assert np.array_equal(vector, np.concatenate([values[at : at + count], np.zeros(width - count)]))
            target = np.full(3 * width, 77, raw.dtype)
            source = np.full(width, np.nan, real)
            source[:count] = values[at : at + count]
            isa.store_partial(kind, source, target, at, count)
            assert np.array_equal(target[at : at + count], raw[at : at + count])
            assert np.all(target[:at] == 77)
            assert np.all(target[at + count :] == 77)


# Tiles


def test_balanced(isa: Any) -> None:
    for limit in (1, 3, 12):
        for total in range(60):
            starts, lengths = isa.balanced(total, limit)
            assert len(lengths) == -(-total // limit)
            assert starts == [sum(lengths[:i]) for i in range(len(lengths))]
            assert sum(lengths) == total
            assert not lengths or (min(lengths) >= 1 and max(lengths) <= min(limit, min(lengths) + 1))


def test_folds(isa: Any, real: type) -> None:
    width = lanes(isa, real)
    whole = generator().integers(-1000, 1000, (isa.dot_tile**2 + width, width)).astype(real)  # sums are exact
    sums = np.full(width, GUARD, real)
    isa.fold(is_double(real), whole, sums)
    assert np.array_equal(sums, whole[:width].sum(1))
    for count in range(1, isa.dot_tile**2 + 1):
        sums = np.full(count + 1, GUARD, real)
        isa.fold_all(is_double(real), whole, count, sums)
        assert np.array_equal(sums[:count], whole[:count].sum(1))
        assert sums[count] == GUARD
    one = np.full(1, GUARD, real)
    isa.horizontal_sum(is_double(real), whole[0], one)
    assert one[0] == whole[0].sum()


def test_transpose(isa: Any, real: type) -> None:
    width = lanes(isa, real)
    block = generator().standard_normal((width, width)).astype(real)
    turned = block.copy()
    isa.transpose_block(is_double(real), turned)
    assert np.array_equal(turned, block.T)
    sizes = sorted({1, width - 1, width, width + 1, 2 * width + 1} - {0})
    for rows in sizes:
        for columns in sizes:
            high, wide = (-(-n // width) * width + width for n in (rows, columns))
            source = np.full((rows, wide), np.nan, real)
            source[:, :columns] = generator().standard_normal((rows, columns))
            out = np.full((columns + 1, high), GUARD, real)
            isa.transpose(is_double(real), source, wide, rows, columns, out, high)
            assert np.array_equal(out[:columns, :rows], source[:, :columns].T)
            assert np.all(out[columns] == GUARD)
            assert np.all(out[:columns, rows : high - width] == 0)
            assert np.all(out[:columns, high - width :] == GUARD)


def test_dot_rows(isa: Any, real: type) -> None:
    """Every tile size, fewer and more rows than a tile, and more panels than one run over the cache."""
    width, tile = panel(isa, real), isa.dot_tile
    run = max(1, isa.dot_bytes // (tile * width * np.dtype(real).itemsize))
    for panels in (1, 2, 2 * run + 1):
        features = panels * width
        for count in range(1, tile + 1):
            for rows in (*range(1, tile + 1), 2 * tile + 1):
                p, q = (generator().standard_normal((n, features)).astype(real) for n in (count, rows))
                out = np.full((rows, count + 2), GUARD, real)
                isa.dot_rows(
                    is_double(real),
                    to_panels(p, width),
                    count,
                    to_panels(q, width),
                    rows,
                    panels,
                    out,
                    count + 2,
                )
                p, q = p.astype(np.float64), q.astype(np.float64)
                terms = features // lanes(isa, real) + 6
                close(out[:, :count], q @ p.T, np.abs(q) @ np.abs(p).T, terms)
                assert np.all(out[:, count:] == GUARD)


def test_multiply_add(isa: Any, real: type) -> None:
    width, side = lanes(isa, real), panel(isa, real)
    for rows in range(1, isa.tile_rows + 1):
        for vectors in range(1, isa.tile_vectors + 1):
            for by_panel in (False, True):
                for count in (0, 1, 19):
                    random = generator()
                    columns, step = vectors * width, 1 if by_panel else rows + 3
                    a = random.standard_normal((count, rows)).astype(real)
                    b = random.standard_normal((count, columns)).astype(real)
                    fill, by_row = random.standard_normal((2, rows)).astype(real)
                    by_column = random.standard_normal(columns).astype(real)
                    row = np.full(max(count, 1) * step + rows * side, np.nan, real)
                    k, r = np.meshgrid(np.arange(count), np.arange(rows), indexing="ij")
                    # Rows one panel apart overlap once count exceeds the panel: keep to one panel of them.
                    kept = min(count, side) if by_panel else count
                    row[(k * step + r * (side if by_panel else 1))[:kept]] = a[:kept]
                    out = np.full((rows + 1, side), GUARD, real)
                    isa.multiply_add(
                        is_double(real),
                        rows,
                        vectors,
                        by_panel,
                        fill,
                        by_column,
                        by_row,
                        row,
                        step,
                        b,
                        kept,
                        out,
                    )
                    a64, b64 = a[:kept].astype(np.float64), b[:kept].astype(np.float64)
                    start = np.outer(fill.astype(np.float64) * by_row, by_column)
                    scale = np.abs(start) + np.abs(a64).T @ np.abs(b64)
                    close(out[:rows, :columns], start + a64.T @ b64, scale, kept + 2)
                    assert np.all(out[:rows, columns:] == GUARD)
                    assert np.all(out[rows] == GUARD)


@pytest.mark.parametrize("start", [0, 1, 2], ids=["zero", "load", "scale"])
def test_panel_tile(isa: Any, real: type, start: int) -> None:
    side = panel(isa, real)
    for rows in range(1, isa.tile_rows + 1):
        for count in (0, 1, 2, 25):
            random = generator()
            a = np.full((count + 1, rows + 5), np.nan, real)
            a[:count, :rows] = random.standard_normal((count, rows))
            b = random.standard_normal((count, side)).astype(real)
            scale = random.standard_normal(rows).astype(real)
            before = np.full((rows + 1, side), np.nan if start == 0 else GUARD, real)
            if start > 0:
                before[:rows] = random.standard_normal((rows, side))
            out = before.copy()
            isa.panel_tile(is_double(real), start, rows, out, scale, a, rows + 5, b, count)
            factor = (np.zeros(rows), np.ones(rows), scale.astype(np.float64))[start][:, None]
            base = factor * before[:rows].astype(np.float64) if start > 0 else np.zeros((rows, side))
            a64, b64 = a[:count, :rows].astype(np.float64), b.astype(np.float64)
            close(out[:rows], base + a64.T @ b64, np.abs(base) + np.abs(a64).T @ np.abs(b64), count + 2)
            assert np.array_equal(out[rows], before[rows], equal_nan=True)


# Packing


def features_of(isa: Any, real: type) -> list[int]:
    """Tails of every kind, after odd and even numbers of whole panels."""
    width, side = lanes(isa, real), panel(isa, real)
    at = [
        1,
        width - 1,
        width,
        width + 1,
        side - 1,
        side,
        side + 1,
        2 * side,
        3 * side,
        4 * side + width,
        5 * side + 1,
    ]
    return sorted({n for n in at if n > 0})


def expected_offset(values: np.ndarray) -> np.ndarray:
    """The mean of each row where its share of the sum of squares exceeds a half, else 0."""
    x = values.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        mean = x.mean(1)
        use = np.isfinite(mean) & (x.sum(1) * mean > 0.5 * (x * x).sum(1))
    return np.where(use, mean, 0)


@pytest.mark.parametrize("listed", [False, True], ids=["dense", "positions"])
def test_pack_rows(isa: Any, harness: ModuleType, storage: str, listed: bool) -> None:
    kind, real = harness.DType.__members__[storage], accumulator(storage)
    side, count, begin, total = panel(isa, real), 7, 2, 23
    for features in features_of(isa, real):
        random = generator()
        stride = features + 3
        x = np.full((total, stride), np.nan)
        x[:, :features] = random.standard_normal((total, features)) * 0.1
        x[::3, :features] += 4  # these have an offset
        x[1::3, :features] -= np.nanmean(x[1::3, :features], 1, keepdims=True)  # these have none
        raw, values = quantize(x, storage)
        position = np.sort(random.choice(total, begin + count, replace=False)) if listed else None
        rows = np.arange(total)[begin : begin + count] if position is None else position[begin:]
        panels = np.full(-(-features // side) * count * side + 1, GUARD, real)
        offset = np.full(count + 1, GUARD, real)
        isa.pack_rows(kind, raw, stride, position, begin, count, features, panels, offset)
        taken = values[rows, :features]
        expected = expected_offset(taken)
        if features > 1:  # of a single feature 0 or all of it may be taken off
            assert np.array_equal(offset[:count] != 0, expected != 0)
            close(offset[:count], expected, np.abs(taken).mean(1), features)
        deviation = taken - offset[:count, None]  # rounded once, as in the kernel: equal to the last bit
        assert np.array_equal(panels[:-1], to_panels(deviation, side).ravel())
        assert offset[count] == panels[-1] == GUARD
        for r, i in enumerate(rows):
            alone = np.full(1, GUARD, real)
            isa.row_offset(kind, raw[i, :features].copy(), alone)
            close(alone, offset[r : r + 1], np.abs(taken[r]).mean(), features)


def test_pack_rows_not_finite(isa: Any, harness: ModuleType, storage: str) -> None:
    kind, real = harness.DType.__members__[storage], accumulator(storage)
    side = panel(isa, real)
    for features in features_of(isa, real):
        x = np.full((6, features), 5.0)
        x[0, 0], x[1, -1], x[2, features // 2], x[3] = np.nan, np.inf, -np.inf, np.inf
        x[4] = 0
        raw, values = quantize(x, storage)
        panels, offset = np.full(-(-features // side) * 6 * side, GUARD, real), np.full(6, GUARD, real)
        isa.pack_rows(kind, raw, features, None, 0, 6, features, panels, offset)
        assert np.array_equal(offset, np.array([0, 0, 0, 0, 0, 5], real))
        assert np.array_equal(panels, to_panels(values - offset[:, None], side).ravel(), equal_nan=True)


def test_pack_weight(isa: Any, harness: ModuleType, storage: str) -> None:
    kind, real = harness.DType.__members__[storage], accumulator(storage)
    width, side = lanes(isa, real), panel(isa, real)
    for features in features_of(isa, real):
        for units in (1, width, 2 * width - 1):
            raw, values = quantize(generator().standard_normal((units, features)), storage)
            panels = to_panels(values, side)
            for p in range(len(panels)):
                out = np.full(units * side, GUARD, real)
                isa.pack_matrix(kind, raw, units, features, p, out)
                assert np.array_equal(out, panels[p].ravel())
            padded = np.zeros((-(-units // width) * width, len(panels) * side), real)
            padded[:units, :features] = values
            for first in range(0, units, width):
                out, sums = np.full((padded.shape[1], width), GUARD, real), np.full(width, GUARD, real)
                isa.pack_transposed(kind, raw, units, features, first, out, sums)
                block = padded[first : first + width].astype(np.float64)
                assert np.array_equal(out, block.T)
                close(sums, block.sum(1), np.abs(block).sum(1), features)


def test_store_panel(isa: Any, harness: ModuleType, storage: str) -> None:
    kind, real = harness.DType.__members__[storage], accumulator(storage)
    side = panel(isa, real)
    for features in features_of(isa, real):
        raw, values = quantize(generator().standard_normal(features), storage)
        panels = to_panels(values[None], side)[:, 0]
        row = np.full(features + 200, 77, raw.dtype)
        aligned = -row.ctypes.data % isa.vector_bytes // row.itemsize
        whole = features * row.itemsize % isa.vector_bytes == 0
        stream = isa.streams(kind, row.ctypes.data + aligned * row.itemsize, features, 1 << 30)
        assert stream == (whole and platform.machine() in ("x86_64", "AMD64"))
        assert not isa.streams(kind, row.ctypes.data + aligned * row.itemsize, features, 1 << 10)
        assert not isa.streams(kind, row.ctypes.data + (aligned + 1) * row.itemsize, features, 1 << 30)
        for at, streaming in [(aligned, stream), (aligned, False), (aligned + 1, False)]:
            row[:] = 77
            for p in range(len(panels)):
                isa.store_panel(kind, row, at, p, features, panels[p], streaming)
            assert np.array_equal(row[at : at + features], raw)
            assert np.all(row[:at] == 77)
            assert np.all(row[at + features :] == 77)


# Scores and softmax


def test_score_block(isa: Any, real: type, harness: ModuleType) -> None:
    """Packed x and packed weight give x W^T, over several runs of features and with vectors left over."""
    kind, width = harness.DType.__members__[np.dtype(real).name], lanes(isa, real)
    side = panel(isa, real)
    for rows in (1, isa.tile_rows, 2 * isa.tile_rows + 1):
        for units in (1, width, 3 * width - 1):
            for features in (5, 300, 513):
                x = generator().standard_normal((rows, features)).astype(real)
                x[::2] += 5
                w = generator().standard_normal((units, features)).astype(real)
                high, vectors = -(-features // side) * side, -(-units // width)
                panels, offset = np.empty(rows * high, real), np.empty(rows, real)
                isa.pack_rows(kind, x, features, None, 0, rows, features, panels, offset)
                assert np.any(offset != 0)
                packed, sums = np.empty((vectors, high, width), real), np.empty((vectors, width), real)
                for v in range(vectors):
                    isa.pack_transposed(kind, w, units, features, v * width, packed[v], sums[v])
                stride = (vectors + 1) * width
                scores = np.full((rows, stride), GUARD, real)
                isa.score_block(
                    is_double(real), panels, offset, rows, features, packed, sums, vectors, scores, stride
                )
                x64, w64 = x.astype(np.float64), w.astype(np.float64)
                close(scores[:, :units], x64 @ w64.T, np.abs(x64) @ np.abs(w64).T, 300)
                assert np.all(scores[:, units : vectors * width] == 0)
                assert np.all(scores[:, vectors * width :] == GUARD)


@pytest.mark.parametrize("listed", [False, True], ids=["dense", "positions"])
@pytest.mark.parametrize("transposed", [False, True], ids=["units-apart", "units-adjacent"])
def test_gather_scores_and_bias(isa: Any, real: type, listed: bool, transposed: bool) -> None:
    positions, all_units, first, units, begin, rows = 31, 21, 16, 5, 3, 9
    stride = -(-units // lanes(isa, real)) * lanes(isa, real)
    given = generator().standard_normal((positions, all_units)).astype(real)
    base = given if transposed else np.ascontiguousarray(given.T)
    unit_stride, position_stride = (1, all_units) if transposed else (positions, 1)
    position = np.sort(generator().choice(positions, begin + rows, replace=False)) if listed else None
    at = np.arange(begin, begin + rows) if position is None else position[begin:]
    scores = np.full((rows + 1, stride), GUARD, real)
    isa.gather_scores(
        is_double(real),
        base,
        unit_stride,
        position_stride,
        position,
        begin,
        rows,
        first,
        units,
        scores,
        stride,
    )
    assert np.array_equal(scores[:rows, :units], given[at, first : first + units])
    assert np.all(scores[:rows, units:] == 0)
    assert np.all(scores[rows] == GUARD)
    bias = generator().standard_normal((units, positions)).astype(real)
    before = scores.copy()
    isa.add_position_bias(is_double(real), bias, positions, position, begin, rows, units, scores, stride)
    assert np.array_equal(scores[:rows, :units], before[:rows, :units] + bias[:, at].T)
    assert np.array_equal(scores[:rows, units:], before[:rows, units:])
    assert np.all(scores[rows] == GUARD)


def run_softmax(
    isa: Any, scores: np.ndarray, offset: np.ndarray, cuts: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """State and exponentials, relative to the last maximum, after the blocks between `cuts`."""
    real, units = scores.dtype.type, scores.shape[1]
    vectors, stride = units // lanes(isa, real), units + lanes(isa, real)
    state = np.full((4, units), np.nan, real)
    isa.softmax_reset(is_double(real), state)
    assert np.all(state[0] == -np.inf)
    assert np.all(state[1:3] == 0)
    done: list[np.ndarray] = []
    for begin, end in zip([0, *cuts], [*cuts, len(scores)], strict=True):
        block = np.full((end - begin, stride), GUARD, real)
        block[:, :units] = scores[begin:end]
        isa.softmax_block(
            is_double(real), state, block, stride, offset[begin:end].copy(), end - begin, vectors
        )
        assert np.all(block[:, units:] == GUARD)
        done = [*(e * state[3] for e in done), block[:, :units].copy()]
    return state, np.concatenate(done)


@pytest.mark.parametrize("cuts", [[], [5], [1, 2, 3], [0, 7, 7, 29], [30]], ids=str)
def test_running_softmax(isa: Any, real: type, cuts: list[int]) -> None:
    units = 3 * lanes(isa, real)
    scores = (generator().standard_normal((30, units)) * 8).astype(real)
    scores[generator().random((30, units)) < 0.2] = -np.inf
    scores[:12, 1] = -np.inf  # whole blocks without a position
    scores[:, 2] = -np.inf  # nothing at all
    offset = generator().standard_normal(30).astype(real)
    state, e = run_softmax(isa, scores, offset, cuts)
    s64, o64 = scores.astype(np.float64), offset.astype(np.float64)
    top = s64.max(0)
    assert np.array_equal(state[0], top)
    expected = np.exp(s64 - np.where(np.isfinite(top), top, 0))
    # A score of magnitude 40 less its maximum has that rounding before the exponential sees it.
    np.testing.assert_allclose(e, expected, rtol=200 * np.finfo(real).eps, atol=1e-35)
    np.testing.assert_allclose(state[1], expected.sum(0), rtol=200 * np.finfo(real).eps)
    weighted = np.abs(o64) @ expected
    assert np.all(np.abs(state[2] - o64 @ expected) <= 200 * np.finfo(real).eps * weighted)
    assert state[0, 2] == -np.inf
    assert state[1, 2] == state[2, 2] == 0
    assert np.all(e[:, 2] == 0)


def test_running_softmax_empty_and_nan(isa: Any, real: type) -> None:
    units = lanes(isa, real)
    state, e = run_softmax(isa, np.empty((0, units), real), np.empty(0, real), [])
    assert e.shape == (0, units)
    assert np.all(state[0] == -np.inf)
    assert np.all(state[1:3] == 0)
    assert np.all(np.isfinite(state[3]))
    scores = generator().standard_normal((6, units)).astype(real)
    scores[2, 0] = np.nan
    for cuts in ([], [2], [3]):
        state, _ = run_softmax(isa, scores, np.ones(6, real), cuts)
        assert np.isnan(state[1, 0])
        assert np.all(np.isfinite(state[:3, 1:]))
