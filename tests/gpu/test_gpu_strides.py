"""Operands and gradients of any strides on a GPU give the numbers of their contiguous copies."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from gpu_helpers import DTYPES, IDS, OURS, gpu_case, gradient_of, on_device
from helpers import WEIGHTINGS, Case, Results, assert_near, run, term_sizes
from torch import Tensor


def transposed(t: Tensor) -> Tensor:
    return t.mT.contiguous().mT if t.dim() > 1 else every_second(t)


def every_second(t: Tensor) -> Tensor:
    wide = t.new_full((*t.shape[:-1], 2 * t.size(-1)), float("nan"))
    wide[..., ::2] = t
    return wide[..., ::2]


def window(t: Tensor) -> Tensor:
    """A part of a larger tensor whose border is NaN."""
    larger = t.new_full([n + 3 for n in t.shape], float("nan"))
    inner = larger[tuple(slice(1, n + 1) for n in t.shape)]
    inner.copy_(t)
    return inner


def unaligned(t: Tensor) -> Tensor:
    flat = t.new_full((t.numel() + 1,), float("nan"))
    flat[1:] = t.flatten()
    return flat[1:].view(t.shape)


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    f.__name__: f for f in (transposed, every_second, window, unaligned)
}


def hold(case: Case, dy: Tensor, expected: Results, of: Case, dy_of: Tensor) -> None:
    with on_device():
        terms = term_sizes(of, dy_of)
    assert_near(run(OURS, case, dy), expected, case.x.dtype, eps=4, terms=terms)


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_operands(weighting: str, change: str, dtype: torch.dtype) -> None:
    for layout in ("mask", "packed"):
        case = gpu_case(weighting=weighting, layout=layout, dtype=dtype)
        dy = gradient_of(case)
        expected = run(OURS, case, dy)
        everything = case.replace(**{n: CHANGES[change](t) for n, t in case.floats().items()})
        hold(everything, CHANGES[change](dy), expected, case, dy)
        if layout == "mask":
            assert case.mask is not None
            hold(case.replace(mask=case.mask.T.contiguous().T), dy, expected, case, dy)


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_stride_zero_gradient(weighting: str, dtype: torch.dtype) -> None:
    """y.sum() sends a gradient whose strides are all 0; expanding one axis sends others."""
    for shift in (True, False):
        case = gpu_case(weighting=weighting, dtype=dtype, shift=shift)
        dy = gradient_of(case)
        gradients = [torch.ones_like(dy[:1, :1, :1]).expand(dy.shape)]
        gradients += [dy.narrow(axis, 0, 1).expand(dy.shape) for axis in range(3) if dy.size(axis) > 1]
        for expanded in gradients:
            assert 0 in expanded.stride()
            whole = expanded.contiguous()
            hold(case, expanded, run(OURS, case, whole), case, whole)


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
def test_one_set_for_all(dtype: torch.dtype) -> None:
    """x of stride 0 over the sets."""
    case = gpu_case(B=1, dtype=dtype)
    wide = case.replace(x=case.x.expand(6, -1, -1))
    assert wide.x.stride(0) == 0
    dy = gradient_of(wide)
    whole = wide.replace(x=wide.x.contiguous())
    hold(wide, dy, run(OURS, whole, dy), whole, dy)


def test_sum_backward_fills_the_leaf() -> None:
    case = gpu_case(shift=False)
    x = case.x.clone().requires_grad_()
    OURS(case.replace(x=x)).sum().backward()
    assert x.grad is not None
    ones = torch.ones_like(gradient_of(case))
    hold(case, ones, run(OURS, case, ones), case, ones)
    torch.testing.assert_close(x.grad, run(OURS, case, ones)["dx"])
