"""`fastac.models.classifier`: the multimodal classifier against its clusters called by hand."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ruamel.yaml import YAML
from torch import Tensor

import fastac
from fastac.data.batch import FeatureBatch
from fastac.models import classifier as classifier_module
from fastac.models.classifier import AttentionClusterClassifier, ClusterConfig

NAN = float("nan")
C = 6
MODALITIES: dict[str, Any] = {
    "rgb": ClusterConfig(8, 3),
    "flow": {"in_features": 5, "cluster_size": 2, "weighting": "fc2", "hidden_features": 4, "shift": False},
    "audio": ClusterConfig(4, 1, "gated", hidden_features=3, position_bias=7),
}
SIZES = {"rgb": (4, 1, 6, 2), "flow": (3, 3, 1, 5), "audio": (7, 2, 1, 1)}
MISSING = {"rgb": (4, 0, 6, 2), "flow": (0, 0, 1, 5), "audio": (7, 2, 1, 0)}
LAYOUTS = ("dense", "packed", "nested")
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def make(*, means: bool = True, modalities: Any = None, **options: Any) -> AttentionClusterClassifier:
    model = AttentionClusterClassifier(
        MODALITIES if modalities is None else modalities, C, **{"dtype": torch.float64, **options}
    ).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("position_bias"):
            torch.nn.init.normal_(parameter)
    if means:
        model.set_means({name: torch.randn(c.in_features) for name, c in model.modalities.items()})
    return model


Videos = dict[str, list[Tensor]]


def make_videos(model: AttentionClusterClassifier, sizes: dict[str, tuple[int, ...]]) -> Videos:
    """By modality, the set of each video, (length, M)."""
    return {
        name: [torch.randn(n, config.in_features, dtype=torch.float64) for n in sizes[name]]
        for name, config in model.modalities.items()
    }


def arranged(videos: Videos, layout: str) -> dict[str, Any]:
    """The arguments of the model; NaN where no feature is."""
    features: dict[str, Tensor] = {}
    borders: dict[str, Tensor] = {}
    for name, sets in videos.items():
        lengths = torch.tensor([len(s) for s in sets])
        m = sets[0].size(1)
        if layout == "dense":
            x = torch.full((len(sets), int(lengths.max()) + 1, m), NAN, dtype=torch.float64)
            if name == "audio":  # position_bias bounds L
                x = x[:, : int(lengths.max())]
            for row, s in zip(x, sets, strict=True):
                row[: len(s)] = s
            features[name], borders[name] = x, lengths
            continue
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        values = torch.cat([*sets, torch.full((2, m), NAN, dtype=torch.float64)])
        if layout == "nested":
            features[name] = torch.nested.nested_tensor_from_jagged(values[:-2], offsets)
        else:
            features[name], borders[name] = values, offsets
    if layout == "nested":
        return {"features": features}
    return {"features": features, "lengths" if layout == "dense" else "offsets": borders}


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


# Bad input


def good() -> dict[str, Any]:
    return {
        "features": {
            "rgb": torch.randn(2, 3, 8),
            "flow": torch.randn(7, 5),
            "audio": torch.randn(2, 2, 4),
        },
        "lengths": {"rgb": torch.tensor([3, 1])},
        "offsets": {"flow": torch.tensor([0, 3, 7])},
        "max_length": {"flow": 4},
    }


BAD_INPUT: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "bare": (
        {"features": torch.randn(2, 3, 8)},
        TypeError,
        "features must be a mapping from modality .*Tensor",
    ),
    "unknown": (
        {"features": {"smell": torch.ones(1)}},
        ValueError,
        "of the modalities rgb, flow, audio, got 's",
    ),
    "none": (
        {"features": {}, "lengths": None, "offsets": None, "max_length": None},
        ValueError,
        "at least one",
    ),
    "no tensor": (
        {"features": {"rgb": [1.0]}},
        TypeError,
        r"features\['rgb'\] must be a torch.Tensor, got list",
    ),
    "rank": (
        {"features": {"audio": torch.randn(2, 4)}},
        ValueError,
        r"'audio': x must have shape \(B, L, M\)",
    ),
    "in_features": (
        {"features": {"rgb": torch.randn(2, 3, 7)}},
        ValueError,
        "modality 'rgb': x must have 8 f",
    ),
    "dtype": (
        {"features": {"rgb": torch.randn(2, 3, 8).double()}},
        TypeError,
        r"\['rgb'\] must be torch.float32",
    ),
    "integers": (
        {"features": {"rgb": torch.ones(2, 3, 8).long()}},
        TypeError,
        r"\['rgb'\] must be torch.float32",
    ),
    "device": (
        {"features": {"rgb": torch.randn(2, 3, 8, device="meta")}},
        ValueError,
        "device of the model, cpu",
    ),
    "batch": (
        {"features": {"audio": torch.randn(3, 2, 4)}},
        ValueError,
        r"\['audio'\] must have B = 2 sets, as 'r",
    ),
    "packed batch": (
        {"offsets": {"flow": torch.tensor([0, 3])}},
        ValueError,
        r"\['flow'\] must have B = 2 .* 1",
    ),
    "no offsets": ({"offsets": {}}, ValueError, "'flow': x must have shape .* needs offsets"),
    "both": (
        {"lengths": {"flow": torch.ones(2).long()}},
        ValueError,
        "'flow': at most one of lengths, mask and of",
    ),
    "bare lengths": ({"lengths": torch.tensor([3, 1])}, TypeError, "lengths must be a mapping from modality"),
    "unknown lengths": (
        {"lengths": {"smell": torch.tensor([3, 1])}},
        ValueError,
        "lengths must be of the modal",
    ),
    "long": (
        {"lengths": {"rgb": torch.tensor([4, 1])}},
        ValueError,
        "'rgb': lengths must lie in 0...L with L = 3",
    ),
    "falling": ({"offsets": {"flow": torch.tensor([0, 8, 7])}}, ValueError, "'flow': offsets must not fall"),
    "max_length": ({"max_length": {"flow": 4.0}}, TypeError, "max_length must be an int, got float"),
    "position_bias": (
        {"features": {"audio": torch.randn(2, 8, 4)}},
        ValueError,
        "'audio': position_bias must c",
    ),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD_INPUT.values(), ids=list(BAD_INPUT))
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    model = make(dtype=torch.float32)
    arguments = good()
    assert model(**arguments).shape == (2, C)
    for what, new in change.items():
        keep = isinstance(new, dict) and new and isinstance(arguments[what], dict)
        arguments[what] = {**arguments[what], **new} if keep else new
    with pytest.raises(error, match=message):
        model(**arguments)


def test_borders_of_an_absent_modality() -> None:
    model = make(dtype=torch.float32)
    arguments = good()
    del arguments["features"]["flow"]
    with pytest.raises(ValueError, match="offsets must be of modalities in features, got 'flow'"):
        model(**arguments)


BAD_MODELS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "list": ({"modalities": [ClusterConfig(4, 2)]}, TypeError, "modalities must be a mapping"),
    "none": ({"modalities": {}}, ValueError, "at least one entry"),
    "number": ({"modalities": {1: ClusterConfig(4, 2)}}, TypeError, "names of type str, got 1"),
    "dot": ({"modalities": {"a.b": ClusterConfig(4, 2)}}, ValueError, "identifiers as names, got 'a.b'"),
    "empty": ({"modalities": {"": ClusterConfig(4, 2)}}, ValueError, "identifiers as names, got ''"),
    "taken": (
        {"modalities": {"items": ClusterConfig(4, 2)}},
        ValueError,
        "ModuleDict uses itself, got 'items'",
    ),
    "config": (
        {"modalities": {"a": 4}},
        TypeError,
        r"modalities\['a'\] must be a ClusterConfig or a mapping",
    ),
    "unknown": (
        {"modalities": {"a": {"in_features": 4, "cluster_size": 2, "heads": 3}}},
        ValueError,
        r"modalities\['a'\] has unknown 'heads'; known are in_features, cluster_size, weighting, hi",
    ),
    "missing": (
        {"modalities": {"a": {"in_features": 4}}},
        ValueError,
        "must give cluster_size, got in_features",
    ),
    "flag": (
        {"modalities": {"a": {"in_features": 4, "cluster_size": 2, "shift": "false"}}},
        TypeError,
        r"modalities\['a'\]: shift must be a bool, got 'false'",
    ),
    "weighting": (
        {"modalities": {"a": ClusterConfig(4, 2, "fc3")}},
        ValueError,
        r"modalities\['a'\]: weighting must be one of",
    ),
    "size": ({"modalities": {"a": ClusterConfig(4, 0)}}, ValueError, r"\['a'\]: cluster_size must be >= 1"),
    "classes": ({"num_classes": 0}, ValueError, "num_classes must be >= 1, got 0"),
    "bool classes": ({"num_classes": True}, TypeError, "num_classes must be an int, got bool"),
    "dropout": ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1.0"),
    "NaN dropout": ({"dropout": NAN}, ValueError, r"dropout must be in \[0, 1\), got nan"),
    "text dropout": ({"dropout": "0.9"}, TypeError, "dropout must be a number, got str"),
    "multi_label": ({"multi_label": 1}, TypeError, "multi_label must be a bool, got 1"),
    "dtype": ({"dtype": torch.int64}, TypeError, r"modalities\['rgb'\]: dtype must be float16"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD_MODELS.values(), ids=list(BAD_MODELS))
def test_bad_models(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AttentionClusterClassifier(**{"modalities": MODALITIES, "num_classes": C, **change})


# Configuration and state


def test_state_dict_keys_are_stable() -> None:
    assert {key: tuple(t.shape) for key, t in make().state_dict().items()} == {
        "mean_rgb": (8,),
        "mean_flow": (5,),
        "mean_audio": (4,),
        "means_known": (3,),
        "clusters.rgb.weight": (3, 8),
        "clusters.rgb.alpha": (3,),
        "clusters.rgb.beta": (3,),
        "clusters.flow.hidden_weight": (2, 4, 5),
        "clusters.flow.hidden_bias": (2, 4),
        "clusters.flow.score_weight": (2, 4),
        "clusters.audio.tanh_weight": (3, 4),
        "clusters.audio.gate_weight": (3, 4),
        "clusters.audio.score_weight": (1, 3),
        "clusters.audio.position_bias": (1, 7),
        "clusters.audio.alpha": (1,),
        "clusters.audio.beta": (1,),
        "fc.weight": (6, 38),
        "fc.bias": (6,),
    }


def test_state_dict_carries_means_and_whether_they_are_known() -> None:
    model = make(means=False)
    model.set_means({"rgb": torch.randn(8), "flow": torch.randn(5)})
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    loaded = make(means=False)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    assert loaded.means_known.tolist() == [True, True, False]
    videos = make_videos(model, {**SIZES, "flow": (0, 0, 1, 5)})
    arguments = arranged(videos, "packed")
    assert torch.equal(loaded(**arguments), model(**arguments))
    with pytest.raises(ValueError, match="modality 'audio' is missing"):
        loaded(**arranged(make_videos(model, MISSING), "packed"))


@pytest.mark.parametrize("through", ["dict", "json", "sorted json", "yaml"])
def test_config_round_trip(through: str) -> None:
    model = make(dropout=0.25, multi_label=True)
    config = model.config
    if through == "json":
        config = json.loads(json.dumps(config))
    elif through == "sorted json":
        config = json.loads(json.dumps(config, sort_keys=True))
        assert list(config["modalities"]) != list(MODALITIES)
    elif through == "yaml":
        stream = io.StringIO()
        YAML(typ="safe", pure=True).dump(config, stream)  # sorts
        config = YAML(typ="safe", pure=True).load(stream.getvalue())
        assert list(config["modalities"]) != list(MODALITIES)
    rebuilt = AttentionClusterClassifier.from_config(config, dtype=torch.float64).eval()
    assert rebuilt.config == model.config
    assert list(rebuilt.modalities) == list(MODALITIES)
    assert rebuilt.modalities == model.modalities
    rebuilt.load_state_dict(model.state_dict())
    arguments = arranged(make_videos(model, MISSING), "packed")
    assert torch.equal(rebuilt(**arguments), model(**arguments))


def test_config_needs_little() -> None:
    config = {"modalities": {"b": {"in_features": 4, "cluster_size": 2}}, "num_classes": 3}
    model = AttentionClusterClassifier.from_config(config)
    assert model.config == {
        "modalities": {
            "b": {
                "in_features": 4,
                "cluster_size": 2,
                "weighting": "fc1",
                "hidden_features": None,
                "shared_hidden": False,
                "position_bias": None,
                "shift": True,
                "eps": 1e-12,
            }
        },
        "order": ["b"],
        "num_classes": 3,
        "dropout": 0.9,
        "multi_label": False,
    }
    assert config == {"modalities": {"b": {"in_features": 4, "cluster_size": 2}}, "num_classes": 3}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"momentum": 1},
            ValueError,
            "config has unknown 'momentum'; known are modalities, order, num_classes",
        ),
        ({"num_classes": None}, ValueError, "config must give num_classes, got modalities"),
        ({"order": ["a"]}, ValueError, r"order must name each of a, b once, got \['a'\]"),
        ({"order": "ab"}, TypeError, "order must be a list of names, got str"),
        ({"order": ["a", 1]}, ValueError, r"order must name each of a, b once"),
        ({"order": 2}, TypeError, "order must be a list of names, got int"),
        ({"modalities": ["a"]}, TypeError, "modalities must be a mapping"),
    ],
)
def test_bad_config(change: dict[str, Any], error: type[Exception], message: str) -> None:
    cluster = {"in_features": 4, "cluster_size": 2}
    config = {"modalities": {"a": cluster, "b": cluster}, "num_classes": 3, "order": ["b", "a"], **change}
    config = {key: value for key, value in config.items() if value is not None}
    with pytest.raises(error, match=message):
        AttentionClusterClassifier.from_config(config)
    with pytest.raises(TypeError, match="config must be a mapping, got list"):
        AttentionClusterClassifier.from_config([])  # type: ignore[arg-type]


def test_copies_and_pickles() -> None:
    model = make()
    arguments = arranged(make_videos(model, MISSING), "packed")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(**arguments), model(**arguments))


def test_reset_parameters_keeps_the_means() -> None:
    model = make()
    before = copy.deepcopy(model.state_dict())
    torch.nn.init.ones_(model.clusters["audio"].position_bias)
    model.reset_parameters()
    same = {key for key, tensor in model.state_dict().items() if torch.equal(tensor, before[key])}
    assert same == {"mean_rgb", "mean_flow", "mean_audio", "means_known"}


def test_device_dtype_and_repr() -> None:
    model = make(means=False, device="meta", dtype=torch.bfloat16)
    assert {str(t.device) for t in model.state_dict().values()} == {"meta"}
    assert {t.dtype for k, t in model.state_dict().items() if k != "means_known"} == {torch.bfloat16}
    assert make().half().means_known.dtype == torch.bool
    text = repr(make(multi_label=True))
    assert "num_classes=6, multi_label=True" in text
    assert "(rgb): AttentionCluster(8, 3, weighting='fc1')" in text


# Losses and weights


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
