"""`fastac.models.classifier`: the multimodal classifier against its clusters called by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from classifier_helpers import (
    LAYOUTS,
    MISSING,
    MODALITIES,
    NAN,
    SIZES,
    C,
    Videos,
    arranged,
    make,
    make_videos,
)
from torch import Tensor

import fastac
from fastac.data.batch import FeatureBatch
from fastac.models import classifier as classifier_module
from fastac.models.classifier import AttentionClusterClassifier, ClusterConfig

each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def by_hand(model: AttentionClusterClassifier, videos: Videos, number: int) -> Tensor:
    """The scores (C,) of one video, its missing modalities given as their means."""
    parts = []
    for name, sets in videos.items():
        x = sets[number] if len(sets[number]) else model.get_buffer(f"mean_{name}")[None]
        parts.append(model.clusters[name](x[None])[0])
    return F.linear(torch.cat(parts), model.fc.weight, model.fc.bias)


def all_by_hand(model: AttentionClusterClassifier, videos: Videos) -> Tensor:
    return torch.stack([by_hand(model, videos, i) for i in range(len(next(iter(videos.values()))))])


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# Numbers


def test_numbers_worked_out_on_paper() -> None:
    """Two clusters of one unit: the mean (2, 4), and the normalised mean (0.6, 0.8)."""
    model = AttentionClusterClassifier(
        {
            "a": ClusterConfig(2, 1, "average", shift=False),
            "b": ClusterConfig(2, 1, "average"),
        },
        2,
    ).eval()
    with torch.no_grad():
        model.clusters["b"].alpha.fill_(2)
        model.clusters["b"].beta.fill_(0)
        model.fc.weight.copy_(torch.tensor([[1.0, 0, 10, 0], [0, 1, 0, 10]]))
        model.fc.bias.copy_(torch.tensor([0.0, 100]))
    features = {"a": torch.tensor([[[1.0, 3], [3, 5]]]), "b": torch.tensor([[[2.0, 5], [4, 3]]])}
    torch.testing.assert_close(model(features), torch.tensor([[8.0, 112.0]]))
    model.set_means({"b": torch.tensor([-8.0, 6.0])})
    torch.testing.assert_close(model({"a": features["a"]}), torch.tensor([[-6.0, 110.0]]))


def test_dense_sets_of_one_length() -> None:
    model = make(means=False)
    videos = make_videos(model, dict.fromkeys(MODALITIES, (5, 5)))
    features = {name: torch.stack(sets) for name, sets in videos.items()}
    torch.testing.assert_close(model(features), all_by_hand(model, videos))


@each_layout
def test_sets_of_many_lengths(layout: str) -> None:
    model = make(means=False)
    videos = make_videos(model, SIZES)
    torch.testing.assert_close(model(**arranged(videos, layout)), all_by_hand(model, videos))


@each_layout
@pytest.mark.parametrize("backend", ["reference", None])
def test_a_missing_modality_is_its_mean(layout: str, backend: str | None) -> None:
    model = make()
    videos = make_videos(model, MISSING)
    with nullcontext() if backend is None else fastac.backend(backend):
        scores = model(**arranged(videos, layout))
    torch.testing.assert_close(scores, all_by_hand(model, videos))


def test_a_modality_may_be_missing_from_all_videos() -> None:
    model = make()
    videos = make_videos(model, {**SIZES, "flow": (0, 0, 0, 0)})
    arguments = arranged(videos, "packed")
    expected = all_by_hand(model, videos)
    torch.testing.assert_close(model(**arguments), expected)
    for given in arguments.values():
        del given["flow"]
    torch.testing.assert_close(model(**arguments), expected)
    arguments["features"]["flow"] = torch.empty(4, 0, 5, dtype=torch.float64)  # L = 0
    torch.testing.assert_close(model(**arguments), expected)


def test_layouts_may_be_mixed() -> None:
    model = make()
    videos = make_videos(model, MISSING)
    dense, packed, nested = (arranged(videos, layout) for layout in LAYOUTS)
    scores = model(
        {
            "audio": nested["features"]["audio"],
            "flow": packed["features"]["flow"],
            "rgb": dense["features"]["rgb"],
        },
        lengths={"rgb": dense["lengths"]["rgb"].int()},
        offsets={"flow": packed["offsets"]["flow"].int()},
        max_length={"flow": 5},
    )
    torch.testing.assert_close(scores, all_by_hand(model, videos))


def test_takes_a_feature_batch() -> None:
    model = make()
    videos = make_videos(model, MISSING)
    packed = arranged(videos, "packed")
    longest = {name: max(sizes) for name, sizes in MISSING.items()}
    batch = FeatureBatch(
        packed["features"], None, torch.arange(4), offsets=packed["offsets"], max_length=longest
    )
    torch.testing.assert_close(model(**batch.inputs()), all_by_hand(model, videos))


def test_a_bound_of_packed_lengths_reaches_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU it goes unused. Where a tensor says it is on a GPU the operator gets it."""
    model = make()
    videos = make_videos(model, MISSING)
    packed = arranged(videos, "packed")
    bounds = []
    whole = fastac.functional._run

    def run(*arguments: Any) -> Tensor:
        _, offsets, bound = fastac.functional.unnest(arguments[0], *arguments[6:10])
        if offsets is not None:
            bounds.append(bound)
        return whole(*arguments)

    monkeypatch.setattr(fastac.functional, "_run", run)
    for on_gpu, expected in ((False, [None]), (True, [9])):
        monkeypatch.setattr(torch.Tensor, "is_cuda", on_gpu, raising=False)
        bounds.clear()
        scores = model(**packed, max_length={"rgb": 9})
        assert bounds[:1] == expected
        torch.testing.assert_close(scores, all_by_hand(model, videos))


def test_one_modality_needs_no_names() -> None:
    model = make(modalities={"rgb": ClusterConfig(8, 1)})
    videos = make_videos(model, {"rgb": (3, 0, 1)})
    expected = all_by_hand(model, videos)
    for layout in LAYOUTS:
        named = arranged(videos, layout)
        bare = {what: given["rgb"] for what, given in named.items()}
        torch.testing.assert_close(model(**named), expected)
        torch.testing.assert_close(model(**bare), expected)
        if layout == "packed":
            torch.testing.assert_close(model(**bare, max_length=3), expected)


@each_layout
def test_empty_batch(layout: str) -> None:
    model = make()
    if layout == "dense":
        features = {n: torch.empty(0, 3, c.in_features).double() for n, c in model.modalities.items()}
        arguments: dict[str, Any] = {"features": features, "lengths": {"rgb": torch.empty(0).long()}}
    else:
        features = {n: torch.empty(0, c.in_features).double() for n, c in model.modalities.items()}
        arguments = {"features": features, "offsets": dict.fromkeys(features, torch.zeros(1).long())}
    del features["audio"]
    if layout != "dense":
        del arguments["offsets"]["audio"]
    if layout == "nested":
        offsets = arguments.pop("offsets")
        arguments["features"] = {
            n: torch.nested.nested_tensor_from_jagged(x, offsets[n]) for n, x in features.items()
        }
    scores = model(**arguments)
    assert scores.shape == (0, C)
    assert model.losses(scores, torch.empty(0, dtype=torch.int64)).shape == (0,)


def test_clusters_run_once_unless_something_is_missing() -> None:
    model = make()
    calls: list[str] = []
    for name, cluster in model.clusters.items():
        cluster.register_forward_hook(lambda *_, name=name: calls.append(name))
    model({name: torch.randn(2, 3, c.in_features).double() for name, c in model.modalities.items()})
    assert calls == ["rgb", "flow", "audio"]
    calls.clear()
    model(**arranged(make_videos(model, SIZES), "packed"))
    assert calls == ["rgb", "flow", "audio"]
    calls.clear()
    model(**arranged(make_videos(model, {**SIZES, "flow": (3, 0, 1, 5)}), "packed"))
    assert calls == ["rgb", "flow", "flow", "audio"]


def test_dropout_is_before_the_last_layer() -> None:
    model = make(dropout=0.75).train()
    videos = make_videos(model, MISSING)
    kept = torch.cat([torch.ones(3 * 8 + 2 * 5 + 4, dtype=torch.float64)[None]] * 4)
    model.fc = torch.nn.Identity()  # type: ignore[assignment]
    model.fc.weight = model.get_buffer("mean_rgb")  # says the dtype
    dropped = model(**arranged(videos, "packed"))
    model.eval()
    whole = model(**arranged(videos, "packed"))
    assert dropped.shape == kept.shape
    is_kept = dropped != 0
    torch.testing.assert_close(dropped[is_kept], 4 * whole[is_kept])
    assert 0.1 < is_kept.double().mean() < 0.4


# Unknown means


@each_layout
def test_a_missing_modality_without_mean_is_an_error(layout: str) -> None:
    model = make(means=False)
    model.set_means({"rgb": torch.zeros(8), "audio": torch.zeros(4)})
    arguments = arranged(make_videos(model, MISSING), layout)
    with pytest.raises(ValueError, match=r"modality 'flow' is missing .* set_means"):
        model(**arguments)
    for given in arguments.values():
        del given["flow"]
    with pytest.raises(ValueError, match=r"modality 'flow' is missing .* set_means"):
        model(**arguments)


def test_where_values_are_not_read_an_unknown_mean_gives_nan(fresh_dynamo: None) -> None:
    """And in the scores of those videos alone; a gradient of the others reaches the clusters as ever."""
    model = make(means=False)
    model.set_means({"flow": torch.randn(5)})
    videos = make_videos(model, {**SIZES, "rgb": (4, 0, 6, 2)})
    arguments = arranged(videos, "packed")
    scores = torch.compile(model, fullgraph=True, backend="aot_eager")(**arguments)
    assert scores.isnan().all(1).tolist() == [False, True, False, False]
    present = [0, 2, 3]
    expected = all_by_hand(model, {name: [sets[i] for i in present] for name, sets in videos.items()})
    torch.testing.assert_close(scores[present], expected)
    parameters = list(model.clusters.parameters())
    found = torch.autograd.grad(scores[present].sum(), parameters)
    for g, e in zip(found, torch.autograd.grad(expected.sum(), parameters), strict=True):
        torch.testing.assert_close(g, e)


def test_set_means() -> None:
    model = make(means=False, dtype=torch.float32)
    assert model.means_known.tolist() == [False, False, False]
    mean = torch.randn(4, dtype=torch.float64, requires_grad=True)
    model.set_means({"audio": mean})
    assert model.means_known.tolist() == [False, False, True]
    assert torch.equal(model.mean_audio, mean.detach().float())
    assert not model.mean_audio.requires_grad
    assert not model.mean_rgb.any()


@pytest.mark.parametrize(
    ("means", "error", "message"),
    [
        ([], TypeError, "means must be a mapping"),
        ({"smell": torch.zeros(4)}, ValueError, "means has unknown 'smell'; known are rgb, flow, audio"),
        ({"flow": [0.0] * 5}, TypeError, r"means\['flow'\] must be a torch.Tensor, got list"),
        ({"flow": torch.zeros(5).long()}, TypeError, r"means\['flow'\] must be a floating type"),
        (
            {"flow": torch.zeros(4)},
            ValueError,
            r"means\['flow'\] must have shape \(M,\) with M = 5, got \(4,\)",
        ),
        ({"flow": torch.tensor([0, 1, NAN, 0, 0])}, ValueError, r"means\['flow'\] must be finite"),
    ],
)
def test_bad_means_set_nothing(means: Any, error: type[Exception], message: str) -> None:
    model = make(means=False)
    with pytest.raises(error, match=message):
        model.set_means({"rgb": torch.ones(8), **means} if isinstance(means, dict) else means)
    assert not model.means_known.any()
    assert not model.mean_rgb.any()


# Gradients


@pytest.mark.parametrize("backend", ["reference", None])
def test_gradcheck_with_missing_modalities(backend: str | None) -> None:
    model = make()
    with torch.no_grad():
        for name in ("rgb", "audio"):  # away from the corner where u = alpha z + beta is 0
            model.clusters[name].beta.add_(1)
    videos = make_videos(model, MISSING)
    packed = arranged(videos, "packed")
    offsets = packed["offsets"]
    names = [*packed["features"], *(name for name, _ in model.named_parameters())]
    tensors = [x.nan_to_num(0.0) for x in packed["features"].values()]
    tensors += [p.detach() for p in model.parameters()]
    labels = torch.tensor([0, 5, 2, 1])

    def loss(*leaves: Tensor) -> Tensor:
        given = dict(zip(names, leaves, strict=True))
        features = {name: given.pop(name) for name in MODALITIES}
        scores = torch.func.functional_call(model, given, (features,), {"offsets": offsets})
        return model.losses(scores, labels)

    with nullcontext() if backend is None else fastac.backend(backend):
        assert torch.autograd.gradcheck(loss, [t.clone().requires_grad_() for t in tensors], fast_mode=True)


@each_layout
def test_gradients_flow_through_the_mean(layout: str) -> None:
    model = make()
    videos = make_videos(model, MISSING)
    weights = torch.randn(4, C, dtype=torch.float64)
    (model(**arranged(videos, layout)) * weights).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    (all_by_hand(model, videos) * weights).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, msg=lambda text, name=name: f"{name}: {text}")

    model.zero_grad()
    model({"rgb": torch.stack([videos["rgb"][0]])}).sum().backward()  # no set of audio at all
    assert model.clusters["audio"].beta.grad.abs().max() > 0
    assert model.mean_audio.grad is None


# Weights


@each_layout
def test_attention(layout: str) -> None:
    model = make(means=False)
    videos = make_videos(model, MISSING)
    arguments = arranged(videos, layout)
    for given in arguments.values():
        del given["flow"]
    found = model.attention(**arguments)
    assert list(found) == ["rgb", "audio"]
    for name, weights in found.items():
        start = 0
        for number, s in enumerate(videos[name]):
            _, expected = model.clusters[name](s[None], return_weights=True)
            if layout == "dense":
                one = weights[number, :, : len(s)]
                assert not weights[number, :, len(s) :].any()
            else:
                one = weights[:, start : start + len(s)]
                start += len(s)
            torch.testing.assert_close(one, expected[0])
    bare = make(modalities={"rgb": ClusterConfig(8, 3)})
    assert bare.attention(torch.randn(2, 5, 8).double())["rgb"].shape == (2, 3, 5)


# Autocast and compilation


@each_layout
def test_autocast(layout: str) -> None:
    model = make(dtype=torch.float32)
    arguments = arranged(make_videos(model, MISSING), layout)
    arguments["features"] = {name: x.float() for name, x in arguments["features"].items()}
    exact = model(**arguments)
    with torch.autocast("cpu", torch.bfloat16):
        scores = model(**arguments)
        losses = model.losses(scores, torch.tensor([0, 1, 2, 3]))
        again = model(
            **{**arguments, "features": {n: x.bfloat16() for n, x in arguments["features"].items()}}
        )
    assert scores.dtype == torch.bfloat16
    assert losses.dtype == torch.float32
    assert torch.equal(scores, again)
    assert 0 < (scores - exact).abs().max() < 0.03 * exact.abs().max()
    losses.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_compiled_training_step(fresh_dynamo: None, layout: str) -> None:
    """One graph, the same numbers, and at most two compilations for all sizes."""
    from torch._dynamo.testing import CompileCounterWithBackend

    model = make()
    counter = CompileCounterWithBackend("aot_eager")
    fast = torch.compile(model, fullgraph=True, backend=counter)
    weights = torch.randn(4, C, dtype=torch.float64)
    for sizes in (MISSING, SIZES, {"rgb": (3, 3, 0, 1), "flow": (0, 1, 0, 2), "audio": (0, 0, 5, 6)}):
        videos = make_videos(model, sizes)
        arguments = arranged(videos, layout)
        results = []
        for call in (fast, model):
            scores = call(**arguments)
            results.append([scores, *torch.autograd.grad((scores * weights).sum(), list(model.parameters()))])
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected)
    assert 1 <= counter.frame_count <= 2


def test_inductor(fresh_dynamo: None) -> None:
    model = make(modalities={"rgb": ClusterConfig(8, 3), "audio": ClusterConfig(4, 2)})
    fast = torch.compile(model, fullgraph=True)
    videos = make_videos(model, MISSING)
    with torch.no_grad():
        torch.testing.assert_close(fast(**arranged(videos, "packed")), all_by_hand(model, videos))


def test_compiled_with_a_bound(fresh_dynamo: None) -> None:
    """The nested tensor that carries a bound on GPUs is made within the graph."""
    model = make()
    videos = make_videos(model, SIZES)
    packed = arranged(videos, "packed")

    def bounded(x: Tensor, offsets: Tensor, bound: int) -> Tensor:
        return model.clusters["rgb"](classifier_module._bounded(x, offsets, bound))

    x, offsets = packed["features"]["rgb"], packed["offsets"]["rgb"]
    found = torch.compile(bounded, fullgraph=True, backend="aot_eager")(x, offsets, 6)
    torch.testing.assert_close(found, model.clusters["rgb"](x, offsets=offsets))
