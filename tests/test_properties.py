"""Random operands against the float64 reference: sizes, dtypes, layouts and strides no list would hold."""

from __future__ import annotations

import hypothesis.strategies as st
import torch
from helpers import DTYPES, LAYOUTS, WEIGHTINGS, Case, assert_equal, check_case, make_case, run
from hypothesis import given
from tested_backends import Backend
from torch import Tensor

LENGTHS = (1, 2, 3, 5, 7, 8, 13, 16, 17, 25, 31, 33, 64, 67, 1000)
FEATURES = (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 61, 64, 65, 127, 131)
UNITS = (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31, 129)
KINDS = ("plain", "plain", "relu", "log_softmax")
SHARED = 512 * 1024
"""B L M N from which the kernels use more than one thread (kSerialOperations of csrc/cpu/memory.h)."""


@st.composite
def cases(draw: st.DrawFn, products: int = 0) -> Case:
    """Of any shape, and as many sets as make B L M N at least `products`."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    L, M, N = (draw(st.sampled_from(v)) for v in (LENGTHS, FEATURES, UNITS))
    # Keep the largest of the three alone: a hundred thousand numbers a case are enough.
    B = draw(st.integers(1, 5 if L * max(M, N) < 20_000 else 1))
    case = make_case(
        B=max(B, -(-products // (L * M * N))),
        L=L,
        M=M,
        N=N,
        dtype=draw(st.sampled_from(DTYPES)),
        weighting=draw(st.sampled_from(WEIGHTINGS)),
        layout=draw(st.sampled_from(LAYOUTS)),
        shift=draw(st.booleans()),
        features=draw(st.sampled_from(KINDS)),
        empty=draw(st.booleans()),
    )
    for name, t in case.floats().items():
        case = case.replace(**{name: restride(t, draw(st.integers(0, 3)))})
    return case


def restride(t: Tensor, how: int) -> Tensor:
    """The same values: as they are, with axes stored in reverse order, with gaps, or off alignment."""
    if how == 1:
        order = tuple(reversed(range(t.dim())))
        return t.permute(order).contiguous().permute(order)
    if how == 2:
        wide = torch.full((*t.shape, 3), float("nan")).to(t.dtype)
        wide[..., 1] = t
        return wide[..., 1]
    if how == 3:
        return torch.cat([t.new_full((1,), float("nan")), t.flatten()])[1:].view(t.shape)
    return t


@given(case=cases())
def test_y_and_every_gradient(backend: Backend, case: Case) -> None:
    check_case(backend, case, all_terms=True, floor=2.0)


@given(case=cases(), data=st.data())
def test_a_subset_of_gradients(backend: Backend, case: Case, data: st.DataObject) -> None:
    names = data.draw(st.sets(st.sampled_from(sorted(case.floats())), min_size=1))
    wanted = tuple(n for n in case.floats() if n in names)
    check_case(backend, case, wanted=wanted, all_terms=True, floor=2.0)


@given(case=cases())
def test_inference_is_the_training_forward(cpp: Backend, case: Case) -> None:
    assert_equal({"y": run(cpp, case, case.dy())["y"]}, run(cpp, case))


@given(case=cases(products=SHARED), threads=st.integers(2, 5))
def test_the_number_of_threads_does_not_matter(native: Backend, case: Case, threads: int) -> None:
    dy = case.dy()
    results = run(native, case, dy)
    torch.set_num_threads(threads)
    try:
        assert_equal(run(native, case, dy), results, f"between 1 and {threads} threads")
    finally:
        torch.set_num_threads(1)


@given(case=cases(), data=st.data())
def test_the_order_of_a_set_does_not_matter(backend: Backend, case: Case, data: st.DataObject) -> None:
    """Without position_bias a set is a set: permuting its positions permutes dx, and nothing else."""
    if case.position_bias is not None or case.lengths is not None or case.offsets is not None:
        case = make_case(dtype=torch.float64, weighting="fc1", layout="mask", L=case.x.size(-2) % 100 + 1)
    case = case.to(torch.float64)
    order = torch.randperm(
        case.x.size(1), generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    )
    scores = None if case.scores is None else case.scores[..., order]
    mask = None if case.mask is None else case.mask[:, order]
    moved = case.replace(x=case.x[:, order], scores=scores, mask=mask)
    y, other = run(backend, case)["y"], run(backend, moved)["y"]
    torch.testing.assert_close(other, y, rtol=1e-8, atol=1e-10)
