"""Videos classified from frames: a CNN, pyramid attention over its layers' maps, one linear layer.

The attention is that of Du et al., ECCV 2018 (`fastac.models.pyramid_attention`, which says what is
stated and what inferred), put on any CNN by the names of its layers and trained with it end to end.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .base import HasScores, VideoClassifier, checked_count, checked_dropout, checked_modality
from .frame_cnn import FrameCNN
from .inputs import Sets, of_modality, one_modality
from .layer_taps import LayerTaps, checked_layers
from .pyramid_attention import PyramidOutput, SpatioTemporalPyramidAttention, checked_size, checked_weight

BACKBONES = ("small", "frame-cnn")
DEFAULT_CHANNELS = (16, 32, 64)


class PyramidScores(NamedTuple):
    """What `PyramidClassifier` returns: class scores (B, C), and the losses (B,) of its attention."""

    scores: Tensor
    interaction_loss: Tensor
    diversity_loss: Tensor


def small_backbone(
    in_channels: int,
    channels: Sequence[int],
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Sequential:
    """``stage1``, ``stage2``, ...: convolution 3x3, ReLU, maximum over 2x2, one for each of the channels."""
    if isinstance(channels, str) or not isinstance(channels, Sequence):
        raise TypeError(f"channels must be a sequence of int, got {type(channels).__name__}")
    if not channels:
        raise ValueError("channels must have at least one stage, got none")
    stages: OrderedDict[str, nn.Module] = OrderedDict()
    before = checked_count("in_channels", in_channels)
    for number, width in enumerate(channels, 1):
        checked_count(f"channels[{number - 1}]", width)
        conv = nn.Conv2d(before, width, 3, padding=1, device=device, dtype=dtype)
        layers: OrderedDict[str, nn.Module] = OrderedDict(conv=conv, relu=nn.ReLU(), pool=nn.MaxPool2d(2))
        stages[f"stage{number}"] = nn.Sequential(layers)
        before = width
    return nn.Sequential(stages)


def frame_cnn_backbone(cnn: FrameCNN | None = None) -> nn.Sequential:
    """The convolutional part of a `FrameCNN`, made of that one's own modules, or of a new one.

    Its stages are ``relu1``, maps (F, 10, 12, 12) of frames 28x28, and ``relu2``, (F, 20, 4, 4). Its state
    dict has the names that these layers have in the CNN's.
    """
    if cnn is None:
        cnn = FrameCNN()
    if not isinstance(cnn, FrameCNN):
        raise TypeError(f"cnn must be a FrameCNN, got {type(cnn).__name__}")
    return nn.Sequential(
        OrderedDict(
            conv1=cnn.conv1,
            pool1=nn.MaxPool2d(2),
            relu1=nn.ReLU(),
            conv2=cnn.conv2,
            drop2d=cnn.drop2d,
            pool2=nn.MaxPool2d(2),
            relu2=nn.ReLU(),
        )
    )


def _built_in_backbone(
    name: object,
    channels: Sequence[int] | None,
    frame_shape: tuple[int, int, int],
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> tuple[nn.Module, list[str], list[int] | None]:
    """A built-in backbone, the names of its stages, and its channels if they can be chosen."""
    if not isinstance(name, str):
        raise TypeError(f"backbone must be a torch.nn.Module or a name, got {type(name).__name__}")
    if name not in BACKBONES:
        raise ValueError(f"backbone must be one of {', '.join(BACKBONES)}, got {name!r}")
    in_channels, height, width = frame_shape
    if name == "frame-cnn":
        if channels is not None:
            raise ValueError(f"channels must not be given for backbone frame-cnn, got {channels}")
        if in_channels != 1 or min(height, width) < 16:
            raise ValueError(
                f"frame_shape must have one channel and 16 or more rows and columns for backbone frame-cnn, "
                f"got {frame_shape}"
            )
        return frame_cnn_backbone().to(device=device, dtype=dtype), ["relu1", "relu2"], None
    channels = DEFAULT_CHANNELS if channels is None else channels
    made = small_backbone(in_channels, channels, device, dtype)
    if min(height, width) < 2 ** len(channels):
        raise ValueError(
            f"frame_shape must have {2 ** len(channels)} or more rows and columns "
            f"for {len(channels)} stages, got {frame_shape}"
        )
    return made, [stage for stage, _ in made.named_children()], list(channels)


def _kind_of(cnn: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
    """The device and floating type of a module's first parameter or buffer that has one."""
    for tensor in chain(cnn.parameters(), cnn.buffers()):
        if tensor.is_floating_point():
            return tensor.device, tensor.dtype
    return None, None


def _frame_shape(given: object) -> tuple[int, int, int]:
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise TypeError(f"frame_shape must be (C, H, W), got {type(given).__name__}")
    if len(given) != 3:
        raise ValueError(f"frame_shape must be (C, H, W), got {len(given)} entries")
    channels, height, width = (checked_count(f"frame_shape[{i}]", size) for i, size in enumerate(given))
    return channels, height, width


def _number(name: str, value: object) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


@torch.no_grad()
def _dry_run(cnn: nn.Module, layers: Sequence[str], frames: Tensor) -> list[Tensor]:
    """The maps of frames in eval mode; every module's mode is as before."""
    modes = [(module, module.training) for module in cnn.modules()]
    cnn.eval()
    try:
        return _maps(cnn, layers, frames)
    finally:
        for module, training in modes:
            module.training = training


def _maps(cnn: nn.Module, layers: Sequence[str], frames: Tensor) -> list[Tensor]:
    """The maps of layers for frames (F, C, H, W)."""
    with LayerTaps(cnn, layers) as taps:
        cnn(frames)
        maps = taps.maps()
    for name, x in zip(layers, maps, strict=True):
        if x.size(0) != frames.size(0):
            raise ValueError(
                f"layer {name!r} must put out one map per frame, F = {frames.size(0)}, got {tuple(x.shape)}"
            )
    return maps


class PyramidClassifier(VideoClassifier):
    """A CNN on every frame, pyramid attention over the maps of some of its layers, dropout, a linear layer.

    Stated by Du et al. (ECCV 2018): the attention inside an ordinary CNN, trained end to end with both its
    losses. Inferred: one linear layer on the weighted positions, the dropout, the weights of the losses.

    A local feature is a frame, a row of C * H * W numbers. The CNN runs on valid frames only, all of a batch
    in one call; to count them, a GPU is waited for once per forward where a layout has padding or offsets.
    All of the CNN runs, also what follows the last of the layers: replace that by ``nn.Identity`` where it
    costs, or where parameters without a gradient are not wanted (``DistributedDataParallel``).

    Args:
        backbone: the CNN, of frames (F, C, H, W); or the name of a built-in one, "small" (`small_backbone`)
            or "frame-cnn" (`frame_cnn_backbone`).
        num_classes: the number of classes.
        frame_shape: (C, H, W).
        channels: of "small" only, the width of each stage; 16, 32, 64 unless given.
        pixel_mean, pixel_std: the CNN sees (frame - pixel_mean) / pixel_std.
        layers: names of the CNN's modules, in order; the maps of the last are what is weighted. All stages of
            a built-in backbone unless given.
        size: (H, W) that all maps are brought to; the smallest map's unless given.
        cluster_size: N, attention units.
        dropout: the probability of dropping an entry of the units' outputs, in [0, 1).
        orthonormality: lambda of the interaction loss.
        interaction_weight, diversity_weight: what the losses of the attention count in ``losses``.
        multi_label: a video has any number of labels, rather than one.
        modality: the name of the frames among a data set's features.
        device, dtype: where and in what type a built-in backbone and the rest are made. With a CNN of your
            own that has parameters, its own are taken, and these must not be given.

    State: what the CNN holds, under ``backbone.``; ``attention_pyramid.scales.<i>.weight`` (C_i, P) and
    ``.bias`` (P,), ``attention_pyramid.score_weight`` (S, P, N); ``fc.weight`` (classes, N * C_last) and
    ``fc.bias``.

    Raises: TypeError for a wrong type, ValueError for a wrong value, and what ``LayerTaps.maps`` raises for
        layers without maps. The maps' sizes are found by running two frames of zeros in eval mode, without
        gradients.
    """

    def __init__(
        self,
        backbone: nn.Module | str,
        num_classes: int,
        *,
        frame_shape: Sequence[int],
        channels: Sequence[int] | None = None,
        pixel_mean: float = 0.0,
        pixel_std: float = 1.0,
        layers: Sequence[str] | None = None,
        size: Sequence[int] | None = None,
        cluster_size: int = 1,
        dropout: float = 0.5,
        orthonormality: float = 1.0,
        interaction_weight: float = 0.1,
        diversity_weight: float = 0.1,
        multi_label: bool = False,
        modality: str = "frames",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_classes, multi_label=multi_label)
        self.frame_shape = _frame_shape(frame_shape)
        self.modality = checked_modality(modality)
        self.interaction_weight = checked_weight("interaction_weight", interaction_weight)
        self.diversity_weight = checked_weight("diversity_weight", diversity_weight)
        p = checked_dropout(dropout)
        self.pixel_mean = _number("pixel_mean", pixel_mean)
        self.pixel_std = _number("pixel_std", pixel_std)
        if self.pixel_std <= 0:
            raise ValueError(f"pixel_std must be > 0, got {pixel_std}")
        self._named: tuple[str, list[int] | None] | None = None
        if isinstance(backbone, nn.Module):
            if channels is not None:
                raise ValueError(f"channels must not be given for a backbone of your own, got {channels}")
            if layers is None:
                raise ValueError("layers must be given for a backbone of your own, got None")
            own_device, own_dtype = _kind_of(backbone)
            if own_dtype is not None:
                if device is not None or dtype is not None:
                    raise ValueError("device and dtype must not be given with a backbone that has its own")
                device, dtype = own_device, own_dtype
        else:
            name = backbone
            backbone, stages, widths = _built_in_backbone(name, channels, self.frame_shape, device, dtype)
            self._named = (name, widths)
            layers = stages if layers is None else layers
            backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.layers = list(checked_layers(backbone, layers))
        self.backbone = backbone
        maps = _dry_run(backbone, self.layers, torch.zeros(2, *self.frame_shape, device=device, dtype=dtype))
        if size is None:
            smallest = min(maps, key=lambda x: x.size(2) * x.size(3))
            size = tuple(smallest.shape[2:])
        self.attention_pyramid = SpatioTemporalPyramidAttention(
            [x.size(1) for x in maps],
            checked_size("size", size),
            cluster_size=cluster_size,
            orthonormality=checked_weight("orthonormality", orthonormality),
            device=device,
            dtype=dtype,
        )
        self.dropout = nn.Dropout(p)
        self.fc = nn.Linear(cluster_size * maps[-1].size(1), num_classes, device=device, dtype=dtype)

    # Configuration

    @property
    def dimensions(self) -> dict[str, int]:
        """The dimension C * H * W of a frame, by the one modality."""
        channels, height, width = self.frame_shape
        return {self.modality: channels * height * width}

    @property
    def config(self) -> dict[str, Any]:
        """What ``from_config`` needs to make this model again, in builtins that JSON and YAML can hold.

        Raises: ValueError for a model on a CNN of your own, which no configuration can name.
        """
        if self._named is None:
            raise ValueError(
                "a PyramidClassifier on a backbone of your own has no config; "
                f"one on {' or '.join(BACKBONES)} has"
            )
        name, channels = self._named
        return {
            "backbone": name,
            "num_classes": self.num_classes,
            "frame_shape": list(self.frame_shape),
            "channels": None if channels is None else list(channels),
            "pixel_mean": self.pixel_mean,
            "pixel_std": self.pixel_std,
            "layers": list(self.layers),
            "size": list(self.attention_pyramid.size),
            "cluster_size": self.attention_pyramid.cluster_size,
            "dropout": self.dropout.p,
            "orthonormality": self.attention_pyramid.scales[0].orthonormality,
            "interaction_weight": self.interaction_weight,
            "diversity_weight": self.diversity_weight,
            "multi_label": self.multi_label,
            "modality": self.modality,
        }

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> PyramidClassifier:
        """A new model on a built-in backbone from a ``config``, which may leave out what has a default.

        Raises: ValueError for an unknown or missing key or a wrong value, TypeError for a wrong type.
        """
        if isinstance(config, Mapping) and isinstance(config.get("backbone"), nn.Module):
            raise TypeError(f"backbone must be one of {', '.join(BACKBONES)} in a config, got a module")
        return super().from_config(config, device=device, dtype=dtype)

    def extra_repr(self) -> str:
        """What the submodules do not show."""
        return f"num_classes={self.num_classes}, layers={self.layers}, frame_shape={self.frame_shape}"

    # Inputs

    def _sets(self, features: object, lengths: object, offsets: object, max_length: object) -> Sets:
        """The checked frames as rows."""
        x = of_modality("features", features, self.modality)
        packed = of_modality("offsets", offsets, self.modality) is not None
        if isinstance(x, Tensor) and not x.is_nested and x.dim() == (4 if packed else 5):
            if tuple(x.shape[-3:]) != self.frame_shape:
                raise ValueError(
                    f"features[{self.modality!r}] must be frames of shape (C, H, W) = {self.frame_shape}, "
                    f"got {tuple(x.shape)}"
                )
            x = x.flatten(-3)
        return one_modality(
            x,
            lengths,
            offsets,
            max_length,
            modality=self.modality,
            in_features=self.dimensions[self.modality],
            like=self.fc.weight,
        )

    def _attend(self, sets: Sets, return_weights: bool = False) -> PyramidOutput:
        """The attention's output for checked frames; the weights (B, N, K, H, W), or (N, valid T, H, W)."""
        x, lengths, offsets, max_length = sets
        batch = None
        if offsets is not None:
            frames = x[: int(offsets[-1])]
        elif lengths is not None:
            lengths = lengths.clamp(0, x.size(1))
            frames = x[_valid(x, lengths)]
            offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
            max_length = x.size(1)
        else:
            batch, frames = x.shape[:2], x.flatten(0, 1)
        frames = frames.unflatten(1, self.frame_shape)
        if (self.pixel_mean, self.pixel_std) != (0.0, 1.0):
            frames = (frames - self.pixel_mean) / self.pixel_std
        if self._named is not None:  # with the weights': 1.6 times as fast on CPUs
            frames = frames.contiguous(memory_format=torch.channels_last)
        maps = _maps(self.backbone, self.layers, frames)
        if batch is not None:
            maps = [y.unflatten(0, batch) for y in maps]
        output: PyramidOutput = self.attention_pyramid(
            maps, offsets=offsets, max_length=max_length, return_weights=return_weights
        )
        return output

    # Use

    def forward(
        self,
        features: Mapping[str, Tensor] | Tensor,
        *,
        lengths: Mapping[str, Tensor] | Tensor | None = None,
        offsets: Mapping[str, Tensor] | Tensor | None = None,
        max_length: Mapping[str, int] | int | None = None,
    ) -> PyramidScores:
        """Class scores of each video, before any softmax or sigmoid, and the losses of its attention.

        Every argument is by modality or bare. A video without frames has the scores of a zero output.

        Args:
            features: frames as rows: (B, L, C * H * W); packed (T, C * H * W), with offsets; or a jagged
                nested tensor. Or as images: (B, L, C, H, W), or packed (T, C, H, W). Of the model's dtype, or
                any float but float64 under autocast.
            lengths: (B,) integer, for frames that are not packed: the valid ones of each video.
            offsets: (B + 1,) int64 or int32, for packed frames: the borders of the videos.
            max_length: an upper bound of the frames of a packed video, a hint.

        Raises: TypeError for a wrong type or dtype; ValueError for a wrong shape, value, device or modality;
            as ``LayerTaps.maps`` where the CNN does not run its layers once.
        """
        attended = self._attend(self._sets(features, lengths, offsets, max_length))
        scores = self.fc(self.dropout(attended.output.flatten(1)))
        return PyramidScores(scores, attended.interaction_loss, attended.diversity_loss)

    def losses(self, output: Tensor | HasScores, labels: Tensor) -> Tensor:
        """The loss of each video, (B,): that of its scores, and the weighted losses of its attention.

        The interaction loss may be negative, and so this: it does not compare with that of other systems.

        Scores alone, a tensor (B, C), have the first part only. Arguments and errors are those of
        `VideoClassifier.losses`.
        """
        losses = super().losses(output, labels)
        if not isinstance(output, PyramidScores):
            return losses
        interaction = self.interaction_weight * output.interaction_loss
        return losses + interaction + self.diversity_weight * output.diversity_loss

    def attention(
        self,
        features: Mapping[str, Tensor] | Tensor,
        *,
        lengths: Mapping[str, Tensor] | Tensor | None = None,
        offsets: Mapping[str, Tensor] | Tensor | None = None,
        max_length: Mapping[str, int] | int | None = None,
    ) -> dict[str, Tensor]:
        """The weights of frames, summed over their positions: (B, N, L), or (N, T) where packed or nested.

        Arguments and errors are those of ``forward``. Excluded frames have weight 0. Differentiable.
        """
        sets = self._sets(features, lengths, offsets, max_length)
        weights = self._attend(sets, return_weights=True).weights
        assert weights is not None
        of_frames = weights.sum((-2, -1))
        x = sets.x
        if sets.offsets is not None:
            of_frames = nn.functional.pad(of_frames, (0, x.size(0) - of_frames.size(1)))
        elif sets.lengths is not None:
            padded = of_frames.new_zeros(*x.shape[:2], of_frames.size(0))
            padded[_valid(x, sets.lengths)] = of_frames.t()
            of_frames = padded.transpose(1, 2)
        return {self.modality: of_frames}


def _valid(x: Tensor, lengths: Tensor) -> Tensor:
    """Which frames of x (B, L, M) are valid, bool (B, L)."""
    return torch.arange(x.size(1), device=x.device) < lengths[:, None]


def attach_pyramid(
    cnn: nn.Module,
    layers: Sequence[str],
    num_classes: int,
    *,
    frame_shape: Sequence[int],
    **options: Any,
) -> PyramidClassifier:
    """A `PyramidClassifier` on layers of a CNN, found by name.

        attach_pyramid(torchvision.models.resnet18(), ["layer3", "layer4"], 101, frame_shape=(3, 224, 224))

    Args:
        cnn: any module of frames (F, C, H, W) whose layers run once in a forward; it is not copied.
        layers, num_classes, frame_shape, options: as for `PyramidClassifier`.

    Raises: as `PyramidClassifier`.
    """
    if not isinstance(cnn, nn.Module):
        raise TypeError(f"cnn must be a torch.nn.Module, got {type(cnn).__name__}")
    return PyramidClassifier(cnn, num_classes, layers=layers, frame_shape=frame_shape, **options)
