"""`fastac.AttentionCluster`: parameters, state, inputs, weights, gradients."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import fastac
from fastac import AttentionCluster, reference

M, N, L = 8, 3, 5
WEIGHTINGS: dict[str, dict[str, Any]] = {
    "fc1": {"weighting": "fc1"},
    "fc1 bias": {"weighting": "fc1", "position_bias": 7},
    "fc2": {"weighting": "fc2", "hidden_features": 4},
    "fc2 shared": {"weighting": "fc2", "shared_hidden": True},
    "fc2 bias": {"weighting": "fc2", "position_bias": 7},
    "gated": {"weighting": "gated", "hidden_features": 6, "position_bias": 7},
    "average": {"weighting": "average"},
}
each_weighting = pytest.mark.parametrize("kwargs", WEIGHTINGS.values(), ids=list(WEIGHTINGS))
each_shift = pytest.mark.parametrize("shift", [True, False], ids=["shift", "no shift"])


def make(kwargs: dict[str, Any], **more: Any) -> AttentionCluster:
    module = AttentionCluster(M, N, **{"dtype": torch.float64, **kwargs, **more})
    if module.position_bias is not None:
        torch.nn.init.normal_(module.position_bias)
    return module


def features(*shape: int) -> Tensor:
    return torch.randn(*(shape or (4, L, M)), dtype=torch.float64)


def expected(module: AttentionCluster, x: Tensor) -> tuple[Tensor, Tensor]:
    """Y (B, N * M) and the weights of a padded x without mask, step by step from the module's parameters."""
    if module.weighting == "fc1":
        scores = reference.fc1_scores(x, module.weight)
    elif module.weighting == "fc2":
        scores = reference.fc2_scores(x, module.hidden_weight, module.hidden_bias, module.score_weight)
    elif module.weighting == "gated":
        scores = reference.gated_scores(x, module.tanh_weight, module.gate_weight, module.score_weight)
    else:
        scores = x.new_zeros(x.size(0), N, x.size(1))
    if module.position_bias is not None:
        scores = scores + module.position_bias[:, : x.size(1)]
    weights = scores.softmax(-1)
    y = weights @ x
    if module.shift:
        u = module.alpha[:, None] * y + module.beta[:, None]
        y = u / (math.sqrt(N) * torch.linalg.vector_norm(u, dim=-1, keepdim=True))
    return y.flatten(1), weights


# What it computes


@each_weighting
@each_shift
def test_output_and_weights(kwargs: dict[str, Any], shift: bool) -> None:
    module, x = make(kwargs, shift=shift), features()
    y, weights = expected(module, x)
    torch.testing.assert_close(module(x), y)
    got, got_weights = module(x, return_weights=True)
    torch.testing.assert_close(got, y)
    torch.testing.assert_close(got_weights, weights)


@each_weighting
def test_every_layout_agrees(kwargs: dict[str, Any]) -> None:
    module, x = make(kwargs), features()
    counts = [5, 0, 2, 3]
    lengths = torch.tensor(counts)
    mask = torch.arange(L) < lengths[:, None]
    offsets = torch.tensor([0, *counts]).cumsum(0)
    packed = torch.cat([x[mask], features(2, M)])
    y, weights = module(x, lengths=lengths, return_weights=True)
    torch.testing.assert_close(module(x, lengths=lengths), y)
    assert torch.equal(weights == 0, ~mask[:, None].expand(4, N, L))

    torch.testing.assert_close(module(x, mask=mask), y)
    got, got_weights = module(x, mask=mask, return_weights=True)
    torch.testing.assert_close((got, got_weights), (y, weights))

    columns = torch.cat([weights.transpose(1, 2)[mask].T, torch.zeros(N, 2, dtype=x.dtype)], 1)
    torch.testing.assert_close(module(packed, offsets=offsets), y)
    got, got_weights = module(packed, offsets=offsets.int(), return_weights=True)
    torch.testing.assert_close((got, got_weights), (y, columns))

    nested = torch.nested.nested_tensor([x[b, :c] for b, c in enumerate(counts)], layout=torch.jagged)
    torch.testing.assert_close(module(nested), y)
    got, got_weights = module(nested, return_weights=True)
    torch.testing.assert_close((got, got_weights), (y, columns[:, :-2]))


def test_nested_input_gets_its_gradient() -> None:
    module = make({"weighting": "fc2"})
    parts = [features(2, M).requires_grad_(), features(3, M).requires_grad_()]
    nested = torch.nested.as_nested_tensor(parts, layout=torch.jagged)
    out = features(2, N * M)
    got = torch.autograd.grad((module(nested) * out).sum(), parts)
    wanted = torch.autograd.grad(
        sum((module(p[None]) * o).sum() for p, o in zip(parts, out, strict=True)), parts
    )
    torch.testing.assert_close(got, wanted)


@each_weighting
@pytest.mark.parametrize("layout", ["lengths", "mask", "packed"])
def test_excluded_nan_poisons_no_gradient(kwargs: dict[str, Any], layout: str) -> None:
    module = make(kwargs)
    x, mask = features(), torch.arange(L) < torch.tensor([5, 0, 2, 3])[:, None]
    layouts: dict[str, dict[str, Tensor]] = {"lengths": {"lengths": mask.sum(1)}, "mask": {"mask": mask}}
    if layout == "packed":
        x, mask = features(9, M), torch.arange(9) < 7
        layouts["packed"] = {"offsets": torch.tensor([0, 3, 3, 7])}

    def run(poison: float, return_weights: bool) -> list[Tensor]:
        leaf = torch.where(mask[..., None], x, poison).requires_grad_()
        y, weights = module(leaf, **layouts[layout], return_weights=True)
        if not return_weights:
            y, weights = module(leaf, **layouts[layout]), weights.detach()
        leaves = [leaf, *module.parameters()]
        loss = y.sin().sum() + (weights.square().sum() if return_weights else 0)
        grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        assert torch.equal(grads[0][~mask], torch.zeros_like(grads[0][~mask]))
        return [y, weights, *grads]

    for return_weights in (False, True):
        clean = run(0.0, return_weights)
        for poison in (math.nan, math.inf):
            for got, wanted in zip(run(poison, return_weights), clean, strict=True):
                assert got.isfinite().all()
                torch.testing.assert_close(got, wanted, rtol=0, atol=0)


@each_weighting
@each_shift
def test_every_gradient_is_present(kwargs: dict[str, Any], shift: bool) -> None:
    module, x = make(kwargs, shift=shift), features().requires_grad_()
    y = module(x)
    y.backward(torch.randn_like(y))
    for name, tensor in [("x", x), *module.named_parameters()]:
        assert tensor.grad is not None, name
        assert tensor.grad.shape == tensor.shape
        assert tensor.grad.abs().max() > 0, name


@each_weighting
def test_derivatives(kwargs: dict[str, Any]) -> None:
    module = make({**kwargs, **({"hidden_features": 2} if kwargs["weighting"] in ("fc2", "gated") else {})})
    x = features(2, 3, M).requires_grad_()
    names = [name for name, _ in module.named_parameters()]

    def call(x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        y, weights = torch.func.functional_call(
            module, dict(zip(names, parameters, strict=True)), (x,), {"return_weights": True}
        )
        return y, weights

    parameters = [p.detach().clone().requires_grad_() for p in module.parameters()]
    assert torch.autograd.gradcheck(call, (x, *parameters), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (x, *parameters), fast_mode=True)


def test_weights_are_differentiable() -> None:
    module, x = make({"weighting": "fc1"}), features().requires_grad_()
    _, weights = module(x, return_weights=True)
    (gradient,) = torch.autograd.grad(weights[:, :, 0].sum(), x)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@each_weighting
def test_dtypes(kwargs: dict[str, Any], dtype: torch.dtype) -> None:
    module = make(kwargs, dtype=dtype)
    x = torch.randn(2, L, M, dtype=dtype)
    y, weights = module(x, return_weights=True)
    assert y.dtype == weights.dtype == dtype
    wanted, _ = expected(copy.deepcopy(module).double(), x.double())
    torch.testing.assert_close(module(x).double(), wanted, rtol=0, atol=20 * torch.finfo(dtype).eps)
    torch.testing.assert_close(y.double(), wanted, rtol=0, atol=20 * torch.finfo(dtype).eps)


@each_weighting
def test_autocast(kwargs: dict[str, Any]) -> None:
    module, x = make(kwargs, dtype=torch.float32), torch.randn(2, L, M, requires_grad=True)
    plain = module(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(x)
        also, weights = module(x, lengths=torch.tensor([L, L]), return_weights=True)
    assert y.dtype == also.dtype == weights.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), plain, rtol=0, atol=0.03)
    torch.testing.assert_close(also.float(), plain, rtol=0, atol=0.03)
    (y.sum() + also.sum() + weights.square().sum()).backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.parameters())


@pytest.mark.parametrize("name", ["fc1 bias", "fc2", "average"])
def test_compiles_whole(name: str) -> None:
    module = make(WEIGHTINGS[name])
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for length, return_weights in ((3, True), (5, True), (5, False)):
        x, lengths = features(2, length, M), torch.tensor([length, 2])
        got = compiled(x, lengths=lengths, return_weights=return_weights)
        torch.testing.assert_close(got, module(x, lengths=lengths, return_weights=return_weights))


def test_without_sets() -> None:
    for kwargs in WEIGHTINGS.values():
        module = make(kwargs)
        assert module(features(0, L, M)).shape == (0, N * M)
        assert module(features(2, 0, M)).shape == (2, N * M)
        y, weights = module(features(0, M), offsets=torch.tensor([0]), return_weights=True)
        assert (y.shape, weights.shape) == ((0, N * M), (N, 0))


# Parameters and state

STATE = {
    "fc1": {"weight": (N, M)},
    "fc1 bias": {"weight": (N, M), "position_bias": (N, 7)},
    "fc2": {"hidden_weight": (N, 4, M), "hidden_bias": (N, 4), "score_weight": (N, 4)},
    "fc2 shared": {"hidden_weight": (10, M), "hidden_bias": (10,), "score_weight": (N, 10)},
    "fc2 bias": {
        "hidden_weight": (N, 10, M),
        "hidden_bias": (N, 10),
        "score_weight": (N, 10),
        "position_bias": (N, 7),
    },
    "gated": {"tanh_weight": (6, M), "gate_weight": (6, M), "score_weight": (N, 6), "position_bias": (N, 7)},
    "average": {},
}


@pytest.mark.parametrize("name", STATE)
@each_shift
def test_state_dict_is_stable(name: str, shift: bool) -> None:
    shapes = STATE[name] | ({"alpha": (N,), "beta": (N,)} if shift else {})
    state = make(WEIGHTINGS[name], shift=shift).state_dict()
    assert {k: tuple(v.shape) for k, v in state.items()} == shapes


def test_default_hidden_features() -> None:
    assert AttentionCluster(M, N, weighting="fc2").hidden_features == 10
    assert AttentionCluster(M, N, weighting="gated").hidden_features == 128
    assert AttentionCluster(M, N).hidden_features is None


@each_weighting
def test_copies(kwargs: dict[str, Any]) -> None:
    module, x = make(kwargs), features()
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    fresh = make(kwargs)
    fresh.load_state_dict(module.state_dict())
    for other in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(buffer, weights_only=False),
        fresh,
    ):
        assert type(other) is AttentionCluster
        assert torch.equal(other(x), module(x))
        assert repr(other) == repr(module)


def test_pickles_into_another_process() -> None:
    assert AttentionCluster.__module__.startswith("fastac")
    assert pickle.loads(pickle.dumps(AttentionCluster)) is fastac.AttentionCluster


def test_scalar_bias_of_a_checkpoint_is_dropped() -> None:
    # A linear layer's checkpoint: its bias is one scalar per unit and cancels in the softmax.
    linear = torch.nn.Linear(M, N, dtype=torch.float64)
    for container, prefix in (
        (make({}, shift=False), ""),
        (torch.nn.Sequential(make({}, shift=False)), "0."),
    ):
        state = {f"{prefix}{k}": v for k, v in linear.state_dict().items()}
        assert not any(container.load_state_dict(state))
        assert f"{prefix}bias" in state
        module = container[0] if prefix else container
        x = features()
        scores = linear(x).transpose(1, 2)
        torch.testing.assert_close(module(x), fastac.attention_pool(x, scores).flatten(1))


def test_other_unexpected_entries_are_still_reported() -> None:
    module = make({})
    for entry in ({"bias": torch.zeros(N + 1)}, {"bias": torch.zeros(N, 7)}, {"other": torch.zeros(N)}):
        with pytest.raises(RuntimeError, match="Unexpected key"):
            module.load_state_dict({**module.state_dict(), **entry})


def test_reset_parameters() -> None:
    torch.manual_seed(0)
    n = 4096
    module = AttentionCluster(64, n, position_bias=5)
    state = module.state_dict()
    for tensor in (state["alpha"], state["beta"]):
        assert float(tensor.std()) == pytest.approx(n**-0.25, rel=0.1)
        assert abs(float(tensor.mean())) < 0.01
    assert float(state["weight"].abs().max()) == pytest.approx(1 / 8, rel=0.01)
    assert float(state["weight"].abs().min()) < 1e-4
    assert torch.equal(module.position_bias, torch.zeros(n, 5))
    before = module.weight.clone()
    module.reset_parameters()
    assert not torch.equal(before, module.weight)

    hidden = AttentionCluster(64, 256, weighting="fc2", hidden_features=16).state_dict()
    assert float(hidden["hidden_weight"].abs().max()) == pytest.approx(1 / 8, rel=0.01)
    assert float(hidden["hidden_bias"].abs().max()) == pytest.approx(1 / 8, rel=0.01)
    assert float(hidden["score_weight"].abs().max()) == pytest.approx(1 / 4, rel=0.01)


def test_device_and_dtype() -> None:
    module = AttentionCluster(M, N, device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in module.parameters())
    module = module.to_empty(device="cpu")
    module.reset_parameters()
    assert module(torch.randn(2, L, M).bfloat16()).isfinite().all()
    assert AttentionCluster(M, N).weight.dtype == torch.get_default_dtype()


def test_extra_repr() -> None:
    assert repr(AttentionCluster(M, N)) == "AttentionCluster(8, 3, weighting='fc1')"
    module = AttentionCluster(
        M, N, weighting="fc2", shared_hidden=True, position_bias=7, shift=False, eps=1e-6
    )
    assert module.extra_repr() == (
        "8, 3, weighting='fc2', hidden_features=10, shared_hidden=True, "
        "position_bias=7, shift=False, eps=1e-06"
    )


# Errors


@pytest.mark.parametrize(
    ("kwargs", "kind", "message"),
    [
        ({"in_features": 0}, ValueError, "in_features must be >= 1, got 0"),
        ({"in_features": 8.0}, TypeError, "in_features must be an int, got float"),
        ({"cluster_size": True}, TypeError, "cluster_size must be an int, got bool"),
        ({"weighting": "fc3"}, ValueError, "weighting must be one of fc1, fc2, gated, average, got 'fc3'"),
        ({"hidden_features": 3}, ValueError, "hidden_features is for weighting fc2 and gated, not fc1"),
        ({"weighting": "fc2", "hidden_features": 0}, ValueError, "hidden_features must be >= 1, got 0"),
        (
            {"weighting": "gated", "shared_hidden": True},
            ValueError,
            "shared_hidden is for weighting fc2, not gated",
        ),
        ({"position_bias": 0}, ValueError, "position_bias must be >= 1, got 0"),
        (
            {"weighting": "average", "position_bias": 3},
            ValueError,
            "position_bias needs scores to be added to; weighting average has none",
        ),
        ({"eps": 0.0}, ValueError, "eps must be finite and > 0, got 0.0"),
        ({"dtype": torch.int32}, TypeError, "dtype must be float16, bfloat16, float32 or float64"),
    ],
)
def test_constructor_errors(kwargs: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as caught:
        AttentionCluster(**{"in_features": M, "cluster_size": N, **kwargs})
    assert str(caught.value).startswith(message)


@each_weighting
@pytest.mark.parametrize("return_weights", [False, True])
def test_input_errors(kwargs: dict[str, Any], return_weights: bool) -> None:
    module = make(kwargs)

    def fails(kind: type[Exception], message: str, x: Any, **call: Any) -> None:
        with pytest.raises(kind) as caught:
            module(x, **call, return_weights=return_weights)
        assert str(caught.value).startswith(message), caught.value

    fails(ValueError, "x must have 8 features in its last dimension, got shape (2, 5, 9)", features(2, 5, 9))
    fails(ValueError, "x must have shape (B, L, M), got (5, 8)", features(5, M))
    fails(TypeError, "x must be a torch.Tensor, got list", [1.0])
    fails(
        ValueError,
        "lengths must lie in 0...L with L = 5, got values in 2...6",
        features(2, L, M),
        lengths=torch.tensor([2, 6]),
    )
    if module.position_bias is not None:
        fails(ValueError, "position_bias must cover every position of x (L = 8)", features(2, 8, M))
        fails(
            ValueError,
            "position_bias must cover every position of x (longest set 8)",
            features(9, M),
            offsets=torch.tensor([0, 8, 9]),
        )
