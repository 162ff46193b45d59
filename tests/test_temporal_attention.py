"""`fastac.models.TemporalAttention`: one softmax over time per feature, padding with weight or without."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from temporal_attention_by_hand import block_by_hand, padded_to
from torch import Tensor

import fastac
from fastac.models.attention_boosted_lstm import TemporalAttention

NAN = float("nan")
T = 5
honoring = pytest.mark.parametrize("honor", [True, False], ids=["honored", "published"])
each_backend = pytest.mark.parametrize("backend", ["reference", None])


def make_block(honor: bool = True, **options: Any) -> TemporalAttention:
    block = TemporalAttention(T, honor_lengths=honor, **{"dtype": torch.float64, **options})
    torch.nn.init.normal_(block.bias)
    return block


@honoring
@each_backend
def test_the_published_formula(honor: bool, backend: str | None) -> None:
    block = make_block(honor)
    x = torch.randn(3, T + 1, 4, dtype=torch.float64)
    lengths = torch.tensor([2, T + 1, T])
    with nullcontext() if backend is None else fastac.backend(backend):
        y, weights = block(x, lengths, return_weights=True)
        assert torch.equal(block(x, lengths), y)
    for b, n in enumerate(lengths.tolist()):
        sequence = padded_to(x[b, :n].numpy(), T)
        expected = block_by_hand(block, sequence, min(n, T) if honor else T)
        torch.testing.assert_close((y[b], weights[b]), tuple(map(torch.from_numpy, expected)))


def test_numbers_worked_out_on_paper() -> None:
    """W carries the first frame's feature to the score of the second: weights 1/3 and 2/3."""
    block = TemporalAttention(2)
    with torch.no_grad():
        block.weight.copy_(torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
    x = torch.tensor([[[np.log(2.0)], [3.0]]], dtype=torch.float32)
    y, weights = block(x, return_weights=True)
    torch.testing.assert_close(weights, torch.tensor([[[1 / 3], [2 / 3]]]))
    torch.testing.assert_close(y, torch.tensor([[[np.log(2.0) / 3], [2.0]]], dtype=torch.float32))


def test_pads_and_cuts() -> None:
    x = torch.randn(2, T + 2, 3, dtype=torch.float64)
    for honor in (True, False):
        block = make_block(honor)
        assert torch.equal(block(x), block(x[:, :T]))
        y, weights = block(x[:, :2], return_weights=True)
        assert y.shape == weights.shape == (2, T, 3)
        assert not y[:, 2:].any()
        assert bool(weights[:, 2:].any()) is not honor
        torch.testing.assert_close(weights.sum(1), torch.ones(2, 3, dtype=torch.float64))
        zeros = torch.cat([x[:, :2], x.new_zeros(2, T - 2, 3)], 1)
        if honor:
            torch.testing.assert_close(y, block(zeros, torch.tensor([2, 2])))
        else:
            torch.testing.assert_close(y, block(zeros))


@honoring
def test_ignores_what_is_excluded(honor: bool) -> None:
    block = make_block(honor)
    lengths = torch.tensor([3, 0, 5, 1])
    x = torch.randn(4, T, 3, dtype=torch.float64)
    taken = (torch.arange(T) < lengths[:, None])[..., None]
    found = []
    for other in (0.0, NAN, float("inf")):
        leaf = torch.where(taken, x, other).requires_grad_()
        block.zero_grad()
        y = block(leaf, lengths)
        (y * torch.arange(1.0, T + 1)[:, None]).sum().backward()
        found.append((y, leaf.grad, block.weight.grad, block.bias.grad))
    for one in found[1:]:
        torch.testing.assert_close(one, found[0], rtol=0, atol=0)
    y, gradient, *_ = found[0]
    assert not y[1].any() and not gradient[~taken.expand_as(gradient)].any()
    assert gradient[0, :3].all() and block.weight.grad.any()


@honoring
@pytest.mark.parametrize("length", [3, T, T + 2])
@each_backend
def test_gradcheck(honor: bool, length: int, backend: str | None) -> None:
    block = make_block(honor)
    lengths = torch.tensor([length, 1, 0, 2])
    x = torch.randn(4, length, 2, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
        given = {"weight": weight, "bias": bias}
        return torch.func.functional_call(block, given, (x, lengths), {"return_weights": True})

    leaves = (x, *(p.detach().clone().requires_grad_() for p in block.parameters()))
    with nullcontext() if backend is None else fastac.backend(backend):
        assert torch.autograd.gradcheck(run, leaves)


def test_starts_as_keras() -> None:
    torch.manual_seed(0)
    block = TemporalAttention(200)
    bound = (6 / 400) ** 0.5
    assert not block.bias.any()
    assert 0.99 * bound < block.weight.max() <= bound
    assert block.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert list(block.state_dict()) == ["weight", "bias"]
    assert repr(TemporalAttention(3)) == "TemporalAttention(3)"
    assert repr(TemporalAttention(3, honor_lengths=False)) == "TemporalAttention(3, honor_lengths=False)"


@pytest.mark.parametrize(
    ("x", "lengths", "error", "message"),
    [
        (torch.zeros(2, 3), None, ValueError, r"x must have shape \(B, L, M\), got \(2, 3\)"),
        (torch.zeros(2, 3, 4).double(), None, TypeError, "x must be torch.float32 as the block, got torch.f"),
        (torch.zeros(2, 3, 4, device="meta"), None, ValueError, "x must be on the device of the block, cpu"),
        ([1.0], None, TypeError, "x must be a torch.Tensor, got list"),
        (torch.zeros(2, 3, 4), torch.tensor([1, 4]), ValueError, r"lengths must lie in 0...L with L = 3"),
        (torch.zeros(2, 3, 4), torch.tensor([1.0, 2.0]), TypeError, "lengths must be an integer tensor"),
        (torch.zeros(2, 3, 4), torch.tensor([1]), ValueError, r"lengths must have shape \(B,\) with B = 2"),
    ],
)
def test_bad_input(x: Any, lengths: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TemporalAttention(T)(x, lengths)
