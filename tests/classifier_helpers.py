"""A small multimodal classifier, and videos for it in every layout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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
