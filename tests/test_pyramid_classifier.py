"""`fastac.models.pyramid_classifier`: CNN, attention and last layer, against their parts called by hand."""

from __future__ import annotations

import copy
import io
import json
import pickle
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_layer_taps import Net, hooks
from torch import Tensor, nn

from fastac.models.base import VideoClassifier, class_scores
from fastac.models.frame_cnn import FrameCNN
from fastac.models.pyramid_classifier import (
    PyramidClassifier,
    PyramidScores,
    attach_pyramid,
    frame_cnn_backbone,
    small_backbone,
)

NAN = float("nan")
F64 = torch.float64
CLASSES = 4
SHAPE = (2, 8, 9)
M = 2 * 8 * 9
COUNTS = (3, 1, 0, 4)
LAYOUTS = ("lengths", "packed", "nested")
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(backbone: Any = "small", **options: Any) -> PyramidClassifier:
    arguments: dict[str, Any] = {"frame_shape": SHAPE, "cluster_size": 3, "dtype": F64, **options}
    if backbone == "small":
        arguments.setdefault("channels", [4, 5])
    return PyramidClassifier(backbone, CLASSES, **arguments)


def arranged(rows: Tensor, counts: tuple[int, ...], layout: str) -> dict[str, Any]:
    """The arguments for the frames (sum of counts, M) of videos; NaN where no frame is."""
    offsets = torch.tensor([0, *np.cumsum(counts).tolist()])
    if layout == "nested":
        return {"features": torch.nested.nested_tensor_from_jagged(rows, offsets)}
    if layout == "packed":
        return {"features": torch.cat([rows, rows.new_full((2, rows.size(1)), NAN)]), "offsets": offsets}
    x = rows.new_full((len(counts), max(counts) + 1, rows.size(1)), NAN)
    for number, (first, last) in enumerate(pairwise(offsets.tolist())):
        x[number, : last - first] = rows[first:last]
    return {"features": x, "lengths": torch.tensor(counts)}


def by_hand(model: PyramidClassifier, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The scores and losses of one video of a "small" model of two stages, in eval mode."""
    frames = rows.view(-1, *model.frame_shape)
    first = F.max_pool2d(model.backbone.stage1.conv(frames).relu(), 2)
    maps = [first, F.max_pool2d(model.backbone.stage2.conv(first).relu(), 2)]
    attended = model.attention_pyramid([x[None] for x in maps])
    return model.fc(attended.output.flatten(1))[0], attended.interaction_loss[0], attended.diversity_loss[0]


# Values


@each_layout
def test_every_layout(layout: str) -> None:
    model = make().eval()
    rows = torch.randn(sum(COUNTS), M, dtype=F64)
    got = model(**arranged(rows, COUNTS, layout))
    assert isinstance(got, PyramidScores)
    assert isinstance(model, VideoClassifier)
    assert class_scores(got) is got.scores
    for number, video in enumerate(rows.split(COUNTS)):
        if len(video):
            for a, b in zip(got, by_hand(model, video), strict=True):
                torch.testing.assert_close(a[number], b, rtol=1e-12, atol=1e-13)
        else:
            assert torch.equal(got.scores[number], model.fc.bias)
            assert got.interaction_loss[number] == 0 == got.diversity_loss[number]


def test_dense_frames_bare_by_modality_and_as_images() -> None:
    model = make(modality="video").eval()
    x = torch.randn(2, 3, M, dtype=F64)
    expected = model(x, lengths=torch.tensor([3, 3]))
    offsets = torch.tensor([0, 3, 6])
    for arguments in (
        {"features": x},
        {"features": {"video": x}},
        {"features": x.view(2, 3, *SHAPE)},
        {"features": {"video": x.view(2, 3, *SHAPE)}, "lengths": {"video": torch.tensor([3, 3])}},
        {"features": {"video": x.flatten(0, 1)}, "offsets": {"video": offsets}, "max_length": {"video": 5}},
        {"features": x.view(6, *SHAPE), "offsets": offsets.int()},
    ):
        for a, b in zip(model(**arguments), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_pixels_are_standardised() -> None:
    model = make(pixel_mean=0.25, pixel_std=0.5).eval()
    plain = make().eval()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, M, dtype=F64)
    torch.testing.assert_close(model(x).scores, plain((x - 0.25) / 0.5).scores, rtol=1e-12, atol=1e-13)


def test_padding_costs_and_changes_nothing() -> None:
    """Batch normalisation in training sees valid frames only."""
    cnn = nn.Sequential(nn.Conv2d(2, 3, 3, dtype=F64), nn.BatchNorm2d(3, dtype=F64))
    rows = torch.randn(sum(COUNTS), M, dtype=F64)
    results = []
    for layout in LAYOUTS:
        model = attach_pyramid(copy.deepcopy(cnn), ["1"], CLASSES, frame_shape=SHAPE, dropout=0.0)
        model.load_state_dict(results[0][1] if results else model.state_dict())
        state = copy.deepcopy(model.state_dict())
        seen: list[int] = []
        model.backbone.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(len(given[0])))
        scores = model(**arranged(rows, COUNTS, layout)).scores
        assert seen == [sum(COUNTS)]
        results.append((scores, state, model.backbone[1].running_mean, model.backbone[1].running_var))
    for scores, _, mean, variance in results[1:]:
        torch.testing.assert_close(scores, results[0][0], rtol=1e-12, atol=1e-13)
        assert torch.equal(mean, results[0][2])
        assert torch.equal(variance, results[0][3])


@pytest.mark.parametrize("layout", ["lengths", "packed"])
def test_excluded_frames_have_no_gradient(layout: str) -> None:
    model = make(dropout=0.0)
    arguments = arranged(torch.randn(sum(COUNTS), M, dtype=F64), COUNTS, layout)
    x = arguments.pop("features").requires_grad_()
    model.loss(model(x, **arguments), torch.tensor([0, 1, 2, 3])).backward()
    excluded = x.detach().isnan()
    assert excluded.any()
    assert not x.grad[excluded].any()
    assert (x.grad[~excluded].view(-1, M) != 0).any(1).all()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(
    ("shape", "arguments"),
    [
        ((2, 0, M), {}),
        ((0, 3, M), {}),
        ((0, M), {"offsets": torch.tensor([0, 0, 0])}),
        ((2, 3, M), {"lengths": torch.tensor([0, 0])}),
    ],
)
def test_no_frames_at_all(shape: tuple[int, ...], arguments: dict[str, Tensor]) -> None:
    model = make(dropout=0.0)
    got = model(torch.full(shape, NAN, dtype=F64), **arguments)
    assert torch.equal(got.scores, model.fc.bias.expand(got.scores.size(0), -1))
    assert not got.interaction_loss.any()
    model.losses(got, torch.zeros(len(got.scores), dtype=torch.int64)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name  # as data-parallel training needs it


def test_frames_may_come_in_any_order() -> None:
    model = make().eval()
    x = torch.randn(1, 6, M, dtype=F64)
    for a, b in zip(model(x), model(x[:, torch.randperm(6)]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


# Losses and attention


def test_losses() -> None:
    model = make(interaction_weight=0.3, diversity_weight=0.7).eval()
    output = model(torch.randn(2, 3, M, dtype=F64))
    labels = torch.tensor([3, 0])
    base = F.cross_entropy(output.scores, labels, reduction="none")
    extra = 0.3 * output.interaction_loss + 0.7 * output.diversity_loss
    assert extra.abs().min() > 0
    torch.testing.assert_close(model.losses(output, labels), base + extra)
    torch.testing.assert_close(model.loss(output, labels), (base + extra).mean())
    torch.testing.assert_close(model.losses(output.scores, labels), base)
    torch.testing.assert_close(model.probabilities(output), output.scores.softmax(1))
    several = make(multi_label=True).eval()
    output = several(torch.randn(2, 3, M, dtype=F64))
    labels = torch.rand(2, CLASSES) > 0.5
    base = F.binary_cross_entropy_with_logits(output.scores, labels.double(), reduction="none").mean(1)
    extra = 0.1 * (output.interaction_loss + output.diversity_loss)
    torch.testing.assert_close(several.losses(output, labels), base + extra)


@each_layout
def test_attention(layout: str) -> None:
    model = make().eval()
    rows = torch.randn(sum(COUNTS), M, dtype=F64)
    arguments = arranged(rows, COUNTS, layout)
    (name,) = model.dimensions
    weights = model.attention(**arguments)[name]
    features = arguments["features"]
    if layout == "lengths":
        assert weights.shape == (len(COUNTS), 3, features.size(1))
        assert not weights[features[..., 0].isnan()[:, None].expand_as(weights)].any()
        of_videos = [weights[i, :, :count] for i, count in enumerate(COUNTS)]
    else:
        rows_given = sum(COUNTS) if layout == "nested" else features.size(0)
        assert weights.shape == (3, rows_given)
        assert not weights[:, sum(COUNTS) :].any()
        of_videos = list(weights[:, : sum(COUNTS)].split(COUNTS, 1))
    for video, got in zip(rows.split(COUNTS), of_videos, strict=True):
        if not len(video):
            continue
        torch.testing.assert_close(got.sum(1), torch.ones(3, dtype=F64))
        alone = model.attention(video[None])[name]
        torch.testing.assert_close(got, alone[0], rtol=1e-12, atol=1e-13)
    assert weights.requires_grad


# Gradients


def test_gradients_reach_the_whole_cnn_and_its_pixels() -> None:
    model = make(dropout=0.0)
    x = torch.randn(2, 3, M, dtype=F64, requires_grad=True)
    model.loss(model(x), torch.tensor([0, 1])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
    direction = torch.randn_like(x)
    with torch.no_grad():
        step = 1e-6
        up, down = (model.loss(model(x + s * direction), torch.tensor([0, 1])) for s in (step, -step))
    torch.testing.assert_close((x.grad * direction).sum(), (up - down) / (2 * step), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("only", ["interaction_loss", "diversity_loss"])
def test_each_loss_reaches_the_cnn(only: str) -> None:
    model = make()
    getattr(model(torch.randn(2, 3, M, dtype=F64)), only).sum().backward()
    for name, parameter in model.backbone.named_parameters():
        assert parameter.grad.any(), name


def bars(videos: int) -> tuple[Tensor, Tensor]:
    """Five frames of noise, one with a bar in a random place: lying or standing, which is the label."""
    labels = torch.arange(videos) % 2
    frames = 0.3 * torch.randn(videos, 5, 1, 8, 8)
    for number, label in enumerate(labels.tolist()):
        frame = frames[number, int(torch.randint(5, ())), 0]
        row, column = torch.randint(8, (2,)).tolist()
        (frame[row] if label else frame[:, column]).add_(1.5)
    return frames, labels


def test_training_finds_the_frame_that_counts() -> None:
    model = PyramidClassifier(
        "small", 2, frame_shape=(1, 8, 8), channels=[8, 16], cluster_size=2, dropout=0.0
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(120):
        frames, labels = bars(64)
        loss = model.loss(model(frames), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    model.eval()
    frames, labels = bars(400)
    with torch.no_grad():
        output = model(frames)
    accuracy = (output.scores.argmax(1) == labels).float().mean()
    assert accuracy > 0.9
    assert losses[-1] < losses[0] - 0.5


# A CNN of one's own


def test_a_cnn_by_the_names_of_its_layers() -> None:
    """Layers that a later one changes in place, one trained, the other not."""
    cnn = Net().double().train()
    cnn.blocks[0].eval()
    modes = {name: module.training for name, module in cnn.named_modules()}
    state = copy.deepcopy(cnn.state_dict())
    layers = ["stem", "blocks.0.conv2", "blocks.1"]
    model = attach_pyramid(cnn, layers, CLASSES, frame_shape=(1, 6, 5), cluster_size=2)
    assert model.backbone is cnn
    assert {name: module.training for name, module in cnn.named_modules()} == modes
    for name, tensor in cnn.state_dict().items():
        assert torch.equal(tensor, state[name])
    assert model.attention_pyramid.channels == (2, 2, 2)
    assert model.attention_pyramid.size == (4, 3)
    assert model.fc.weight.shape == (CLASSES, 2 * 2)
    assert model.fc.weight.dtype == model.attention_pyramid.score_weight.dtype == F64
    x = torch.randn(2, 3, 30, dtype=F64)
    model.loss(model(x), torch.tensor([0, 1])).backward()
    for name in ("stem", "blocks"):
        for parameter in cnn.get_submodule(name).parameters():
            assert parameter.grad is not None
    assert hooks(model) == 0
    with pytest.raises(ValueError, match="backbone of your own has no config; one on small or frame-cnn has"):
        _ = model.config


def test_statistics_of_batch_normalisation_stay() -> None:
    cnn = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    attach_pyramid(cnn, ["1"], CLASSES, frame_shape=(1, 6, 6))
    assert cnn.training
    assert cnn[1].num_batches_tracked == 0


def test_size() -> None:
    model = make(size=(5, 3))
    assert model.attention_pyramid.size == (5, 3)
    assert make().attention_pyramid.size == (2, 2)
    assert make(layers=["stage2", "stage1"]).fc.in_features == 3 * 4
    assert model(torch.randn(1, 2, M, dtype=F64)).scores.shape == (1, CLASSES)


class Fails(nn.Module):
    """Puts out what it is told to."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.layer = nn.Identity()
        self.output = output

    def forward(self, x: Tensor) -> Any:
        if self.output is None:
            raise FloatingPointError("planted")
        return self.layer(self.output)


def test_hooks_go_after_errors_and_modes_come_back() -> None:
    cnn = Fails(None)
    with pytest.raises(FloatingPointError, match="planted"):
        attach_pyramid(cnn, ["layer"], CLASSES, frame_shape=SHAPE)
    assert hooks(cnn) == 0
    assert cnn.training and cnn.layer.training
    cnn.output = torch.randn(2, 3, 4, 4)
    model = attach_pyramid(cnn, ["layer"], CLASSES, frame_shape=SHAPE)
    wrong = r"layer 'layer' must put out one map per frame, F = 5, got \(2, 3, 4, 4\)"
    with pytest.raises(ValueError, match=wrong):
        model(torch.randn(1, 5, M))
    assert hooks(model) == 0
    cnn.output = None
    with pytest.raises(FloatingPointError, match="planted"):
        model(torch.randn(1, 2, M))
    assert hooks(model) == 0


# Built-in CNNs, configuration, state


def test_the_frame_cnn_is_that_of_the_features() -> None:
    cnn = FrameCNN().eval()
    backbone = frame_cnn_backbone(cnn)
    assert backbone.conv1 is cnn.conv1 and backbone.conv2 is cnn.conv2
    frames = torch.randn(3, 1, 28, 28)
    maps = backbone.eval()(frames)
    assert maps.shape == (3, 20, 4, 4)
    rest = F.log_softmax(cnn.fc(maps.flatten(1)).relu(), -1)
    assert torch.equal(rest, cnn.features(frames))
    model = PyramidClassifier("frame-cnn", 5, frame_shape=(1, 28, 28))
    loaded = model.backbone.load_state_dict(cnn.state_dict(), strict=False)
    assert not loaded.missing_keys
    assert model.layers == ["relu1", "relu2"]
    assert model.attention_pyramid.channels == (10, 20)
    assert model.attention_pyramid.size == (4, 4)


def test_the_small_cnn() -> None:
    cnn = small_backbone(3, (4, 5), dtype=F64).eval()
    frames = torch.randn(2, 3, 8, 8, dtype=F64)
    first = F.max_pool2d(F.conv2d(frames, cnn.stage1.conv.weight, cnn.stage1.conv.bias, padding=1).relu(), 2)
    assert torch.equal(cnn.stage1(frames), first)
    assert cnn(frames).shape == (2, 5, 2, 2)


@pytest.mark.parametrize(
    ("backbone", "options"),
    [
        ("small", {"channels": (4, 5), "size": (3, 2), "layers": ("stage2", "stage1"), "orthonormality": 2,
                   "interaction_weight": 0.4, "diversity_weight": 0.0, "modality": "clips",
                   "multi_label": True, "pixel_mean": 0.5, "pixel_std": 2, "dropout": 0.25}),
        ("frame-cnn", {"frame_shape": (1, 20, 24)}),
    ],
)  # fmt: skip
def test_configuration(backbone: str, options: dict[str, Any]) -> None:
    model = make(backbone, **options).eval()
    config = json.loads(json.dumps(model.config, sort_keys=True))
    assert config == model.config
    other = PyramidClassifier.from_config(config, dtype=F64).eval()
    assert other.config == model.config
    assert repr(other) == repr(model)
    other.load_state_dict(model.state_dict())
    (m,) = model.dimensions.values()
    x = torch.randn(2, 3, m, dtype=F64)
    assert torch.equal(other(x).scores, model(x).scores)
    labels = torch.ones(2, CLASSES) if model.multi_label else torch.tensor([0, 1])
    assert torch.equal(other.losses(other(x), labels), model.losses(model(x), labels))
    for key, value in options.items():
        expected = list(value) if isinstance(value, tuple) else value
        assert config[key] == expected


def test_state() -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in make().state_dict().items()}
    assert shapes == {
        "backbone.stage1.conv.weight": (4, 2, 3, 3),
        "backbone.stage1.conv.bias": (4,),
        "backbone.stage2.conv.weight": (5, 4, 3, 3),
        "backbone.stage2.conv.bias": (5,),
        "attention_pyramid.score_weight": (2, 4, 3),
        "attention_pyramid.scales.0.weight": (4, 4),
        "attention_pyramid.scales.0.bias": (4,),
        "attention_pyramid.scales.1.weight": (5, 4),
        "attention_pyramid.scales.1.bias": (4,),
        "fc.weight": (CLASSES, 15),
        "fc.bias": (CLASSES,),
    }


def test_copies() -> None:
    model = make().eval()
    x = torch.randn(2, 3, M, dtype=F64)
    expected = model(x).scores
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for copied in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ):
        assert hooks(copied) == 0
        assert torch.equal(copied(x).scores, expected)
        assert copied.config == model.config


def test_autocast() -> None:
    model = make(dtype=torch.float32, dropout=0.0)
    x = torch.randn(2, 3, M)
    expected = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model(x)
        losses = model.losses(got, torch.tensor([0, 1]))
    assert losses.dtype == torch.float32
    losses.sum().backward()
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=0.05, atol=0.05)


# Wrong input


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"backbone": "resnet"}, ValueError, "backbone must be one of small, frame-cnn, got 'resnet'"),
        ({"backbone": 3}, TypeError, "backbone must be a torch.nn.Module or a name, got int"),
        ({"channels": []}, ValueError, "channels must have at least one stage, got none"),
        ({"channels": 4}, TypeError, "channels must be a sequence of int, got int"),
        ({"channels": [4, 0]}, ValueError, "channels[1] must be >= 1, got 0"),
        ({"channels": [4] * 4}, ValueError,
         "frame_shape must have 16 or more rows and columns for 4 stages, got (2, 8, 9)"),
        ({"backbone": "frame-cnn"}, ValueError,
         "channels must not be given for backbone frame-cnn, got [4, 5]"),
        ({"backbone": "frame-cnn", "channels": None}, ValueError,
         "frame_shape must have one channel and 16 or more rows and columns for backbone frame-cnn, "
         "got (2, 8, 9)"),
        ({"frame_shape": 28}, TypeError, "frame_shape must be (C, H, W), got int"),
        ({"frame_shape": (28, 28)}, ValueError, "frame_shape must be (C, H, W), got 2 entries"),
        ({"frame_shape": (1, 28, 0)}, ValueError, "frame_shape[2] must be >= 1, got 0"),
        ({"layers": ["stage3"]}, ValueError,
         "layers must be modules of the CNN, got 'stage3'; close are stage2, stage1"),
        ({"size": (2,)}, ValueError, "size must be a pair (H, W), got 1 entries"),
        ({"cluster_size": 0}, ValueError, "cluster_size must be >= 1, got 0"),
        ({"dropout": 1}, ValueError, "dropout must be in [0, 1), got 1"),
        ({"orthonormality": -1.0}, ValueError, "orthonormality must be finite and >= 0, got -1.0"),
        ({"interaction_weight": None}, TypeError, "interaction_weight must be a number, got NoneType"),
        ({"diversity_weight": NAN}, ValueError, "diversity_weight must be finite and >= 0, got nan"),
        ({"pixel_mean": NAN}, ValueError, "pixel_mean must be finite, got nan"),
        ({"pixel_std": 0.0}, ValueError, "pixel_std must be > 0, got 0.0"),
        ({"pixel_std": "1"}, TypeError, "pixel_std must be a number, got str"),
        ({"multi_label": 1}, TypeError, "multi_label must be a bool, got 1"),
        ({"modality": ""}, ValueError, "modality must be the name of the features, got ''"),
        ({"modality": 3}, TypeError, "modality must be a str, got int"),
        ({"num_classes": 0}, ValueError, "num_classes must be >= 1, got 0"),
    ],
)  # fmt: skip
def test_wrong_models(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    complete = {
        "backbone": "small",
        "num_classes": CLASSES,
        "frame_shape": SHAPE,
        "channels": [4, 5],
        **arguments,
    }
    for constructor in (PyramidClassifier, lambda **given: PyramidClassifier.from_config(given)):
        with pytest.raises(error) as caught:
            constructor(**complete)
        assert str(caught.value) == message


def test_wrong_backbones_of_ones_own() -> None:
    cnn = nn.Sequential(nn.Conv2d(2, 3, 3))
    with pytest.raises(ValueError, match="layers must be given for a backbone of your own, got None"):
        PyramidClassifier(cnn, CLASSES, frame_shape=SHAPE)
    with pytest.raises(ValueError, match="channels must not be given for a backbone of your own"):
        PyramidClassifier(cnn, CLASSES, frame_shape=SHAPE, layers=["0"], channels=[3])
    with pytest.raises(
        ValueError, match="device and dtype must not be given with a backbone that has its own"
    ):
        attach_pyramid(cnn, ["0"], CLASSES, frame_shape=SHAPE, dtype=F64)
    with pytest.raises(TypeError, match=r"cnn must be a torch.nn.Module, got str"):
        attach_pyramid("small", ["0"], CLASSES, frame_shape=SHAPE)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="cnn must be a FrameCNN, got Sequential"):
        frame_cnn_backbone(cnn)  # type: ignore[arg-type]


def test_wrong_configurations() -> None:
    config = make().config
    with pytest.raises(TypeError, match="config must be a mapping, got list"):
        PyramidClassifier.from_config([])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="config has unknown 'depth'; known are backbone, num_classes"):
        PyramidClassifier.from_config({**config, "depth": 3})
    with pytest.raises(ValueError, match="config must give frame_shape, got backbone"):
        PyramidClassifier.from_config({k: v for k, v in config.items() if k != "frame_shape"})
    with pytest.raises(TypeError, match="backbone must be one of small, frame-cnn in a config, got a module"):
        PyramidClassifier.from_config({**config, "backbone": Net()})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"features": {"rgb": torch.ones(1)}}, ValueError,
         "features must be of the modality 'frames', got 'rgb'"),
        ({"features": {}}, ValueError, "features must have the modality 'frames', got none"),
        ({"features": torch.ones(1, 2, M)}, TypeError,
         "features['frames'] must be torch.float64 as the model, got torch.float32"),
        ({"features": torch.ones(1, 2, M - 1, dtype=F64)}, ValueError,
         "modality 'frames': x must have 144 features in its last dimension, got shape (1, 2, 143)"),
        ({"features": torch.ones(1, 2, 9, 8, 2, dtype=F64)}, ValueError,
         "features['frames'] must be frames of shape (C, H, W) = (2, 8, 9), got (1, 2, 9, 8, 2)"),
        ({"features": torch.ones(2, M, dtype=F64)}, ValueError,
         "modality 'frames': x must have shape (B, L, M), got (2, 144); "
         "a packed x of shape (T, M) needs offsets"),
        ({"features": torch.ones(1, 2, M, dtype=F64), "lengths": torch.tensor([3])}, ValueError,
         "modality 'frames': lengths must lie in 0...L with L = 2, got values in 3...3"),
        ({"features": torch.ones(2, M, dtype=F64), "offsets": torch.tensor([0, 3])}, ValueError,
         "modality 'frames': offsets must end at T = 2 or before, got offsets[-1] = 3"),
    ],
)  # fmt: skip
def test_wrong_features(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    model = make()
    for method in (model, model.attention):
        with pytest.raises(error) as caught:
            method(**arguments)
        assert str(caught.value) == message
