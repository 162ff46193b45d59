"""Autograd: gradcheck, gradgradcheck, opcheck, autocast, and which gradients are computed."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import LAYOUTS, WEIGHTINGS, Case, assert_equal, make_case, run
from tested_backends import Backend
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import fastac
from fastac import _native, ops

SHIFT = pytest.mark.parametrize("shift", [True, False], ids=["shift", "plain"])
SMALL = {"B": 3, "L": 4, "M": 5, "N": 2, "dtype": torch.float64, "empty": True}


def function_of(backend: Backend, case: Case) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """y as a function of the operands that have a gradient, and those operands."""
    names = tuple(case.floats())
    leaves = tuple(getattr(case, n).detach().clone().requires_grad_() for n in names)
    return lambda *ts: backend(case.replace(**dict(zip(names, ts, strict=True)))), leaves


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@SHIFT
def test_gradcheck(backend: Backend, weighting: str, layout: str, shift: bool) -> None:
    function, leaves = function_of(
        backend, make_case(**SMALL, weighting=weighting, layout=layout, shift=shift)
    )
    assert gradcheck(function, leaves, fast_mode=backend.interpreted)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@SHIFT
def test_gradgradcheck(quick_backend: Backend, weighting: str, layout: str, shift: bool) -> None:
    case = make_case(**SMALL, weighting=weighting, layout=layout, shift=shift)
    function, leaves = function_of(quick_backend, case)
    assert gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize(("weighting", "layout"), zip(WEIGHTINGS, LAYOUTS, strict=True))
def test_gradgradcheck_interpreted(interpreted: Backend, weighting: str, layout: str) -> None:
    function, leaves = function_of(interpreted, make_case(**SMALL, weighting=weighting, layout=layout))
    assert gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.full
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@SHIFT
def test_gradgradcheck_entry_by_entry(
    quick_backend: Backend, weighting: str, layout: str, shift: bool
) -> None:
    """The same without random projections."""
    case = make_case(**SMALL, weighting=weighting, layout=layout, shift=shift)
    function, leaves = function_of(quick_backend, case)
    assert gradgradcheck(function, leaves)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_gradcheck_in_the_linear_region(backend: Backend, weighting: str) -> None:
    case = make_case(**SMALL, weighting=weighting).replace(eps=1e3)
    function, leaves = function_of(backend, case)
    assert gradcheck(function, leaves, fast_mode=backend.interpreted)


def test_gradcheck_of_a_frozen_x(backend: Backend) -> None:
    case = make_case(**SMALL)
    names = ("weight", "alpha", "beta")
    leaves = tuple(getattr(case, n).clone().requires_grad_() for n in names)

    def function(*ts: Tensor) -> Tensor:
        return backend(case.replace(**dict(zip(names, ts, strict=True))))

    assert gradcheck(function, leaves, fast_mode=backend.interpreted)
    assert gradgradcheck(function, leaves, fast_mode=True)


def test_gradgradcheck_with_a_bound(each_backend: Backend) -> None:
    """max_length bounds the second derivative's sets too."""
    case = make_case(**SMALL, layout="packed")

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return fastac.attention_cluster(
            x, weight, case.alpha, case.beta, offsets=case.offsets, max_length=4, backend=each_backend.name
        )

    leaves = (case.x.requires_grad_(), case.weight.requires_grad_())  # type: ignore[union-attr]
    assert gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weighting", ["fc1", "fc2", "gated", "average"])
@SHIFT
def test_module(quick_backend: Backend, weighting: str, layout: str, shift: bool) -> None:
    check_module(quick_backend, weighting, layout, shift)


@pytest.mark.parametrize(
    ("weighting", "layout"), zip(["fc1", "fc2", "gated", "average"], LAYOUTS, strict=True)
)
def test_module_interpreted(interpreted: Backend, weighting: str, layout: str) -> None:
    check_module(interpreted, weighting, layout, shift=True)


def check_module(backend: Backend, weighting: str, layout: str, shift: bool) -> None:
    """Both checks through `fastac.AttentionCluster`, in x and every parameter."""
    hidden = {"hidden_features": 3} if weighting in ("fc2", "gated") else {}
    module = fastac.AttentionCluster(5, 2, weighting=weighting, shift=shift, dtype=torch.float64, **hidden)
    parameters = dict(module.named_parameters())
    case = make_case(**SMALL, layout=layout)
    ragged = {n: t for n in ("lengths", "mask", "offsets") if (t := getattr(case, n)) is not None}

    def function(x: Tensor, *values: Tensor) -> Tensor:
        with fastac.backend(backend.name):
            found = torch.func.functional_call(
                module, dict(zip(parameters, values, strict=True)), (x,), ragged
            )
        assert isinstance(found, Tensor)
        return found

    leaves = (
        case.x.clone().requires_grad_(),
        *(p.detach().clone().requires_grad_() for p in parameters.values()),
    )
    assert gradcheck(function, leaves, fast_mode=True)
    assert gradgradcheck(function, leaves, fast_mode=True)


def operator_arguments(case: Case) -> tuple[Any, ...]:
    floats = (case.x, case.weight, case.scores, case.position_bias, case.alpha, case.beta)
    return (*floats, case.lengths, case.mask, case.offsets, case.eps)


def operators(backend: Backend) -> list[Callable[..., Any]]:
    return [ops.operator(backend.name, kind) for kind in ("inference", "forward", "backward")]


OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.unguarded
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@SHIFT
def test_opcheck(each_cpp: Backend, weighting: str, layout: str, shift: bool) -> None:
    case = make_case(
        B=3, L=7, M=41, N=2, weighting=weighting, layout=layout, shift=shift, dtype=torch.float64
    )
    inference, forward, backward = operators(each_cpp)
    args = operator_arguments(case)
    leaves = case.replace(**{n: t.clone().requires_grad_() for n, t in case.floats().items()})
    # With a bound of the lengths, and without where the argument is left to its default.
    bound = (7,) if layout == "packed" else ()
    torch.library.opcheck(inference, (*args, *bound), test_utils=OPCHECKS)
    # The scores of excluded positions are not written, so they are kept where there are none.
    for save in (True, False) if layout == "padded" else (False,):
        torch.library.opcheck(forward, (*operator_arguments(leaves), save, *bound), test_utils=OPCHECKS)
        saved = forward(*args, save)
        needs = sum(1 << i for i, t in enumerate(args[:6]) if t is not None)
        for mask in (needs, needs & ~1, 0) if layout == "padded" else (needs,):
            torch.library.opcheck(backward, (case.dy(), *args, *saved, mask, *bound), test_utils=OPCHECKS)


@pytest.mark.unguarded
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_opcheck_of_other_dtypes(each_cpp: Backend, dtype: torch.dtype) -> None:
    """The fake kernels know the dtypes: y as x, the statistics accumulated, each gradient as its operand."""
    inference, forward, backward = operators(each_cpp)
    for weighting in WEIGHTINGS:
        case = make_case(B=2, L=3, M=64, N=1, weighting=weighting, dtype=dtype)
        args = operator_arguments(case)
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(inference, args, test_utils=checks)
        torch.library.opcheck(forward, (*args, True), test_utils=checks)
        saved = forward(*args, True)
        needs = sum(1 << i for i, t in enumerate(args[:6]) if t is not None)
        torch.library.opcheck(backward, (case.dy(), *args, *saved, needs), test_utils=checks)


def test_inference_has_no_autograd_kernel(each_cpp: Backend) -> None:
    """What lets a call without gradients skip autograd's cost."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    found = {k: has(f"fastac::{each_cpp.name}_{k}", "Autograd") for k in ("inference", "forward", "backward")}
    assert found == {"inference": False, "forward": True, "backward": True}


def called_operators(function: Callable[[], object]) -> list[str]:
    with torch.profiler.profile() as profile:
        function()
    return [e.name.removeprefix("fastac::") for e in profile.events() if e.name.startswith("fastac::")]


def test_which_operator_runs(each_cpp: Backend) -> None:
    """Inference if nothing needs a gradient, else forward and backward, and nothing twice."""
    inference, forward, backward = (f"{each_cpp.name}_{k}" for k in ("inference", "forward", "backward"))
    case = make_case()
    leaves = case.replace(**{n: t.clone().requires_grad_() for n, t in case.floats().items()})
    assert called_operators(lambda: each_cpp(case)) == [inference]

    def without_grad() -> None:
        with torch.no_grad():
            each_cpp(leaves)

    def in_inference_mode() -> None:
        with torch.inference_mode():
            each_cpp(leaves)

    assert called_operators(without_grad) == [inference]
    assert called_operators(in_inference_mode) == [inference]
    assert called_operators(lambda: each_cpp(leaves).sum().backward()) == [forward, backward]


def test_the_result_needs_a_gradient_only_if_an_operand_does(each_backend: Backend) -> None:
    case = make_case(weighting="position_bias")
    assert not each_backend(case).requires_grad
    for name, t in case.floats().items():
        y = each_backend(case.replace(**{name: t.clone().requires_grad_()}))
        assert y.requires_grad, name
        with torch.no_grad():
            assert not each_backend(case.replace(**{name: t.clone().requires_grad_()})).requires_grad


def test_only_wanted_gradients_are_asked_for(each_cpp: Backend) -> None:
    """Each operand's own requires_grad decides its bit of `needs`."""
    for weighting, layout in itertools.product(WEIGHTINGS, ("padded", "packed")):
        case = make_case(weighting=weighting, layout=layout)
        order = ("x", "weight", "scores", "position_bias", "alpha", "beta")
        for name in case.floats():
            leaf = getattr(case, name).clone().requires_grad_()
            y = each_cpp(case.replace(**{name: leaf}))
            with Recorder(each_cpp) as recorder:
                y.backward(case.dy())
            assert recorder.needs == [1 << order.index(name)], (weighting, name)
            assert leaf.grad is not None and leaf.grad.abs().max() > 0


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_max_length_reaches_every_operator(each_cpp: Backend, layout: str) -> None:
    """The bound of a packed call goes to inference, forward and backward; a padded call has L."""
    case = make_case(layout=layout)
    x = case.x.clone().requires_grad_()
    arguments = (case.weight, case.alpha, case.beta)
    options = {"offsets": case.offsets, "max_length": 40, "backend": each_cpp.name}
    found = []

    class Bounds(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "fastac":
                position = [a.name for a in func._schema.arguments].index("max_length")
                found.append(args[position] if len(args) > position else None)
            return func(*args, **(kwargs or {}))

    with Bounds():
        fastac.attention_cluster(case.x, *arguments, **options)
        fastac.attention_cluster(x, *arguments, **options).sum().backward()
    assert found == [40 if layout == "packed" else None] * 3


class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the `needs` of every call of a backend's backward operator."""

    def __init__(self, backend: Backend) -> None:
        super().__init__()
        self.backward = ops.operator(backend.name, "backward")
        self.needs: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is self.backward:
            self.needs.append(args[14] if "needs" not in (kwargs or {}) else kwargs["needs"])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(each_backend: Backend, layout: str, target: torch.dtype) -> None:
    """x and weight go to the autocast type, nothing else; gradients come back in the operands' own."""
    for weighting in WEIGHTINGS:
        case = make_case(weighting=weighting, layout=layout)
        by_hand = case.replace(x=case.x.to(target))
        if case.weight is not None:
            by_hand = by_hand.replace(weight=case.weight.to(target))
        dy = case.dy().to(target)
        expected = run(each_backend, by_hand, dy)

        def under_autocast(c: Case) -> Tensor:
            with torch.autocast("cpu", target):
                return each_backend(c)

        results, y = run(under_autocast, case, dy), run(under_autocast, case)["y"]
        assert y.dtype == results["y"].dtype == target
        for name in case.floats():
            assert results[f"d{name}"].dtype == torch.float32, name
        rounded = {n: t if n == "y" else t.float() for n, t in expected.items()}
        assert_equal(results, rounded, "under autocast")
        assert_equal({"y": y}, {"y": expected["y"]}, "at inference under autocast")


def test_autocast_leaves_float64_and_a_disabled_region_alone(each_backend: Backend) -> None:
    double, single = make_case(dtype=torch.float64), make_case()
    with torch.autocast("cpu", torch.bfloat16):
        y = each_backend(double)
        with torch.autocast("cpu", enabled=False):
            assert each_backend(single).dtype == torch.float32
    assert_equal({"y": y}, run(each_backend, double), "under autocast")


def test_backward_outside_the_autocast_region(each_backend: Backend) -> None:
    case = make_case()
    x = case.x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = each_backend(case.replace(x=x))
    y.float().square().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32 and x.grad.isfinite().all()


def test_second_derivatives_against_the_reference(each_backend: Backend) -> None:
    """A gradient penalty, in float32: the same numbers as differentiating the reference twice."""
    case = make_case(B=2, L=5, M=9, N=3)
    direction = torch.randn(2, 5, 9)
    found = []
    for call in (each_backend, Backend("reference")):
        leaves = {n: t.clone().requires_grad_() for n, t in case.floats().items()}
        y = call(case.replace(**leaves))
        (dx,) = torch.autograd.grad(y.square().cos().sum(), leaves["x"], create_graph=True)
        found.append(torch.autograd.grad((dx * direction).sum(), list(leaves.values())))
    for ours, exact in zip(*found, strict=True):
        assert exact.abs().max() > 0
        torch.testing.assert_close(ours, exact, rtol=1e-3, atol=1e-4 * float(exact.abs().max()))


def test_retain_graph_gives_the_same_gradient_twice(each_backend: Backend) -> None:
    case = make_case()
    x = case.x.clone().requires_grad_()
    y = each_backend(case.replace(x=x))
    dy = case.dy()
    (first,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    (second,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, x, dy)


def test_changing_an_operand_before_backward_is_noticed(each_backend: Backend) -> None:
    case = make_case()
    weight = case.weight.clone().requires_grad_()  # type: ignore[union-attr]
    x = case.x.clone()
    y = each_backend(case.replace(x=x, weight=weight))
    x.add_(1)
    with pytest.raises(RuntimeError, match="inplace operation"):
        y.sum().backward()


def test_no_warning_on_the_way(each_backend: Backend) -> None:
    case = make_case()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(each_backend, case, case.dy())
        run(each_backend, case)


def _plain_call(dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    torch.manual_seed(5)
    shapes = ((3, 5, 6), (4, 6), (4,), (4,))
    return tuple(torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)


@pytest.mark.skipif(not _native.available, reason="needs the C++ extension")
@pytest.mark.parametrize("asked", [(0, 1, 2, 3), (0,), (1,), (2,), (1, 2, 3), (0, 3)], ids=str)
def test_an_eager_call_without_layout_has_the_operators_gradients(asked: tuple[int, ...]) -> None:
    """It goes past the operator's registered rule; the bits are the same and no gradient is made up."""
    inputs = tuple(t if i in asked else t.detach() for i, t in enumerate(_plain_call()))
    y = fastac.attention_cluster(*inputs)
    assert y.grad_fn is not None and "FastCluster" in type(y.grad_fn).__name__
    x, weight, alpha, beta = inputs
    forward = ops.operator("cpu", "forward")
    expected = forward(x, weight, None, None, alpha, beta, None, None, None, 1e-12, False)[0]
    assert torch.equal(y, expected)
    dy = torch.randn_like(y)
    leaves = [inputs[i] for i in asked]
    found = torch.autograd.grad(y, leaves, dy)
    for a, b in zip(found, torch.autograd.grad(expected, leaves, dy), strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(not _native.available, reason="needs the C++ extension")
def test_an_eager_call_without_layout_has_a_second_derivative() -> None:
    inputs = _plain_call()
    assert gradgradcheck(fastac.attention_cluster, inputs)
    x, weight, *_ = inputs
    assert gradgradcheck(fastac.attention_cluster, (x, weight))
