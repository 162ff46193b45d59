"""The named workloads and their cost model.

    B sets, L local features each, M features, N attention units
    T rows in all sets together: B L, or less if ragged

Operations count a multiply-add as two. x, weight, scores and dy are normal random data; alpha and beta are
drawn as the module initialises them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

MODES = {
    "forward": "forward, nothing requires grad",
    "training": "forward + backward, x requires grad",
    "frozen": "forward + backward, x frozen",
    "backward": "gradients alone, x requires grad; the forward is outside the clock",
}


@dataclass(frozen=True)
class Workload:
    """Sizes of one benchmark; `scores` is "fc1" (scores = x W^T) or "given" (attention_pool)."""

    name: str
    batch: int
    length: int
    in_features: int
    cluster_size: int
    stands_for: str
    scores: str = "fc1"
    ragged: bool = False
    full_batch: int | None = None
    """Batch of the workload's definition where `batch` is a reduction of it."""

    def describe(self) -> str:
        length = f"1..{self.length}" if self.ragged else str(self.length)
        text = f"B={self.batch} L={length} M={self.in_features} N={self.cluster_size}"
        if self.full_batch is not None:
            text += f" (B reduced from {self.full_batch})"
        if self.scores == "given":
            text += ", scores given"
        if self.ragged:
            text += ", ours packed, peers padded with a mask"
        return text

    def reduced(self, divisor: int) -> Workload:
        """The same workload with B divided, at least 1."""
        batch = max(1, self.batch // divisor)
        if batch == self.batch:
            return self
        return replace(self, batch=batch, full_batch=self.full_batch or self.batch)

    def operations(self, rows: int, mode: str) -> int:
        """Floating-point operations for `rows` = T rows of x.

        A product of T rows with (N, M) is 2 T M N. fc1: scores and sums forward, then dA, dW, and two for dX.
        Scores given: one product less forward (no scores), no dW, no part of dX that runs through W.
        """
        products = {
            "fc1": {"forward": 2, "training": 2 + 4, "frozen": 2 + 2, "backward": 4},
            "given": {"forward": 1, "training": 1 + 2, "frozen": 1 + 1, "backward": 2},
        }
        return products[self.scores][mode] * 2 * rows * self.in_features * self.cluster_size

    def bytes_moved(self, rows: int, mode: str, element_size: int) -> int:
        """Bytes that must move.

        (T + B N) M elements forward, (T + 2 B N) M more backward, T M more for dX, the scores where given.
        """
        units = self.batch * self.cluster_size
        forward = rows + units
        rows_moved = {
            "forward": forward,
            "frozen": forward + rows + 2 * units,
            "training": forward + 2 * rows + 2 * units,
            "backward": 2 * rows + 2 * units,
        }[mode]
        moved = rows_moved * self.in_features
        if self.scores == "given":  # read; read again, gradient
            times = {"forward": 1, "backward": 2}.get(mode, 3)
            moved += rows * self.cluster_size * times
        return moved * element_size

    def operand_bytes(self, rows: int, mode: str, element_size: int) -> int:
        """Bytes of x, y and the gradients that a call in a mode returns."""
        units = self.batch * self.cluster_size
        elements = (rows + units) * self.in_features
        if mode != "forward":
            mix = rows if self.scores == "given" else self.in_features
            elements += (mix + 2) * self.cluster_size
        if mode in ("training", "backward"):
            elements += rows * self.in_features
        return elements * element_size


WORKLOADS = {
    w.name: w
    for w in (
        Workload(
            "kinetics-rgb", 256, 25, 1536, 64, "the paper's best RGB cluster, Inception-ResNet-v2 features"
        ),
        Workload("kinetics-flow", 256, 25, 1536, 32, "the paper's flow cluster"),
        Workload("ucf-resnet", 256, 20, 2048, 64, "ResNet-152 features, test-time length"),
        Workload("flash-mnist", 1024, 25, 50, 64, "the paper's toy set"),
        Workload("yt8m-rgb", 64, 300, 1024, 128, "YouTube-8M frames"),
        Workload("yt8m-audio", 64, 300, 128, 32, "YouTube-8M audio"),
        Workload("ragged", 256, 300, 1024, 64, "untrimmed clips, packed", ragged=True),
        Workload(
            "mil-bag", 1, 131072, 1024, 8, "one whole-slide image; scores computed outside", scores="given"
        ),
        Workload("online", 1, 25, 1536, 64, "one clip, latency"),
    )
}

OVERHEAD = Workload("call overhead", 1, 4, 16, 4, "what a call costs before it computes anything")


@dataclass
class Case:
    """Operands of one workload. A ragged x is packed: (T, M) with offsets (B + 1,); otherwise (B, L, M)."""

    workload: Workload
    x: Tensor
    mix: Tensor  # weight (N, M), or scores (B, N, L)
    alpha: Tensor  # (N,)
    beta: Tensor  # (N,)
    dy: Tensor  # (B, N, M)
    offsets: Tensor | None = None

    @property
    def rows(self) -> int:
        return self.x.numel() // self.x.size(-1)

    def to(self, dtype: torch.dtype) -> Case:
        cast = {name: getattr(self, name).to(dtype) for name in ("x", "mix", "alpha", "beta", "dy")}
        return replace(self, **cast)

    def padded(self) -> tuple[Tensor, Tensor | None]:
        """Return x as (B, L, M), zeros after each set, and the mask (B, L) of valid positions (None: all)."""
        if self.offsets is None:
            return self.x, None
        sets = torch.split(self.x, self.offsets.diff().tolist())
        padded = torch.nn.utils.rnn.pad_sequence(list(sets), batch_first=True)
        return padded, torch.arange(padded.size(1)) < self.offsets.diff().unsqueeze(1)


def make_case(workload: Workload, dtype: torch.dtype = torch.float32, seed: int = 0) -> Case:
    """Random operands of a workload; the same seed gives the same numbers for every contender."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    b, length, m, n = workload.batch, workload.length, workload.in_features, workload.cluster_size
    offsets = None
    shape: tuple[int, ...] = (b, length, m)
    if workload.ragged:
        lengths = torch.randint(1, length + 1, (b,), generator=generator)
        offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        shape = (int(offsets[-1]), m)
    case = Case(
        workload,
        x=normal(*shape),
        mix=normal(b, n, length) if workload.scores == "given" else normal(n, m) * m**-0.5,
        alpha=normal(n) * n**-0.25,
        beta=normal(n) * n**-0.25,
        dy=normal(b, n, m),
        offsets=offsets,
    )
    return case.to(dtype)
