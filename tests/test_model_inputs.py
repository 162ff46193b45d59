"""`fastac.models.inputs`: features of one modality, checked and padded."""

from __future__ import annotations

import pytest
import torch

from fastac.models.inputs import Sets, padded, without_excluded

X = torch.arange(12.0).view(6, 2)


def test_packed_sets_are_padded_with_zeros() -> None:
    x, lengths = padded(Sets(X, None, torch.tensor([0, 2, 2, 5]), None))
    assert lengths is not None
    assert lengths.tolist() == [2, 0, 3]
    expected = torch.zeros(3, 3, 2)
    expected[0, :2], expected[2] = X[:2], X[2:5]
    assert torch.equal(x, expected)


@pytest.mark.parametrize("bound", [2, 3, 5])
def test_a_bound_is_the_length_of_all(bound: int) -> None:
    """One that is too small cuts: a device is not asked whether it is."""
    x, lengths = padded(Sets(X, None, torch.tensor([0, 2, 5]), bound))
    assert lengths is not None
    assert x.shape == (2, bound, 2)
    assert lengths.tolist() == [2, min(3, bound)]
    assert torch.equal(x[1, : min(3, bound)], X[2 : 2 + min(3, bound)])
    assert not x[0, 2:].any()


def test_gradients_of_packed_rows() -> None:
    rows = X.clone().requires_grad_()
    x, _ = padded(Sets(rows, None, torch.tensor([0, 2, 5]), None))
    (x * torch.arange(1.0, 13).view(2, 3, 2)).sum().backward()
    expected = torch.zeros(6, 2)
    expected[:2] = torch.arange(1.0, 5).view(2, 2)
    expected[2:5] = torch.arange(7.0, 13).view(3, 2)
    assert torch.equal(rows.grad, expected)


def test_nothing_is_padded_to_nothing() -> None:
    x, lengths = padded(Sets(X[:0], None, torch.tensor([0, 0]), 4))
    assert x.shape == (1, 4, 2) and not x.any()
    assert lengths is not None and lengths.tolist() == [0]
    x, lengths = padded(Sets(X, None, torch.tensor([0]), None))
    assert x.shape == (0, 0, 2)
    dense = X.view(1, 6, 2)
    assert padded(Sets(dense, None, None, None)) == (dense, None)


def test_what_is_excluded_is_zero_and_has_no_gradient() -> None:
    x = torch.full((2, 3, 1), float("nan"))
    x[0, :2] = 1
    x.requires_grad_()
    kept = without_excluded(x, torch.tensor([2, 0]))
    assert kept.flatten().tolist() == [1, 1, 0, 0, 0, 0]
    kept.sum().backward()
    assert x.grad.flatten().tolist() == [1, 1, 0, 0, 0, 0]
    assert without_excluded(x, None) is x
