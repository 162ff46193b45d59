"""`fastac.models.attention_boosted_lstm`: the published formulas by hand, and lengths honoured or not."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from temporal_attention_by_hand import block_by_hand, padded_to
from torch import Tensor
from torch.export import Dim, export

from fastac.data.batch import FeatureBatch
from fastac.models.attention_boosted_lstm import POSITIONS, AttentionBoostedLSTM

NAN = float("nan")
M, C, T, H, DENSE = 6, 4, 5, 3, 7
SIZES = (4, 7, 1, 5, 2)
EMPTY = (4, 0, 7, 1)
LAYOUTS = ("dense", "packed", "nested")
each_position = pytest.mark.parametrize("position", POSITIONS)
each_attention = pytest.mark.parametrize("position", ["before", "after"])
each_layout = pytest.mark.parametrize("layout", LAYOUTS)
honoring = pytest.mark.parametrize("honor", [True, False], ids=["honored", "published"])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(position: str = "after", honor: bool = True, **options: Any) -> AttentionBoostedLSTM:
    """A model whose parameters are all drawn, the biases too."""
    sizes = {"sequence_length": T, "hidden_features": H, "dense_features": DENSE}
    given = {"dtype": torch.float64, "honor_lengths": honor, **sizes, **options}
    model = AttentionBoostedLSTM(M, C, position=position, **given).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def make_videos(sizes: tuple[int, ...] = SIZES, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(n, M, dtype=dtype) for n in sizes]


def arranged(videos: list[Tensor], layout: str) -> dict[str, Any]:
    """The arguments of a model; NaN where no frame is."""
    lengths = torch.tensor([len(v) for v in videos])
    if layout == "dense":
        x = torch.full((len(videos), int(lengths.max()) + 1, M), NAN, dtype=videos[0].dtype)
        for row, video in zip(x, videos, strict=True):
            row[: len(video)] = video
        return {"features": x, "lengths": lengths}
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    values = torch.cat(videos)
    if layout == "nested":
        return {"features": torch.nested.nested_tensor_from_jagged(values, offsets)}
    return {"features": torch.cat([values, torch.full_like(values[:2], NAN)]), "offsets": offsets}


# The published formulas, in numpy, one number at a time


def sigmoid(v: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-v))


def lstm_by_hand(model: AttentionBoostedLSTM, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Outputs (n, 2 H) and last states (2 H,) of the bi-LSTM on x (n, M)."""
    outputs, last = [], []
    for suffix, order in (("", range(len(x))), ("_reverse", range(len(x) - 1, -1, -1))):
        w, r, b, b2 = (
            getattr(model.lstm, f"{name}_l0{suffix}").detach().numpy()
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        h, c, out = np.zeros(H), np.zeros(H), np.zeros((len(x), H))
        for t in order:
            i, f, g, o = np.split(w @ x[t] + r @ h + b + b2, 4)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
            out[t] = h
        outputs.append(out)
        last.append(h)
    return np.concatenate(outputs, 1), np.concatenate(last)


def by_hand(model: AttentionBoostedLSTM, video: Tensor) -> np.ndarray:
    """The scores (C,) of one video (n, M)."""
    n = max(1, min(len(video), T)) if model.honor_lengths else T
    x = padded_to(video.numpy(), T)
    if model.position == "before":
        x, _ = block_by_hand(model.temporal_attention, x, n)
    outputs, pooled = lstm_by_hand(model, x[:n])
    if model.position == "after":
        pooled = block_by_hand(model.temporal_attention, padded_to(outputs, T), n)[0].reshape(-1)
    for layer in (model.dense, model.fc):
        if layer is model.fc:
            pooled = np.maximum(pooled, 0)
        pooled = layer.weight.detach().numpy() @ pooled + layer.bias.detach().numpy()
    return pooled


def all_by_hand(model: AttentionBoostedLSTM, videos: list[Tensor]) -> Tensor:
    return torch.from_numpy(np.stack([by_hand(model, video) for video in videos]))


@each_position
@honoring
@each_layout
def test_the_published_formulas(position: str, honor: bool, layout: str) -> None:
    model = make(position, honor)
    videos = make_videos()
    torch.testing.assert_close(model(**arranged(videos, layout)), all_by_hand(model, videos))


@each_position
@honoring
@pytest.mark.parametrize("length", [1, T - 1, T, T + 3])
def test_dense_videos_without_lengths(position: str, honor: bool, length: int) -> None:
    """All L frames are valid; only the published form counts the padding to T."""
    model = make(position, honor)
    videos = make_videos((length, length))
    torch.testing.assert_close(model(torch.stack(videos)), all_by_hand(model, videos))


@each_position
def test_lengths_are_honored_unless_asked_otherwise(position: str) -> None:
    honored, published = make(position), make(position, honor=False)
    published.load_state_dict(honored.state_dict())
    videos = make_videos()
    differs = [
        not torch.allclose(a, b, rtol=1e-3)
        for a, b in zip(
            honored(**arranged(videos, "dense")), published(**arranged(videos, "dense")), strict=True
        )
    ]
    assert differs == [len(v) < T for v in videos]


# Layouts and lengths


@each_position
@honoring
@each_layout
def test_a_video_is_scored_as_alone(position: str, honor: bool, layout: str) -> None:
    """An empty one as one frame of zeros."""
    model = make(position, honor)
    videos = make_videos(EMPTY)
    alone = torch.cat([model(v[None] if len(v) else v.new_zeros(1, 1, M)) for v in videos])
    torch.testing.assert_close(model(**arranged(videos, layout)), alone)


@each_position
@honoring
@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_excluded_positions_have_no_influence(position: str, honor: bool, layout: str) -> None:
    """Not on scores, nor on gradients; nor have frames after T."""
    model = make(position, honor, dense_features=50)  # so that some unit is active for every video
    arguments = arranged(make_videos(EMPTY), layout)
    x = arguments.pop("features")
    rows = torch.ones_like(x, dtype=torch.bool)
    if layout == "dense":
        rows[:] = (torch.arange(x.size(1)) < arguments["lengths"].clamp(max=T)[:, None])[..., None]
    else:
        rows[[9, 10, 12, 13]] = False  # of 7 frames at row 4 two are cut; two rows belong to no video
    found = []
    for other in (0.0, NAN):
        leaf = torch.where(rows, x, other).requires_grad_()
        model.zero_grad()
        scores = model(leaf, **arguments)
        scores.square().sum().backward()
        found.append((scores, leaf.grad, [p.grad for p in model.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    gradient = found[0][1]
    assert not gradient[~rows].any() and gradient[rows].count_nonzero() > 0.9 * int(rows.sum())


@each_position
def test_takes_a_feature_batch_and_names(position: str) -> None:
    model = make(position, modality="rgb")
    videos = make_videos()
    packed = arranged(videos, "packed")
    expected = all_by_hand(model, videos)
    for bound in (7, 12):
        batch = FeatureBatch(
            {"rgb": packed["features"]},
            None,
            torch.arange(len(videos)),
            offsets={"rgb": packed["offsets"]},
            max_length={"rgb": bound},
        )
        torch.testing.assert_close(model(**batch.inputs()), expected)
    torch.testing.assert_close(model(**packed, max_length=7), expected)
    assert model.dimensions == {"rgb": M}


@each_position
@honoring
@pytest.mark.parametrize("shape", [(0, 3), (0, 0), (2, 0)])
def test_nothing_at_all(position: str, honor: bool, shape: tuple[int, int]) -> None:
    model = make(position, honor)
    batches: list[int] = []
    hook = model.lstm.register_forward_pre_hook(lambda _, given: batches.append(given[0].size(0)))
    x = torch.zeros(*shape, M, dtype=torch.float64, requires_grad=True)
    scores = model(x)
    assert batches == [max(1, shape[0])]  # no kernel is asked for an empty batch
    hook.remove()
    assert scores.shape == (shape[0], C) and scores.isfinite().all()
    scores.sum().backward()
    lengths = torch.zeros(shape[0], dtype=torch.int64)
    torch.testing.assert_close(model(x, lengths=lengths), scores)
    offsets = torch.zeros(shape[0] + 1, dtype=torch.int64)
    torch.testing.assert_close(model(x.detach().reshape(-1, M), offsets=offsets), scores)
    assert model.losses(scores, lengths).shape == (shape[0],)
    if position != "none":
        weights = model.attention(x, lengths=lengths)["features"]
        assert weights.shape[::2] == shape and not weights.any()


@each_position
@honoring
def test_gradcheck_with_ragged_lengths(position: str, honor: bool) -> None:
    model = make(position, honor, hidden_features=2, dense_features=3)
    lengths = torch.tensor([T + 1, 2, 0, T])
    names = [name for name, _ in model.named_parameters()]
    labels = torch.tensor([0, 3, 1, 1])

    def loss(x: Tensor, *parameters: Tensor) -> Tensor:
        given = dict(zip(names, parameters, strict=True))
        return model.losses(torch.func.functional_call(model, given, (x,), {"lengths": lengths}), labels)

    x = torch.randn(4, T + 1, M, dtype=torch.float64, requires_grad=True)
    leaves = (x, *(p.detach().clone().requires_grad_() for p in model.parameters()))
    assert torch.autograd.gradcheck(loss, leaves, fast_mode=True)


# Attention


@each_attention
@honoring
@each_layout
def test_attention(position: str, honor: bool, layout: str) -> None:
    model = make(position, honor)
    videos = make_videos(EMPTY)
    found = model.attention(**arranged(videos, layout))
    assert list(found) == ["features"]
    weights = found["features"]
    d = M if position == "before" else 2 * H
    longest, rows = max(EMPTY), sum(EMPTY)
    assert (
        weights.shape == {"dense": (4, d, longest + 1), "packed": (d, rows + 2), "nested": (d, rows)}[layout]
    )
    start = 0
    for number, video in enumerate(videos):
        n = len(video)
        taken = weights[number] if layout == "dense" else weights[:, start : start + n]
        start += n
        inputs = padded_to(video.numpy(), T)
        valid = max(1, min(n, T)) if honor else T
        if position == "after":
            inputs = padded_to(lstm_by_hand(model, inputs[:valid])[0], T)
        expected = padded_to(block_by_hand(model.temporal_attention, inputs, valid)[1], longest + 1)
        expected[n:] = 0
        torch.testing.assert_close(taken.T, torch.from_numpy(expected[: taken.size(1)]))
        if honor and n:
            torch.testing.assert_close(taken.sum(1), torch.ones(d, dtype=torch.float64))
    if layout == "packed":
        assert not weights[:, rows:].any()


def test_none_has_no_attention() -> None:
    with pytest.raises(ValueError, match="attention needs position before or after, the model has none"):
        make("none").attention(torch.zeros(1, 2, M, dtype=torch.float64))


# Parameters


KEYS = {
    "lstm.weight_ih_l0": (4 * H, M),
    "lstm.weight_hh_l0": (4 * H, H),
    "lstm.bias_ih_l0": (4 * H,),
    "lstm.bias_hh_l0": (4 * H,),
    "lstm.weight_ih_l0_reverse": (4 * H, M),
    "lstm.weight_hh_l0_reverse": (4 * H, H),
    "lstm.bias_ih_l0_reverse": (4 * H,),
    "lstm.bias_hh_l0_reverse": (4 * H,),
    "dense.weight": (DENSE, 2 * H),
    "dense.bias": (DENSE,),
    "fc.weight": (C, DENSE),
    "fc.bias": (C,),
}
ATTENTION_KEYS = {"temporal_attention.weight": (T, T), "temporal_attention.bias": (T,)}


@each_position
def test_state_dict(position: str) -> None:
    model = make(position)
    expected: dict[str, tuple[int, ...]] = dict(KEYS)
    if position != "none":
        expected = {**ATTENTION_KEYS, **expected}
    if position == "after":
        expected["dense.weight"] = (DENSE, 2 * H * T)
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == expected
    again = make(position)
    again.load_state_dict(model.state_dict(), strict=True)
    arguments = arranged(make_videos(), "dense")
    assert torch.equal(again(**arguments), model(**arguments))


def test_the_published_sizes_are_the_defaults() -> None:
    model = AttentionBoostedLSTM(10, 3, sequence_length=4)
    assert (model.position, model.hidden_features, model.dense_features) == ("after", 256, 512)
    assert model.dropout.p == 0.5 and model.honor_lengths
    assert model.dense.in_features == 4 * 512


@each_position
def test_starts_as_keras(position: str) -> None:
    torch.manual_seed(0)
    h, m = 60, 90
    sizes = {"sequence_length": T, "hidden_features": h, "dense_features": 200}
    model = AttentionBoostedLSTM(m, 50, position=position, **sizes)
    for suffix in ("l0", "l0_reverse"):
        kernel, recurrent = (getattr(model.lstm, f"weight_{k}_{suffix}").detach() for k in ("ih", "hh"))
        bound = (6 / (m + 4 * h)) ** 0.5
        assert 0.99 * bound < kernel.abs().max() <= bound
        torch.testing.assert_close(recurrent.T @ recurrent, torch.eye(h), atol=1e-5, rtol=0)
        bias = sum(getattr(model.lstm, f"bias_{k}_{suffix}").detach() for k in ("ih", "hh"))
        assert torch.equal(bias, torch.cat([torch.zeros(h), torch.ones(h), torch.zeros(2 * h)]))
    for layer in (model.dense, model.fc):
        bound = (6 / (layer.in_features + layer.out_features)) ** 0.5
        assert 0.98 * bound < layer.weight.abs().max() <= bound
        assert not layer.bias.any()
    before = copy.deepcopy(model.state_dict())
    model.reset_parameters()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if "weight" in name}


@each_position
def test_config(position: str) -> None:
    model = make(position, honor=False, dropout=0.25, multi_label=True, modality="rgb")
    config = json.loads(json.dumps(model.config, sort_keys=True))
    again = AttentionBoostedLSTM.from_config(config, dtype=torch.float64)
    assert again.config == model.config and repr(again) == repr(model)
    assert repr(position) in repr(model)
    again.load_state_dict(model.state_dict())
    x = torch.randn(2, T, M, dtype=torch.float64)
    assert torch.equal(again.eval()(x), model(x))
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))
    least = {"in_features": M, "num_classes": C, "sequence_length": T}
    assert (
        AttentionBoostedLSTM.from_config(least).config == AttentionBoostedLSTM(M, C, sequence_length=T).config
    )


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ([], TypeError, "config must be a mapping, got list"),
        ({"in_features": 3, "num_classes": 2}, ValueError, "config must give sequence_length, got in_f"),
        (
            {"in_features": 3, "num_classes": 2, "sequence_length": 1, "heads": 2},
            ValueError,
            "unknown 'heads'",
        ),
    ],
)
def test_bad_config(config: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AttentionBoostedLSTM.from_config(config)


def test_meta_device_and_half_types() -> None:
    assert make(device="meta").fc.weight.is_meta
    x = torch.randn(2, T, M)
    lengths = torch.tensor([3, T])
    for position in POSITIONS:
        model = make(position, dtype=torch.float32)
        expected = model(x, lengths=lengths)
        for dtype in (torch.bfloat16, torch.float16):
            half = AttentionBoostedLSTM.from_config(model.config, dtype=dtype).eval()
            half.load_state_dict(model.state_dict())
            scores = half(x.to(dtype), lengths=lengths)
            assert scores.dtype == dtype
            torch.testing.assert_close(scores.float(), expected, atol=0.05, rtol=0.05)


# Bad input


@pytest.mark.parametrize("name", ["cnn-lstm-attention", "cnn_lstm_attention", "cnn_lstm", "After", None])
def test_an_unknown_position_lists_the_known(name: Any) -> None:
    with pytest.raises(ValueError, match=f"position must be one of none, before, after, got {name!r}"):
        AttentionBoostedLSTM(M, C, sequence_length=T, position=name)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"in_features": 0}, ValueError, "in_features must be >= 1, got 0"),
        ({"num_classes": 2.0}, TypeError, "num_classes must be an int, got float"),
        ({"sequence_length": 0}, ValueError, "sequence_length must be >= 1, got 0"),
        ({"hidden_features": True}, TypeError, "hidden_features must be an int, got bool"),
        ({"dense_features": -1}, ValueError, "dense_features must be >= 1, got -1"),
        ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1.0"),
        ({"honor_lengths": 1}, TypeError, "honor_lengths must be a bool, got 1"),
        ({"multi_label": "no"}, TypeError, "multi_label must be a bool, got 'no'"),
        ({"modality": ""}, ValueError, "modality must be the name of the features, got ''"),
        ({"modality": 3}, TypeError, "modality must be a str, got int"),
        (
            {"dtype": torch.int64},
            TypeError,
            "dtype must be float16, bfloat16, float32 or float64, got torch.i",
        ),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {"in_features": M, "num_classes": C, "sequence_length": T}
    AttentionBoostedLSTM(**good)
    with pytest.raises(error, match=message):
        AttentionBoostedLSTM(**{**good, **change})


X = torch.zeros(2, 3, M)
BAD_INPUT: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "rank": ({"features": X[0]}, ValueError, r"x must have shape \(B, L, M\), got \(3, 6\).*needs offsets"),
    "features": ({"features": X[..., :5]}, ValueError, "x must have 6 features in its last dimension"),
    "dtype": ({"features": X.double()}, TypeError, "must be torch.float32 as the model, got torch.float64"),
    "no tensor": ({"features": [1.0]}, TypeError, r"features\['features'\] must be a torch.Tensor, got list"),
    "modality": ({"features": {"sound": X}}, ValueError, "must be of the modality 'features', got 'sound'"),
    "none": ({"features": {}}, ValueError, "features must have the modality 'features', got none"),
    "lengths": ({"features": X, "lengths": torch.tensor([4, 1])}, ValueError, "lengths must lie in 0...L"),
    "offsets": ({"features": X[0], "offsets": torch.tensor([0, 4])}, ValueError, "offsets must end at T = 3"),
    "bound": (
        {"features": X[0], "offsets": torch.tensor([0, 3]), "max_length": 2},
        ValueError,
        "max_length must bound every set, got 2 and a set of length 3",
    ),
}


@each_position
@pytest.mark.parametrize(("arguments", "error", "message"), BAD_INPUT.values(), ids=list(BAD_INPUT))
def test_bad_input(position: str, arguments: Any, error: type[Exception], message: str) -> None:
    model = make(position, dtype=torch.float32)
    with pytest.raises(error, match=message):
        model(**arguments)


# Around it


@each_position
@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_autocast(position: str, layout: str) -> None:
    """Features of any float but float64; parameters learn in their own type."""
    model = make(position, dtype=torch.float32)
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


@pytest.mark.filterwarnings("ignore:The tensor attributes self.lstm._flat_weights")
@each_position
@honoring
def test_export(position: str, honor: bool) -> None:
    model = make(position, honor, dtype=torch.float32)
    batch = Dim("batch")
    x = torch.randn(3, T, M)
    program = export(model, (x,), dynamic_shapes={"features": {0: batch}}).module()
    more = torch.randn(6, T, M)
    torch.testing.assert_close(program(more), model(more))
    lengths = {"lengths": torch.tensor([3, T, 1])}
    if honor:
        with pytest.raises(Exception, match="cannot take a packed LSTM: export a model with honor_lengths=F"):
            export(model, (x,), lengths)
        return
    program = export(model, (x,), lengths, dynamic_shapes={"features": {0: batch}, "lengths": {0: batch}})
    counts = torch.tensor([5, 0, 1, 2, 3, 4])
    torch.testing.assert_close(program.module()(more, lengths=counts), model(more, lengths=counts))
    rows, offsets = torch.randn(9, M), torch.tensor([0, 3, 4, 9])
    program = export(
        model,
        (rows,),
        {"offsets": offsets},
        dynamic_shapes={"features": {0: Dim("rows")}, "offsets": {0: Dim("borders", min=3)}},
    )
    rows, offsets = torch.randn(14, M), torch.tensor([0, 0, 3, 10, 11, 14])
    torch.testing.assert_close(program.module()(rows, offsets=offsets), model(rows, offsets=offsets))


def test_compiles_with_packed_videos() -> None:
    """Around the LSTM, at which the graph breaks."""
    torch._dynamo.reset()
    model = make("after")
    arguments = arranged(make_videos(), "packed")
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(**arguments, max_length=7), model(**arguments))
    torch._dynamo.reset()


def test_dropout_is_between_the_dense_layers() -> None:
    model = make("after", dropout=0.75, dense_features=400).train()
    x = torch.randn(1, T, M, dtype=torch.float64)
    seen: list[Tensor] = []
    model.dropout.register_forward_hook(lambda _, given, out: seen.extend((*given, out)))
    model(x)
    given, kept = seen
    assert given.shape == (1, 400) and (given >= 0).all()
    assert 0.15 < (kept[given > 0] > 0).double().mean() < 0.35
    torch.testing.assert_close(kept[kept > 0], 4 * given[kept > 0])
