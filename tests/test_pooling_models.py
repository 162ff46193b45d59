"""`fastac.models.pooling`: the baselines against their formulas in numpy."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.export import Dim, export

import fastac
from fastac.data.batch import FeatureBatch
from fastac.models.pooling import POOLINGS, LearnedQueryPooling, NetVLAD, PoolingClassifier

NAN = float("nan")
M, C, K = 6, 4, 3
SIZES = (4, 7, 1, 5)
EMPTY = (4, 0, 7, 1)
LAYOUTS = ("dense", "packed", "nested")
each_pooling = pytest.mark.parametrize("pooling", POOLINGS)
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(pooling: str, **options: Any) -> PoolingClassifier:
    given = {"dtype": torch.float64, "cluster_size": K, **options}
    return PoolingClassifier(M, C, pooling=pooling, **given).eval()


def make_videos(sizes: tuple[int, ...] = SIZES, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(n, M, dtype=dtype) for n in sizes]


def arranged(videos: list[Tensor], layout: str, other: float = NAN) -> dict[str, Any]:
    """The arguments of a model; ``other`` where no feature is."""
    lengths = torch.tensor([len(v) for v in videos])
    if layout == "dense":
        x = torch.full((len(videos), int(lengths.max()) + 1, M), other, dtype=videos[0].dtype)
        for row, video in zip(x, videos, strict=True):
            row[: len(video)] = video
        return {"features": x, "lengths": lengths}
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    values = torch.cat(videos)
    if layout == "nested":
        return {"features": torch.nested.nested_tensor_from_jagged(values, offsets)}
    return {"features": torch.cat([values, torch.full_like(values[:2], other)]), "offsets": offsets}


# The formulas, in numpy, one sum at a time


def softmax(scores: list[float]) -> np.ndarray:
    e = np.exp(np.array(scores) - max(scores))
    return e / e.sum()


def query_weights(model: PoolingClassifier, x: np.ndarray) -> np.ndarray:
    queries = model.sdpa.queries.detach().numpy()
    return np.stack([softmax([float(q @ row) / M**0.5 for row in x]) for q in queries])


def pooled_by_hand(model: PoolingClassifier, x: np.ndarray) -> np.ndarray:
    if model.pooling == "mean":
        return sum(x) / len(x)
    if model.pooling == "sdpa":
        return np.concatenate(
            [sum(a * row for a, row in zip(w, x, strict=True)) for w in query_weights(model, x)]
        )
    w, b, c = (p.detach().numpy() for p in _netvlad_parameters(model))
    v = np.zeros((K, M))
    for row in x:
        a = softmax([float(w[k] @ row + b[k]) for k in range(K)])
        for k in range(K):
            v[k] += a[k] * (row - c[k])
    v = np.concatenate([row / np.linalg.norm(row) for row in v])
    return v / np.linalg.norm(v)


def _netvlad_parameters(model: PoolingClassifier) -> tuple[Tensor, Tensor, Tensor]:
    return model.netvlad.assignment.weight, model.netvlad.assignment.bias, model.netvlad.centroids


def by_hand(model: PoolingClassifier, video: Tensor) -> np.ndarray:
    """The scores (C,) of one video (n, M); those of an empty one are the bias."""
    bias = model.fc.bias.detach().numpy()
    if not len(video):
        return bias
    return model.fc.weight.detach().numpy() @ pooled_by_hand(model, video.numpy()) + bias


def all_by_hand(model: PoolingClassifier, videos: list[Tensor]) -> Tensor:
    return torch.from_numpy(np.stack([by_hand(model, video) for video in videos]))


@each_pooling
@each_layout
@pytest.mark.parametrize("sizes", [SIZES, EMPTY], ids=["filled", "empty"])
@pytest.mark.parametrize("backend", ["reference", None])
def test_the_formulas(pooling: str, layout: str, sizes: tuple[int, ...], backend: str | None) -> None:
    model = make(pooling)
    videos = make_videos(sizes)
    with nullcontext() if backend is None else fastac.backend(backend):
        scores = model(**arranged(videos, layout))
    torch.testing.assert_close(scores, all_by_hand(model, videos))


@each_pooling
def test_dense_videos_without_lengths(pooling: str) -> None:
    model = make(pooling)
    videos = make_videos((5, 5, 5))
    torch.testing.assert_close(model(torch.stack(videos)), all_by_hand(model, videos))


def test_netvlad_numbers_worked_out_on_paper() -> None:
    """Equal assignments: V = (1, 0) - (0, 0) and (1, 0) - (1, 1), each of norm 1, together sqrt(2)."""
    pool = NetVLAD(2, 2)
    with torch.no_grad():
        pool.assignment.weight.zero_()
        pool.assignment.bias.zero_()
        pool.centroids.copy_(torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    y = pool(torch.tensor([[[2.0, 1.0], [0.0, -1.0]]]))
    torch.testing.assert_close(y, torch.tensor([[1.0, 0.0, 0.0, -1.0]]) / 2**0.5)


def test_query_numbers_worked_out_on_paper() -> None:
    """Scores log(3) and 0 after the scale 1 / sqrt(4): weights 3/4 and 1/4."""
    pool = LearnedQueryPooling(4, 1)
    with torch.no_grad():
        pool.queries.copy_(torch.tensor([[2 * np.log(3.0), 0, 0, 0]]))
    x = torch.tensor([[[1.0, 4, 0, 0], [0, 0, 8, 0]]])
    torch.testing.assert_close(pool.weights(x), torch.tensor([[[0.75, 0.25]]]))
    torch.testing.assert_close(pool(x), torch.tensor([[0.75, 3, 2, 0]]))


@each_pooling
@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_excluded_positions_have_no_influence(pooling: str, layout: str) -> None:
    model = make(pooling)
    videos = make_videos(EMPTY)
    found = []
    for other in (0.0, NAN, float("inf")):
        arguments = arranged(videos, layout, other)
        leaf = arguments.pop("features").requires_grad_()
        model.zero_grad()
        scores = model(leaf, **arguments)
        scores.square().sum().backward()
        found.append((scores, leaf.grad, [p.grad for p in model.parameters()]))
    for one in found[1:]:
        torch.testing.assert_close(one, found[0], rtol=0, atol=0)
    gradient = found[0][1]
    if layout == "dense":
        rows = torch.arange(gradient.size(1)) < torch.tensor(EMPTY)[:, None]
    else:
        rows = torch.arange(len(gradient)) < sum(EMPTY)
    assert not gradient[~rows].any() and gradient[rows].all()


@each_pooling
def test_gradcheck_with_ragged_lengths(pooling: str) -> None:
    model = make(pooling)
    lengths = torch.tensor([4, 2, 0, 1])
    names = [name for name, _ in model.named_parameters()]
    labels = torch.tensor([0, 3, 1, 1])

    def loss(x: Tensor, *parameters: Tensor) -> Tensor:
        given = dict(zip(names, parameters, strict=True))
        return model.losses(torch.func.functional_call(model, given, (x,), {"lengths": lengths}), labels)

    x = torch.randn(4, 5, M, dtype=torch.float64, requires_grad=True)
    leaves = (x, *(p.detach().clone().requires_grad_() for p in model.parameters()))
    assert torch.autograd.gradcheck(loss, leaves)


@each_pooling
@pytest.mark.parametrize("shape", [(0, 3), (0, 0), (2, 0)])
def test_nothing_at_all(pooling: str, shape: tuple[int, int]) -> None:
    model = make(pooling)
    x = torch.zeros(*shape, M, dtype=torch.float64, requires_grad=True)
    scores = model(x)
    assert torch.equal(scores, model.fc.bias.expand(shape[0], -1))
    scores.sum().backward()
    lengths = torch.zeros(shape[0], dtype=torch.int64)
    assert torch.equal(model(x, lengths=lengths), scores)
    offsets = torch.zeros(shape[0] + 1, dtype=torch.int64)
    assert torch.equal(model(x.detach().reshape(-1, M), offsets=offsets), scores)
    if pooling == "sdpa":
        assert model.attention(x)["features"].shape == (shape[0], K, shape[1])


@each_pooling
def test_takes_a_feature_batch_and_names(pooling: str) -> None:
    model = make(pooling, modality="rgb")
    videos = make_videos()
    packed = arranged(videos, "packed")
    batch = FeatureBatch(
        {"rgb": packed["features"]},
        None,
        torch.arange(len(videos)),
        offsets={"rgb": packed["offsets"]},
        max_length={"rgb": 9},
    )
    torch.testing.assert_close(model(**batch.inputs()), all_by_hand(model, videos))
    torch.testing.assert_close(model(**packed, max_length=9), all_by_hand(model, videos))
    assert model.dimensions == {"rgb": M}


def test_a_bound_of_packed_lengths_reaches_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """It spares a GPU the look at the offsets."""
    bounds = []
    whole = fastac.functional.attention_cluster

    def pool(*arguments: Any, max_length: int | None, **options: Any) -> Tensor:
        bounds.append(max_length)
        return whole(*arguments, max_length=max_length, **options)

    monkeypatch.setattr(fastac.functional, "attention_cluster", pool)
    make("mean")(**arranged(make_videos(), "packed"), max_length=9)
    assert bounds == [9]


def test_no_query_attends_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch does not say what its kernels make of a mask that lets nothing through."""
    masks: list[Tensor] = []
    whole = torch.nn.functional.scaled_dot_product_attention

    def attend(*arguments: Tensor, attn_mask: Tensor) -> Tensor:
        masks.append(attn_mask)
        return whole(*arguments, attn_mask=attn_mask)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    make("sdpa")(**arranged(make_videos(EMPTY), "packed"))
    (mask,) = masks
    assert mask.sum(-1).flatten().tolist() == [max(1, n) for n in EMPTY]


@each_layout
def test_attention_of_queries(layout: str) -> None:
    model = make("sdpa")
    videos = make_videos(EMPTY)
    weights = model.attention(**arranged(videos, layout))["features"]
    rows = sum(EMPTY)
    assert weights.shape == {"dense": (4, K, 8), "packed": (K, rows + 2), "nested": (K, rows)}[layout]
    expected = [query_weights(model, v.numpy()) if len(v) else np.zeros((K, 0)) for v in videos]
    if layout == "dense":
        for w, e in zip(weights, expected, strict=True):
            torch.testing.assert_close(w[:, : e.shape[1]], torch.from_numpy(e))
            assert not w[:, e.shape[1] :].any()
    else:
        torch.testing.assert_close(weights[:, :rows], torch.from_numpy(np.concatenate(expected, 1)))
        assert not weights[:, rows:].any()


@pytest.mark.parametrize("pooling", ["mean", "netvlad"])
def test_others_have_no_attention(pooling: str) -> None:
    with pytest.raises(ValueError, match=f"attention needs pooling sdpa, the model has {pooling}"):
        make(pooling).attention(torch.zeros(1, 2, M, dtype=torch.float64))


# Parameters


KEYS: dict[str, dict[str, tuple[int, ...]]] = {
    "mean": {"fc.weight": (C, M), "fc.bias": (C,)},
    "netvlad": {
        "netvlad.centroids": (K, M),
        "netvlad.assignment.weight": (K, M),
        "netvlad.assignment.bias": (K,),
        "fc.weight": (C, K * M),
        "fc.bias": (C,),
    },
    "sdpa": {"sdpa.queries": (K, M), "fc.weight": (C, K * M), "fc.bias": (C,)},
}


@each_pooling
def test_state_dict(pooling: str) -> None:
    model = make(pooling)
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == KEYS[pooling]
    again = make(pooling)
    again.load_state_dict(model.state_dict(), strict=True)
    arguments = arranged(make_videos(), "dense")
    assert torch.equal(again(**arguments), model(**arguments))
    again.reset_parameters()
    state = again.state_dict()
    assert not any(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_parameters_at_first() -> None:
    torch.manual_seed(0)
    model = PoolingClassifier(100, 3, pooling="netvlad", cluster_size=50)
    assert model.netvlad.centroids.std().item() == pytest.approx(0.1, rel=0.05)
    queries = PoolingClassifier(100, 3, pooling="sdpa", cluster_size=50).sdpa.queries
    assert 0.099 < queries.abs().max() <= 0.1


@each_pooling
def test_config(pooling: str) -> None:
    model = make(pooling, dropout=0.25, multi_label=True, modality="rgb")
    config = json.loads(json.dumps(model.config, sort_keys=True))
    again = PoolingClassifier.from_config(config, dtype=torch.float64)
    assert again.config == model.config and repr(again) == repr(model)
    assert f"pooling={pooling!r}" in repr(model)
    again.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, M, dtype=torch.float64)
    assert torch.equal(again.eval()(x), model(x))
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))
    least = PoolingClassifier.from_config({"in_features": M, "num_classes": C})
    assert least.config == PoolingClassifier(M, C, pooling="mean", cluster_size=64, dropout=0.5).config


@each_pooling
def test_dropout_is_before_the_last_layer(pooling: str) -> None:
    model = PoolingClassifier(300, C, pooling=pooling, cluster_size=K, dropout=0.75)
    x = torch.randn(1, 5, 300)
    with torch.no_grad():
        model.fc.weight.fill_(1)
        model.fc.bias.zero_()
    seen: list[Tensor] = []
    model.dropout.register_forward_hook(lambda _, given, out: seen.extend((*given, out)))
    scores = model(x)
    given, kept = seen
    torch.testing.assert_close(scores, kept.sum(1, keepdim=True).expand(1, C), atol=1e-4, rtol=1e-4)
    assert 0.15 < (kept != 0).double().mean() < 0.35
    torch.testing.assert_close(kept[kept != 0], 4 * given[kept != 0])


# Bad input


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"in_features": 0}, ValueError, "in_features must be >= 1, got 0"),
        ({"num_classes": 2.0}, TypeError, "num_classes must be an int, got float"),
        ({"pooling": "max"}, ValueError, "pooling must be one of mean, netvlad, sdpa, got 'max'"),
        ({"cluster_size": 0}, ValueError, "cluster_size must be >= 1, got 0"),
        ({"cluster_size": "8"}, TypeError, "cluster_size must be an int, got str"),
        ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1.0"),
        ({"multi_label": "no"}, TypeError, "multi_label must be a bool, got 'no'"),
        ({"modality": ""}, ValueError, "modality must be the name of the features, got ''"),
        (
            {"dtype": torch.int64},
            TypeError,
            "dtype must be float16, bfloat16, float32 or float64, got torch.i",
        ),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    good: dict[str, Any] = {"in_features": M, "num_classes": C}
    PoolingClassifier(**good)
    with pytest.raises(error, match=message):
        PoolingClassifier(**{**good, **change})


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ([], TypeError, "config must be a mapping, got list"),
        ({"in_features": 3}, ValueError, "config must give num_classes, got in_features"),
        ({"in_features": 3, "num_classes": 2, "heads": 2}, ValueError, "unknown 'heads'"),
    ],
)
def test_bad_config(config: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PoolingClassifier.from_config(config)


X = torch.zeros(2, 3, M)
BAD_INPUT: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "rank": ({"features": X[0]}, ValueError, r"x must have shape \(B, L, M\), got \(3, 6\).*needs offsets"),
    "features": ({"features": X[..., :5]}, ValueError, "x must have 6 features in its last dimension"),
    "dtype": ({"features": X.double()}, TypeError, "must be torch.float32 as the model, got torch.float64"),
    "device": ({"features": X.to("meta")}, ValueError, "must be on the device of the model, cpu, got meta"),
    "modality": ({"features": {"sound": X}}, ValueError, "must be of the modality 'features', got 'sound'"),
    "lengths": ({"features": X, "lengths": torch.tensor([4, 1])}, ValueError, "lengths must lie in 0...L"),
    "offsets": ({"features": X[0], "offsets": torch.tensor([0, 4])}, ValueError, "offsets must end at T = 3"),
}


@each_pooling
@pytest.mark.parametrize(("arguments", "error", "message"), BAD_INPUT.values(), ids=list(BAD_INPUT))
def test_bad_input(pooling: str, arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(pooling, dtype=torch.float32)(**arguments)


# Around it


@each_pooling
@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_autocast(pooling: str, layout: str) -> None:
    model = make(pooling, dtype=torch.float32)
    arguments = arranged(make_videos(EMPTY, torch.float32), layout)
    expected = model(**arguments)
    for dtype in (torch.float32, torch.bfloat16):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            scores = model(**{**arguments, "features": arguments["features"].to(dtype)})
            losses = model.losses(scores, torch.tensor([0, 1, 2, 3]))
        assert scores.dtype == torch.bfloat16 and losses.dtype == torch.float32
        torch.testing.assert_close(scores.float(), expected, atol=0.05, rtol=0.05)
        losses.sum().backward()
        assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


@each_pooling
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(pooling: str, dtype: torch.dtype) -> None:
    """Empty sets too: a small eps must not become 0."""
    model = make(pooling, dtype=torch.float32)
    half = PoolingClassifier.from_config(model.config, dtype=dtype).eval()
    half.load_state_dict(model.state_dict())
    arguments = arranged(make_videos(EMPTY, torch.float32), "dense")
    scores = half(arguments["features"].to(dtype), lengths=arguments["lengths"])
    assert scores.dtype == dtype
    torch.testing.assert_close(scores.float(), model(**arguments), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_netvlad_of_features_near_the_centroids(dtype: torch.dtype) -> None:
    """The residuals of features around 5 are small beside the sums that they are the difference of."""
    torch.manual_seed(0)
    layer = NetVLAD(16, 4)
    with torch.no_grad():
        layer.centroids.normal_(5, 0.1)
        layer.assignment.weight.mul_(0.1)
    x = (5 + 0.3 * torch.randn(3, 300, 16)).to(dtype)
    exact = copy.deepcopy(layer).double()(x.double())
    with torch.autocast("cpu", dtype):
        y = layer(x)
    error = (y.double() - exact).norm() / exact.norm()
    assert error < 0.01
    large = layer.to(dtype)(50 * x)  # sums of 300 such features are beyond float16
    assert large.isfinite().all()


@each_pooling
def test_export(pooling: str) -> None:
    model = make(pooling, dtype=torch.float32)
    varies = {0: Dim("batch"), 1: Dim("length")}
    lengths = torch.tensor([3, 5, 1])
    program = export(
        model,
        (torch.randn(3, 5, M),),
        {"lengths": lengths},
        dynamic_shapes={"features": varies, "lengths": {0: varies[0]}},
    )
    x, counts = torch.randn(5, 7, M), torch.tensor([7, 0, 2, 3, 6])
    torch.testing.assert_close(program.module()(x, lengths=counts), model(x, lengths=counts))


@each_pooling
def test_export_of_packed_sets(pooling: str) -> None:
    model = make(pooling, dtype=torch.float32)
    x, bound = torch.randn(9, M), 6
    arguments = {"offsets": torch.tensor([0, 3, 4, 9]), "max_length": bound}
    program = export(model, (x,), arguments)
    other = {"offsets": torch.tensor([0, 0, 6, 8]), "max_length": bound}
    torch.testing.assert_close(program.module()(x, **other), model(x, **other))
