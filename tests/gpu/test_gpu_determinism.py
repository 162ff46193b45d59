"""The same bits in every run on a GPU, also while another stream keeps it busy."""

from __future__ import annotations

import pytest
import torch
from gpu_helpers import DEVICE, DTYPES, IDS, OURS, gpu_case, gradient_of, on_device
from helpers import Case, Results, assert_equal, make_lengths, pack, run

REPEATS = 100
NAMES = (
    "many sets",
    "many sets, mask",
    "few long sets",
    "long bag",
    "long bag, scores",
    "uneven, packed",
)


def case_of(name: str, dtype: torch.dtype) -> Case:
    kind, _, variant = name.partition(", ")
    if kind == "many sets":
        layout = variant or "padded"
        return gpu_case(B=300, L=25, M=512, N=32, dtype=dtype, layout=layout, empty=layout == "mask")
    if kind == "few long sets":
        return gpu_case(B=3, L=300, M=256, N=33, dtype=dtype, weighting="position_bias")
    if kind == "long bag":
        return gpu_case(B=1, L=20_000, M=128, N=8, dtype=dtype, weighting=variant or "fc1")
    with on_device():
        return pack(gpu_case(B=40, L=200, M=128, N=17, dtype=dtype), make_lengths(40, 200), trailing=3)


def fresh(case: Case) -> Case:
    """The same numbers at other addresses."""
    return case.replace(**{n: t.clone() for n, t in case.floats().items()})


def repeat(case: Case, dy: torch.Tensor, first: Results, what: str) -> None:
    for i in range(REPEATS):
        again = fresh(case) if i % 10 == 0 else case
        assert_equal(run(OURS, again, dy), first, f"in repeat {i} ({what})")


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
@pytest.mark.parametrize("name", NAMES)
def test_a_hundred_repeats(name: str, dtype: torch.dtype) -> None:
    case = case_of(name, dtype)
    dy = gradient_of(case)
    repeat(case, dy, run(OURS, case, dy), name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], **IDS)
def test_a_hundred_repeats_beside_a_busy_stream(dtype: torch.dtype) -> None:
    """Products on a second stream take multiprocessors away at moments that differ from run to run."""
    chosen = {name: case_of(name, dtype) for name in ("many sets", "long bag", "uneven, packed")}
    gradients = {name: gradient_of(case) for name, case in chosen.items()}
    first = {name: run(OURS, case, gradients[name]) for name, case in chosen.items()}
    torch.cuda.synchronize()
    busy = torch.cuda.Stream()
    a = torch.randn(2048, 2048, device=DEVICE)
    product = torch.empty_like(a)
    torch.cuda.synchronize()
    for i in range(REPEATS):
        with torch.cuda.stream(busy):
            for _ in range(4):
                torch.mm(a, a, out=product)
        for name, case in chosen.items():
            assert_equal(run(OURS, case, gradients[name]), first[name], f"in repeat {i} ({name})")


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
def test_frozen_features(dtype: torch.dtype) -> None:
    for name in ("many sets", "long bag"):
        case = case_of(name, dtype)
        dy = gradient_of(case)
        wanted = ("weight", "alpha", "beta")
        first = run(OURS, case, dy, wanted)
        for i in range(10):
            assert_equal(run(OURS, fresh(case), dy, wanted), first, f"in repeat {i} ({name})")


def test_the_comparison_sees_one_bit() -> None:
    """The control of the tests above."""
    case = gpu_case()
    results = run(OURS, case)
    changed = results["y"].clone()
    changed.view(torch.int32)[0, 0, 0] ^= 1
    with pytest.raises(AssertionError, match="y differs"):
        assert_equal({"y": changed}, results)
