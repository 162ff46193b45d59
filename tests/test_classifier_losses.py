"""`fastac.models.classifier`: losses and probabilities."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from classifier_helpers import NAN, C, make


def test_single_label_losses() -> None:
    model = make()
    scores = torch.randn(5, C)
    labels = torch.tensor([0, 5, 2, 2, 1])
    weight = torch.tensor([1.0, 0.5, 0.25, 2.0, 0.0])
    expected = -scores.log_softmax(1)[torch.arange(5), labels]
    torch.testing.assert_close(model.losses(scores, labels), expected)
    torch.testing.assert_close(model.loss(scores, labels), expected.mean())
    torch.testing.assert_close(model.loss(scores, labels, reduction="none"), expected)
    torch.testing.assert_close(model.loss(scores, labels, weight, "none"), expected * weight)
    torch.testing.assert_close(model.loss(scores, labels, weight, "sum"), (expected * weight).sum())
    torch.testing.assert_close(model.loss(scores, labels, weight), (expected * weight).sum() / 3.75)
    of_classes = torch.rand(C)
    expected = F.cross_entropy(scores, labels, of_classes)
    torch.testing.assert_close(model.loss(scores, labels, of_classes[labels]), expected)
    probabilities = model.probabilities(scores)
    torch.testing.assert_close(probabilities, scores.exp() / scores.exp().sum(1, keepdim=True))


def test_multi_label_losses() -> None:
    model = make(multi_label=True)
    scores = torch.randn(5, C)
    labels = torch.randint(0, 2, (5, C)).bool()
    p = 1 / (1 + torch.exp(-scores))
    torch.testing.assert_close(model.probabilities(scores), p)
    expected = -torch.where(labels, p, 1 - p).log().mean(1)
    for given in (labels, labels.float(), labels.double()):
        torch.testing.assert_close(model.losses(scores, given), expected)
    torch.testing.assert_close(model.loss(scores, labels, reduction="sum"), expected.sum())


@pytest.mark.parametrize("multi_label", [False, True])
def test_losses_are_made_in_float32(multi_label: bool) -> None:
    model = make(multi_label=multi_label)
    labels = torch.ones(5, C) if multi_label else torch.arange(5)
    for dtype, expected in (
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float64, torch.float64),
    ):
        scores = torch.randn(5, C, dtype=dtype)
        found = model.losses(scores, labels)
        assert found.dtype == model.probabilities(scores).dtype == expected
        torch.testing.assert_close(found, model.losses(scores.to(expected), labels))


S = torch.zeros(2, C)
BAD_LOSSES: dict[str, tuple[bool, tuple[Any, ...], type[Exception], str]] = {
    "scores": (
        False,
        (torch.zeros(2, 3), torch.zeros(2)),
        ValueError,
        r"scores must have shape \(B, C\) with C = 6",
    ),
    "integers": (False, (S.long(), torch.zeros(2).long()), TypeError, "scores must be a floating type"),
    "no labels": (False, (S, None), TypeError, "labels must be a torch.Tensor, got NoneType"),
    "shape": (
        False,
        (S, torch.zeros(3).long()),
        ValueError,
        r"labels must have shape \(B,\) = \(2,\), got \(3,\)",
    ),
    "dtype": (False, (S, torch.zeros(2)), TypeError, "labels must be torch.int64, got torch.float32"),
    "range": (False, (S, torch.tensor([0, 6])), ValueError, r"labels must lie in 0...5, got values in 0...6"),
    "ignored": (
        False,
        (S, torch.tensor([0, -100])),
        ValueError,
        r"labels must lie in 0...5, got values in -100",
    ),
    "weight": (
        False,
        (S, torch.zeros(2).long(), torch.ones(6)),
        ValueError,
        r"weight must have shape \(B,\)",
    ),
    "reduction": (
        False,
        (S, torch.zeros(2).long(), None, "max"),
        ValueError,
        "reduction must be one of mean, sum",
    ),
    "multi shape": (
        True,
        (S, torch.zeros(2).long()),
        ValueError,
        r"labels must have shape \(B, C\) = \(2, 6\)",
    ),
    "multi dtype": (True, (S, S.long()), TypeError, "labels must be a floating type or bool"),
    "multi range": (True, (S, S + 2), ValueError, r"labels must lie in 0...1, got values in 2.0...2.0"),
    "multi NaN": (True, (S, S + NAN), ValueError, r"labels must lie in 0...1, got values in nan"),
}


@pytest.mark.parametrize(
    ("multi", "arguments", "error", "message"), BAD_LOSSES.values(), ids=list(BAD_LOSSES)
)
def test_bad_losses(multi: bool, arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(multi_label=multi).loss(*arguments)
