"""How a call lives in CUDA: graphs, streams, devices, compilation, synchronisation, launches, big tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from gpu_helpers import DEVICE, IDS, OURS, gpu_case, gradient_of, leaves_of, moved, need_memory
from helpers import LAYOUTS, WEIGHTINGS, Case, Results, assert_equal, assert_near, run, truth
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.profiler import ProfilerActivity, profile

import fastac
from fastac import _cuda

NAMED = {
    "online": {"B": 1, "L": 25, "M": 1536, "N": 64},
    "kinetics-rgb": {"B": 256, "L": 25, "M": 1536, "N": 64},
}


# CUDA graphs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], **IDS)
@pytest.mark.parametrize("name", NAMED)
def test_graph_of_the_forward(name: str, dtype: torch.dtype) -> None:
    first, second = gpu_case(**NAMED[name], dtype=dtype), gpu_case(**NAMED[name], dtype=dtype)
    expected = [run(OURS, case)["y"] for case in (first, second)]
    assert not torch.equal(*expected)
    static = first.replace(**{n: t.clone() for n, t in first.floats().items()})
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = OURS(static)
    for case, direct in zip((second, first), reversed(expected), strict=True):
        for n, t in static.floats().items():
            t.copy_(getattr(case, n))
        graph.replay()
        assert torch.equal(y, direct)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], **IDS)
@pytest.mark.parametrize("name", NAMED)
def test_graph_of_a_training_step(name: str, dtype: torch.dtype) -> None:
    case, other = gpu_case(**NAMED[name], dtype=dtype), gpu_case(**NAMED[name], dtype=dtype)
    static, leaves = leaves_of(case)
    dy, other_dy = gradient_of(case), gradient_of(other)
    expected = run(OURS, other, other_dy)

    def step() -> tuple[Tensor, ...]:
        y = OURS(static)
        return (y, *torch.autograd.grad(y, leaves, dy))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    with torch.no_grad():
        for target, source in zip((*leaves, dy), (*other.floats().values(), other_dy), strict=True):
            target.copy_(source)
    graph.replay()
    named: Results = {"y": results[0].detach()}
    named |= {f"d{n}": t for n, t in zip(other.floats(), results[1:], strict=True)}
    assert_equal(named, expected, "between graph and direct call")


# Streams and devices


def test_current_stream_is_honoured() -> None:
    """x is written late on a side stream: a kernel on any other stream would read NaN."""
    case = gpu_case(B=64, L=25, M=512, N=32)
    dy = gradient_of(case)
    expected = run(OURS, case, dy)
    late = case.replace(x=torch.full_like(case.x, float("nan")))
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        late.x.copy_(case.x)
        found = run(OURS, late, dy)
    side.synchronize()
    assert_equal(found, expected, "on a side stream")


def test_other_device() -> None:
    """Tensors decide where a call runs, whatever device is current."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    case = gpu_case(dtype=torch.bfloat16)
    dy = gradient_of(case)
    there = moved(case, "cuda:1")
    assert torch.cuda.current_device() == 0
    found = run(OURS, there, dy.to("cuda:1"))
    assert torch.cuda.current_device() == 0
    assert all(t.device == torch.device("cuda:1") for t in found.values())
    with torch.cuda.device(1):
        expected = run(OURS, there, dy.to("cuda:1"))
    assert_equal(found, expected, "between current devices")


def test_operands_of_two_devices_are_refused() -> None:
    case = gpu_case()
    assert case.weight is not None
    with pytest.raises(ValueError, match="weight must be on the device of x"):
        OURS(case.replace(weight=case.weight.cpu()))


def test_plans_are_made_for_this_gpu() -> None:
    """Clusters included, unless what is compiled is for older GPUs."""
    if OURS.name != "cuda":
        pytest.skip("Triton's plans are the same for all GPUs")
    properties = torch.cuda.get_device_properties(DEVICE)
    shared, capability = _cuda.limits(torch.cuda.current_device())
    assert shared == properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    assert 80 <= capability <= 10 * properties.major + properties.minor
    assert (capability >= 90) == (properties.major >= 9)


# Precision of float32 products


@contextlib.contextmanager
def precision(setting: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def relative_errors(case: Case, dy: Tensor) -> dict[str, float]:
    """Root-mean-square errors against float64."""
    found = run(OURS, case, dy)
    with DEVICE:
        exact = run(truth, case.to(torch.float64), dy.double())
    return {n: float((t.double() - exact[n]).norm() / exact[n].norm()) for n, t in found.items()}


@pytest.mark.parametrize("L", [25, 300])
def test_float32_is_full_unless_torch_is_told_otherwise(L: int) -> None:
    case = gpu_case(B=8, L=L, M=1024, N=64)
    dy = gradient_of(case)
    with precision("highest"):
        full = relative_errors(case, dy)
    with precision("high"):
        allowed = relative_errors(case, dy)
    with precision("highest"):
        again = relative_errors(case, dy)
    assert max(full[n] for n in ("y", "dx", "dweight")) < 1e-5, full
    assert max(allowed[n] for n in ("y", "dx", "dweight")) < 2e-2, allowed
    assert again == full


@pytest.mark.parametrize("L", [25, 300])
def test_float64_never_uses_less(L: int) -> None:
    case = gpu_case(B=4, L=L, M=256, N=16, dtype=torch.float64)
    dy = gradient_of(case)
    with precision("highest"):
        full = run(OURS, case, dy)
    with precision("high"):
        assert_equal(run(OURS, case, dy), full, "between precisions")


# Synchronisation and launches


@contextlib.contextmanager
def no_synchronisation() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_nothing_synchronises(weighting: str, layout: str) -> None:
    """Packed sets without max_length included: no length is ever read on the host."""
    case = gpu_case(B=9, L=80, M=256, N=16, weighting=weighting, layout=layout, dtype=torch.bfloat16)
    dy = gradient_of(case)
    expected = run(OURS, case, dy)
    with no_synchronisation():
        found = run(OURS, case, dy)
        with torch.no_grad():
            OURS(case)
    assert_equal(found, expected, "without synchronisation")


def test_the_synchronisation_detector_fires() -> None:
    t = torch.ones((), device=DEVICE)
    with no_synchronisation(), pytest.raises(RuntimeError, match="synchroniz"):
        t.item()


@pytest.mark.parametrize("bound", [40, 80, 1000])
def test_max_length_changes_no_result(bound: int) -> None:
    case = gpu_case(B=6, L=40, M=128, N=8, layout="packed", dtype=torch.float32)

    def bounded(c: Case) -> Tensor:
        return fastac.attention_cluster(
            c.x, c.weight, c.alpha, c.beta, offsets=c.offsets, max_length=bound, backend=OURS.name
        )

    dy = gradient_of(case)
    assert_near(run(bounded, case, dy), run(OURS, case, dy), torch.float32, eps=64)


def device_events(function: Callable[[], object]) -> list[str]:
    """What the device did: names of kernels, copies and fills."""
    function()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        function()
        torch.cuda.synchronize()
    return [e.name for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]


def need_profiler() -> None:
    t = torch.ones(1000, device=DEVICE)
    seen = device_events(lambda: t.sin())
    if not seen:
        pytest.skip("the profiler sees no kernels on this machine")
    assert len(seen) == 1, seen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], **IDS)
@pytest.mark.parametrize("name", NAMED)
def test_launches_of_a_call(name: str, dtype: torch.dtype) -> None:
    """One launch forward, at most two backward; nothing else runs on the device."""
    need_profiler()
    case = gpu_case(**NAMED[name], dtype=dtype)
    dy = gradient_of(case)
    with torch.no_grad():
        seen = device_events(lambda: OURS(case))
    assert len(seen) == 1, seen
    for wanted in (None, ("weight", "alpha", "beta")):
        with_leaves, leaves = leaves_of(case, wanted)
        y = OURS(with_leaves)
        seen = device_events(lambda c=with_leaves: OURS(c))  # type: ignore[misc]
        assert len(seen) == 1, seen
        seen = device_events(
            lambda y=y, leaves=leaves: torch.autograd.grad(y, leaves, dy, retain_graph=True)  # type: ignore[misc]
        )
        assert 1 <= len(seen) <= 2, seen


# torch.compile


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(case: Case, backend: object) -> Callable[[Case], Tensor]:
    """The call compiled without graph breaks, as a function of the tensors of `case` alone."""
    names = [n for n, t in case.operands().items() if isinstance(t, Tensor)]
    empty = case.replace(**{n: None for n in names if n != "x"})

    def function(*tensors: Tensor) -> Tensor:
        return OURS(empty.replace(**dict(zip(names, tensors, strict=True))))

    fast = torch.compile(function, fullgraph=True, backend=backend)  # type: ignore[call-overload]
    return lambda c: fast(*(getattr(c, n) for n in names))


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_compile_without_graph_breaks(weighting: str, layout: str) -> None:
    case = gpu_case(weighting=weighting, layout=layout, dtype=torch.bfloat16)
    dy = gradient_of(case)
    fast = compiled(case, "aot_eager")
    assert_near(run(fast, case, dy), run(OURS, case, dy), torch.bfloat16)
    assert_near(run(fast, case), run(OURS, case), torch.bfloat16)


@pytest.mark.usefixtures("fresh_dynamo")
def test_compile_with_inductor() -> None:
    """The default backend, with work around the operator to fuse."""
    case = gpu_case(B=16, L=25, M=256, N=16)
    name = OURS.name

    def model(x: Tensor, weight: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
        y = fastac.attention_cluster(x.relu() + 1, weight, alpha, beta, backend=name)
        return (y * 2).sin()

    results = []
    for call in (torch.compile(model, fullgraph=True), model):
        _, leaves = leaves_of(case)
        y = call(*leaves)
        gradients = torch.autograd.grad(y.sum(), leaves)
        results.append({str(i): t for i, t in enumerate((y.detach(), *gradients))})
    assert_near(results[0], results[1], torch.float32, eps=64)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_few_compilations_for_all_lengths(layout: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    fast = compiled(gpu_case(layout=layout), counter)
    for L in (25, 7, 64, 131, 300):
        case = gpu_case(L=L, layout=layout)
        dy = gradient_of(case)
        assert_near(run(fast, case, dy), run(OURS, case, dy), torch.float32)
    assert 1 <= counter.frame_count <= 2


# More elements than 31 bits count


def last_sets(case: Case, count: int) -> Case:
    return case.replace(x=case.x[-count:].clone())


def big(B: int, L: int, M: int, N: int) -> Case:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)

    return Case(normal(B, L, M), weight=normal(N, M) / M**0.5, alpha=normal(N), beta=normal(N))


@pytest.mark.parametrize(
    ("B", "L", "M", "N"),
    [(33_000, 64, 1024, 2), (22_200, 2, 1536, 64), (3, 700_001, 1024, 2)],
    ids=["x", "y", "x, long sets"],
)
def test_more_than_two_to_the_31_elements(B: int, L: int, M: int, N: int) -> None:
    """The last sets have the results they have alone."""
    need_memory(30)
    case = big(B, L, M, N)
    assert max(B * L * M, B * N * M) > 2**31
    dy = torch.randn(B, N, M, device=DEVICE, dtype=torch.bfloat16)
    x = case.x.requires_grad_()
    y = OURS(case.replace(x=x))
    (dx,) = torch.autograd.grad(y, x, dy)
    case.x.requires_grad_(False)
    few = 4 if B > 4 else 1
    alone = last_sets(case, few)
    expected = run(OURS, alone, dy[-few:].clone(), ("x",))
    found = {"y": y.detach()[-few:].clone(), "dx": dx[-few:].clone()}
    assert_near(found, expected, torch.bfloat16, eps=4)


def test_more_than_two_to_the_31_packed_elements() -> None:
    need_memory(30)
    case = big(1, 2_200_000, 1024, 2)
    cuts = [0, 100, 2_199_000, 2_199_700, 2_200_000]
    packed = case.replace(x=case.x[0], offsets=torch.tensor(cuts, device=DEVICE))
    dy = torch.randn(4, 2, 1024, device=DEVICE, dtype=torch.bfloat16)
    found = run(OURS, packed, dy, ("x",))
    tail = torch.tensor([0, 700, 1000], device=DEVICE)
    alone = packed.replace(x=packed.x[2_199_000:].clone(), offsets=tail)
    expected = run(OURS, alone, dy[2:].clone(), ("x",))
    found = {"y": found["y"][2:].clone(), "dx": found["dx"][2_199_000:].clone()}
    assert_near(found, expected, torch.bfloat16, eps=4)
