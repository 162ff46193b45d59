"""What the results call things: workloads, modes, contenders, and a colour for each contender."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import NamedTuple


class Shape(NamedTuple):
    """Sizes of a named workload; the length as text, since sets may differ in it."""

    batch: int
    length: str
    in_features: int
    cluster_size: int
    stands_for: str


WORKLOADS = {
    "kinetics-rgb": Shape(256, "25", 1536, 64, "the paper's best RGB cluster, Inception-ResNet-v2 features"),
    "kinetics-flow": Shape(256, "25", 1536, 32, "the paper's flow cluster"),
    "ucf-resnet": Shape(256, "20", 2048, 64, "ResNet-152 features, test-time length"),
    "flash-mnist": Shape(1024, "25", 50, 64, "the paper's toy set"),
    "yt8m-rgb": Shape(64, "300", 1024, 128, "YouTube-8M frames"),
    "yt8m-audio": Shape(64, "300", 128, 32, "YouTube-8M audio"),
    "ragged": Shape(256, "1–300", 1024, 64, "untrimmed clips, packed"),
    "mil-bag": Shape(1, "131072", 1024, 8, "one whole-slide image; scores computed outside"),
    "online": Shape(1, "25", 1536, 64, "one clip, latency"),
}

MODES = {
    "forward": "forward, nothing requires grad",
    "backward": "gradients alone, x requires grad; the forward is outside the clock",
    "training": "forward + backward, x requires grad",
    "frozen": "forward + backward, x frozen",
}
"""In the order of the tables; "step", a whole training step, has a table of its own."""

SAME = "the same"
"""What a contender computes that has the same operands and the same result as ours."""

COLOURS = {
    "ours": "#0072B2",
    "eager": "#D55E00",
    "compile": "#009E73",
    "compile-max-autotune": "#56B4E9",
    "sdpa": "#CC79A7",
    "flex": "#E69F00",
    "timm-style": "#882255",
    "set-transformer": "#999933",
    "netvlad": "#332288",
    "mean": "#666666",
}
"""Colours that colour-blind readers tell apart (Okabe and Ito; Tol); no picture needs them all."""

SPARE = ("#117733", "#AA4499", "#DDCC77", "#661100", "#44AA99")


def colour(contender: str) -> str:
    """The contender's colour, the same in every picture."""
    return COLOURS.get(contender) or SPARE[zlib.crc32(contender.encode()) % len(SPARE)]


def order(known: Iterable[str], found: Iterable[str]) -> list[str]:
    """The names found, each once, the known ones first and in their order."""
    names, first = dict.fromkeys(found), dict.fromkeys(known)
    return [*(name for name in first if name in names), *(name for name in names if name not in first)]
