"""`softmax_weight` on a GPU, held against extended precision and plain torch on the CPU."""

from __future__ import annotations

import pytest
import torch
from gpu_helpers import DEVICE, DTYPES, IDS, OURS, need_memory
from helpers import assert_equal, make_lengths
from softmax_weight_cases import operands, results, verify
from torch import Tensor

from fastac import backends, softmax_weight

# Sets that fit a program's registers and sets that are streamed; blocks of features that are not whole.
SHAPES = [(5, 23, 67), (1, 1, 1), (64, 25, 512), (4, 300, 1024), (2, 2500, 70), (1, 20011, 5), (3, 30, 25088)]
REPEATS = 50


@pytest.fixture(autouse=True)
def has_it(tested: None) -> None:
    """After the choice of the backend."""
    if OURS.name in backends.LACKING["softmax_weight"]:
        pytest.skip(f"the {OURS.name} backend has no softmax_weight")


def on_gpu(x: Tensor, scores: Tensor, *, lengths: Tensor | None = None) -> Tensor:
    lengths = None if lengths is None else lengths.to(DEVICE)
    return softmax_weight(x.to(DEVICE), scores.to(DEVICE), lengths=lengths, backend=OURS.name).cpu()


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
@pytest.mark.parametrize(("B", "L", "M"), SHAPES)
def test_accuracy(B: int, L: int, M: int, dtype: torch.dtype) -> None:
    x, scores, dy = operands(B, L, M, dtype)
    for lengths in (None, make_lengths(B, L)):
        verify(on_gpu, x, scores, dy, lengths)


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
def test_what_is_excluded_has_no_influence(dtype: torch.dtype) -> None:
    lengths = torch.tensor([7, 0, 300, 299])
    x, scores, dy = operands(4, 300, 65, dtype)
    clean = verify(on_gpu, x, scores, dy, lengths)
    excluded = torch.arange(300) >= lengths[:, None]
    for tensor, value in ((x, "nan"), (scores, "inf"), (dy, "nan")):
        tensor[excluded] = float(value)
    assert_equal(results(on_gpu, x, scores, dy, lengths), clean, "with NaN and Inf where excluded")
    assert all(not t[excluded].any() for t in clean.values())


def test_strides() -> None:
    """Scores as a layer over time makes them, x cut from a longer one, the gradient of a sum."""
    x, scores, _ = (t.to(DEVICE) for t in operands(3, 40, 130))
    layouts = [
        (x, scores),
        (x.mT.contiguous().mT, scores.mT.contiguous().mT),
        (torch.cat([x, x], 1)[:, :40], torch.cat([scores, scores], 2)[..., :130]),
    ]
    found = []
    for x_, scores_ in layouts:
        x_, scores_ = x_.detach().requires_grad_(), scores_.detach().requires_grad_()
        y = softmax_weight(x_, scores_, backend=OURS.name)
        dx, dscores = torch.autograd.grad(y.sum(), (x_, scores_))
        found.append({"y": y.detach(), "dx": dx, "dscores": dscores})
    for other in found[1:]:
        for name, t in other.items():
            torch.testing.assert_close(t, found[0][name])
    assert found[0]["dscores"].abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], **IDS)
def test_the_same_bits_in_every_run(dtype: torch.dtype) -> None:
    x, scores, dy = (t.to(DEVICE) for t in operands(64, 300, 257, dtype))

    def call(x: Tensor, scores: Tensor, *, lengths: Tensor | None) -> Tensor:
        return softmax_weight(x, scores, lengths=lengths, backend=OURS.name)

    lengths = make_lengths(64, 300).to(DEVICE)
    first = results(call, x, scores, dy, lengths)
    for i in range(REPEATS):
        assert_equal(results(call, x.clone(), scores, dy, lengths), first, f"in repeat {i}")


def test_more_than_two_to_the_31_elements() -> None:
    """The last set of many, alone and with the others."""
    need_memory(60)
    B, L, M = 44_000, 50, 1024  # 2.25e9
    x = torch.randn(1, L, M, device=DEVICE, dtype=torch.bfloat16).expand(B, L, M).contiguous()
    scores = torch.randn(1, L, M, device=DEVICE, dtype=torch.bfloat16).expand(B, L, M)
    y = softmax_weight(x, scores, backend=OURS.name)
    alone = softmax_weight(x[-1:], scores[-1:], backend=OURS.name)
    assert torch.equal(y[-1:], alone)
    assert torch.equal(y[:1], alone)
    del y
