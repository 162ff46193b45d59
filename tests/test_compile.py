"""torch.compile: the same numbers in one graph, and few compilations however L varies."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from helpers import LAYOUTS, WEIGHTINGS, Backend, Case, assert_near, make_case, run
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

pytestmark = pytest.mark.unguarded


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(call: Callable[[Case], Tensor], case: Case, **options: object) -> Callable[[Case], Tensor]:
    """`call` compiled as a function of the tensors of `case` alone."""
    names = [n for n, t in case.operands().items() if isinstance(t, Tensor)]
    empty = case.replace(**{n: None for n in names if n != "x"})

    def function(*tensors: Tensor) -> Tensor:
        return call(empty.replace(**dict(zip(names, tensors, strict=True))))

    fast = torch.compile(function, fullgraph=True, **options)  # type: ignore[call-overload]
    return lambda c: fast(*(getattr(c, n) for n in names))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_same_numbers(each_backend: Backend, weighting: str, layout: str) -> None:
    """Forward and backward in one graph each, and inference."""
    case = make_case(weighting=weighting, layout=layout)
    dy = case.dy()
    fast = compiled(each_backend, case, backend="aot_eager")
    assert_near(run(fast, case, dy), run(each_backend, case, dy), torch.float32)
    assert_near(run(fast, case), run(each_backend, case), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(each_backend: Backend, dtype: torch.dtype) -> None:
    case = make_case(dtype=dtype)
    dy = case.dy()
    fast = compiled(each_backend, case, backend="aot_eager")
    eps = 8 if each_backend.name == "cpu" else 64  # a decomposed reference may round in other places
    assert_near(run(fast, case, dy), run(each_backend, case, dy), dtype, eps=eps)


def test_frozen_features(each_backend: Backend) -> None:
    case = make_case()
    dy = case.dy()
    wanted = ("weight", "alpha", "beta")
    fast = compiled(each_backend, case, backend="aot_eager")
    assert_near(run(fast, case, dy, wanted), run(each_backend, case, dy, wanted), torch.float32)


def test_inductor(widest: Backend) -> None:
    """The default backend, with work around the operator to fuse and a dynamic L."""
    direction = torch.randn(11, 67)

    def model(x: Tensor, weight: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
        y = widest(Case(x.relu() + 1, weight, alpha=alpha, beta=beta))
        return (y * 2).sin() * direction

    case = make_case()
    fast = torch.compile(model, fullgraph=True, dynamic=True)
    for L in (23, 40):
        other = case.replace(x=torch.randn(5, L, 67))
        leaves = [t.clone().requires_grad_() for t in (other.x, other.weight, other.alpha, other.beta)]  # type: ignore[union-attr]
        results = []
        for call in (fast, model):
            y = call(*leaves)
            grads = torch.autograd.grad(y.sum(), leaves)
            results.append({str(i): t for i, t in enumerate((y.detach(), *grads))})
        assert_near(results[0], results[1], torch.float32, eps=32)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_at_most_two_compilations_for_all_lengths(
    each_backend: Backend, weighting: str, training: bool
) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    fast = compiled(each_backend, make_case(weighting=weighting), backend=counter)
    for L in (25, 2, 7, 64, 3, 131, 300):
        case = make_case(L=L, weighting=weighting)
        if case.position_bias is not None:
            case = case.replace(position_bias=torch.randn(11, 303))
        dy = case.dy() if training else None
        assert_near(run(fast, case, dy), run(each_backend, case, dy), torch.float32)
    assert 1 <= counter.frame_count <= 2


def test_at_most_two_compilations_for_all_packed_sizes(each_backend: Backend) -> None:
    """T and the lengths vary, B stays."""
    counter = CompileCounterWithBackend("aot_eager")
    fast = compiled(each_backend, make_case(layout="packed"), backend=counter)
    for L in (25, 7, 64, 131):
        case = make_case(L=L, layout="packed")
        dy = case.dy()
        assert_near(run(fast, case, dy), run(each_backend, case, dy), torch.float32)
    assert 1 <= counter.frame_count <= 2


def test_dynamic_from_the_start(each_backend: Backend) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    fast = compiled(each_backend, make_case(), backend=counter, dynamic=True)
    for B, L in ((5, 25), (3, 7), (4, 131)):
        case = make_case(B=B, L=L)
        dy = case.dy()
        assert_near(run(fast, case, dy), run(each_backend, case, dy), torch.float32)
    assert 1 <= counter.frame_count <= 2


def test_double_backward_raises(widest: Backend) -> None:
    """Never zeros in silence: a second derivative of a compiled graph is refused."""
    case = make_case(dtype=torch.float64)
    leaf = case.x.clone().requires_grad_()
    y = compiled(widest, case, backend="aot_eager")(case.replace(x=leaf))
    (dx,) = torch.autograd.grad(y.sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(dx.square().sum(), leaf)


def test_autocast_inside_the_graph(each_backend: Backend) -> None:
    case = make_case()

    def call(c: Case) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return each_backend(c)

    fast = compiled(call, case, backend="aot_eager")
    dy = case.dy().bfloat16()
    found = run(fast, case, dy)
    assert found["y"].dtype == torch.bfloat16
    assert_near(found, run(call, case, dy), torch.bfloat16)
