"""Operands and gradients of any strides give the numbers of their contiguous copies."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import DTYPES, WEIGHTINGS, assert_near, make_case, run, term_sizes
from tested_backends import Backend
from torch import Tensor

IDS = {"ids": lambda v: str(v).removeprefix("torch.")}


def transposed(t: Tensor) -> Tensor:
    return t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() > 1 else strided(t)


def strided(t: Tensor) -> Tensor:
    wide = torch.full((*t.shape[:-1], 2 * t.size(-1)), float("nan")).to(t.dtype)
    wide[..., ::2] = t
    return wide[..., ::2]


def sliced(t: Tensor) -> Tensor:
    """A window of a larger tensor whose border is NaN."""
    larger = torch.full([n + 3 for n in t.shape], float("nan")).to(t.dtype)
    window = larger[tuple(slice(1, n + 1) for n in t.shape)]
    window.copy_(t)
    return window


def shifted(t: Tensor) -> Tensor:
    """Contiguous, but one element off any alignment."""
    flat = torch.full((t.numel() + 1,), float("nan")).to(t.dtype)
    flat[1:] = t.flatten()
    return flat[1:].view(t.shape)


def reversed_axes(t: Tensor) -> Tensor:
    order = list(reversed(range(t.dim())))
    return t.permute(order).contiguous().permute(order)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    f.__name__: f for f in (transposed, strided, sliced, shifted, reversed_axes)
}


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
@pytest.mark.parametrize("change", LAYOUTS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_operands(backend: Backend, weighting: str, change: str, dtype: torch.dtype) -> None:
    layouts = ("mask", "packed")
    if backend.interpreted:
        layouts = layouts[:1] if dtype.itemsize == 4 else layouts[1:]
    for layout in layouts:
        case = make_case(weighting=weighting, layout=layout, dtype=dtype)
        dy = case.dy()
        expected = run(backend, case, dy)
        for name, t in case.floats().items():
            odd = LAYOUTS[change](t)
            assert torch.equal(odd, t)
            assert_near(
                run(backend, case.replace(**{name: odd}), dy),
                expected,
                dtype,
                eps=4,
                terms=term_sizes(case, dy),
                noise=backend.form_noise(case, dy),
            )
        everything = {name: LAYOUTS[change](t) for name, t in case.floats().items()}
        assert_near(
            run(backend, case.replace(**everything), LAYOUTS[change](dy)),
            expected,
            dtype,
            eps=4,
            terms=term_sizes(case, dy),
            noise=backend.form_noise(case, dy),
        )


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_stride_zero_gradient(backend: Backend, weighting: str, dtype: torch.dtype) -> None:
    """y.sum() sends a dy whose strides are all 0; expanding one axis sends others."""
    for shift in (True, False):
        case = make_case(weighting=weighting, dtype=dtype, shift=shift)
        ones = torch.ones(case.dy().shape, dtype=dtype)
        scalar = torch.ones((), dtype=dtype).expand(ones.shape)
        assert scalar.stride() == (0, 0, 0)
        assert_near(
            run(backend, case, scalar),
            run(backend, case, ones),
            dtype,
            eps=4,
            terms=term_sizes(case, ones),
            noise=backend.form_noise(case, ones),
        )
        dy = case.dy()
        for axis in (n for n in range(3) if dy.size(n) > 1):
            expanded = dy.narrow(axis, 0, 1).expand(dy.shape)
            assert expanded.stride(axis) == 0
            assert_near(
                run(backend, case, expanded),
                run(backend, case, expanded.contiguous()),
                dtype,
                eps=4,
                terms=term_sizes(case, dy),
                noise=backend.form_noise(case, expanded),
            )


@pytest.mark.parametrize("change", LAYOUTS)
def test_gradient_of_y(backend: Backend, change: str) -> None:
    for dtype in DTYPES:
        case = make_case(dtype=dtype, layout="lengths")
        dy = case.dy()
        assert_near(
            run(backend, case, LAYOUTS[change](dy)),
            run(backend, case, dy),
            dtype,
            eps=4,
            terms=term_sizes(case, dy),
            noise=backend.form_noise(case, dy),
        )


def test_sum_backward(backend: Backend) -> None:
    """The whole path, a leaf's .grad filled by y.sum().backward()."""
    case = make_case(shift=False, features="offset")
    x = case.x.clone().requires_grad_()
    backend(case.replace(x=x)).sum().backward()
    expected = run(backend, case, torch.ones_like(case.dy()))["dx"]
    assert x.grad is not None
    assert_near({"dx": x.grad}, {"dx": expected}, torch.float32, eps=4)


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
def test_expanded_operands(backend: Backend, dtype: torch.dtype) -> None:
    """Scores shared by units or sets, one feature vector repeated, one scalar for every α: the gradient of an
    expanded operand is full size, and autograd sums it.
    """
    case = make_case(weighting="scores", dtype=dtype, layout="mask")
    assert case.scores is not None and case.alpha is not None and case.beta is not None
    B, N, L = case.scores.shape
    dy = case.dy()
    changes = [
        {"scores": case.scores[:, :1].expand(B, N, L)},
        {"scores": case.scores[:1].expand(B, N, L)},
        {"scores": case.scores[:, :, :1].expand(B, N, L)},
        {"x": case.x[:1].expand(B, L, -1)},
        {"x": case.x[:, :1].expand(B, L, -1)},
        {"x": case.x[:, :, :1].expand(B, L, case.x.size(2))},
        {"alpha": case.alpha[:1].expand(N), "beta": case.beta[:1].expand(N)},
    ]
    for change in changes:
        solid = {name: t.contiguous() for name, t in change.items()}
        assert_near(
            run(backend, case.replace(**change), dy),
            run(backend, case.replace(**solid), dy),
            dtype,
            eps=4,
            terms=term_sizes(case, dy),
            noise=backend.form_noise(case.replace(**change), dy),
        )


def test_expanded_weight_and_position_bias(backend: Backend) -> None:
    case = make_case(weighting="position_bias")
    assert case.weight is not None and case.position_bias is not None
    dy = case.dy()
    for name, t in (("weight", case.weight[:1]), ("position_bias", case.position_bias[:1])):
        full = t.expand(case.cluster_size, -1)
        expected = run(backend, case.replace(**{name: full.contiguous()}), dy)
        assert_near(
            run(backend, case.replace(**{name: full}), dy),
            expected,
            torch.float32,
            eps=4,
            terms=term_sizes(case, dy),
        )


def test_strided_lengths_mask_and_offsets(backend: Backend) -> None:
    for layout in ("lengths", "mask", "packed"):
        case = make_case(layout=layout, weighting="scores")
        name = "offsets" if layout == "packed" else layout
        t = getattr(case, name)
        expected = run(backend, case, dy := case.dy())
        spread = torch.stack([t, torch.ones_like(t)], -1)[..., 0]
        assert not spread.is_contiguous()
        assert_near(
            run(backend, case.replace(**{name: spread}), dy),
            expected,
            torch.float32,
            eps=4,
            terms=term_sizes(case, dy),
        )
    case = make_case()
    mask = (torch.rand(case.x.size(1)) < 0.6).expand(case.x.shape[:2])
    case = case.replace(mask=mask)
    dy = case.dy()
    solid = case.replace(mask=mask.contiguous())
    assert_near(
        run(backend, case, dy), run(backend, solid, dy), torch.float32, eps=4, terms=term_sizes(case, dy)
    )


def test_scores_made_by_a_matmul(backend: Backend) -> None:
    """(B, L, N) transposed: what a linear layer over features gives."""
    case = make_case(weighting="scores")
    assert case.scores is not None
    scores = case.scores.transpose(1, 2).contiguous().transpose(1, 2)
    dy = case.dy()
    assert_near(
        run(backend, case.replace(scores=scores), dy),
        run(backend, case, dy),
        torch.float32,
        eps=4,
        terms=term_sizes(case, dy),
    )
