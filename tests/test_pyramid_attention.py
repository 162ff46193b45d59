"""`fastac.models.pyramid_attention` against its formulas written out in numpy, and what must not matter."""

from __future__ import annotations

import copy
import io
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from pyramid_attention_by_hand import numpy_resized, numpy_video
from torch import Tensor
from torch.autograd import gradcheck

from fastac.models.pyramid_attention import (
    InteractionAwareAttention,
    PyramidOutput,
    SpatioTemporalPyramidAttention,
    diversity_loss,
    resized,
)

NAN = float("nan")
F64 = torch.float64
CHANNELS = (3, 5)
SIZES = ((6, 4), (2, 2))  # of the layers' maps
SIZE = (3, 2)  # that they are brought to
UNITS = 2


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(**options: Any) -> SpatioTemporalPyramidAttention:
    arguments: dict[str, Any] = {"cluster_size": UNITS, "orthonormality": 0.7, "dtype": F64, **options}
    return SpatioTemporalPyramidAttention(CHANNELS, SIZE, **arguments)


def make_maps(*leading: int) -> list[Tensor]:
    return [torch.randn(*leading, c, *size, dtype=F64) for c, size in zip(CHANNELS, SIZES, strict=True)]


def split(maps: list[Tensor], counts: tuple[int, ...]) -> list[list[Tensor]]:
    """Packed maps by video, (1, K, C, H, W)."""
    borders = [0, *np.cumsum(counts).tolist()]
    return [[x[first:last][None] for x in maps] for first, last in pairwise(borders)]


def arranged(maps: list[Tensor], counts: tuple[int, ...], layout: str) -> dict[str, Any]:
    """The arguments for packed maps of videos; NaN where no frame is."""
    if layout == "packed":
        offsets = torch.tensor([0, *np.cumsum(counts).tolist()])
        rest = [torch.full((2, *x.shape[1:]), NAN, dtype=F64) for x in maps]
        return {"maps": [torch.cat([x, r]) for x, r in zip(maps, rest, strict=True)], "offsets": offsets}
    padded = [torch.full((len(counts), max(counts) + 1, *x.shape[1:]), NAN, dtype=F64) for x in maps]
    for number, video in enumerate(split(maps, counts)):
        for x, part in zip(padded, video, strict=True):
            x[number, : counts[number]] = part[0]
    return {"maps": padded, "lengths": torch.tensor(counts)}


# The formulas


def assert_video(got: PyramidOutput, number: int, expected: tuple[Any, ...], weights: Tensor) -> None:
    for what, value in (
        (got.output[number], expected[0]),
        (got.interaction_loss[number], expected[1]),
        (got.diversity_loss[number], expected[2]),
        (weights, expected[3]),
    ):
        np.testing.assert_allclose(what.detach().numpy(), value, rtol=1e-12, atol=1e-13)


COUNTS = (3, 1, 0, 4)


@pytest.mark.parametrize("layout", ["lengths", "packed"])
def test_the_formulas(layout: str) -> None:
    model = make()
    maps = make_maps(sum(COUNTS))
    got = model(**arranged(maps, COUNTS, layout), return_weights=True)
    row = 0
    assert got.weights is not None
    for number, (video, count) in enumerate(zip(split(maps, COUNTS), COUNTS, strict=True)):
        if layout == "packed":
            weights = got.weights[:, row : row + count]
        else:
            weights = got.weights[number, :, :count]
            assert not got.weights[number, :, count:].any()
        row += count
        if count:
            assert_video(got, number, numpy_video(model, video), weights)
        else:
            assert not got.output[number].any()
            assert got.interaction_loss[number] == 0 == got.diversity_loss[number]
    if layout == "packed":
        assert not got.weights[:, row:].any()


@pytest.mark.parametrize("frames", [1, 2, 7])
def test_the_same_weights_take_any_number_of_frames(frames: int) -> None:
    model = make()
    maps = make_maps(2, frames)
    got = model(maps, return_weights=True)
    assert got.weights is not None
    assert got.weights.shape == (2, UNITS, frames, *SIZE)
    torch.testing.assert_close(got.weights.sum((2, 3, 4)), torch.ones(2, UNITS, dtype=F64))
    for number in range(2):
        video = [x[number : number + 1] for x in maps]
        assert_video(got, number, numpy_video(model, video), got.weights[number])


def test_three_scales_and_one() -> None:
    channels, sizes = (3, 5, 2), ((6, 4), (3, 2), (1, 1))
    maps = [torch.randn(1, 2, c, *size, dtype=F64) for c, size in zip(channels, sizes, strict=True)]
    for count in (3, 1):
        model = SpatioTemporalPyramidAttention(channels[:count], SIZE, dtype=F64)
        got = model(maps[:count], return_weights=True)
        assert got.weights is not None
        assert_video(got, 0, numpy_video(model, maps[:count]), got.weights[0])
        assert bool(got.diversity_loss) == (count == 3)


# Gradients


@pytest.mark.parametrize("positions", [1, 4])
def test_gradcheck_of_one_scale(positions: int) -> None:
    layer = InteractionAwareAttention(3, positions, orthonormality=0.7, dtype=F64)
    x = torch.randn(2, positions, 3, dtype=F64, requires_grad=True)

    def both(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))
        return y, layer.interaction_loss(x, y)

    assert gradcheck(both, (x, layer.weight, layer.bias))


@pytest.mark.parametrize("layout", ["dense", "lengths", "packed"])
def test_gradcheck_of_the_pyramid(layout: str) -> None:
    model = SpatioTemporalPyramidAttention((2, 3), (1, 2), cluster_size=2, dtype=F64)
    shapes = ((2, 2, 4), (3, 1, 1))
    arguments: dict[str, Any]
    if layout == "dense":
        arguments = {"maps": [torch.randn(2, 2, *shape, dtype=F64) for shape in shapes]}
    else:
        packed = [torch.randn(3, *shape, dtype=F64) for shape in shapes]
        arguments = arranged(packed, (2, 0, 1), layout)
        arguments["maps"] = [x.nan_to_num(0.5) for x in arguments["maps"]]
    maps = [x.requires_grad_() for x in arguments.pop("maps")]
    names, parameters = zip(*model.named_parameters(), strict=True)

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        state = dict(zip(names, tensors[len(maps) :], strict=True))
        given = {"return_weights": True, **arguments}
        return tuple(torch.func.functional_call(model, state, (list(tensors[: len(maps)]),), given))

    assert gradcheck(run, (*maps, *parameters))


def total(output: PyramidOutput) -> Tensor:
    return output.output.square().sum() + output.interaction_loss.sum() + output.diversity_loss.sum()


@pytest.mark.parametrize("layout", ["lengths", "packed"])
@pytest.mark.parametrize("poison", [NAN, float("inf"), 1e300])
def test_excluded_frames_have_no_influence(layout: str, poison: float) -> None:
    model = make()
    results = []
    for value in (0.0, poison):
        arguments = arranged(make_maps_seeded(sum(COUNTS)), COUNTS, layout)
        maps = [torch.where(x.isnan(), value, x).requires_grad_() for x in arguments.pop("maps")]
        output = model(maps, **arguments)
        model.zero_grad()
        total(output).backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        of_maps = [x.grad for x in maps if x.grad is not None]
        for x, of_x in zip(arranged(make_maps(sum(COUNTS)), COUNTS, layout)["maps"], of_maps, strict=True):
            assert not of_x[x.isnan()].any()
        results.append([*output[:3], *gradients, *of_maps])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def make_maps_seeded(*leading: int) -> list[Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return make_maps(*leading)


# Invariances


def test_frames_may_come_in_any_order() -> None:
    model = make()
    maps = make_maps(2, 6)
    order = torch.randperm(6)
    first = model(maps, return_weights=True)
    second = model([x[:, order] for x in maps], return_weights=True)
    for a, b in zip(first[:3], second[:3], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(first.weights[:, :, order], second.weights, rtol=1e-12, atol=1e-13)


def test_a_repeated_video_changes_nothing() -> None:
    model = make()
    maps = make_maps(1, 2)
    repeated = model([x.repeat(1, 3, 1, 1, 1) for x in maps])
    for a, b in zip(model(maps)[:3], repeated[:3], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_the_interaction_loss_knows_no_scale() -> None:
    layer = InteractionAwareAttention(6, 4)
    x = torch.randn(5, 4, 6)
    y = layer(x)
    for scale in (1e-30, 1e-12, 1e25):
        scaled = (x * scale).requires_grad_()
        loss = layer.interaction_loss(scaled, y)
        torch.testing.assert_close(loss, layer.interaction_loss(x, y), rtol=1e-5, atol=1e-6)
        loss.sum().backward(retain_graph=True)
        assert scaled.grad is not None
        assert scaled.grad.isfinite().all()


@pytest.mark.parametrize("value", [0.0, 0.1, 1e-42, 1e30])
def test_channels_that_are_all_equal_have_no_variance(value: float) -> None:
    layer = InteractionAwareAttention(7, 4)
    x = (torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None].expand(2, 4, 7) * value).clone().requires_grad_()
    y = layer(torch.randn(2, 4, 7)).detach()
    loss = layer.interaction_loss(x, y)
    gram = y @ y.mT - torch.eye(4)
    torch.testing.assert_close(loss, gram.square().sum((1, 2)) / 4)
    loss.sum().backward()
    assert x.grad is not None
    assert not x.grad.any()


def test_a_spread_too_small_to_divide_by_is_none() -> None:
    layer = InteractionAwareAttention(6, 4)
    x = (torch.randn(2, 4, 6) * 1e-40).requires_grad_()
    assert x.detach().any()
    y = torch.eye(4).expand(2, 4, 4)
    loss = layer.interaction_loss(x, y)
    assert not loss.any()
    loss.sum().backward()
    assert x.grad is not None
    assert not x.grad.any()


def test_the_least_interaction_loss() -> None:
    """The minimum that the docstring gives: a bound for all rows of unit norm, reached in two dimensions."""
    p, strength = 2, 0.8
    layer = InteractionAwareAttention(9, p, orthonormality=strength, dtype=F64)
    x = torch.randn(1, p, 9, dtype=F64)
    centred = x[0] - x[0].mean(-1, keepdim=True)
    variances, axes = torch.linalg.eigh(centred @ centred.mT)
    shares = variances / variances.sum()
    least = -1 - p / (4 * strength) * (shares - 1 / p).square().sum()
    angles = torch.rand(500, p, dtype=F64) * 2 * torch.pi
    rows = torch.stack([angles.cos(), angles.sin()], -1)
    losses = layer.interaction_loss(x.expand(500, -1, -1), rows)
    assert (losses >= least - 1e-12).all()
    crowding = 1 + (p * shares - 1) / (2 * strength)  # eigenvalues of Y^T Y
    best = torch.stack([(crowding / p).sqrt(), (crowding / p).sqrt() * torch.tensor([1, -1])])
    best = (best @ axes.mT)[None]
    torch.testing.assert_close(best.norm(dim=-1), torch.ones(1, p, dtype=F64))
    torch.testing.assert_close(layer.interaction_loss(x, best), least[None])
    torch.testing.assert_close(layer.interaction_loss(x, torch.eye(p, dtype=F64)[None]), x.new_full((1,), -1))


def test_diversity_of_equal_opposite_and_orthogonal_rows() -> None:
    y = torch.linalg.qr(torch.randn(3, 4, 4, dtype=F64))[0]
    one = torch.ones(3, dtype=F64)
    torch.testing.assert_close(diversity_loss([y, y]), one)
    torch.testing.assert_close(diversity_loss([y, -y]), one)
    torch.testing.assert_close(diversity_loss([y, y.roll(1, 1)]), 0 * one)
    torch.testing.assert_close(diversity_loss([y, y, y.roll(1, 1)]), one / 3)
    assert not diversity_loss([y]).any()
    with pytest.raises(ValueError, match="attentions must have at least one scale"):
        diversity_loss([])


def test_rows_have_unit_norm_and_a_row_of_zeros_stays_finite() -> None:
    layer = InteractionAwareAttention(3, 4)
    torch.testing.assert_close(layer(torch.randn(2, 4, 3)).norm(dim=-1), torch.ones(2, 4))
    x = torch.randn(2, 4, 3)
    near = InteractionAwareAttention(3, 4, eps=100.0)
    torch.testing.assert_close(near(x), (x @ near.weight + near.bias) / 100)
    with torch.no_grad():
        layer.bias.zero_()
    x = torch.zeros(1, 4, 3, requires_grad=True)
    y = layer(x)
    assert not y.any()
    (y.sum() + layer.interaction_loss(x, y).sum()).backward()
    for tensor in (x, *layer.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()


@pytest.mark.parametrize(
    ("has", "wanted"),
    [((4, 4), (4, 4)), ((6, 4), (3, 2)), ((2, 3), (4, 6)), ((6, 1), (2, 3)), ((1, 8), (5, 2))],
)
def test_resizing(has: tuple[int, int], wanted: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *has, dtype=F64)
    got = resized(x, wanted)
    for a, b in zip(got, x, strict=True):
        np.testing.assert_allclose(a.numpy(), numpy_resized(b.numpy(), wanted), rtol=1e-12, atol=1e-13)
    # A ratio that is no integer keeps constants.
    assert torch.equal(resized(torch.ones(1, 2, 7, 5), (3, 3)), torch.ones(1, 2, 3, 3))


# Layouts, types, state


@pytest.mark.parametrize(
    ("maps", "arguments", "batch"),
    [
        (make_maps(0, 3), {}, 0),
        (make_maps(2, 0), {}, 2),
        (make_maps(0), {"offsets": torch.tensor([0, 0])}, 1),
        (make_maps(0), {"offsets": torch.tensor([0])}, 0),
        (make_maps(2, 3), {"lengths": torch.tensor([0, 0])}, 2),
    ],
)
def test_no_frames_at_all(maps: list[Tensor], arguments: dict[str, Tensor], batch: int) -> None:
    model = make()
    got = model(maps, **arguments, return_weights=True)
    assert got.output.shape == (batch, UNITS, CHANNELS[-1])
    for tensor in got:
        assert not tensor.any()
    total(got).backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_int32_offsets_and_max_length() -> None:
    model, maps = make(), make_maps(5)
    offsets = torch.tensor([0, 2, 5])
    expected = model(maps, offsets=offsets)
    for given in ({"offsets": offsets.int()}, {"offsets": offsets, "max_length": 4}):
        for a, b in zip(model(maps, **given)[:3], expected[:3], strict=True):
            assert torch.equal(a, b)
    with pytest.raises(ValueError, match="max_length must bound every set, got 2"):
        model(maps, offsets=offsets, max_length=2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_types(dtype: torch.dtype) -> None:
    model = make(dtype=dtype)
    maps = [x.to(dtype) for x in make_maps(2, 3)]
    got = model(maps, return_weights=True)
    assert got.output.dtype == dtype
    assert got.interaction_loss.dtype == got.diversity_loss.dtype == got.weights.dtype == torch.float32
    expected = copy.deepcopy(model).double()([x.double() for x in maps], return_weights=True)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


def test_autocast() -> None:
    model = make(dtype=torch.float32)
    maps = [x.float() for x in make_maps(2, 3)]
    expected = model(maps)
    for given in (maps, [x.bfloat16() for x in maps]):  # a CNN puts out either
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = model(given)
        assert [x.dtype for x in got[:3]] == [torch.bfloat16, torch.float32, torch.float32]
        for a, b in zip(got[:3], expected[:3], strict=True):
            torch.testing.assert_close(a.float(), b, rtol=0.05, atol=0.05)


def test_the_interaction_loss_is_not_autocast() -> None:
    layer, x = InteractionAwareAttention(6, 4), torch.randn(2, 4, 6)
    y = layer(x)
    expected = layer.interaction_loss(x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.float32
        assert torch.equal(layer.interaction_loss(x, y), expected)


def test_state() -> None:
    model = make()
    p = SIZE[0] * SIZE[1]
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == {
        "score_weight": (2, p, UNITS),
        "scales.0.weight": (3, p),
        "scales.0.bias": (p,),
        "scales.1.weight": (5, p),
        "scales.1.bias": (p,),
    }
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = make()
    maps = make_maps(1, 2)
    assert not torch.equal(other(maps).output, model(maps).output)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(maps).output, model(maps).output)
    other.reset_parameters()
    for name, parameter in other.named_parameters():
        assert not torch.equal(parameter, model.get_parameter(name)), name
    assert "(3, 5), (3, 2), cluster_size=2" in repr(model)
    assert "5, 6, orthonormality=0.7" in repr(model)


def test_parameters_start_as_those_of_linear_layers() -> None:
    model = SpatioTemporalPyramidAttention((64, 400), (5, 5), cluster_size=40)
    for parameter, inputs in (
        (model.scales[0].weight, 64),
        (model.scales[1].weight, 400),
        (model.scales[1].bias, 400),
        (model.score_weight, 50),
    ):
        assert 0.8 < float(parameter.detach().abs().max()) * inputs**0.5 <= 1


# Wrong input


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"channels": 0}, ValueError, "channels must be >= 1, got 0"),
        ({"channels": 2.0}, TypeError, "channels must be an int, got float"),
        ({"positions": True}, TypeError, "positions must be an int, got bool"),
        ({"orthonormality": -1}, ValueError, "orthonormality must be finite and >= 0, got -1"),
        ({"orthonormality": "1"}, TypeError, "orthonormality must be a number, got str"),
        ({"eps": 0.0}, ValueError, "eps must be finite and > 0, got 0.0"),
        ({"dtype": torch.int64}, TypeError,
         "dtype must be float16, bfloat16, float32 or float64, got torch.int64"),
    ],
)  # fmt: skip
def test_wrong_scales(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        InteractionAwareAttention(**{"channels": 3, "positions": 4, **arguments})
    assert str(caught.value) == message


def test_wrong_input_of_a_scale() -> None:
    layer = InteractionAwareAttention(3, 4)
    x = torch.randn(2, 4, 3)
    wanted = r"x must have shape \(F, P, C\) with P = 4 and C = 3, got \(2, 3, 4\)"
    with pytest.raises(ValueError, match=wanted):
        layer(x.mT)
    with pytest.raises(ValueError, match=wanted):
        layer.interaction_loss(x.mT, layer(x))
    with pytest.raises(TypeError, match=r"x must be torch.float32 as the parameters, got torch.float64"):
        layer(x.double())
    with pytest.raises(TypeError, match=r"x must be a torch.Tensor, got list"):
        layer([x])
    with pytest.raises(ValueError, match=r"x must be on the device of the parameters, cpu, got meta"):
        layer(x.to("meta"))
    with pytest.raises(ValueError, match=r"attention must have shape \(2, 4, 4\), got \(1, 4, 4\)"):
        layer.interaction_loss(x, layer(x)[:1])
    with pytest.raises(TypeError, match=r"attention must be a torch.Tensor, got NoneType"):
        layer.interaction_loss(x, None)
    with pytest.raises(
        TypeError, match=r"attention must be torch.float32 for x of torch.float32, got .*bfloat16"
    ):
        layer.interaction_loss(x, layer(x).bfloat16())
    with pytest.raises(ValueError, match=r"attentions must have at least one scale, got none"):
        diversity_loss([])
    with pytest.raises(TypeError, match=r"attentions\[1\] must be a torch.Tensor, got list"):
        diversity_loss([layer(x), []])
    for other in (layer(x)[:1], layer(x)[0], layer(x)[:, :2]):
        with pytest.raises(ValueError, match=r"attentions must have one shape \(F, P, P\), got"):
            diversity_loss([layer(x), other])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"channels": []}, ValueError, "channels must have at least one layer, got none"),
        ({"channels": 3}, TypeError, "channels must be a sequence of int, got int"),
        ({"channels": "35"}, TypeError, "channels must be a sequence of int, got str"),
        ({"channels": (3, 0)}, ValueError, "channels[1] must be >= 1, got 0"),
        ({"size": 4}, TypeError, "size must be a pair (H, W), got int"),
        ({"size": (4,)}, ValueError, "size must be a pair (H, W), got 1 entries"),
        ({"size": (4, 0)}, ValueError, "size[1] must be >= 1, got 0"),
        ({"cluster_size": 0}, ValueError, "cluster_size must be >= 1, got 0"),
        ({"orthonormality": NAN}, ValueError, "orthonormality must be finite and >= 0, got nan"),
    ],
)
def test_wrong_pyramids(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        SpatioTemporalPyramidAttention(**{"channels": CHANNELS, "size": SIZE, **arguments})
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("change", "arguments", "error", "message"),
    [
        (lambda m: m[0], {}, TypeError, "maps must be a sequence of tensors, one per layer, got Tensor"),
        (lambda m: m[:1], {}, ValueError, "maps must be of 2 layers, got 1"),
        (lambda m: [m[0], 3], {}, TypeError, "maps[1] must be a torch.Tensor, got int"),
        (lambda m: m[::-1], {}, ValueError,
         "maps[0] must have shape (B, K, C, H, W) with C = 3, got (2, 3, 5, 2, 2)"),
        (lambda m: [x[0] for x in m], {}, ValueError,
         "maps[0] must have shape (B, K, C, H, W) with C = 3, got (3, 3, 6, 4); packed maps need offsets"),
        (lambda m: m, {"offsets": torch.tensor([0, 2])}, ValueError,
         "maps[0] must have shape (T, C, H, W) with C = 3, got (2, 3, 3, 6, 4)"),
        (lambda m: [m[0], m[1][..., :0]], {}, ValueError,
         "maps[1] must have shape (B, K, C, H, W) with C = 5, got (2, 3, 5, 2, 0)"),
        (lambda m: [m[0], m[1][:, :2]], {}, ValueError,
         "maps[1] must have the frames of maps[0], (2, 3), got (2, 2)"),
        (lambda m: [m[0], m[1].float()], {}, TypeError,
         "maps[1] must be torch.float64 as the parameters, got torch.float32"),
        (lambda m: [m[0].to("meta"), m[1]], {}, ValueError,
         "maps[0] must be on the device of the parameters, cpu, got meta"),
        (lambda m: m, {"lengths": torch.tensor([1, 4])}, ValueError,
         "lengths must lie in 0...L with L = 3, got values in 1...4"),
        (lambda m: m, {"lengths": torch.tensor([1])}, ValueError,
         "lengths must have shape (B,) with B = 2, got (1,)"),
        (lambda m: m, {"lengths": torch.ones(2)}, TypeError,
         "lengths must be an integer tensor, got torch.float32"),
        (lambda m: [x[0] for x in m], {"offsets": torch.tensor([0, 4])}, ValueError,
         "offsets must end at T = 3 or before, got offsets[-1] = 4"),
        (lambda m: [x[0] for x in m], {"offsets": torch.tensor([0, 3]), "lengths": torch.tensor([3])},
         ValueError, "at most one of lengths, mask and offsets may be given, got lengths and offsets"),
    ],
)  # fmt: skip
def test_wrong_maps(change: Any, arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        make()(change(make_maps(2, 3)), **arguments)
    assert str(caught.value) == message
