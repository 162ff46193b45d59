"""The reference against values computed by hand, against F.scaled_dot_product_attention, and at its edges."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastac import reference

NAN, INF = float("nan"), float("inf")
F64 = torch.float64


def tensor(*values: object, **kwargs: object) -> Tensor:
    return torch.tensor(*values, dtype=F64, **kwargs)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64)


# Values computed by hand


def test_fc1_and_shift_by_hand() -> None:
    # Scores log 3 and 0 give weights 3/4 and 1/4; then u = 2 z - 1 = (1/2, -1/2), whose norm is 1/sqrt 2.
    x = tensor([[[1.0, 0.0], [0.0, 1.0]]])
    weight = tensor([[math.log(3), 0.0]])
    z = reference.attention_cluster(x, weight)
    torch.testing.assert_close(z, tensor([[[0.75, 0.25]]]))
    y = reference.attention_cluster(x, weight, tensor([2.0]), tensor([-1.0]))
    torch.testing.assert_close(y, tensor([[[1.0, -1.0]]]) / math.sqrt(2))


def test_every_unit_has_norm_one_over_root_n() -> None:
    # u = (3, 4) and (0, -5): divided by sqrt 2 * 5.
    x = tensor([[[3.0, 4.0]]])
    alpha, beta = tensor([1.0, -1.0]), tensor([0.0, 0.0])
    y = reference.attention_cluster(x, None, alpha, beta)
    torch.testing.assert_close(y, tensor([[[3.0, 4.0], [-3.0, -4.0]]]) / (5 * math.sqrt(2)))


def test_average_by_hand() -> None:
    x = tensor([[[1.0, 2.0], [3.0, 6.0], [100.0, 100.0]]])
    y = reference.attention_cluster(x, None, lengths=torch.tensor([2]))
    torch.testing.assert_close(y, tensor([[[2.0, 4.0]]]))


def test_position_bias_by_hand() -> None:
    x = tensor([[[1.0], [5.0]]])
    bias = tensor([[0.0, math.log(3), 99.0]])
    y = reference.attention_cluster(x, tensor([[0.0]]), position_bias=bias)
    torch.testing.assert_close(y, tensor([[[4.0]]]))  # 1/4 * 1 + 3/4 * 5


def test_position_bias_counts_inside_each_set() -> None:
    x = tensor([[7.0], [1.0], [5.0]])
    bias = tensor([[0.0, math.log(3)]])
    y = reference.attention_cluster(x, tensor([[0.0]]), position_bias=bias, offsets=torch.tensor([0, 1, 3]))
    torch.testing.assert_close(y, tensor([[[7.0]], [[4.0]]]))


def test_pool_by_hand() -> None:
    x = tensor([[[4.0], [8.0], [12.0]]])
    scores = tensor([[[0.0, 0.0, math.log(2)], [-INF, 0.0, -INF], [-INF, -INF, -INF]]])
    y = reference.attention_pool(x, scores)
    torch.testing.assert_close(y, tensor([[[9.0], [8.0], [0.0]]]))


@pytest.mark.parametrize("shared", [False, True])
def test_fc2_scores_by_hand(shared: bool) -> None:
    n, h, m, length = 2, 3, 4, 2
    x = randn(1, length, m)
    w1, b1, w2 = randn(n, h, m), randn(n, h), randn(n, h)
    if shared:
        w1, b1 = w1[0], b1[0]
    got = reference.fc2_scores(x, w1, b1, w2)
    for k in range(n):
        unit_w, unit_b = (w1, b1) if shared else (w1[k], b1[k])
        for i in range(length):
            expected = sum(
                float(w2[k, j]) * math.tanh(float((unit_w[j] * x[0, i]).sum() + unit_b[j])) for j in range(h)
            )
            assert float(got[0, k, i]) == pytest.approx(expected, rel=1e-12)


def test_gated_scores_by_hand() -> None:
    n, h, m, length = 2, 3, 4, 2
    x, v, u, w2 = randn(1, length, m), randn(h, m), randn(h, m), randn(n, h)
    got = reference.gated_scores(x, v, u, w2)
    for k in range(n):
        for i in range(length):
            expected = sum(
                float(w2[k, j])
                * math.tanh(float(v[j] @ x[0, i]))
                / (1 + math.exp(-float(u[j] @ x[0, i])))
                for j in range(h)
            )  # fmt: skip
            assert float(got[0, k, i]) == pytest.approx(expected, rel=1e-12)


# Another implementation of the part before the shift


@pytest.mark.parametrize("masked", [False, True])
def test_against_scaled_dot_product_attention(masked: bool) -> None:
    x, weight = randn(3, 7, 5), randn(4, 5)
    mask = torch.rand(3, 7) < 0.6 if masked else None
    if mask is not None:
        mask[:, 0] = True  # SDPA gives NaN for an empty set
    expected = F.scaled_dot_product_attention(
        weight.expand(3, 4, 5), x, x, attn_mask=None if mask is None else mask[:, None, :], scale=1.0
    )
    torch.testing.assert_close(reference.attention_cluster(x, weight, mask=mask), expected)


def test_shift_against_normalize() -> None:
    z, alpha, beta = randn(2, 3, 6), randn(3), randn(3)
    y, norm = reference.shift(z, alpha, beta, 1e-12)
    u = alpha[:, None] * z + beta[:, None]
    torch.testing.assert_close(y, F.normalize(u, dim=-1) / math.sqrt(3))
    torch.testing.assert_close(norm, torch.linalg.vector_norm(u, dim=-1))


def test_log_sum_exp_and_weights() -> None:
    x, weight = randn(2, 5, 3), randn(4, 3)
    got = reference.forward(x, weight, None, None, None, None, None, None, None, 1e-12)
    scores = (x @ weight.T).transpose(1, 2)
    torch.testing.assert_close(got.lse, scores.logsumexp(-1))
    torch.testing.assert_close(got.weights, scores.softmax(-1))
    assert got.norm.shape == (0,)


# Layouts agree


def test_lengths_mask_and_packed_agree() -> None:
    counts = [3, 0, 5, 1]
    b, length, m, n = 4, 5, 6, 3
    x, weight, alpha, beta, bias = randn(b, length, m), randn(n, m), randn(n), randn(n), randn(n, 5)
    lengths = torch.tensor(counts)
    mask = torch.arange(length) < lengths[:, None]
    offsets = torch.tensor([0, *counts]).cumsum(0)
    packed = torch.cat([x[mask], randn(2, m)])  # two rows beyond the last set
    arguments = {"position_bias": bias}
    first = reference.attention_cluster(x, weight, alpha, beta, lengths=lengths, **arguments)
    for other in (
        reference.attention_cluster(x, weight, alpha, beta, mask=mask, **arguments),
        reference.attention_cluster(packed, weight, alpha, beta, offsets=offsets, **arguments),
        reference.attention_cluster(
            packed, weight, alpha, beta, offsets=offsets.int(), max_length=5, **arguments
        ),
    ):
        torch.testing.assert_close(other, first)

    scores = randn(b, n, length)
    padded = reference.attention_pool(x, scores, alpha, beta, lengths=lengths)
    columns = torch.cat([scores.transpose(1, 2)[mask], randn(2, n)]).T
    torch.testing.assert_close(
        reference.attention_pool(packed, columns, alpha, beta, offsets=offsets), padded
    )
    weights = reference.attention_weights(scores, lengths=lengths)
    torch.testing.assert_close(weights.sum(-1), (lengths > 0).double()[:, None].expand(b, n))
    assert torch.equal(weights == 0, ~mask[:, None, :].expand(b, n, length))
    packed_weights = reference.attention_weights(columns, offsets=offsets)
    torch.testing.assert_close(packed_weights[:, : sum(counts)].T, weights.transpose(1, 2)[mask])
    assert torch.equal(packed_weights[:, sum(counts) :], torch.zeros(n, 2, dtype=F64))


def test_holes_in_a_mask() -> None:
    x, weight = randn(1, 4, 3), randn(2, 3)
    mask = torch.tensor([[True, False, False, True]])
    torch.testing.assert_close(
        reference.attention_cluster(x, weight, mask=mask),
        reference.attention_cluster(x[:, [0, 3]], weight),
    )


# Edges


@pytest.mark.parametrize("layout", ["lengths", "mask", "packed"])
def test_excluded_nan_reaches_nothing(layout: str) -> None:
    x, weight, alpha, beta = randn(2, 4, 3), randn(2, 3), randn(2), randn(2)
    scores = randn(2, 2, 4)
    kwargs: dict[str, Tensor] = {"lengths": torch.tensor([2, 4])}
    excluded = torch.arange(4) >= kwargs["lengths"][:, None]
    if layout == "mask":
        kwargs = {"mask": ~excluded}
    if layout == "packed":
        x, scores = randn(6, 3), randn(2, 6)
        kwargs = {"offsets": torch.tensor([0, 1, 4])}
        excluded = torch.arange(6) >= 4

    def run(poison: float) -> list[Tensor]:
        def poisoned(t: Tensor, where: Tensor) -> Tensor:
            return torch.where(where, poison, t).requires_grad_()

        gone = excluded[..., None].expand_as(x)
        score_gone = excluded[:, None].expand_as(scores) if layout != "packed" else excluded.expand_as(scores)
        leaves = [poisoned(x, gone), weight.clone().requires_grad_()]
        y = reference.attention_cluster(leaves[0], leaves[1], alpha, beta, **kwargs)
        leaves.append(poisoned(scores, score_gone))
        y2 = reference.attention_pool(leaves[0], leaves[2], alpha, beta, **kwargs)
        grads = torch.autograd.grad((y * y.detach().cos()).sum() + y2.cos().sum(), leaves)
        assert torch.equal(grads[0][gone], torch.zeros(int(gone.sum()), dtype=F64))
        assert torch.equal(grads[2][score_gone], torch.zeros(int(score_gone.sum()), dtype=F64))
        return [y, y2, *grads]

    clean = run(0.0)
    for poison in (NAN, INF, -INF):
        for a, b in zip(run(poison), clean, strict=True):
            assert torch.equal(a, b)


def test_nan_in_a_valid_position_is_not_hidden() -> None:
    x = randn(2, 3, 4)
    x[0, 1, 2] = NAN
    y = reference.attention_cluster(x, randn(2, 4))
    assert y[0].isnan().any()
    assert not y[1].isnan().any()


def test_empty_set_gives_the_direction_of_beta() -> None:
    x = randn(2, 3, 4)
    lengths = torch.tensor([0, 3])
    alpha, beta = tensor([1.0, 2.0]), tensor([-0.5, 0.0])
    weight = randn(2, 4).requires_grad_()
    assert torch.equal(
        reference.attention_cluster(x, weight, lengths=lengths)[0], torch.zeros(2, 4, dtype=F64)
    )
    y = reference.attention_cluster(x, weight, alpha, beta, lengths=lengths)
    torch.testing.assert_close(y[0, 0], torch.full((4,), -1 / (2 * math.sqrt(2)), dtype=F64))
    assert torch.equal(y[0, 1], torch.zeros(4, dtype=F64))
    (gradient,) = torch.autograd.grad(y[0, 0].sum(), weight)
    assert torch.equal(gradient, torch.zeros_like(weight))


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4)])
def test_no_sets_and_no_positions(shape: tuple[int, ...]) -> None:
    x, weight = randn(*shape).requires_grad_(), randn(2, 4).requires_grad_()
    y = reference.attention_cluster(x, weight, randn(2), randn(2))
    assert y.shape == (shape[0], 2, 4)
    assert y.isfinite().all()
    grads = torch.autograd.grad(y.sum(), (x, weight), allow_unused=True, materialize_grads=True)
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("offsets", [[0], [0, 0, 0]])
def test_packed_without_rows(offsets: list[int]) -> None:
    y = reference.attention_cluster(randn(0, 4), randn(2, 4), offsets=torch.tensor(offsets))
    assert torch.equal(y, torch.zeros(len(offsets) - 1, 2, 4, dtype=F64))


def test_linear_region() -> None:
    # ||u|| = 5e-4 < eps: y = u / (sqrt N eps), and the gradient is that of this map, at u = 0 too.
    eps = 1e-3
    for x in (tensor([[[3e-4, 4e-4]]]), torch.zeros(1, 1, 2, dtype=F64)):
        x.requires_grad_()
        y = reference.attention_cluster(x, None, tensor([1.0]), tensor([0.0]), eps=eps)
        torch.testing.assert_close(y, x / eps)
        (gradient,) = torch.autograd.grad(y[0, 0, 0], x)
        torch.testing.assert_close(gradient, tensor([[[1 / eps, 0.0]]]))


def test_eps_does_not_vanish_in_half_precision() -> None:
    x = torch.zeros(1, 2, 4, dtype=torch.float16, requires_grad=True)
    y = reference.attention_cluster(x, None, torch.ones(1), torch.zeros(1))
    assert torch.equal(y, torch.zeros(1, 1, 4, dtype=torch.float16))


def test_large_scores_do_not_overflow() -> None:
    scores = tensor([[[1e4, 1e4 - math.log(3), -1e4]]])
    x = tensor([[[4.0], [8.0], [1000.0]]])
    torch.testing.assert_close(reference.attention_pool(x, scores), tensor([[[5.0]]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_rounded_once(dtype: torch.dtype) -> None:
    x, weight = torch.randn(2, 9, 16).to(dtype), torch.randn(3, 16).to(dtype)
    alpha, beta = torch.randn(3), torch.randn(3)
    got = reference.attention_cluster(x, weight, alpha, beta)
    assert got.dtype == dtype
    assert torch.equal(got, reference.attention_cluster(x.float(), weight.float(), alpha, beta).to(dtype))


# Derivatives


@pytest.mark.parametrize("layout", ["padded", "lengths", "mask", "packed"])
@pytest.mark.parametrize("weighting", ["fc1", "scores", "average", "fc2", "gated"])
def test_first_and_second_derivatives(weighting: str, layout: str) -> None:
    n, m, h = 2, 3, 2
    x = randn(*((5, m) if layout == "packed" else (2, 3, m)))
    layouts = {
        "padded": {},
        "lengths": {"lengths": torch.tensor([2, 0])},
        "mask": {"mask": torch.tensor([[True, False, True], [False, True, True]])},
        "packed": {"offsets": torch.tensor([0, 1, 1, 4])},
    }
    scores_shape = (n, 5) if layout == "packed" else (2, n, 3)
    extra = {
        "fc1": [randn(n, m), randn(n, 4)],
        "scores": [randn(*scores_shape)],
        "average": [],
        "fc2": [randn(n, h, m), randn(n, h), randn(n, h)],
        "gated": [randn(h, m), randn(h, m), randn(n, h)],
    }[weighting]

    def call(x: Tensor, alpha: Tensor, beta: Tensor, *extra: Tensor) -> Tensor:
        kwargs = layouts[layout]
        if weighting == "fc1":
            return reference.attention_cluster(x, extra[0], alpha, beta, position_bias=extra[1], **kwargs)
        if weighting == "average":
            return reference.attention_cluster(x, None, alpha, beta, **kwargs)
        makers = {"fc2": reference.fc2_scores, "gated": reference.gated_scores}
        scores = makers[weighting](x, *extra) if weighting in makers else extra[0]
        return reference.attention_pool(x, scores, alpha, beta, **kwargs)

    leaves = [t.requires_grad_() for t in (x, randn(n), randn(n), *extra)]
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


def test_compiles_whole_and_twice_at_most() -> None:
    graphs = 0

    def count(module: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        nonlocal graphs
        graphs += 1
        return module

    def run(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        return reference.attention_cluster(x, weight, offsets=offsets)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend=count)
    weight = randn(3, 4)
    for rows in (4, 5, 9, 23):
        x, offsets = randn(rows, 4), torch.tensor([0, 2, rows - 1])
        torch.testing.assert_close(compiled(x, weight, offsets), run(x, weight, offsets))
    assert graphs <= 2


def test_takes_no_other_backend() -> None:
    with pytest.raises(ValueError, match='backend must be None or "reference"'):
        reference.attention_cluster(randn(1, 2, 3), None, backend="cpu")
