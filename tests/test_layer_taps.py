"""`fastac.models.layer_taps`: the right maps, and no hooks left."""

from __future__ import annotations

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastac.models.layer_taps import LayerTaps, checked_layers


class Residual(nn.Module):
    """A block as ResNets have it: an in-place ReLU that runs twice, an in-place sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 2, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(self.relu(self.conv1(x)))
        out += x
        return self.relu(out)


class Net(nn.Module):
    """Blocks, a head that is no map, a layer that does not run and one that gives a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 2, 3)
        self.blocks = nn.Sequential(Residual(), Residual())
        self.pair = nn.LSTM(2, 3, batch_first=True)
        self.head = nn.Linear(3, 4)
        self.idle = nn.Conv2d(2, 2, 1)
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        if self.fails:
            raise FloatingPointError("planted")
        return self.head(self.pair(x.mean((2, 3))[:, None])[0][:, -1])


def hooks(module: nn.Module) -> int:
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in module.modules()
    )


FRAMES = torch.randn(3, 1, 6, 5)


def test_maps_are_the_outputs_of_the_layers() -> None:
    net = Net()
    with LayerTaps(net, ["blocks.1", "stem", "blocks.0.conv2"]) as taps:
        assert hooks(net) == 4
        net(FRAMES)
        last, stem, conv2 = taps.maps()
    assert hooks(net) == 0
    # What later layers change in place is the output before it: computed here without them.
    expected = net.stem(FRAMES)
    assert torch.equal(stem, expected)
    block = net.blocks[0]
    inner = block.conv2(block.conv1(expected).relu())
    assert torch.equal(conv2, inner)
    assert inner.min() < 0  # else a ReLU would not have shown
    first = (inner + expected).relu()
    block = net.blocks[1]
    assert torch.equal(last, (block.conv2(block.conv1(first).relu()) + first).relu())


def test_a_map_before_a_relu_in_place_has_its_gradient() -> None:
    """Against the same CNN without in-place layers."""
    results = []
    for inplace in (True, False):
        torch.manual_seed(3)
        net = nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.ReLU(inplace), nn.Conv2d(2, 2, 3), nn.Hardtanh(-0.1, 0.1, inplace)
        )
        with LayerTaps(net, ["0", "1", "2"]) as taps:
            y = net(FRAMES)
            maps = taps.maps()
        (y.sum() + sum((i + 1) * x.square().sum() for i, x in enumerate(maps))).backward()
        results.append([*maps, *(p.grad for p in net.parameters())])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_hooks_go_when_the_forward_raises() -> None:
    net = Net()
    net.fails = True
    with pytest.raises(FloatingPointError, match="planted"), LayerTaps(net, ["stem"]):
        net(FRAMES)
    assert hooks(net) == 0


def test_no_hook_is_set_when_a_name_is_wrong() -> None:
    net = Net()
    with pytest.raises(ValueError, match="stemm"):
        LayerTaps(net, ["stem", "stemm"])
    assert hooks(net) == 0


def test_hooks_that_stay_see_every_forward() -> None:
    net = Net()
    mine: list[int] = []
    own = net.stem.register_forward_hook(lambda *_: mine.append(1))
    taps = LayerTaps(net, ["stem"])
    for frames in (FRAMES, FRAMES[:1]):
        net(frames)
    (maps,) = taps.maps()  # those of the last
    assert torch.equal(maps, net.stem(FRAMES[:1]))
    net.fails = True
    with pytest.raises(FloatingPointError):
        net(FRAMES)
    net.fails = False
    net(FRAMES)  # what the failed one kept does not count
    assert taps.maps()[0].size(0) == 3
    with pytest.raises(
        RuntimeError, match="layer 'stem' must run once in a forward of the CNN, it did not run"
    ):
        taps.maps()
    net(FRAMES)
    taps.remove()
    taps.remove()
    with pytest.raises(RuntimeError, match="it did not run"):  # what it kept is freed
        taps.maps()
    assert hooks(net) == 1
    own.remove()
    assert mine


def test_two_names_of_one_module() -> None:
    net = Net()
    net.alias = net.stem
    with LayerTaps(net, ["alias", "stem"]) as taps:
        net(FRAMES)
        alias, stem = taps.maps()
    assert torch.equal(alias, stem)
    assert torch.equal(alias, net.stem(FRAMES))
    assert hooks(net) == 0


@pytest.mark.parametrize(
    ("layer", "error", "message"),
    [
        ("blocks.0.relu", RuntimeError,
         "layer 'blocks.0.relu' must run once in a forward of the CNN, it ran 2 times"),
        ("idle", RuntimeError, "layer 'idle' must run once in a forward of the CNN, it did not run"),
        ("pair", TypeError, "layer 'pair' must put out a tensor, got tuple"),
        ("head", ValueError, "layer 'head' must put out maps of shape (F, C, H, W), got (3, 4)"),
    ],
)  # fmt: skip
def test_layers_without_maps(layer: str, error: type[Exception], message: str) -> None:
    net = Net()
    with pytest.raises(error) as caught, LayerTaps(net, ["stem", layer]) as taps:
        net(FRAMES)
        taps.maps()
    assert str(caught.value) == message
    assert hooks(net) == 0


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        ("stem", TypeError, "layers must be a sequence of names, got str"),
        (3, TypeError, "layers must be a sequence of names, got int"),
        ([], ValueError, "layers must have at least one name, got none"),
        ([3], TypeError, "layers must be names of type str, got 3"),
        (["stem", "stem"], ValueError, "layers must be distinct, got 'stem' twice"),
        (["blocks.0.conv3"], ValueError,
         "layers must be modules of the CNN, got 'blocks.0.conv3'; close are "
         "blocks.0.conv2, blocks.0.conv1, blocks.1.conv2, blocks.1.conv1, blocks.0"),
        (["zzz"], ValueError,
         "layers must be modules of the CNN, got 'zzz'; known are stem, blocks, blocks.0, blocks.0.conv1, "
         "blocks.0.relu, blocks.0.conv2, blocks.1, blocks.1.conv1, blocks.1.relu, blocks.1.conv2, pair, "
         "head, idle"),
        ([""], ValueError, None),  # the CNN itself is no layer
    ],
)  # fmt: skip
def test_wrong_names(layers: Any, error: type[Exception], message: str | None) -> None:
    with pytest.raises(error) as caught:
        checked_layers(Net(), layers)
    assert message is None or str(caught.value) == message


def test_a_list_of_names_is_cut() -> None:
    with pytest.raises(ValueError, match=r"19 and 5 more$"):
        checked_layers(nn.Sequential(*(nn.Identity() for _ in range(25))), ["conv"])
    with pytest.raises(TypeError, match=r"cnn must be a torch.nn.Module, got str"):
        checked_layers("resnet", ["conv"])  # type: ignore[arg-type]


def test_copies_made_afterwards_have_no_hooks() -> None:
    net = Net()
    with LayerTaps(net, ["stem"]) as taps:
        net(FRAMES)
        taps.maps()
    for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert hooks(copied) == 0
        assert torch.equal(copied(FRAMES), net(FRAMES))


def maps_alone(net: Net, x: Tensor) -> list[Tensor]:
    with LayerTaps(net, ["stem", "blocks.1"]) as taps:
        net(x)
        return taps.maps()


def test_threads_do_not_see_each_other_s_maps() -> None:
    """Two forwards of one CNN that are under way at the same time, each with its own taps."""
    net = Net()
    together = threading.Barrier(2, timeout=20)

    def meet(*_: object) -> None:
        together.wait()

    own = net.stem.register_forward_hook(meet)
    frames = [torch.full_like(FRAMES, float(value)) for value in (1, 2)]

    def maps(x: Tensor) -> list[Tensor]:
        with LayerTaps(net, ["stem", "blocks.1"]) as taps:
            net(x)
            return taps.maps()

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(maps, frames))
    own.remove()
    for x, of_thread in zip(frames, found, strict=True):
        for a, b in zip(of_thread, maps_alone(net, x), strict=True):
            assert torch.equal(a, b)
    assert hooks(net) == 0
