"""Bad input gets an error that names the argument, what it must be and what it was, before anything runs."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

import fastac

B, L, M, N, T = 2, 3, 4, 5, 7


def x_(*shape: int, **kwargs: object) -> Tensor:
    return torch.randn(*(shape or (B, L, M)), **kwargs)


W = torch.randn(N, M)
ALPHA, BETA = torch.randn(N), torch.randn(N)
PACKED, OFFSETS = torch.randn(T, M), torch.tensor([0, 2, T])


def cluster(x: object = None, weight: object = W, *args: object, **kwargs: object) -> Tensor:
    return fastac.attention_cluster(x_() if x is None else x, weight, *args, **kwargs)


def pool(scores: object, x: Tensor | None = None, **kwargs: object) -> Tensor:
    return fastac.attention_pool(x_() if x is None else x, scores, **kwargs)


CASES: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    # x
    "x rank 2": (
        lambda: cluster(x_(3, 4)),
        ValueError,
        "x must have shape (B, L, M), got (3, 4); a packed x of shape (T, M) needs offsets",
    ),
    "x rank 4": (
        lambda: cluster(x_(1, 2, 3, 4)),
        ValueError,
        "x must have shape (B, L, M), got (1, 2, 3, 4)",
    ),
    "x rank 3 with offsets": (
        lambda: cluster(offsets=OFFSETS),
        ValueError,
        "x must have shape (T, M) when offsets are given, got (2, 3, 4)",
    ),
    "x list": (lambda: cluster([[1.0]]), TypeError, "x must be a torch.Tensor, got list"),
    "x int": (
        lambda: cluster(torch.ones(B, L, M, dtype=torch.int64)),
        TypeError,
        "x must be float16, bfloat16, float32 or float64, got torch.int64",
    ),
    "x sparse": (
        lambda: cluster(x_().to_sparse()),
        TypeError,
        "x must be a dense strided or a jagged nested tensor, got layout torch.sparse_coo",
    ),
    "x without features": (
        lambda: cluster(x_(B, L, 0), torch.randn(N, 0)),
        ValueError,
        "x must have at least one feature (M >= 1), got shape (2, 3, 0)",
    ),
    # weight
    "weight size": (
        lambda: cluster(weight=torch.randn(N, M + 1)),
        ValueError,
        "weight must have shape (N, M) with M = 4 as in x, got (5, 5)",
    ),
    "weight rank": (
        lambda: cluster(weight=torch.randn(M)),
        ValueError,
        "weight must have shape (N, M) with M = 4 as in x, got (4,)",
    ),
    "weight without units": (
        lambda: cluster(weight=torch.randn(0, M)),
        ValueError,
        "weight must have at least one unit (N >= 1), got shape (0, 4)",
    ),
    "weight dtype": (
        lambda: cluster(weight=W.double()),
        TypeError,
        "weight must be torch.float32 (the dtype of x), got torch.float64",
    ),
    "weight half": (
        lambda: cluster(x_().bfloat16()),
        TypeError,
        "weight must be torch.bfloat16 (the dtype of x), got torch.float32",
    ),
    "weight device": (
        lambda: cluster(weight=W.to("meta")),
        ValueError,
        "weight must be on the device of x, cpu, got meta",
    ),
    "weight type": (lambda: cluster(weight=3.0), TypeError, "weight must be a torch.Tensor, got float"),
    "weight layout": (
        lambda: cluster(weight=W.to_sparse()),
        TypeError,
        "weight must be a dense strided tensor, got layout torch.sparse_coo",
    ),
    # alpha, beta
    "alpha alone": (
        lambda: cluster(None, W, ALPHA),
        ValueError,
        "alpha and beta must be given together, beta is missing",
    ),
    "beta alone": (
        lambda: cluster(None, W, None, BETA),
        ValueError,
        "alpha and beta must be given together, alpha is missing",
    ),
    "alpha size": (
        lambda: cluster(None, W, ALPHA[:2], BETA),
        ValueError,
        "alpha must have shape (N,) with N = 5, got (2,)",
    ),
    "beta size": (
        lambda: cluster(None, W, ALPHA, BETA[None]),
        ValueError,
        "beta must have shape (N,) with N = 5, got (1, 5)",
    ),
    "beta size in the average": (
        lambda: cluster(None, None, ALPHA, BETA[:2]),
        ValueError,
        "beta must have shape (N,) with N = 5, got (2,)",
    ),
    "alpha empty in the average": (
        lambda: cluster(None, None, ALPHA[:0], BETA[:0]),
        ValueError,
        "alpha must have shape (N,) with N = 1, got (0,)",
    ),
    "alpha dtype": (
        lambda: cluster(None, W, ALPHA.double(), BETA),
        TypeError,
        "alpha must be torch.float32 (the dtype of x), got torch.float64",
    ),
    "beta dtype": (
        lambda: cluster(x_().bfloat16(), W.bfloat16(), ALPHA, BETA.half()),
        TypeError,
        "beta must be torch.bfloat16 (the dtype of x) or torch.float32, got torch.float16",
    ),
    "beta device": (
        lambda: cluster(None, W, ALPHA, BETA.to("meta")),
        ValueError,
        "beta must be on the device of x, cpu, got meta",
    ),
    # scores
    "scores missing": (lambda: pool(None), TypeError, "scores must be a torch.Tensor, got NoneType"),
    "scores rank": (
        lambda: pool(torch.randn(B, L)),
        ValueError,
        "scores must have shape (B, N, L) with B = 2 and L = 3, got (2, 3)",
    ),
    "scores transposed": (
        lambda: pool(torch.randn(B, L, N)),
        ValueError,
        "scores must have shape (B, N, L) with B = 2 and L = 3, got (2, 3, 5)",
    ),
    "scores batch": (
        lambda: pool(torch.randn(1, N, L)),
        ValueError,
        "scores must have shape (B, N, L) with B = 2 and L = 3, got (1, 5, 3)",
    ),
    "scores packed": (
        lambda: pool(torch.randn(N, T - 1), PACKED, offsets=OFFSETS),
        ValueError,
        "scores must have shape (N, T) with T = 7, got (5, 6)",
    ),
    "scores without units": (
        lambda: pool(torch.randn(B, 0, L)),
        ValueError,
        "scores must have at least one unit (N >= 1), got shape (2, 0, 3)",
    ),
    "scores dtype": (
        lambda: pool(torch.randn(B, N, L).half()),
        TypeError,
        "scores must be torch.float32 (the dtype of x), got torch.float16",
    ),
    # position_bias
    "position_bias without weight": (
        lambda: cluster(None, None, position_bias=torch.randn(1, L)),
        ValueError,
        "position_bias needs weight",
    ),
    "position_bias units": (
        lambda: cluster(position_bias=torch.randn(N + 1, L)),
        ValueError,
        "position_bias must have shape (N, L_max) with N = 5, got (6, 3)",
    ),
    "position_bias too short": (
        lambda: cluster(position_bias=torch.randn(N, L - 1)),
        ValueError,
        "position_bias must cover every position of x (L = 3), got L_max = 2",
    ),
    "position_bias too short, packed": (
        lambda: cluster(PACKED, position_bias=torch.randn(N, 4), offsets=OFFSETS),
        ValueError,
        "position_bias must cover every position of x (longest set 5), got L_max = 4",
    ),
    "position_bias dtype": (
        lambda: cluster(position_bias=torch.randn(N, L).half()),
        TypeError,
        "position_bias must be torch.float32 (the dtype of x), got torch.float16",
    ),
    # lengths
    "lengths too long": (
        lambda: cluster(lengths=torch.tensor([1, 4])),
        ValueError,
        "lengths must lie in 0...L with L = 3, got values in 1...4",
    ),
    "lengths negative": (
        lambda: cluster(lengths=torch.tensor([-1, 3])),
        ValueError,
        "lengths must lie in 0...L with L = 3, got values in -1...3",
    ),
    "lengths shape": (
        lambda: cluster(lengths=torch.tensor([1, 2, 3])),
        ValueError,
        "lengths must have shape (B,) with B = 2, got (3,)",
    ),
    "lengths dtype": (
        lambda: cluster(lengths=torch.tensor([1.0, 2.0])),
        TypeError,
        "lengths must be an integer tensor, got torch.float32",
    ),
    "lengths bool": (
        lambda: cluster(lengths=torch.tensor([True, False])),
        TypeError,
        "lengths must be an integer tensor, got torch.bool",
    ),
    "lengths list": (lambda: cluster(lengths=[1, 2]), TypeError, "lengths must be a torch.Tensor, got list"),
    "lengths device": (
        lambda: cluster(lengths=torch.tensor([1, 2], device="meta")),
        ValueError,
        "lengths must be on the device of x, cpu, got meta",
    ),
    # mask
    "mask dtype": (
        lambda: cluster(mask=torch.ones(B, L)),
        TypeError,
        "mask must be torch.bool (True = takes part), got torch.float32",
    ),
    "mask shape": (
        lambda: cluster(mask=torch.ones(L, B, dtype=torch.bool)),
        ValueError,
        "mask must have shape (B, L) = (2, 3), got (3, 2)",
    ),
    # offsets
    "offsets dtype": (
        lambda: cluster(PACKED, offsets=OFFSETS.float()),
        TypeError,
        "offsets must be int64 or int32, got torch.float32",
    ),
    "offsets shape": (
        lambda: cluster(PACKED, offsets=OFFSETS[None]),
        ValueError,
        "offsets must have shape (B + 1,), got (1, 3)",
    ),
    "offsets empty": (
        lambda: cluster(PACKED, offsets=OFFSETS[:0]),
        ValueError,
        "offsets must have shape (B + 1,), got (0,)",
    ),
    "offsets start": (
        lambda: cluster(PACKED, offsets=torch.tensor([1, 2])),
        ValueError,
        "offsets must rise from 0, got offsets[0] = 1",
    ),
    "offsets fall": (
        lambda: cluster(PACKED, offsets=torch.tensor([0, 5, 3])),
        ValueError,
        "offsets must not fall, got a step of -2",
    ),
    "offsets beyond T": (
        lambda: cluster(PACKED, offsets=torch.tensor([0, 8])),
        ValueError,
        "offsets must end at T = 7 or before, got offsets[-1] = 8",
    ),
    # combinations
    "lengths and mask": (
        lambda: cluster(lengths=torch.tensor([1, 2]), mask=torch.ones(B, L, dtype=torch.bool)),
        ValueError,
        "at most one of lengths, mask and offsets may be given, got lengths and mask",
    ),
    "offsets and lengths": (
        lambda: cluster(PACKED, lengths=torch.tensor([1, 2]), offsets=OFFSETS),
        ValueError,
        "at most one of lengths, mask and offsets may be given, got lengths and offsets",
    ),
    # max_length
    "max_length type": (
        lambda: cluster(PACKED, offsets=OFFSETS, max_length=2.0),
        TypeError,
        "max_length must be an int, got float",
    ),
    "max_length negative": (
        lambda: cluster(PACKED, offsets=OFFSETS, max_length=-1),
        ValueError,
        "max_length must be >= 0, got -1",
    ),
    "max_length too small": (
        lambda: cluster(PACKED, offsets=OFFSETS, max_length=4),
        ValueError,
        "max_length must bound every set, got 4 and a set of length 5",
    ),
    # eps
    "eps zero": (lambda: cluster(eps=0.0), ValueError, "eps must be finite and > 0, got 0.0"),
    "eps negative": (lambda: cluster(eps=-1e-3), ValueError, "eps must be finite and > 0, got -0.001"),
    "eps nan": (lambda: cluster(eps=float("nan")), ValueError, "eps must be finite and > 0, got nan"),
    "eps inf": (lambda: cluster(eps=float("inf")), ValueError, "eps must be finite and > 0, got inf"),
    "eps vanishes": (
        lambda: cluster(eps=1e-50),
        ValueError,
        "eps must be at least 1.18e-38 in float32 accumulation, got 1e-50",
    ),
    "eps type": (lambda: cluster(eps="small"), TypeError, "eps must be a number, got str"),
    "eps tensor": (lambda: cluster(eps=torch.ones(())), TypeError, "eps must be a number, got Tensor"),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_message(name: str, backend: str | None) -> None:
    call, kind, message = CASES[name]
    with nullcontext() if backend is None else fastac.backend(backend), pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind
    assert str(caught.value).startswith(message), str(caught.value)


def jagged() -> Tensor:
    return torch.nested.nested_tensor([torch.randn(2, M), torch.randn(3, M)], layout=torch.jagged)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_nested_errors() -> None:
    with pytest.raises(ValueError, match=r"lengths must not be given with a nested x"):
        cluster(jagged(), lengths=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"offsets must not be given with a nested x"):
        cluster(jagged(), offsets=torch.tensor([0, 1, 2]))
    holes = torch.nested.narrow(
        torch.randn(2, 5, M), 1, torch.tensor([0, 1]), torch.tensor([3, 2]), layout=torch.jagged
    )
    with pytest.raises(ValueError, match=r"no holes: call x\.contiguous\(\) first"):
        cluster(holes)
    with pytest.raises(ValueError, match=r"x must have shape \(B, j, M\) with the ragged dimension second"):
        cluster(jagged().transpose(1, 2))
    strided = torch.nested.as_nested_tensor([torch.randn(2, M), torch.randn(3, M)], layout=torch.strided)
    with pytest.raises(TypeError, match=r"x must have layout torch\.jagged when nested"):
        cluster(strided)
    with pytest.raises(ValueError, match=re.escape("position_bias must cover every position of x")):
        cluster(jagged(), position_bias=torch.randn(N, 2))


def test_values_are_not_read_while_compiling() -> None:
    def run(x: Tensor, lengths: Tensor) -> Tensor:
        return fastac.attention_cluster(x, W, lengths=lengths, backend="reference")

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    x = x_()
    too_long = compiled(x, torch.tensor([9, 1]))
    torch.testing.assert_close(too_long, run(x, torch.tensor([3, 1])))


def test_errors_name_autocast_types() -> None:
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(TypeError, match=r"alpha must be torch\.bfloat16 \(the dtype of x\) or torch\.float32"),
    ):
        cluster(x_().half(), W.half(), ALPHA.half(), BETA.half())


def test_explain_raises_the_same_errors() -> None:
    with pytest.raises(ValueError, match=re.escape("x must have shape (B, L, M), got (3, 4)")):
        fastac.explain(x_(3, 4), W)
    with pytest.raises(ValueError, match="at most one of weight and scores"):
        fastac.explain(x_(), W, scores=torch.randn(B, N, L))
