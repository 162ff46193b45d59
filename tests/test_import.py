"""Importing: the two ways to write it, what it must not load, and the public names."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest

import fastac


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


STATEMENTS = {
    "literal": "import fastac.AttentionCluster",
    "from": "from fastac import AttentionCluster",
    "as": "import fastac.AttentionCluster as AttentionCluster",
    "from path": "from fastac.AttentionCluster import AttentionCluster",
}


@pytest.mark.parametrize("first", STATEMENTS.values(), ids=list(STATEMENTS))
def test_the_name_stays_bound_to_the_class(first: str) -> None:
    check = (
        "assert isinstance(fastac.AttentionCluster, type), fastac.AttentionCluster\n"
        "assert globals().get('AttentionCluster', fastac.AttentionCluster) is fastac.AttentionCluster\n"
    )
    others = "".join(f"{second}\nimport fastac\n{check}" for second in STATEMENTS.values())
    out = run(
        f"{first}\nimport fastac, torch\n{check}{others}"
        "print(tuple(fastac.AttentionCluster(8, 3)(torch.randn(2, 4, 8)).shape))"
    )
    assert out == "(2, 24)"


def test_import_is_lean() -> None:
    heavy = [
        "triton",
        "matplotlib",
        "sklearn",
        "pandas",
        "tqdm",
        "click",
        "h5py",
        "pydantic",
        "safetensors",
        "tensorboard",
        "torchmetrics",
        "torch._inductor",
        "fastac.cli",
        "fastac.data",
        "fastac.models",
        "fastac.training",
        "fastac.kernels",
    ]
    out = run(
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import fastac\n"
        f"print([m for m in {heavy!r} if m in sys.modules and m not in before], torch.cuda.is_initialized())"
    )
    assert out == "[] False"


BLOCK_TRITON = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ImportError("no triton here")
sys.meta_path.insert(0, Blocked())
"""

CALLS = """
import sys, torch, fastac
x, weight = torch.randn(2, 5, 64, requires_grad=True), torch.randn(3, 64)
lengths = torch.tensor([5, 2])
fastac.attention_cluster(x, weight, lengths=lengths).sum().backward()
fastac.attention_cluster(x.detach(), weight)
reason = fastac.explain(x, weight).reasons["triton"]
fastac.info.report()
try:
    fastac.attention_cluster(x, weight, backend="triton")
    raise SystemExit("triton ran")
except ValueError as error:
    assert reason in str(error), error
loaded = [m for m in sys.modules if m.split(".")[0] == "triton" or m.startswith("fastac.kernels")]
print(reason, loaded, torch.cuda.is_initialized(), sep=" | ")
"""


def test_without_triton() -> None:
    """Triton that cannot be imported is a reason, and everything else works."""
    code = BLOCK_TRITON + "import fastac.info" + CALLS
    assert run(code) == "triton is not installed | [] | False"


def test_calls_on_the_cpu_leave_triton_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """With Triton installed or not, neither the import nor a call, explain or info loads it or wakes CUDA."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    reason, loaded, initialised = run("import fastac.info" + CALLS).split(" | ")
    wanted = "x is on cpu; Triton runs there only in its interpreter (TRITON_INTERPRET=1)"
    assert reason == (wanted if find_spec("triton") else "triton is not installed")
    assert (loaded, initialised) == ("[]", "False")


def test_the_operators_of_triton_exist_without_it() -> None:
    """A graph that holds them can be loaded anywhere; running one there is an ImportError."""
    out = run(
        BLOCK_TRITON + "import fastac, torch\n"
        "x, weight = torch.randn(2, 5, 8), torch.randn(3, 8)\n"
        "arguments = (weight, *[None] * 7, 1e-12)\n"
        "print(tuple(torch.ops.fastac.triton_inference(x.to('meta'), *arguments).shape))\n"
        "try: torch.ops.fastac.triton_inference(x, *arguments)\n"
        "except ImportError as error: print(error)"
    )
    assert out.splitlines() == ["(2, 3, 8)", "no triton here"]


def test_public_names() -> None:
    for name in fastac.__all__:
        assert getattr(fastac, name) is not None
    for name in (
        "AttentionCluster",
        "attention_cluster",
        "attention_pool",
        "softmax_weight",
        "backend",
        "explain",
    ):
        assert callable(getattr(fastac, name)), name
        assert getattr(fastac, name).__doc__, name
    assert callable(fastac.reference.attention_cluster)
    assert callable(fastac.reference.attention_pool)
    assert callable(fastac.reference.softmax_weight)


def test_explain_stays_the_function_after_its_module_is_imported() -> None:
    assert run("import fastac.explain, fastac\nprint(callable(fastac.explain))") == "True"


def test_reference_has_the_same_signatures() -> None:
    import inspect

    for name in ("attention_cluster", "attention_pool", "softmax_weight"):
        ours, oracle = getattr(fastac, name), getattr(fastac.reference, name)
        assert inspect.signature(ours) == inspect.signature(oracle)
