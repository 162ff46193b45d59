"""Which backend runs, how it is chosen, forced and reported; `explain` and the command line."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastac
from fastac import _cuda, _native, backends, info
from fastac.__main__ import main
from fastac.kernels import plan

X, W = torch.randn(2, 5, 64), torch.randn(3, 64)
AUTOMATIC = "cpu" if _native.available else "reference"


@pytest.fixture(autouse=True)
def unforced(monkeypatch: pytest.MonkeyPatch) -> None:
    """No backend is forced, and there is no CUDA library, whatever other tests have loaded."""
    monkeypatch.setattr(_cuda, "why_not", "not built for this test")
    monkeypatch.setattr(backends, "_emulated", lambda: False)
    monkeypatch.setattr(backends, "current", None)
    monkeypatch.setattr(backends, "_logged", set())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Triton that the kernels can use, whatever is installed; nothing here launches one."""
    monkeypatch.setattr(backends, "triton_version", lambda: "3.6.0")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Tensor, Tensor]]:
    """Fake x (2, 5, 64) and weight (3, 64) on a CUDA device, which need no GPU."""
    monkeypatch.setattr(backends, "_capability", lambda index: (9, 0))
    monkeypatch.setattr(_cuda, "limits", lambda index: _cuda.ASSUMED)
    monkeypatch.setattr(_cuda, "unusable", _cuda.unusable.__wrapped__)
    with FakeTensorMode():
        yield torch.empty(2, 5, 64, device="cuda"), torch.empty(3, 64, device="cuda")


def ran(x: Tensor = X, **kwargs: object) -> str:
    """The backend whose operators a call reaches."""
    seen: list[str] = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Spy():
        fastac.attention_cluster(x, W.to(x.device), **kwargs)
    own = [name.split(".")[1].split("_")[0] for name in seen if name.startswith("fastac.")]
    return own[0] if own else "reference"


def test_automatic_choice() -> None:
    assert ran() == AUTOMATIC
    assert backends.choose(X) == AUTOMATIC


def test_by_argument_context_and_nesting() -> None:
    assert ran(backend="reference") == "reference"
    with fastac.backend("reference"):
        assert ran() == "reference"
        with fastac.backend("cpu"):
            assert backends.current == "cpu"
        assert backends.current == "reference"
    assert backends.current is None


def test_context_is_left_after_an_exception() -> None:
    with pytest.raises(KeyError), fastac.backend("reference"):
        raise KeyError
    assert backends.current is None


@pytest.mark.parametrize("name", ["cpuu", "", "CPU"])
def test_unknown_name_lists_the_known(name: str) -> None:
    message = f"backend must be one of cuda, triton, cpu, reference, got {name!r}"
    with pytest.raises(ValueError, match=message), fastac.backend(name):
        pass
    with pytest.raises(ValueError, match=message):
        fastac.attention_cluster(X, W, backend=name)


def test_asked_for_and_not_built() -> None:
    with pytest.raises(ValueError, match="backend 'cuda' cannot run this call: not built for this test"):
        fastac.attention_cluster(X, W, backend="cuda")
    with fastac.backend("cuda"), pytest.raises(ValueError, match="not built"):
        fastac.attention_cluster(X, W)


@pytest.mark.usefixtures("triton")
def test_triton_on_the_cpu_is_for_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = "x is on cpu; Triton runs there only in its interpreter (TRITON_INTERPRET=1)"
    assert backends.why_not("triton", X) == backends.passed_over("triton", X) == refused
    with pytest.raises(ValueError, match="backend 'triton' cannot run this call: x is on cpu; Triton"):
        fastac.attention_cluster(X, W, backend="triton")

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delitem(sys.modules, "triton.language.standard", raising=False)
    assert backends.why_not("triton", X) is None
    assert backends.choose(X, "triton") == "triton"
    by_name = "runs in Triton's interpreter, only when asked for by name"
    assert backends.passed_over("triton", X) == by_name
    assert backends.choose(X) == AUTOMATIC
    assert fastac.explain(X, W).reasons["triton"] == by_name

    compiled = types.ModuleType("triton.language.standard")
    compiled.cdiv = lambda: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, compiled.__name__, compiled)
    late = "x is on cpu, and TRITON_INTERPRET=1 was set after Triton was imported"
    assert backends.why_not("triton", X) == late


def test_triton_without_the_native_library_is_not_the_automatic_choice(
    triton: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An interpreter some thousand times slower than plain torch: never unasked."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delitem(sys.modules, "triton.language.standard", raising=False)
    monkeypatch.setattr(_native, "available", False)
    monkeypatch.setattr(_native, "why_not", "taken away by this test")
    with caplog.at_level(logging.INFO, "fastac"):
        assert ran() == "reference"
    assert "triton: runs in Triton's interpreter, only when asked for by name" in caplog.text


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        (None, "triton is not installed"),
        ("3.5.1", "triton 3.6 or later is needed, version 3.5.1 is installed"),
        ("2.9", "triton 3.6 or later is needed, version 2.9 is installed"),
        ("unknown", "triton 3.6 or later is needed, version unknown is installed"),
        ("3.6.0", None),
        ("3.10.0+git1234", None),
        ("4.0", None),
    ],
)
def test_which_triton_will_do(
    gpu: tuple[Tensor, Tensor], version: str | None, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "triton_version", lambda: version)
    assert backends.why_not("triton", gpu[0]) == reason
    assert backends.choose(gpu[0]) == ("triton" if reason is None else "reference")


def test_the_version_of_triton_comes_from_its_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under whichever name it was distributed, and without an import."""
    look_up = backends.triton_version.__wrapped__
    versions = {"triton": "3.6.0", "pytorch-triton-rocm": "3.7.0"}

    def version(name: str) -> str:
        if name not in versions:
            raise PackageNotFoundError(name)
        return versions[name]

    provided = {"triton": ["pytorch-triton-rocm"]}
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(backends.importlib.metadata, "version", version)
    monkeypatch.setattr(backends.importlib.metadata, "packages_distributions", lambda: provided)
    assert look_up() == "3.6.0"
    del versions["triton"]
    assert look_up() == "3.7.0"
    provided.clear()
    assert look_up() == "unknown"
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    assert look_up() is None


@pytest.mark.usefixtures("triton")
def test_automatic_choice_on_a_gpu(
    gpu: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    x, weight = gpu
    with caplog.at_level(logging.INFO, "fastac"):
        assert backends.choose(x) == "triton"
        assert fastac.attention_cluster(x, weight).device == x.device
    assert [r.getMessage() for r in caplog.records] == ["backend triton for cuda, torch.float32"]
    with pytest.raises(
        ValueError, match="backend 'cpu' cannot run this call: x is on cuda:0, not on the CPU"
    ):
        fastac.attention_cluster(x, weight, backend="cpu")

    monkeypatch.setattr(backends, "_capability", lambda index: (7, 5))
    old = "CUDA capability 8.0 or later is needed, x is on a GPU of 7.5"
    assert backends.why_not("triton", x) == old
    assert backends.choose(x) == "reference"
    with pytest.raises(ValueError, match="backend 'triton' cannot run this call: " + old):
        backends.choose(x, "triton")
    monkeypatch.setattr(backends, "_capability", lambda index: (8, 0))
    assert backends.choose(x) == "triton"

    # Of AMD's GPUs none has run the kernels: they may, if they are asked to.
    monkeypatch.setattr(backends, "_capability", lambda index: (7, 5))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert backends.choose(x) == "reference"
    assert backends.choose(x, "triton") == "triton"
    assert "compiled for AMD GPUs but never run on one" in str(backends.passed_over("triton", x))


@pytest.mark.usefixtures("triton")
def test_between_cuda_and_triton_measurements_decide(
    gpu: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = gpu
    long, packed = torch.empty(2, 65, 64, device="cuda"), torch.empty(5, 64, device="cuda")
    assert backends.passed_over("cuda", x) == "not built for this test"
    monkeypatch.setattr(_cuda, "why_not", None)
    monkeypatch.setattr(backends, "_gpu_name", lambda index: "Some GPU")
    unmeasured = "not measured on this GPU; triton is preferred"
    assert backends.why_not("cuda", x) is None
    assert (backends.choose(x), backends.choose(x, "cuda")) == ("triton", "cuda")
    assert backends.passed_over("cuda", x) == unmeasured
    assert fastac.explain(x, weight).reasons["cuda"] == unmeasured

    table = {"Some GPU": {"32-bit short": "cuda", "32-bit packed": "triton"}, "Another GPU": {}}
    monkeypatch.setattr(_cuda, "measured", lambda: table)
    assert backends.choose(x) == "cuda"
    assert backends.passed_over("triton", x) == "measured slower than cuda on this GPU (32-bit short)"
    assert backends.choose(packed) == "triton"
    slower = "measured slower than triton on this GPU (32-bit packed)"
    assert backends.passed_over("cuda", packed) == slower
    for other in (long, torch.empty_like(x, dtype=torch.bfloat16)):
        assert backends.choose(other) == "triton"
        assert backends.passed_over("cuda", other) == unmeasured
    assert backends.choose(packed, "cuda") == "cuda"
    monkeypatch.setattr(backends, "_gpu_name", lambda index: "Another GPU")
    assert backends.choose(x) == "triton"

    # With one of them alone there is nothing to compare.
    monkeypatch.setattr(backends, "triton_version", lambda: None)
    assert [backends.choose(t) for t in (x, long, packed)] == ["cuda"] * 3
    monkeypatch.setattr(backends, "_capability", lambda index: (7, 5))
    assert "capability 8.0 or later" in str(backends.why_not("cuda", x))
    assert backends.choose(x) == "reference"


@pytest.mark.usefixtures("triton", "gpu")
def test_info_says_what_measurements_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cuda, "why_not", None)
    monkeypatch.setattr(backends, "_gpu_name", lambda index: "Some GPU")
    monkeypatch.setattr(_cuda, "measured", lambda: {"Some GPU": {"32-bit short": "cuda"}})
    assert info._backend_lines("cuda")[:2] == [
        "cuda: available",
        "triton: measured slower than cuda on this GPU (32-bit short)",
    ]


@pytest.mark.usefixtures("triton")
def test_cuda_needs_kernels_for_this_gpu(gpu: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Built for other GPUs, or for a newer driver: not chosen, and the reason is the CUDA runtime's."""
    said = "the CUDA library cannot run on this GPU: no kernel image is available"

    def limits(index: int | None) -> tuple[int, int]:
        raise RuntimeError("check, launch.cuh:60, fastac: no kernel image is available\nand more")

    monkeypatch.setattr(_cuda, "why_not", None)
    monkeypatch.setattr(_cuda, "limits", limits)
    assert backends.why_not("cuda", gpu[0]) == said
    assert backends.choose(gpu[0]) == "triton"
    with pytest.raises(ValueError, match=f"backend 'cuda' cannot run this call: {said}$"):
        backends.choose(gpu[0], "cuda")


def test_classes_of_measured_winners() -> None:
    found = {
        (2, 64, 8): "32-bit short",
        (2, 65, 8): "32-bit long",
        (9, 8): "32-bit packed",
    }
    assert {shape: _cuda.workload(torch.empty(shape)) for shape in found} == found
    assert _cuda.workload(torch.empty(2, 3, 8, dtype=torch.float64)) == "64-bit short"
    for classes in _cuda.measured().values():
        for name, winner in classes.items():
            assert re.fullmatch(r"(16|32|64)-bit (short|long|packed)", name)
            assert winner in ("cuda", "triton")


def test_cuda_is_for_cuda_devices_and_emulated_where_a_test_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cuda, "why_not", None)
    assert backends.why_not("cuda", X) == "x is on cpu, not on a CUDA device"
    monkeypatch.setattr(_cuda, "why_not", "not built for this test")
    monkeypatch.setattr(backends, "_emulated", lambda: True)
    assert backends.why_not("cuda", X) is None
    assert backends.passed_over("cuda", X) == "runs in the emulation, only when asked for by name"
    assert backends.choose(X) == AUTOMATIC
    assert backends.why_not("cuda", X.to("meta")) == "not built for this test"


def test_why_the_cuda_library_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "_C_cuda.abi3.so"
    monkeypatch.setattr(_cuda, "PATH", library)
    assert str(_cuda._load()).startswith("not built (FASTAC_CUDA=0, or no nvcc was found")
    library.write_text("no library")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert _cuda._load() == f"torch {torch.__version__} has no CUDA"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(_native, "available", False)
    monkeypatch.setattr(_native, "why_not", "taken away by this test")
    assert _cuda._load() == "needs the native library: taken away by this test"
    monkeypatch.setattr(_native, "available", True)
    assert str(_cuda._load()).startswith("the CUDA library _C_cuda.abi3.so does not load: ")


@pytest.mark.usefixtures("triton")
def test_triton_on_other_devices() -> None:
    assert backends.why_not("triton", X.to("meta")) == "x is on meta, not on a CUDA device"


@pytest.mark.usefixtures("triton", "gpu")
def test_triton_has_no_rules_for_transforms() -> None:
    seen = []

    def function(x: Tensor) -> Tensor:
        seen.append(backends.why_not("triton", x))
        return x

    torch.vmap(function)(torch.empty(2, 5, 64, device="cuda"))
    assert "torch.func transforms" in seen[0]


@pytest.mark.usefixtures("triton")
def test_explain_has_the_plan_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan of the very call: the bound of a packed x, none for a padded one, the dtype of autocast."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delitem(sys.modules, "triton.language.standard", raising=False)
    planned = []
    monkeypatch.setattr(plan, "describe", lambda p: planned.append(p) or {"launches": 2})
    padded = fastac.explain(X, W, max_length=9, backend="triton")
    assert (padded.backend, padded.plan) == ("triton", {"launches": 2})
    assert "plan       launches: 2" in str(padded)
    if _native.available:
        assert padded.reasons["cpu"] == "could run this call, another backend was asked for"
    fastac.explain(X[0], W, offsets=torch.tensor([0, 1, 4]), max_length=4, backend="triton")
    with torch.autocast("cpu", torch.bfloat16):
        fastac.explain(X, torch.randn(1, 64), backend="triton")
    common = {"features": 64, "weighting": "linear", "shift": False, "gpu": ""}
    sizes = [
        {"batch": 2, "length": 5, "longest": 5, "units": 3, "itemsize": 4, "layout": "padded", "kept": True},
        {"batch": 2, "length": 5, "longest": 4, "units": 3, "itemsize": 4, "layout": "packed", "kept": True},
        {"batch": 2, "length": 5, "longest": 5, "units": 1, "itemsize": 2, "layout": "padded", "kept": True},
    ]
    for p, wanted in zip(planned, sizes, strict=True):
        assert {name: getattr(p, name) for name in (*common, *wanted)} == common | wanted


def test_asked_for_on_another_device() -> None:
    with pytest.raises(ValueError, match="backend 'cpu' cannot run this call: x is on meta, not on the CPU"):
        fastac.attention_cluster(X.to("meta"), W.to("meta"), backend="cpu")


def test_without_the_native_library(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_native, "available", False)
    monkeypatch.setattr(_native, "why_not", "taken away by this test")
    with caplog.at_level(logging.INFO, "fastac"):
        assert ran() == "reference"
        assert ran() == "reference"
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "taken away by this test" in caplog.text
    with pytest.raises(ValueError, match="backend 'cpu' cannot run this call: taken away by this test"):
        fastac.attention_cluster(X, W, backend="cpu")


def test_device_without_kernels_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fastac"):
        for dtype in (torch.float32, torch.float64, torch.float32):
            y = fastac.attention_cluster(X.to("meta", dtype), W.to("meta", dtype))
            assert y.shape == (2, 3, 64)
    assert len(caplog.records) == 1
    assert "no backend has kernels for meta devices" in caplog.text


def test_choice_is_logged_once_per_plan(caplog: pytest.LogCaptureFixture) -> None:
    lengths = torch.tensor([5, 2])
    with caplog.at_level(logging.INFO, "fastac"):
        for _ in range(3):
            fastac.attention_cluster(X, W, lengths=lengths)
        assert len(caplog.records) == 1
        fastac.attention_cluster(X.double(), W.double(), lengths=lengths)
        assert len(caplog.records) == 2
    assert f"backend {AUTOMATIC}" in caplog.records[0].getMessage()


def test_nothing_is_logged_while_compiling(caplog: pytest.LogCaptureFixture) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: fastac.attention_cluster(x, W), fullgraph=True, backend="eager")
    with caplog.at_level(logging.INFO, "fastac"):
        compiled(X)
    assert not [r for r in caplog.records if r.name == "fastac"]


def test_compiled_code_follows_the_backend() -> None:
    graphs: list[str] = []

    def keep(module: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(str(module.graph))
        return module

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: fastac.attention_cluster(x, W), fullgraph=True, backend=keep)
    first = compiled(X)
    with fastac.backend("reference"):
        second = compiled(X)
    torch.testing.assert_close(first, second)
    assert "fastac" not in graphs[-1]
    if _native.available:
        assert "fastac.cpu_forward" in graphs[0]
        assert len(graphs) == 2


def test_environment_variable() -> None:
    def run(value: str) -> subprocess.CompletedProcess[str]:
        code = "import fastac, torch; print(fastac.explain(torch.randn(2, 3, 4), torch.randn(5, 4)).backend)"
        environment = {**os.environ, "FASTAC_BACKEND": value}
        return subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
        )

    assert run("reference").stdout.strip() == "reference"
    wrong = run("gpu")
    assert wrong.returncode != 0
    assert "backend must be one of cuda, triton, cpu, reference, got 'gpu'" in wrong.stderr


@pytest.mark.parametrize("name", ["grad", "jvp", "vmap", "dual"])
def test_transforms_use_the_reference(name: str, caplog: pytest.LogCaptureFixture) -> None:
    x, weight = X.double(), W.double()

    def loss(x: Tensor, **kwargs: str) -> Tensor:
        return fastac.attention_cluster(x, weight, **kwargs).pow(3).sum()

    (gradient,) = torch.autograd.grad(loss(x.requires_grad_()), x)
    x = x.detach()
    direction = torch.randn_like(x)
    with caplog.at_level(logging.INFO, "fastac"):
        if name == "grad":
            torch.testing.assert_close(torch.func.grad(loss)(x), gradient)
        elif name == "jvp":
            _, tangent = torch.func.jvp(loss, (x,), (direction,))
            torch.testing.assert_close(tangent, (gradient * direction).sum())
        elif name == "vmap":
            torch.testing.assert_close(torch.vmap(loss)(x[None]), loss(x)[None])
        else:
            with torch.autograd.forward_ad.dual_level():
                y = loss(torch.autograd.forward_ad.make_dual(x, direction))
                tangent = torch.autograd.forward_ad.unpack_dual(y).tangent
            torch.testing.assert_close(tangent, (gradient * direction).sum())
    assert "backend reference" in caplog.text
    if name == "grad" and _native.available:
        with pytest.raises(ValueError, match=r"backend 'cpu' cannot run this call: .*torch\.func"):
            torch.func.grad(lambda x: loss(x, backend="cpu"))(x)


# explain


def test_explain_counts_what_the_cost_model_says() -> None:
    b, length, m, n, s = 256, 25, 1536, 64, 4
    x, weight = torch.empty(b, length, m), torch.empty(n, m)
    got = fastac.explain(x, weight, torch.ones(n), torch.zeros(n))
    assert got.backend == AUTOMATIC
    assert (got.batch, got.positions, got.in_features, got.cluster_size) == (b, b * length, m, n)
    assert got.forward.operations == 4 * b * length * m * n
    assert got.forward.bytes == b * (length + n) * m * s
    assert got.backward.operations == 4 * b * length * m * n  # x is frozen
    trained = fastac.explain(x.requires_grad_(), weight)
    assert trained.backward.operations == 8 * b * length * m * n
    assert trained.backward.bytes == b * (2 * length + 2 * n) * m * s
    more_units = fastac.explain(x, torch.empty(2 * n, m))  # 20 N > M: the scores are computed again
    assert more_units.backward.operations == (8 + 2) * b * length * m * 2 * n


def test_explain_counts_valid_positions() -> None:
    scores = torch.randn(2, 3, 5)
    assert fastac.explain(X, W, lengths=torch.tensor([5, 2])).positions == 7
    assert fastac.explain(X, W, mask=torch.eye(5)[:2].bool()).positions == 2
    assert fastac.explain(X[0], W, offsets=torch.tensor([0, 1, 4])).positions == 4
    pooled = fastac.explain(X, scores=scores)
    assert (pooled.weighting, pooled.cluster_size) == ("scores", 3)
    assert pooled.forward.operations == 2 * 2 * 5 * 64 * 3
    assert fastac.explain(X).weighting == "average"
    nested = torch.nested.nested_tensor([X[0], X[1, :2]], layout=torch.jagged)
    assert (fastac.explain(nested, W).layout, fastac.explain(nested, W).positions) == ("packed", 7)


def test_explain_prints_every_part() -> None:
    with fastac.backend("reference"):
        text = str(fastac.explain(X, W))
    for part in ("backend    reference", "fc1, padded", "B = 2, 10 positions, M = 64, N = 3", "FLOP"):
        assert part in text
    assert "not cuda   not built for this test" in text
    assert "not cpu" in text


# The command line


def environment_read_by_the_sources() -> set[str]:
    """Names of the environment variables that the package or its build looks up."""
    root = Path(fastac.__file__).parents[1]
    sources = [p for folder in ("fastac", "kernels") for p in (root / folder).rglob("*.py")]
    sources += [p for p in (root / "setup.py",) if p.is_file()]
    return {
        name
        for path in sources
        for name in re.findall(r"""(?:environ\.get|environ|switch)[(\[]\s*"([A-Z_]+)""", path.read_text())
    }


def test_info_lists_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for part in (
        fastac.__version__,
        torch.__version__,
        "CUDA library:\n  not available: not built for this test",
        "cuda: not built for this test",
        "triton: ",
        f"triton {backends.triton_version() or 'is not installed'}",
        f"numpy {version('numpy')}",
        "reference: available",
    ):
        assert part in text
    for name in (*info.ENVIRONMENT, *environment_read_by_the_sources()):
        assert f"  {name}=" in text
    if _native.available:
        assert f"instruction set in use: {_native.isa()}" in text
        assert str(_native.PATH) in text
    else:
        assert str(_native.why_not) in text


def test_info_without_the_native_library(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_native, "available", False)
    monkeypatch.setattr(_native, "why_not", "taken away by this test")
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert "not available: taken away by this test" in text
    assert "cpu: taken away by this test" in text


@pytest.mark.parametrize("arguments", [[], ["inof"], ["info", "--more"]])
def test_wrong_command_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert "Usage: fastac" in capsys.readouterr().err
