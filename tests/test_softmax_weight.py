"""`softmax_weight`, its backends and operators, against extended precision and plain torch."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import DTYPES, HALF, assert_equal, assert_near, check, fenced, make_lengths
from softmax_weight_cases import operands, plain, results, truth, verify
from tested_backends import BACKENDS, NATIVE, TRITON, Backend
from torch import Tensor

import fastac
from fastac import backends, softmax_weight, softmax_weight_ops

WITH_IT = [BACKENDS[0], *NATIVE, *TRITON]
WITH_OPERATORS = [*NATIVE[-1:], *TRITON]

# What the CPU kernels tell apart: features side by side or positions too, tiles, sets kept or read twice.
SHAPES = [
    (5, 23, 67),
    (1, 1, 1),
    (3, 40, 1),
    (2, 37, 3),
    (4, 25, 50),
    (1, 7, 2113),
    (2, 300, 230),
    (2, 1500, 70),
    (1, 2500, 70),
    (1, 9001, 5),
    (2, 20011, 5),
]
INTERPRETED = [(3, 11, 29), (1, 1, 1), (2, 13, 3), (1, 70, 33)]


@pytest.fixture(params=WITH_IT, ids=str)
def weighting(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Each backend that has the operator, the native one under each instruction set, allocations guarded."""
    with request.param.active(guarded="unguarded" not in request.keywords) as active:
        yield active


@pytest.fixture(params=WITH_OPERATORS, ids=str)
def stem(request: pytest.FixtureRequest) -> Iterator[str]:
    """The stem of each family of operators."""
    with request.param.active(guarded="unguarded" not in request.keywords) as active:
        yield active.name


def shapes(backend: Backend) -> list[tuple[int, int, int]]:
    return INTERPRETED if backend.interpreted else SHAPES


def call_on(backend: Backend) -> Callable[..., Tensor]:
    return functools.partial(softmax_weight, backend=backend.name)


# Values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accuracy(weighting: Backend, dtype: torch.dtype) -> None:
    for B, L, M in shapes(weighting):
        if L > 2000 and dtype in HALF and weighting.isa not in (None, NATIVE[-1].isa):
            continue
        x, scores, dy = operands(B, L, M, dtype)
        for lengths in (None, make_lengths(B, L)):
            verify(call_on(weighting), x, scores, dy, lengths)


@pytest.mark.parametrize("dtype", [torch.float64, *HALF], ids=str)
def test_scores_in_float32(weighting: Backend, dtype: torch.dtype) -> None:
    for B, L, M in shapes(weighting)[:5]:
        x, scores, dy = operands(B, L, M, dtype, torch.float32)
        ours = results(call_on(weighting), x, scores, dy)
        exact = truth(x, scores, dy)
        peer = results(plain, x.float(), scores, dy.float())
        rounded = {name: t.to(ours[name].dtype) for name, t in peer.items()}
        assert ours["dscores"].dtype == torch.float32
        single = {"dscores"}
        check(
            {n: ours[n] for n in single}, {n: exact[n] for n in single}, [{n: rounded[n] for n in single}],
            torch.float32,
        )  # fmt: skip
        halves = {"y", "dx"}
        check(
            {n: ours[n] for n in halves}, {n: exact[n] for n in halves}, [{n: rounded[n] for n in halves}],
            dtype,
        )  # fmt: skip


def test_by_hand(weighting: Backend) -> None:
    third = torch.tensor([[[0.0, 5.0], [0.0, 5.0], [0.0, 5.0]]])
    x = torch.tensor([[[3.0, 6.0], [9.0, -3.0], [0.0, 12.0]]])
    y = softmax_weight(x, third, backend=weighting.name)
    torch.testing.assert_close(y, x / 3)
    scores = torch.tensor([[[0.0], [float(torch.log(torch.tensor(3.0)))]]])
    y = softmax_weight(torch.ones(1, 2, 1), scores, backend=weighting.name)
    torch.testing.assert_close(y, torch.tensor([[[0.25], [0.75]]]))


def test_columns_of_weights_add_up_to_one(weighting: Backend) -> None:
    for B, L, M in shapes(weighting):
        _, scores, _ = operands(B, L, M, torch.float64)
        lengths = make_lengths(B, L, empty=False)
        y = softmax_weight(torch.ones_like(scores), scores, lengths=lengths, backend=weighting.name)
        torch.testing.assert_close(y.sum(1), torch.ones(B, M, dtype=torch.float64))


def test_one_position_has_weight_one_and_no_gradient(weighting: Backend) -> None:
    x, scores, dy = operands(4, 1, 19)
    found = results(call_on(weighting), x, scores, dy)
    assert_equal(found, {"y": x, "dx": dy, "dscores": torch.zeros_like(x)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_huge_scores(weighting: Backend, dtype: torch.dtype, scale: float) -> None:
    for B, L, M in shapes(weighting)[:4]:
        x, scores, dy = operands(B, L, M, dtype)
        verify(call_on(weighting), x, scores * scale, dy, None)
    x, scores, dy = operands(2, 9, 31, dtype)
    near = verify(call_on(weighting), x, (scores * 64).round() / 64 + 1e4, dy, None)  # a large common part
    assert (near["y"] != 0).all()


def test_the_harness_finds_a_wrong_kernel() -> None:
    x, scores, dy = operands(4, 23, 67)

    def other_axis(x: Tensor, scores: Tensor, lengths: Tensor | None = None) -> Tensor:
        return x * scores.softmax(2)

    def half_sum(x: Tensor, scores: Tensor, lengths: Tensor | None = None) -> Tensor:
        e = scores.exp()
        return x * e / e.bfloat16().sum(1, keepdim=True).float()

    def no_gradient_through_the_sum(x: Tensor, scores: Tensor, lengths: Tensor | None = None) -> Tensor:
        e = scores.exp()
        return x * e / e.sum(1, keepdim=True).detach()

    for wrong in (other_axis, half_sum, no_gradient_through_the_sum):
        with pytest.raises(AssertionError, match="error"):
            verify(wrong, x, scores, dy, None)
    verify(lambda x, s, lengths: softmax_weight(x, s, backend="reference"), x, scores, dy, None)


# What takes no part


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_excluded_positions_have_no_influence(weighting: Backend, dtype: torch.dtype) -> None:
    for B, L, M in [s for s in shapes(weighting) if s[0] > 1]:
        x, scores, dy = operands(B, L, M, dtype)
        lengths = make_lengths(B, L)
        excluded = (torch.arange(L) >= lengths[:, None]).unsqueeze(-1)
        clean = [torch.where(excluded, 0, t) for t in (x, scores, dy)]
        for junk in (float("nan"), float("inf"), -float("inf")):
            dirty = [torch.where(excluded, junk, t) for t in (x, scores, dy)]
            found = results(call_on(weighting), *dirty, lengths)
            assert_equal(found, results(call_on(weighting), *clean, lengths), f"with {junk}")
        for name, t in found.items():
            assert (torch.where(excluded, t, 0) == 0).all(), name


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (0, 0, 1), (3, 5, 70)], ids=str)
def test_nothing_takes_part(weighting: Backend, shape: tuple[int, int, int]) -> None:
    x, scores, dy = operands(*shape)
    found = results(call_on(weighting), x, scores, dy, torch.zeros(shape[0], dtype=torch.int64))
    for t in found.values():
        assert t.shape == shape
        assert (t == 0).all()
    if 0 in shape:
        results(call_on(weighting), x, scores, dy)


def test_scores_of_minus_infinity_take_no_part(weighting: Backend) -> None:
    minus_inf, nan = float("-inf"), float("nan")
    for B, L, M in [s for s in shapes(weighting) if s[0] > 1]:
        x, scores, dy = operands(B, L, M)
        gone = torch.rand(B, L, M) < 0.4
        gone[0, :, M // 2] = True  # a column without any
        gone[-1] = True  # a set without any
        scores = scores.masked_fill(gone, minus_inf)
        lengths = make_lengths(B, L, empty=False)
        ours = verify(call_on(weighting), x, scores, dy, lengths)
        junk = results(
            call_on(weighting), x.masked_fill(gone, nan), scores, dy.masked_fill(gone, nan), lengths
        )
        assert_equal(junk, ours, "with NaN where the score is -inf")
        for name, t in junk.items():
            assert (t[gone] == 0).all(), name


def test_a_nan_stays_in_its_column(weighting: Backend) -> None:
    for B, L, M in [(2, 9, 21), (2, 40, 2)]:
        x, scores, dy = operands(B, L, M)
        clean = results(call_on(weighting), x, scores, dy)
        for bad in (float("nan"), float("inf")):
            spoilt = scores.clone()
            spoilt[1, 3, 1] = bad
            found = results(call_on(weighting), x, spoilt, dy)
            for name, t in found.items():
                assert t[1, :, 1].isnan().all(), name
                t[1, :, 1] = clean[name][1, :, 1]
            assert_equal(found, clean)
        spoilt = x.clone()
        spoilt[1, 3, 1] = float("nan")
        found = results(call_on(weighting), spoilt, scores, dy)
        assert found["y"].isnan().sum() == 1
        assert found["dscores"][1, :, 1].isnan().all()
        assert found["dscores"].isnan().sum() == L
        assert torch.equal(found["dx"], clean["dx"])


# Layouts


def test_strides(weighting: Backend) -> None:
    B, L, M = (3, 11, 29) if weighting.interpreted else (3, 23, 67)
    for features in (M, 5):
        x, scores, dy = operands(B, L, features)
        layouts: dict[str, Callable[[Tensor], Tensor]] = {
            "transposed": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
            "sets last": lambda t: t.permute(1, 2, 0).contiguous().permute(2, 0, 1),
            "every other": lambda t: torch.stack([t, t + 1], 3).flatten(2)[:, :, ::2],
            "rows apart": lambda t: torch.cat([t, t + 1], 2)[:, :, : t.size(2)],
            "fenced": fenced,
        }
        expected = results(call_on(weighting), x, scores, dy)
        for name, layout in layouts.items():
            found = results(call_on(weighting), layout(x), layout(scores), layout(dy))
            if weighting.name == "reference":  # torch sums in the order in which numbers lie in memory
                assert_near(found, expected, x.dtype)
            else:
                assert_equal(found, expected, name)


def test_strides_of_zero(weighting: Backend) -> None:
    B, L, M = 3, 11, 29
    for dim in range(3):
        x, scores, dy = (t.narrow(dim, 0, 1).expand(B, L, M) for t in operands(B, L, M))
        found = results(call_on(weighting), x, scores, dy)
        dense = results(call_on(weighting), *(t.contiguous() for t in (x, scores, dy)))
        assert_equal(found, dense, f"expanded along {dim}")
    x, scores, _ = operands(B, L, M)
    x.requires_grad_()
    softmax_weight(x, scores, backend=weighting.name).sum().backward()
    torch.testing.assert_close(x.grad, scores.softmax(1))


# The operators


def test_needs(stem: str) -> None:
    forward, backward = (softmax_weight_ops.operator(stem, k) for k in softmax_weight_ops._SCHEMAS)
    for B, L, M in [(2, 9, 31), (1, 2500, 70) if stem == "cpu" else (1, 40, 5)]:
        x, scores, dy = operands(B, L, M, torch.bfloat16, torch.float32)
        y, stats = forward(x, scores, None)
        assert y.dtype == x.dtype
        assert (stats.shape, stats.dtype) == ((2, B, M), torch.float32)
        torch.testing.assert_close(stats[0], scores.amax(1))
        torch.testing.assert_close(stats[1], (scores - scores.amax(1, keepdim=True)).exp().sum(1))
        dx, dscores = backward(dy, x, scores, None, stats, 3)
        for needs in range(4):
            found = backward(dy, x, scores, None, stats, needs)
            for i, whole in enumerate((dx, dscores)):
                assert found[i].dtype == whole.dtype
                wanted = whole if needs >> i & 1 else whole.new_empty(0)
                assert torch.equal(found[i], wanted), f"needs {needs}, gradient {i}"


def test_stats_of_nothing(stem: str) -> None:
    x, scores, _ = operands(2, 3, 5)
    _, stats = softmax_weight_ops.operator(stem)(x, scores, torch.tensor([0, 2]))
    assert (stats[0, 0] == float("-inf")).all()
    assert (stats[1, 0] == 0).all()


@pytest.mark.parametrize("with_lengths", [False, True], ids=["padded", "lengths"])
def test_gradcheck(weighting: Backend, with_lengths: bool) -> None:
    x, scores, _ = operands(2, 3, 2 if weighting.interpreted else 5, torch.float64)
    lengths = torch.tensor([3, 2]) if with_lengths else None
    call = functools.partial(softmax_weight, lengths=lengths, backend=weighting.name)
    inputs = (x.requires_grad_(), scores.requires_grad_())
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)
    if weighting.name == "cpu" and not with_lengths:  # past the registered rule
        assert torch.autograd.gradcheck(softmax_weight, inputs)
        assert torch.autograd.gradgradcheck(softmax_weight, inputs)


def test_third_derivative() -> None:
    x, scores, _ = operands(1, 3, 2, torch.float64)
    scores.requires_grad_()

    def second(call: Callable[..., Tensor]) -> Tensor:
        first = torch.autograd.grad(call(x, scores).pow(2).sum(), scores, create_graph=True)[0]
        again = torch.autograd.grad(first.pow(2).sum(), scores, create_graph=True)[0]
        return torch.autograd.grad(again.pow(2).sum(), scores)[0]

    torch.testing.assert_close(second(softmax_weight), second(plain))


@pytest.mark.unguarded
@pytest.mark.parametrize("needs", [1, 2, 3])
def test_opcheck(stem: str, needs: int) -> None:
    forward, backward = (softmax_weight_ops.operator(stem, k) for k in softmax_weight_ops._SCHEMAS)
    x, scores, dy = operands(2, 5, 3)
    lengths = torch.tensor([5, 3]) if needs == 3 else None
    x.requires_grad_(bool(needs & 1))
    scores.requires_grad_(bool(needs & 2))
    torch.library.opcheck(forward, (x, scores, lengths))
    stats = forward(x, scores, lengths)[1]
    dy.requires_grad_()
    torch.library.opcheck(backward, (dy, x, scores, lengths, stats, needs))


@pytest.mark.parametrize("lengths", [None, torch.tensor([4, 1])], ids=["fast", "registered"])
def test_only_what_is_asked_for(weighting: Backend, lengths: Tensor | None) -> None:
    x, scores, dy = operands(2, 4, 3)
    whole = results(call_on(weighting), x, scores, dy, lengths)
    for asked in ("dx", "dscores"):
        a, b = x.clone(), scores.clone()
        leaf = a.requires_grad_() if asked == "dx" else b.requires_grad_()
        y = softmax_weight(a, b, lengths=lengths, backend=weighting.name)
        y.backward(dy)
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, whole[asked])
    assert not softmax_weight(x, scores, lengths=lengths, backend=weighting.name).requires_grad


@pytest.mark.parametrize("needs", [1, 2, 3])
def test_past_the_registered_rule_nothing_changes(widest: Backend, needs: int) -> None:
    x, scores, dy = operands(3, 9, 21)
    x.requires_grad_(bool(needs & 1))
    scores.requires_grad_(bool(needs & 2))
    leaves = [t for t in (x, scores) if t.requires_grad]
    found = []
    for call in (softmax_weight, lambda a, b: softmax_weight_ops.operator("cpu")(a, b, None)[0]):
        y = call(x, scores)
        found.append([y, *torch.autograd.grad(y, leaves, dy)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_threads_change_no_bit(native: Backend, threads: int) -> None:
    for B, L, M in [(17, 25, 50), (1, 17, 2113), (1, 2500, 70), (1, 20011, 5), (3, 300, 230)]:
        x, scores, dy = operands(B, L, M)
        lengths = make_lengths(B, L)
        torch.set_num_threads(1)
        one = results(call_on(native), x, scores, dy, lengths)
        torch.set_num_threads(threads)
        assert_equal(results(call_on(native), x, scores, dy, lengths), one, f"with {threads} threads")


@pytest.mark.unguarded
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_results_stored_past_the_caches(widest: Backend, dtype: torch.dtype) -> None:
    """From 32 MB on, where rows are whole vectors, beside rows that are not."""
    size = torch.finfo(dtype).bits // 8
    for M in (1024, 1000):
        B, L = 2, (40 << 20) // (2 * 1000 * size)
        base = torch.randn(L, M, dtype=dtype)
        x, scores, dy = (base[torch.randperm(L)].expand(B, L, M) for _ in range(3))
        found = results(call_on(widest), x, scores, dy)
        small = results(call_on(widest), x[:1], scores[:1], dy[:1])
        for name, t in found.items():
            assert torch.equal(t[0], t[1])
            torch.testing.assert_close(t[:1], small[name])


# torch.compile, transforms, autocast


@pytest.mark.unguarded
@pytest.mark.parametrize("with_lengths", [False, True], ids=["padded", "lengths"])
def test_compile(widest: Backend, with_lengths: bool) -> None:
    torch._dynamo.reset()
    traced = []

    def count(graph: Any, inputs: Any) -> Any:
        traced.append(graph)
        return graph

    def twice(x: Tensor, scores: Tensor, lengths: Tensor | None = None) -> Tensor:
        return softmax_weight(x + 1, scores, lengths=lengths) * 2

    compiled = torch.compile(twice, fullgraph=True, dynamic=True, backend="aot_eager")
    counted = torch.compile(twice, fullgraph=True, dynamic=True, backend=count)
    for L in (7, 12, 30):
        x, scores, dy = operands(3, L, 21)
        lengths = make_lengths(3, L) if with_lengths else None
        assert_equal(results(compiled, x, scores, dy, lengths), results(twice, x, scores, dy, lengths))
        counted(x, scores, lengths)
    assert len(traced) == 1


def test_second_derivatives_raise_under_compile(widest: Backend) -> None:
    torch._dynamo.reset()
    x, scores, _ = operands(2, 5, 3)
    scores.requires_grad_()

    @torch.compile(backend="aot_eager")
    def first(scores: Tensor) -> Tensor:
        return softmax_weight(x, scores).pow(2).sum()

    gradient = torch.autograd.grad(first(scores), scores, create_graph=True)[0]
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.sum(), scores)


def test_transforms_run_on_the_reference() -> None:
    x, scores, dy = operands(3, 5, 4, torch.float64)
    batched = torch.func.vmap(lambda a, b: softmax_weight(a[None], b[None])[0])(x, scores)
    torch.testing.assert_close(batched, plain(x, scores))
    y, tangent = torch.func.jvp(softmax_weight, (x, scores), (dy, x))
    expected, expected_tangent = torch.func.jvp(plain, (x, scores), (dy, x))
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(tangent, expected_tangent)
    gradient = torch.func.grad(lambda s: (softmax_weight(x, s) * dy).sum())(scores)
    torch.testing.assert_close(gradient, results(plain, x, scores, dy)["dscores"])
    with pytest.raises(ValueError, match=r"torch\.func transforms"):
        torch.func.vmap(lambda a, b: softmax_weight(a[None], b[None], backend="cpu")[0])(x, scores)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_autocast_casts_nothing(weighting: Backend, dtype: torch.dtype) -> None:
    x, scores, dy = operands(2, 9, 5, dtype)
    expected = results(call_on(weighting), x, scores, dy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = results(call_on(weighting), x, scores, dy)
        assert_equal(found, expected)
        assert found["y"].dtype == dtype
        if dtype == torch.float32:  # scores of a layer that autocast has cast
            half = scores.to(torch.bfloat16)
            mixed = results(call_on(weighting), x, half, dy)
            assert mixed["dscores"].dtype == torch.bfloat16
            assert torch.equal(mixed["y"], softmax_weight(x, half.float(), backend=weighting.name))
            assert torch.equal(softmax_weight(x, half), softmax_weight(x, half.float()))


# Backends and errors


def test_choice_of_a_backend(widest: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    x, scores, _ = operands(2, 3, 4)
    assert backends.choose(x, None, "softmax_weight") == (
        "cpu" if backends.current is None else backends.current
    )
    lacks = re.escape("backend 'cuda' cannot run this call: the cuda backend has no softmax_weight")
    with pytest.raises(ValueError, match=lacks):
        softmax_weight(x, scores, backend="cuda")
    with fastac.backend("cuda"), pytest.raises(ValueError, match=lacks):
        softmax_weight(x, scores)
    with pytest.raises(ValueError, match="backend must be one of"):
        softmax_weight(x, scores, backend="fast")
    with pytest.raises(ValueError, match='backend must be None or "reference"'):
        fastac.reference.softmax_weight(x, scores, backend="cpu")
    reference = fastac.reference.softmax_weight
    assert torch.equal(reference(x, scores), softmax_weight(x, scores, backend="reference"))
    assert inspect.signature(reference) == inspect.signature(softmax_weight)


def test_triton_on_a_gpu_whatever_the_table_of_winners_says(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(2, 3, 4, device="cuda")
    monkeypatch.setitem(backends.PREDICATES, "cuda", lambda x: None)
    monkeypatch.setitem(backends.PREDICATES, "triton", lambda x: None)
    monkeypatch.setattr(backends, "_triton_by_name", lambda x: None)
    monkeypatch.setattr(backends, "_slower", lambda name, x: "measured slower" if name == "triton" else None)
    assert backends.choose(x) == "cuda"
    assert backends.choose(x, None, "softmax_weight") == "triton"
    assert backends.passed_over("cuda", x, "softmax_weight") == "the cuda backend has no softmax_weight"


X = torch.zeros(2, 3, 4)
WRONG: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "x must be a torch.Tensor, got list", {"x": [1.0]}),
    (TypeError, "x must be a dense strided tensor, got layout torch.sparse_coo", {"x": X.to_sparse()}),
    (ValueError, "x must have shape (B, L, M), got (3, 4)", {"x": X[0]}),
    (TypeError, "x must be float16, bfloat16, float32 or float64, got torch.int64", {"x": X.long()}),
    (
        ValueError, "x must have at least one feature (M >= 1), got shape (2, 3, 0)",
        {"x": X[..., :0], "scores": X[..., :0]},
    ),
    (TypeError, "scores must be a torch.Tensor, got NoneType", {"scores": None}),
    (TypeError, "scores must be a dense strided tensor", {"scores": X.to_sparse()}),
    (ValueError, "scores must have the shape of x, (B, L, M) = (2, 3, 4), got (2, 4, 3)", {"scores": X.mT}),
    (
        ValueError, "scores must have the shape of x, (B, L, M) = (2, 3, 4), got (2, 3, 1)",
        {"scores": X[..., :1]},
    ),
    (ValueError, "scores must be on the device of x, cpu, got meta", {"scores": X.to("meta")}),
    (
        TypeError, "scores must be torch.float32 (the dtype of x), got torch.float64",
        {"scores": X.double()},
    ),
    (
        TypeError, "scores must be torch.float16 (the dtype of x) or torch.float32, got torch.bfloat16",
        {"x": X.half(), "scores": X.bfloat16()},
    ),
    (TypeError, "lengths must be a torch.Tensor, got list", {"lengths": [1, 2]}),
    (TypeError, "lengths must be an integer tensor, got torch.float32", {"lengths": torch.ones(2)}),
    (ValueError, "lengths must have shape (B,) with B = 2, got (3,)", {"lengths": torch.tensor([1, 2, 3])}),
    (
        ValueError, "lengths must lie in 0...L with L = 3, got values in 1...4",
        {"lengths": torch.tensor([1, 4])},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "changed"), WRONG, ids=[m for _, m, _ in WRONG])
def test_errors(error: type[Exception], message: str, changed: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"x": X, "scores": X, "lengths": None} | changed
    x, scores = arguments.pop("x"), arguments.pop("scores")
    for call in (softmax_weight, fastac.reference.softmax_weight):
        with pytest.raises(error, match=re.escape(message)):
            call(x, scores, **arguments)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.uint8], ids=str)
def test_integer_types_of_lengths(dtype: torch.dtype) -> None:
    x, scores, dy = operands(2, 5, 3)
    lengths = torch.tensor([5, 2])
    found = results(softmax_weight, x, scores, dy, lengths.to(dtype))
    assert_equal(found, results(softmax_weight, x, scores, dy, lengths))


def test_direct_calls_read_nothing_out_of_bounds(widest: Backend) -> None:
    forward, backward = (softmax_weight_ops.operator("cpu", k) for k in softmax_weight_ops._SCHEMAS)
    x, scores, dy = operands(2, 5, 3)
    lengths = torch.tensor([5, 3])
    _, stats = forward(x, scores, lengths)
    short, lower = torch.zeros(2, 5, 2), torch.zeros(2, 4, 3)
    wrong = [
        lambda: forward(x, short, None),
        lambda: forward(x[0], scores[0], None),
        lambda: forward(x.long(), scores, None),
        lambda: forward(x, scores.double(), None),
        lambda: forward(x, scores, torch.tensor([5])),
        lambda: forward(x, scores, lengths.int()),
        lambda: forward(x[..., :0], scores[..., :0], None),
        lambda: backward(lower, x, scores, None, stats, 3),
        lambda: backward(dy.double(), x, scores, None, stats, 3),
        lambda: backward(dy, x, scores, None, stats[:, :1], 3),
        lambda: backward(dy, x, scores, None, stats.double(), 3),
    ]
    for call in wrong:
        with pytest.raises(RuntimeError):
            call()
    clamped = forward(x, scores, torch.tensor([99, -1]))[0]
    assert torch.equal(clamped, forward(x, scores, torch.tensor([5, 0]))[0])
