"""The patches of `interpreter.py`, each against numbers made by hand and against what it replaces."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import interpreter
import pytest
import torch

interpreter.install()

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.runtime import interpreter as theirs  # noqa: E402

BFLOAT16 = (
    # float32 bits, bfloat16 bits
    (0x3F800000, 0x3F80),  # 1
    (0x3F807FFF, 0x3F80),  # just below a tie
    (0x3F808000, 0x3F80),  # a tie, to even: down
    (0x3F808001, 0x3F81),  # just above it
    (0x3F818000, 0x3F82),  # a tie, to even: up
    (0xBF818000, 0xBF82),
    (0x3FFFFFFF, 0x4000),  # the carry reaches the exponent
    (0x7F7F7FFF, 0x7F7F),  # stays finite
    (0x7F7F8000, 0x7F80),  # overflows
    (0xFF7FFFFF, 0xFF80),
    (0x7F800000, 0x7F80),  # Inf
    (0xFF800000, 0xFF80),
    (0x00000000, 0x0000),
    (0x80000000, 0x8000),
    (0x00010000, 0x0001),  # subnormal
    (0x00007FFF, 0x0000),
    (0x00008000, 0x0000),  # a subnormal tie
    (0x00018000, 0x0002),
    (0x80028001, 0x8003),
    (0x007FFFFF, 0x0080),  # the smallest normal number
)
NANS = (0x7F800001, 0x7FBFFFFF, 0x7FC00000, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF)


@triton.jit
def convert(x_ptr, y_ptr, n: tl.constexpr):
    i = tl.arange(0, n)
    x = tl.load(x_ptr + i)
    tl.store(y_ptr + i, x.to(y_ptr.dtype.element_ty))


@triton.jit
def store_as_is(x_ptr, y_ptr, n: tl.constexpr):
    i = tl.arange(0, n)
    x = tl.load(x_ptr + i)
    tl.store(y_ptr + i, x)


@triton.jit
def matmul(a_ptr, b_ptr, c_ptr, K, n: tl.constexpr, BLOCK_K: tl.constexpr):
    """c = a b + 1, a (n, K) and b (K, n), in blocks of K."""
    i = tl.arange(0, n)
    c = tl.full([n, n], 1.0, tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        a = tl.load(a_ptr + i[:, None] * K + k[None, :], mask=k[None, :] < K, other=0.0)
        b = tl.load(b_ptr + k[:, None] * n + i[None, :], mask=k[:, None] < K, other=0.0)
        c = tl.dot(a, b, c, input_precision="ieee")
    tl.store(c_ptr + i[:, None] * n + i[None, :], c)


@triton.jit
def one_more(x):
    return x + 1


@triton.jit
def refuse(x):
    tl.static_assert(x is None, "refused")


@triton.jit
def count(y_ptr, turns, REFUSE: tl.constexpr):
    total = tl.program_id(0) * 0
    for _ in range(turns):
        total = one_more(total)
    tl.store(y_ptr + tl.program_id(0), total)
    if REFUSE:
        refuse(total)


@triton.jit
def scalar_mask(y_ptr, limit_ptr, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(y_ptr + i, 1.0, mask=(i < 2) & (tl.load(limit_ptr) < 1))


@triton.jit
def divide(x_ptr, y_ptr):
    x = tl.load(x_ptr)
    tl.store(y_ptr, x / x)


def from_bits(bits: list[int], dtype: torch.dtype) -> torch.Tensor:
    wide, integer = (torch.int64, torch.int32) if dtype == torch.float32 else (torch.int32, torch.int16)
    return torch.tensor(bits, dtype=wide).to(integer).view(dtype)


def converted(x: torch.Tensor, dtype: torch.dtype, kernel: object = convert) -> torch.Tensor:
    """x in another dtype; its size is brought to a power of two with zeros for the kernel."""
    size = triton.next_power_of_2(x.numel())
    padded = torch.zeros(size, dtype=x.dtype)
    padded[: x.numel()] = x
    y = torch.empty(size, dtype=dtype)
    kernel[(1,)](padded, y, size)  # type: ignore[index]
    return y[: x.numel()]


def differing(a: torch.Tensor, b: torch.Tensor) -> list[int]:
    """Where the bits of two bfloat16 or float32 tensors differ."""
    integer = torch.int16 if a.dtype == torch.bfloat16 else torch.int32
    return (a.view(integer) != b.view(integer)).nonzero().flatten().tolist()


@pytest.mark.parametrize("kernel", [convert, store_as_is], ids=["to", "store"])
def test_float32_rounds_to_the_nearest_bfloat16(kernel: object, monkeypatch: pytest.MonkeyPatch) -> None:
    x = from_bits([bits for bits, _ in BFLOAT16], torch.float32)
    expected = from_bits([bits for _, bits in BFLOAT16], torch.bfloat16)
    assert differing(expected, x.to(torch.bfloat16)) == [], "the table is wrong"
    assert differing(converted(x, torch.bfloat16, kernel), expected) == []

    monkeypatch.setattr(theirs.InterpreterBuilder, "cast_impl", interpreter.originals["cast"])
    rounded_up = {3, 4, 5, 6, 8, 9}
    assert rounded_up <= set(differing(converted(x, torch.bfloat16, kernel), expected))


def test_float32_nan_stays_nan_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    nans = from_bits(list(NANS), torch.float32)
    assert converted(nans, torch.bfloat16).isnan().all()

    monkeypatch.setattr(theirs.InterpreterBuilder, "cast_impl", interpreter.originals["cast"])
    assert not converted(nans, torch.bfloat16).isnan().all()


def test_every_bfloat16_is_exact_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    bits = list(range(1 << 16))
    x = from_bits(bits, torch.bfloat16)
    expected = from_bits([b << 16 for b in bits], torch.float32)
    assert differing(converted(x, torch.float32), expected) == []
    finite = x.isfinite()
    assert torch.equal(converted(x, torch.float64)[finite], expected.double()[finite])

    monkeypatch.setattr(theirs.InterpreterBuilder, "cast_impl", interpreter.originals["cast"])
    wrong = differing(converted(x, torch.float32), expected)
    assert wrong
    assert all(x[i].abs() < torch.finfo(torch.bfloat16).tiny for i in wrong), "subnormals, no others"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int32, torch.int64], ids=str)
def test_other_dtypes_become_bfloat16(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    # Eight significant bits: 257 and 259 are ties, 258 and 260 exist.
    x = torch.tensor([0, 1, -3, 256, 257, 258, 259, -259, 515, 32000]).to(dtype)
    expected = torch.tensor([0, 1, -3, 256, 256, 258, 260, -260, 516, 32000], dtype=torch.float32)
    assert torch.equal(converted(x, torch.bfloat16).float(), expected)

    monkeypatch.setattr(theirs.InterpreterBuilder, "cast_impl", interpreter.originals["cast"])
    assert not torch.equal(converted(x, torch.bfloat16).float(), expected)


def test_bfloat16_becomes_other_dtypes() -> None:
    x = torch.tensor([0, 1, -3, 256, -260], dtype=torch.bfloat16)
    for dtype in (torch.float64, torch.float16, torch.int32):
        assert converted(x, dtype).tolist() == [0, 1, -3, 256, -260]


def test_other_conversions_are_untouched() -> None:
    x = torch.tensor([0.0, 1 / 3, -65504, 65520, float("inf"), float("nan")])
    assert differing(converted(x, torch.float32), x) == []
    assert torch.equal(converted(x[:4], torch.float16), x[:4].half())
    assert torch.equal(converted(x[:4], torch.float64), x[:4].double())


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    c = torch.empty(a.size(0), a.size(0))
    matmul[(1,)](a, b, c, a.size(1), a.size(0), 32)
    return c


def test_bfloat16_dot_of_small_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    a = torch.tensor([[1, 2, 3], [-4, 0.5, 6]], dtype=torch.bfloat16)
    b = torch.tensor([[1, 0], [-1, 2], [0.25, -8]], dtype=torch.bfloat16)
    expected = [[0.75, -19], [-2, -46]]
    assert product(a, b).tolist() == expected

    monkeypatch.setattr(theirs.InterpreterBuilder, "create_dot", interpreter.originals["dot"])
    assert product(a, b).tolist() != expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dot_against_float64(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    K = 67
    a, b = torch.randn(16, K).to(dtype), torch.randn(K, 16).to(dtype)
    # Accumulated in float32: at most K roundings of partial sums.
    bound = K * 2.0**-24 * (a.double().abs() @ b.double().abs() + 1)
    expected = a.double() @ b.double() + 1
    assert ((product(a, b) - expected).abs() <= bound).all()

    monkeypatch.setattr(theirs.InterpreterBuilder, "create_dot", interpreter.originals["dot"])
    assert ((product(a, b) - expected).abs() <= bound).all() == (dtype != torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float64], ids=str)
def test_comparison_of_scalars_in_a_mask(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    y = torch.zeros(4)
    scalar_mask[(1,)](y, torch.ones(1, dtype=dtype), 4)
    assert y.tolist() == [0, 0, 0, 0]
    scalar_mask[(1,)](y, torch.zeros(1, dtype=dtype), 4)
    assert y.tolist() == [1, 1, 0, 0]

    monkeypatch.setattr(theirs.InterpreterBuilder, "binary_op", interpreter.originals["binary"])
    if dtype.is_floating_point or triton.__version__.startswith("3.9."):
        with pytest.raises(theirs.InterpreterError, match=r"bitwise_and|unsupported dtype"):
            scalar_mask[(1,)](y, torch.zeros(1, dtype=dtype), 4)


def test_range_up_to_an_argument_without_deprecated_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    y = torch.zeros(1, dtype=torch.int32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        count[(1,)](y, 7, False)
        assert y.item() == 7
        if triton.__version__.startswith("3.6."):
            monkeypatch.setattr(theirs, "_patch_lang_tensor", interpreter.originals["patch_tensor"])
            with pytest.raises(theirs.InterpreterError, match="scalar"):
                count[(1,)](y, 7, False)


def test_kernels_raise_no_floating_point_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.zeros(1), torch.zeros(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        divide[(1,)](x, y)
        assert y.isnan().item()
        monkeypatch.setattr(theirs.GridExecutor, "__call__", interpreter.originals["launch"])
        with pytest.raises(theirs.InterpreterError, match="RuntimeWarning"):
            divide[(1,)](x, y)


def test_the_language_is_patched_once_per_launch_and_module(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    patch = theirs._patch_lang
    monkeypatch.setattr(theirs, "_patch_lang", lambda fn: calls.append(fn) or patch(fn))
    load = tl.load
    y = torch.zeros(3, dtype=torch.int32)
    for launches in (1, 2):
        count[(3,)](y.zero_(), 5, False)
        assert y.tolist() == [5, 5, 5]
        assert len(calls) == 2 * launches  # the kernel itself, then the module its functions are in
        assert tl.load is load, "the launch must give triton.language back"

    monkeypatch.setattr(theirs.InterpretedFunction, "__call__", interpreter.originals["call"])
    calls.clear()
    count[(3,)](y.zero_(), 5, False)
    assert y.tolist() == [5, 5, 5]
    assert len(calls) == 1 + 15


def test_errors_in_functions_surface_and_do_no_harm() -> None:
    y = torch.zeros(1, dtype=torch.int32)
    load = tl.load
    with pytest.raises(theirs.InterpreterError, match="refused"):
        count[(1,)](y, 2, True)
    assert tl.load is load
    count[(1,)](y, 3, False)
    assert y.item() == 3


def test_installing_again_changes_nothing() -> None:
    before = (
        dict(interpreter.originals),
        theirs.InterpreterBuilder.cast_impl,
        theirs.InterpretedFunction.__call__,
    )
    interpreter.install()
    after = (
        dict(interpreter.originals),
        theirs.InterpreterBuilder.cast_impl,
        theirs.InterpretedFunction.__call__,
    )
    assert after == before
    assert interpreter.originals["cast"] is not theirs.InterpreterBuilder.cast_impl


def run(code: str, interpret: str | None) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(Path(interpreter.__file__).parent)
    if interpret is not None:
        env["TRITON_INTERPRET"] = interpret
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)


def test_install_before_the_import_of_triton() -> None:
    check = "import triton.language as tl; print(type(tl.sum).__name__)"
    done = run(f"import interpreter; interpreter.install(); {check}", None)
    assert done.stdout.strip() == "InterpretedFunction", done.stderr


def test_install_after_the_import_of_triton() -> None:
    code = "import triton, interpreter; interpreter.install(); print('installed')"
    assert run(code, "1").stdout.strip() == "installed"
    for interpret in (None, "0"):
        late = run(code, interpret)
        assert late.returncode != 0
        assert "RuntimeError: triton was imported without TRITON_INTERPRET=1" in late.stderr


@pytest.mark.parametrize(("chosen", "state"), [("gpu", "compiled"), (".", "in its interpreter")])
def test_the_gpu_tests_alone_have_compiled_kernels(chosen: str, state: str) -> None:
    """On a GPU an interpreter would take CUDA tensors too, and the tests would say nothing of the kernels."""
    folder = Path(__file__).parent
    options = ["--collect-only", "--ignore-glob=*/test_*"]
    command = [sys.executable, "-m", "pytest", str(folder / chosen), *options]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert f"triton kernels: {state}\n" in done.stdout, done.stdout + done.stderr
