"""The Triton kernels of softmax_weight: tiles, edges of blocks, both forms, strides, excluded positions.

Calls the host functions of `fastac.kernels.softmax_weight` themselves. Runs in Triton's interpreter.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import Results, assert_equal, check, fenced
from torch import Tensor
from torch.autograd import gradcheck

pytest.importorskip("triton")

from fastac.kernels import launch, plan
from fastac.kernels import softmax_weight as sw

IDS = {"ids": lambda v: str(v).removeprefix("torch.")}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALF = (torch.bfloat16, torch.float16)
INF, NAN = float("inf"), float("nan")
GUARD = 64


@pytest.fixture(autouse=True)
def guards(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """Fill what is allocated with NaN, between bands that must stay NaN; the shapes of what was allocated."""
    bands: list[Tensor] = []
    shapes: list[tuple[int, ...]] = []

    def empty(x: Tensor, *shape: int, dtype: torch.dtype) -> Tensor:
        shapes.append(shape)
        if x.is_meta:
            return x.new_empty(shape, dtype=dtype)
        numel = math.prod(shape)
        whole = torch.full((numel + 2 * GUARD,), NAN, dtype=dtype)
        bands.extend((whole[:GUARD], whole[GUARD + numel :]))
        return whole[GUARD : GUARD + numel].view(shape)

    monkeypatch.setattr(sw, "empty", empty)
    yield shapes
    assert all(b.isnan().all() for b in bands), "something outside the outputs was written"


Launches = list[tuple[str, int, dict[str, Any]]]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """Name, programs and arguments of every launch."""
    seen: Launches = []
    start = launch.start

    def note(kernel: Any, grid: int, arguments: dict[str, Any], warps: int, stages: int) -> None:
        seen.append((kernel.__name__, grid, dict(arguments)))
        if not arguments["x_ptr"].is_meta:
            start(kernel, grid, arguments, warps, stages)

    monkeypatch.setattr(launch, "start", note)
    return seen


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every set is walked over, four positions and sixteen features at a time."""

    def tiles(batch: int, length: int, features: int, itemsize: int, *, backward: bool) -> sw.Tiles:
        return sw.Tiles(4, 16, 1, one_block=False, feature_blocks=-(-features // 16))

    monkeypatch.setattr(sw, "tiles", tiles)


Call = tuple[Tensor, Tensor, Tensor | None, Tensor]  # x, scores, lengths, dy


def make_call(
    B: int, L: int, M: int, dtype: torch.dtype = torch.float32, ragged: bool = False, **other: torch.dtype
) -> Call:
    scores = (3 * torch.randn(B, L, M)).to(other.get("scores", dtype))
    lengths = torch.randint(0, L + 1, (B,)) if ragged else None
    return torch.randn(B, L, M).to(dtype), scores, lengths, torch.randn(B, L, M).to(dtype)


def ours(call: Call, needs: int = 3) -> Results:
    x, scores, lengths, dy = call
    y, stats = sw.forward(x, scores, lengths)
    dx, dscores = sw.backward(dy, x, scores, lengths, stats, needs)
    return {"y": y, "dx": dx, "dscores": dscores}


def formula(x: Tensor, scores: Tensor, lengths: Tensor | None) -> Tensor:
    """y as one writes it in torch; excluded are positions behind the length and scores of -inf."""
    taken = scores != -INF
    if lengths is not None:
        taken = taken & (torch.arange(x.size(1)) < lengths[:, None])[..., None]
    peak = torch.where(taken, scores.detach(), -INF).amax(1, keepdim=True)
    # Tensor.softmax over another dimension than the last adds term after term: too rough for a truth.
    e = torch.where(taken, torch.exp(torch.where(taken, scores - peak, 0)), 0)
    total = e.sum(1, keepdim=True)
    a = e / torch.where(total == 0, 1, total)
    return a.to(x.dtype) * torch.where(taken, x, 0)


def by_torch(call: Call, dtype: torch.dtype) -> Results:
    """The same results by autograd through `formula` in a dtype."""
    x, scores, lengths, dy = call
    leaves = [t.detach().to(dtype).requires_grad_() for t in (x, scores)]
    y = formula(*leaves, lengths)
    dx, dscores = torch.autograd.grad(y, leaves, dy.to(dtype))
    return {"y": y.detach(), "dx": dx, "dscores": dscores}


def check_call(call: Call, found: Results | None = None) -> None:
    """Errors against those of plain torch in the same dtype, and of float32 with its results rounded."""
    x, scores, _, _ = call
    found = ours(call) if found is None else found
    exact = by_torch(call, torch.float64)
    peers = [by_torch(call, x.dtype)]
    if x.dtype in HALF:
        rounded = by_torch(call, torch.float32)
        peers.append({k: t.to(scores.dtype if k == "dscores" else x.dtype) for k, t in rounded.items()})
    peers[0]["dscores"] = peers[0]["dscores"].to(scores.dtype)
    # dscores = a (e - mean e), e = dy x: what it may lose is relative to a |e|, not to the difference.
    weights = formula(torch.ones_like(x, dtype=torch.float64), scores.double(), call[2])
    e = (weights * torch.where(weights > 0, x.double() * call[3].double(), 0)).abs()
    terms = {"y": exact["y"], "dx": exact["dx"], "dscores": e + weights * e.sum(1, keepdim=True)}
    check(found, exact, peers, x.dtype, terms=terms)
    assert found["y"].dtype == found["dx"].dtype == x.dtype and found["dscores"].dtype == scores.dtype
    assert all(t.is_contiguous() for t in found.values())


# Against plain torch


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
@pytest.mark.parametrize("ragged", [False, True], ids=["padded", "lengths"])
def test_accuracy(dtype: torch.dtype, ragged: bool) -> None:
    for sizes in ((4, 25, 50), (2, 7, 130), (1, 600, 17)):
        check_call(make_call(*sizes, dtype, ragged))


def test_the_check_sees_a_wrong_kernel() -> None:
    call = make_call(3, 11, 9)
    found = ours(call)
    for name in found:
        wrong = found | {name: found[name] + 3e-5 * found[name].abs().max()}
        with pytest.raises(AssertionError, match=name):
            check_call(call, wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], **IDS)
@pytest.mark.usefixtures("streamed")
def test_accuracy_of_streams(dtype: torch.dtype) -> None:
    for ragged in (False, True):
        for length in (1, 4, 5, 23):
            check_call(make_call(3, length, 19, dtype, ragged))


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 31, 32, 33, 127, 128, 129, 255, 256, 257])
def test_lengths_around_a_block(length: int, launches: Launches) -> None:
    check_call(make_call(2, length, 5, torch.bfloat16, ragged=True))
    launches.clear()
    check_call(make_call(1, length, 40, torch.float16))
    assert [a["ONE_BLOCK"] for *_, a in launches] == [length <= 256, length <= 128]


@pytest.mark.parametrize("features", [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 127, 128, 129])
def test_features_around_a_block(features: int) -> None:
    for dtype in (torch.float16, torch.float64):
        check_call(make_call(2, 6, features, dtype, ragged=True))


def test_one_feature_of_a_long_set() -> None:
    for length in (4096, 4097, 8192, 8193):
        check_call(make_call(1, length, 1))


@pytest.mark.parametrize("dtype", [torch.float64, *HALF], **IDS)
def test_scores_in_float32(dtype: torch.dtype) -> None:
    """Scores that the dtype of x could not hold."""
    x, scores, lengths, dy = make_call(3, 9, 13, dtype, ragged=True, scores=torch.float32)
    found = ours((x, scores * 1e6, lengths, dy))
    assert found["dscores"].dtype == torch.float32
    assert torch.equal(found["y"].double(), by_torch((x, scores * 1e6, lengths, dy), torch.float64)["y"])
    check_call((x, scores, lengths, dy))


@pytest.mark.parametrize("form", ["one_block", "streamed"])
@pytest.mark.parametrize("order", ["rising", "falling", "mixed"])
def test_large_scores(order: str, form: str, request: pytest.FixtureRequest) -> None:
    """The greatest score may come first or last: sums are scaled down, never up."""
    if form == "streamed":
        request.getfixturevalue("streamed")
    x, scores, _, dy = make_call(2, 22, 9)
    scores = scores * 1e4 if order == "mixed" else 20 * torch.arange(22.0)[None, :, None] - 5e3 + scores
    if order == "falling":
        scores = scores.flip(1)
    check_call((x, scores, None, dy))


@pytest.mark.parametrize("form", ["one_block", "streamed"])
def test_gradcheck(form: str, request: pytest.FixtureRequest) -> None:
    if form == "streamed":
        request.getfixturevalue("streamed")
    lengths = torch.tensor([6, 3, 0])

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, scores: Tensor) -> Tensor:
            y, stats = sw.forward(x, scores, lengths)
            ctx.save_for_backward(x, scores, stats)
            return y

        @staticmethod
        def backward(ctx: Any, *dy: Tensor) -> tuple[Tensor, Tensor]:
            x, scores, stats = ctx.saved_tensors
            return sw.backward(dy[0], x, scores, lengths, stats, 3)

    leaves = [torch.randn(3, 6, 9, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert gradcheck(Function.apply, leaves, fast_mode=True)


# Forms


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], **IDS)
def test_streams_agree_with_whole_sets(dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    call = make_call(3, 21, 19, dtype, ragged=True)
    whole = ours(call)
    request.getfixturevalue("streamed")
    for name, t in ours(call).items():
        assert torch.allclose(t, whole[name], rtol=0, atol=8 * torch.finfo(dtype).eps), name


def test_stats_keep_peak_and_sum_apart() -> None:
    """A log-sum-exp of scores near 1e8 would have lost the sum in float32."""
    x, scores, _, _ = make_call(2, 8, 5)
    scores = torch.full_like(scores, 1e8)
    y, stats = sw.forward(x, scores, torch.tensor([8, 0]))
    assert torch.equal(stats[:, 0], torch.tensor([1e8, 8.0])[:, None].expand(2, 5))
    assert torch.equal(stats[:, 1], torch.tensor([-INF, 0.0])[:, None].expand(2, 5))
    assert torch.equal(y[0], x[0] / 8) and not y[1].any()


def test_needs(guards: list[tuple[int, ...]], launches: Launches, request: pytest.FixtureRequest) -> None:
    """What is not asked for is neither computed nor allocated; the rest has the same bits."""
    x, scores, lengths, dy = call = make_call(2, 9, 13, ragged=True)
    for streams in (False, True):
        if streams:
            request.getfixturevalue("streamed")
        every = ours(call)
        _, stats = sw.forward(x, scores, lengths)
        for needs in range(4):
            launches.clear()
            guards.clear()
            dx, dscores = sw.backward(dy, x, scores, lengths, stats, needs)
            assert guards == [x.shape if needs >> i & 1 else (0,) for i in range(2)]
            assert dx.numel() == 0 or torch.equal(dx, every["dx"])
            assert dscores.numel() == 0 or torch.equal(dscores, every["dscores"])
            asked = [(bool(needs & 1), bool(needs & 2))] if needs else []
            assert [(a["NEED_X"], a["NEED_SCORES"]) for *_, a in launches] == asked
    # dx = a dy does not depend on x, nor on what a sum over it would be.
    dx, _ = sw.backward(dy, torch.full_like(x, NAN), scores, lengths, stats, 1)
    assert torch.equal(dx, every["dx"])


# Launches


@pytest.mark.parametrize("length", [20, 5000])
def test_no_value_is_read_from_the_device(launches: Launches, length: int) -> None:
    x, scores, lengths, dy = (
        None if t is None else t.to("meta") for t in make_call(3, length, 48, ragged=True)
    )
    y, stats = sw.forward(x, scores, lengths)
    assert y.shape == x.shape and stats.shape == (2, 3, 48)
    dx, dscores = sw.backward(dy, x, scores, lengths, stats, 3)
    assert dx.shape == dscores.shape == x.shape
    assert [name for name, *_ in launches] == ["softmax_weight_forward", "softmax_weight_backward"]


def test_nothing_to_do(launches: Launches) -> None:
    found = ours(make_call(0, 5, 3))
    assert [t.shape for t in found.values()] == [(0, 5, 3)] * 3 and not launches
    x, scores, _, dy = make_call(2, 0, 3)
    for lengths in (None, torch.zeros(2, dtype=torch.int64)):
        y, stats = sw.forward(x, scores, lengths)
        assert y.shape == (2, 0, 3)
        assert (stats[0] == -INF).all() and (stats[1] == 0).all()
        dx, dscores = sw.backward(dy, x, scores, lengths, stats, 3)
        assert dx.shape == dscores.shape == (2, 0, 3)


def test_more_sets_than_a_grid_has_rows(launches: Launches) -> None:
    """Sets and features share the first axis, which has room for 2³¹ - 1 programs, the others for 65535."""
    x, scores, lengths, dy = (None if t is None else t.to("meta") for t in make_call(1, 4, 100))
    x, scores, dy = (t.expand(70_000, 4, 100) for t in (x, scores, dy))
    _, stats = sw.forward(x, scores, lengths)
    sw.backward(dy, x, scores, lengths, stats, 3)
    assert [grid for _, grid, _ in launches] == [70_000] * 2


@pytest.mark.parametrize("seed", range(2))
def test_the_order_of_programs_does_not_matter(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    from triton.runtime import interpreter

    call = make_call(5, 20, 70, ragged=True)
    expected = ours(call)
    builder = type(interpreter.interpreter_builder)
    original, launched = builder.set_grid_idx, []

    def shuffled(self: Any, x: int, y: int, z: int) -> None:
        order = torch.randperm(self.grid_dim[0], generator=torch.Generator().manual_seed(seed)).tolist()
        launched.append(order[x])
        original(self, order[x], y, z)

    monkeypatch.setattr(builder, "set_grid_idx", shuffled)
    assert_equal(ours(call), expected, "in another order")
    assert launched != sorted(launched)


# Strides


def spread(t: Tensor) -> Tensor:
    whole = torch.full([2 * n for n in t.shape], NAN, dtype=t.dtype)
    return whole[::2, ::2, ::2].copy_(t)


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "batch last": lambda t: t.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    "spread": spread,
    "one set": lambda t: t[:1].expand(t.shape),
    "one position": lambda t: t[:, :1].expand(t.shape),
    "one feature": lambda t: t[..., :1].expand(t.shape),
    "one value": lambda t: t[:1, :1, :1].expand(t.shape),
}


@pytest.mark.parametrize("form", ["one_block", "streamed"])
@pytest.mark.parametrize("which", ["x", "scores", "dy"])
def test_strides(which: str, form: str, request: pytest.FixtureRequest) -> None:
    if form == "streamed":
        request.getfixturevalue("streamed")
    call = make_call(2, 7, 18, ragged=True)
    place = {"x": 0, "scores": 1, "dy": 3}[which]
    for name, change in STRIDES.items():
        changed = list(call)
        changed[place] = change(call[place])
        plain = list(changed)
        plain[place] = changed[place].contiguous()
        assert changed[place].stride() != plain[place].stride()
        assert_equal(ours(tuple(changed)), ours(tuple(plain)), name)


def test_lengths_that_are_not_contiguous() -> None:
    x, scores, _, dy = make_call(3, 6, 5)
    lengths = torch.tensor([6, 0, 2, 0, 4, 0])
    assert_equal(ours((x, scores, lengths[::2], dy)), ours((x, scores, lengths[::2].clone(), dy)))


@pytest.mark.parametrize("which", ["x", "scores", "dy"])
def test_offsets_of_64_bits(which: str) -> None:
    """Strides of 32 bits times indices pass 2³¹ elements, in memory that is reserved but hardly touched."""
    far = 2**30 + 64
    call = make_call(3, 3, 3, torch.float16)
    expected = ours(call)
    place = {"x": 0, "scores": 1, "dy": 3}[which]
    for axis in (0, 1, 2):
        strides = [72, 24, 8]
        strides[axis] = far
        sizes = call[place].shape
        reach = 1 + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))
        storage = torch.empty(reach, dtype=torch.float16)
        changed = list(call)
        changed[place] = storage.as_strided(sizes, strides).copy_(call[place])
        assert_equal(ours(tuple(changed)), expected, f"with axis {axis} far apart")
        del storage, changed


# Excluded positions


@pytest.mark.parametrize("form", ["one_block", "streamed"])
@pytest.mark.parametrize("garbage", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], **IDS)
def test_excluded_positions(
    garbage: float, dtype: torch.dtype, form: str, request: pytest.FixtureRequest
) -> None:
    """What stands there, and around the operands, reaches nothing; results and gradients are 0 there."""
    if form == "streamed":
        request.getfixturevalue("streamed")
    x, scores, _, dy = make_call(5, 9, 11, dtype)
    lengths = torch.tensor([9, 4, 1, 0, 8])
    expected = ours((x, scores, lengths, dy))
    excluded = (torch.arange(9) >= lengths[:, None])[..., None]
    spoilt = [fenced(t.masked_fill(excluded, garbage)) for t in (x, scores, dy)]
    found = ours((spoilt[0], spoilt[1], lengths, spoilt[2]))
    assert_equal(found, expected)
    for name, t in found.items():
        assert not t.masked_select(excluded).any(), name
    check_call((x, scores, lengths, dy), found)


@pytest.mark.parametrize("form", ["one_block", "streamed"])
def test_scores_of_minus_infinity(form: str, request: pytest.FixtureRequest) -> None:
    """They have weight 0 and gradient 0, whatever x and dy are there; a column of nothing else is 0."""
    if form == "streamed":
        request.getfixturevalue("streamed")
    x, scores, _, dy = make_call(3, 10, 7)
    out = torch.rand(3, 10, 7) < 0.5
    out[:, :, 0] = True
    out[:, 4, 1:] = False
    out[:, :4, 2] = True  # the greatest score of the first block is -inf
    scores = scores.masked_fill(out, -INF)
    found = ours((x, scores, None, dy))
    check_call((x, scores, None, dy), found)
    for name, t in found.items():
        assert not t.masked_select(out).any(), name
    for garbage in (NAN, INF):
        spoilt = ours((x.masked_fill(out, garbage), scores, None, dy.masked_fill(out, garbage)))
        assert_equal(spoilt, found)


@pytest.mark.parametrize("form", ["one_block", "streamed"])
@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_score_that_is_no_number(bad: float, form: str, request: pytest.FixtureRequest) -> None:
    """It spoils its own column, all of it as in torch, and no other; excluded positions stay 0."""
    if form == "streamed":
        request.getfixturevalue("streamed")
    for position in (0, 5):
        x, scores, _, dy = make_call(2, 9, 11)
        lengths = torch.tensor([7, 9])
        expected = ours((x, scores, lengths, dy))
        scores[0, position, 3] = bad
        for name, t in ours((x, scores, lengths, dy)).items():
            assert t[0, :7, 3].isnan().all() and not t[0, 7:, 3].any(), name
            t[0, :7, 3] = expected[name][0, :7, 3]
            assert torch.equal(t, expected[name]), name


def test_nan_in_x_stays_at_its_place() -> None:
    x, scores, lengths, dy = make_call(2, 9, 11)
    expected = ours((x, scores, lengths, dy))
    x[1, 4, 2] = NAN
    found = ours((x, scores, lengths, dy))
    assert torch.equal(found["dx"], expected["dx"])
    assert found["y"].isnan().nonzero().tolist() == [[1, 4, 2]]
    assert found["dscores"].isnan().nonzero().tolist() == [[1, i, 2] for i in range(9)]


def test_lengths_are_clamped() -> None:
    """A length beyond L counts as L, a negative one as 0."""
    for length in (9, 600):
        x, scores, _, dy = make_call(5, length, 3)
        wild = torch.tensor([2**40, -1, length, length + 1, -(2**40)])
        tame = torch.tensor([length, 0, length, length, 0])
        assert_equal(ours((x, scores, wild, dy)), ours((x, scores, tame, dy)))


# Tiles


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_tiles(itemsize: int, backward: bool) -> None:
    lengths = (0, 1, 2, 3, 25, 30, 64, 65, 256, 257, 512, 513, 8192, 8193, 100_000, 1 << 22)
    held = {2: 16, 4: 16, 8: 8}[itemsize]
    for batch, length, features in itertools.product(
        (1, 2, 64, 1024), lengths, (1, 3, 8, 31, 50, 512, 1025, 100_352)
    ):
        t = sw.tiles(batch, length, features, itemsize, backward=backward)
        what = f"{(batch, length, features)}: {t}"
        assert t.feature_blocks == -(-features // t.block_m), what
        for size in (t.block_l, t.block_m, t.warps):
            assert size >= 1 and size & (size - 1) == 0, what
        assert t.block_l >= 2 and t.block_m < 2 * features, what
        assert t.block_m == plan.power_of_two(features) or t.block_m * itemsize >= 64, what
        assert t.warps <= 16, what
        # A thread holds this many elements, fewer only where the tile is less than one warp's.
        share = t.block_l * t.block_m / (32 * t.warps)
        most = held if t.one_block and not backward else held // 2
        assert share == most or (share < most and t.warps == 1), what
        assert t.one_block == (t.block_l >= length), what
        assert not t.one_block or t.block_l < 2 * max(length, 2), what
        if batch * t.feature_blocks < plan.PROGRAMS:  # a finer tile would not read whole sectors
            assert t.block_m == min(64 // itemsize, plan.power_of_two(features)), what


@pytest.mark.parametrize(("itemsize", "longest"), [(2, 256), (4, 512), (8, 512)])
def test_longest_set_that_is_read_once(itemsize: int, longest: int) -> None:
    for backward in (False, True):
        most = longest // (2 if backward else 1)
        assert sw.tiles(64, most, 1024, itemsize, backward=backward).one_block
        assert not sw.tiles(64, most + 1, 1024, itemsize, backward=backward).one_block


# Errors


def test_operands_that_do_not_fit() -> None:
    x, scores, lengths, dy = make_call(2, 5, 3, ragged=True)
    assert lengths is not None
    wrong: list[tuple[Tensor, Tensor, Tensor | None]] = [
        (x[0], scores[0], None),
        (x[..., :0], scores[..., :0], None),
        (x.int(), scores.int(), None),
        (x, scores[:1], None),
        (x, scores[:, :4], None),
        (x, scores[..., :2], None),
        (x, scores.half(), None),
        (x.half(), scores.bfloat16(), None),
        (x, scores.to("meta"), None),
        (x, scores, lengths[:1]),
        (x, scores, lengths[:, None]),
        (x, scores, lengths.int()),
        (x, scores, lengths.to("meta")),
    ]
    _, stats = sw.forward(x, scores, lengths)
    for operands in wrong:
        with pytest.raises(RuntimeError, match="contradict each other"):
            sw.forward(*operands)
        with pytest.raises(RuntimeError, match="contradict each other"):
            sw.backward(dy, *operands, stats, 3)
    for bad_dy, bad_stats in (
        (dy[:, :4], stats),
        (dy.half(), stats),
        (dy.to("meta"), stats),
        (dy, stats[0]),
        (dy, stats[..., :2]),
        (dy, stats.double()),
        (dy, stats.to("meta")),
    ):
        with pytest.raises(RuntimeError, match="do not fit the operands"):
            sw.backward(bad_dy, x, scores, lengths, bad_stats, 3)
