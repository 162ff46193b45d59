"""torch.compile: the same numbers in one graph, and few compilations however L varies."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from functorch.compile import make_boxed_func
from helpers import LAYOUTS, WEIGHTINGS, Case, assert_near, make_case, run
from tested_backends import Backend
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import fastac
from fastac import _cuda, backends, ops

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
    eps = 64 if each_backend.name == "reference" else 8  # a decomposed reference may round in other places
    assert_near(run(fast, case, dy), run(each_backend, case, dy), dtype, eps=eps)


def test_frozen_features(each_backend: Backend) -> None:
    case = make_case()
    dy = case.dy()
    wanted = ("weight", "alpha", "beta")
    fast = compiled(each_backend, case, backend="aot_eager")
    assert_near(run(fast, case, dy, wanted), run(each_backend, case, dy, wanted), torch.float32)


def test_inductor(each_cpp: Backend) -> None:
    """The default backend, with work around the operator to fuse and a dynamic L."""
    case = make_case()
    B, _, M = case.x.shape
    direction = torch.randn(case.cluster_size, M)

    def model(x: Tensor, weight: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
        y = each_cpp(Case(x.relu() + 1, weight, alpha=alpha, beta=beta))
        return (y * 2).sin() * direction

    fast = torch.compile(model, fullgraph=True, dynamic=True)
    for L in (23, 40):
        other = case.replace(x=torch.randn(B, L, M))
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
            case = case.replace(position_bias=torch.randn(case.cluster_size, 303))
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
    fast = compiled(each_backend, make_case(N=11), backend=counter, dynamic=True)
    for B, L in ((5, 25), (3, 7), (4, 131)):
        case = make_case(B=B, L=L, N=11)
        dy = case.dy()
        assert_near(run(fast, case, dy), run(each_backend, case, dy), torch.float32)
    assert 1 <= counter.frame_count <= 2


def test_double_backward_raises(each_cpp: Backend) -> None:
    """Never zeros in silence: a second derivative of a compiled graph is refused."""
    case = make_case(dtype=torch.float64)
    leaf = case.x.clone().requires_grad_()
    y = compiled(each_cpp, case, backend="aot_eager")(case.replace(x=leaf))
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


# The backends of a GPU on fake tensors: everything above their kernels, on a machine without one


@pytest.fixture(params=["triton", "cuda"])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The one of the GPU's backends that can run every call: fake tensors launch nothing."""
    chosen: str = request.param
    monkeypatch.setattr(backends, "current", None)
    for name in ("triton", "cuda"):
        monkeypatch.setitem(backends.PREDICATES, name, lambda x, name=name: None if name == chosen else "no")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return chosen


class Graphs:
    """A compiler that keeps the operators of fastac in the graphs of the forward and of the backward."""

    def __init__(self) -> None:
        self.forward: list[list[str]] = []
        self.backward: list[list[str]] = []
        self.backend = aot_autograd(
            fw_compiler=lambda module, _: self._keep(self.forward, module),
            bw_compiler=lambda module, _: self._keep(self.backward, module),
        )

    @staticmethod
    def _keep(kept: list[list[str]], module: torch.fx.GraphModule) -> Callable[..., object]:
        targets = [n.target for n in module.graph.nodes if n.op == "call_function"]
        kept.append([t.name() for t in targets if getattr(t, "namespace", "") == "fastac"])
        function: Callable[..., object] = make_boxed_func(module.forward)
        return function


def on(device: str, case: Case) -> Case:
    """Operands of the same shapes with no values; fake ones under a FakeTensorMode."""
    tensors = {n: t for n, t in case.operands().items() if isinstance(t, Tensor)}
    return case.replace(**{n: torch.empty(t.shape, dtype=t.dtype, device=device) for n, t in tensors.items()})


def automatic(case: Case, max_length: int | None = None) -> Tensor:
    """y by the public functions, without a backend's name."""
    rest = {name: getattr(case, name) for name in ("lengths", "mask", "offsets", "eps")}
    rest["max_length"] = max_length
    if case.scores is not None:
        return fastac.attention_pool(case.x, case.scores, case.alpha, case.beta, **rest)
    rest["position_bias"] = case.position_bias
    return fastac.attention_cluster(case.x, case.weight, case.alpha, case.beta, **rest)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_one_graph_on_fake_cuda_tensors(gpu: str, weighting: str, layout: str) -> None:
    """Inference on a CUDA device: the backend is chosen without being named, in one graph."""
    case, graphs = make_case(weighting=weighting, layout=layout), Graphs()
    with FakeTensorMode():
        case = on("cuda", case)
        y = compiled(automatic, case, backend=graphs.backend)(case)
    assert (y.device.type, y.shape) == ("cuda", (5, case.cluster_size, 67))
    assert graphs.forward == [[f"fastac::{gpu}_forward"]]


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both of the GPU's backends can run every call, and the table of measured winners was not yet read."""
    monkeypatch.setattr(backends, "current", None)
    for name in ("triton", "cuda"):
        monkeypatch.setitem(backends.PREDICATES, name, lambda x: None)
    monkeypatch.setattr(backends, "_gpu_name", lambda index: "no GPU of this name was measured")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    _cuda.measured.cache_clear()


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize("winner", [None, "triton", "cuda"])
def test_one_graph_where_both_can_run(winner: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of measured winners is read while the call is traced."""
    if winner is not None:
        monkeypatch.setattr(backends, "_gpu_name", lambda index: "Some GPU")
        monkeypatch.setattr(_cuda, "measured", lambda: {"Some GPU": {"32-bit short": winner}})
    case, graphs = make_case(), Graphs()
    with FakeTensorMode():
        case = on("cuda", case)
        compiled(automatic, case, backend=graphs.backend)(case)
    assert graphs.forward == [[f"fastac::{winner or 'triton'}_forward"]]


@pytest.mark.usefixtures("both")
def test_the_choice_does_not_depend_on_lengths_where_nothing_was_measured() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    fast = torch.compile(lambda operands: automatic(Case(**operands)), fullgraph=True, backend=counter)
    cases = [make_case(L=L) for L in (25, 2, 64, 131, 300)]
    with FakeTensorMode():
        for case in cases:
            fast({n: t for n, t in on("cuda", case).operands().items() if isinstance(t, Tensor)})
    assert 1 <= counter.frame_count <= 2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_operators_on_fake_cuda_tensors(gpu: str, weighting: str, layout: str) -> None:
    """Shapes, dtypes and devices of what the three operators return, with the gradient of x and without."""
    case = make_case(weighting=weighting, layout=layout, dtype=torch.bfloat16)
    with FakeTensorMode():
        case = on("cuda", case)
        floats = (case.x, case.weight, case.scores, case.position_bias, case.alpha, case.beta)
        arguments = (*floats, case.lengths, case.mask, case.offsets, case.eps)
        y, stats, saved = ops.operator(gpu, "forward")(*arguments, True)
        again = ops.operator(gpu, "inference")(*arguments)
        needs = sum(1 << i for i, t in enumerate(floats) if t is not None)
        for asked in (needs, needs & ~1):
            gradients = ops.operator(gpu, "backward")(y, *arguments, y, stats, saved, asked)
            for i, (t, gradient) in enumerate(zip(floats, gradients, strict=True)):
                shape = t.shape if t is not None and asked >> i & 1 else (0,)
                assert (gradient.shape, gradient.dtype) == (shape, torch.bfloat16)
                assert gradient.device.type == "cuda"
    units = case.cluster_size
    for t in (y, again):
        assert (t.shape, t.dtype) == ((5, units, 67), torch.bfloat16)
    assert (stats.shape, stats.dtype) == ((3, 5, units), torch.float32)
    assert saved.shape == ((0,) if case.weight is None else (*case.x.shape[:-1], units))
    assert {t.device.type for t in (y, again, stats, saved)} == {"cuda"}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_training_in_one_graph_of_fake_tensors(gpu: str, weighting: str, layout: str) -> None:
    """Forward and backward are one operator each.

    On CPU tensors: a CPU build of torch aborts where autograd meets a CUDA tensor, a fake one included.
    """
    case, graphs = make_case(weighting=weighting, layout=layout), Graphs()
    with FakeTensorMode():
        case = on("cpu", case)
        fast = compiled(Backend(gpu), case, backend=graphs.backend)
        results = run(fast, case, torch.empty(5, case.cluster_size, 67))
    for name, t in case.floats().items():
        assert results[f"d{name}"].shape == t.shape
    assert graphs.forward == [[f"fastac::{gpu}_forward"]]
    assert graphs.backward == [[f"fastac::{gpu}_backward"]]


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_at_most_two_compilations_on_fake_cuda_tensors(layout: str) -> None:
    """L, T and the bound of the lengths vary."""
    counter = CompileCounterWithBackend("aot_eager")

    def function(operands: dict[str, Tensor], bound: int | None) -> Tensor:
        return automatic(Case(**operands), bound)

    fast = torch.compile(function, fullgraph=True, backend=counter)
    cases = [(L, make_case(L=L, layout=layout)) for L in (25, 2, 7, 64, 3, 131, 300)]
    with FakeTensorMode():
        for L, case in cases:
            operands = {n: t for n, t in on("cuda", case).operands().items() if isinstance(t, Tensor)}
            y = fast(operands, L if layout == "packed" else None)
            assert y.shape == (5, 11, 67)
    assert 1 <= counter.frame_count <= 2


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("compiling", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_autocast_on_fake_cuda_tensors(
    dtype: torch.dtype, compiling: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """x and weight reach the operator in the autocast type unless x is float64, alpha as it is."""
    seen, sizes = set(), ops.sizes

    def noting(x: Tensor, weight: Tensor, scores: None, alpha: Tensor, offsets: None) -> object:
        seen.add((x.dtype, weight.dtype, alpha.dtype))
        return sizes(x, weight, scores, alpha, offsets)

    monkeypatch.setattr(ops, "sizes", noting)  # what the fake kernels call
    case = make_case(dtype=dtype)
    if dtype == torch.float16:  # which alpha and beta may not be where x becomes bfloat16
        case.alpha, case.beta = case.alpha.float(), case.beta.float()  # type: ignore[union-attr]
    # torch.autocast switches itself off where there is no GPU.
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        with FakeTensorMode():
            case = on("cuda", case)
            y = (compiled(automatic, case, backend="aot_eager") if compiling else automatic)(case)
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
    target = torch.float64 if dtype == torch.float64 else torch.bfloat16
    assert y.dtype == target
    assert seen == {(target, target, case.alpha.dtype)}  # type: ignore[union-attr]
