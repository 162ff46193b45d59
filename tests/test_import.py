"""Importing: the two ways to write it, what it must not load, and the public names."""

from __future__ import annotations

import subprocess
import sys

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
        "torch._inductor",
        "fastac.demo",
        "fastac.kernels",
    ]
    out = run(
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import fastac\n"
        f"print([m for m in {heavy!r} if m in sys.modules and m not in before], torch.cuda.is_initialized())"
    )
    assert out == "[] False"


def test_public_names() -> None:
    for name in fastac.__all__:
        assert getattr(fastac, name) is not None
    for name in ("AttentionCluster", "attention_cluster", "attention_pool", "backend", "explain"):
        assert callable(getattr(fastac, name)), name
        assert getattr(fastac, name).__doc__, name
    assert callable(fastac.reference.attention_cluster)
    assert callable(fastac.reference.attention_pool)


def test_explain_stays_the_function_after_its_module_is_imported() -> None:
    assert run("import fastac.explain, fastac\nprint(callable(fastac.explain))") == "True"


def test_reference_has_the_same_signatures() -> None:
    import inspect

    for name in ("attention_cluster", "attention_pool"):
        ours, oracle = getattr(fastac, name), getattr(fastac.reference, name)
        assert inspect.signature(ours) == inspect.signature(oracle)
