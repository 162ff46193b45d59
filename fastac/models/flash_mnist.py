"""The system of Long et al. (CVPR 2018, section 4) for Flash-MNIST: a frame CNN, then an attention cluster.

The CNN is trained on single frames and frozen; the classifier sees its features only. Layers and settings are
those of the authors' code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastac import AttentionCluster
from fastac.data.flash_mnist import BLOCK, FlashMNIST, NoisyDigits

MEAN, STD = 0.1307, 0.3081
"""Mean and standard deviation of MNIST's pixels, scaled to 0…1."""

FEATURES = 50
FRAME_CLASSES = 11
"""Ten digits and noise."""


def normalised(frames: np.ndarray | Tensor) -> Tensor:
    """uint8 frames ``(..., 28, 28)`` as float32 ``(n, 1, 28, 28)``, scaled to 0…1 and standardised."""
    pixels = torch.as_tensor(frames).reshape(-1, 1, 28, 28).float()
    return pixels.mul_(1 / (255 * STD)).sub_(MEAN / STD)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Layers this small gain little from a second thread and lose a lot where its core is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class FrameCNN(nn.Module):
    """The feature CNN: ``features`` gives the local features, ``forward`` class log-probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 10, 5)
        self.conv2 = nn.Conv2d(10, 20, 5)
        self.drop2d = nn.Dropout2d(0.5)
        self.fc = nn.Linear(320, FEATURES)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(FEATURES, FRAME_CLASSES)

    def features(self, x: Tensor) -> Tensor:
        """Frames ``(n, 1, 28, 28)`` to local features ``(n, 50)``: the log-softmax over the 50 units."""
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.drop2d(self.conv2(x)), 2))
        x = self.drop(F.relu(self.fc(x.flatten(1))))
        return F.log_softmax(x, dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        """Frames ``(n, 1, 28, 28)`` to log-probabilities ``(n, 11)``."""
        return F.log_softmax(self.head(self.features(x)), dim=-1)


def pretrain(
    cnn: FrameCNN,
    frames: NoisyDigits | Sequence[NoisyDigits],
    *,
    batch_size: int = 64,
    lr: float = 1e-3,
    progress: Callable[[int], object] | None = None,
) -> float:
    """Adam on the frames' classes, one epoch; returns its mean loss. ``progress(n)`` hears of n frames.

    A sequence of sets of frames is one epoch each, and the loss is the last one's.

    The CNN is left in eval mode with frozen parameters, in channels-last layout (twice as fast on CPUs).
    """
    cnn.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    cnn.train().requires_grad_(True)
    optimizer = torch.optim.Adam(cnn.parameters(), lr=lr, fused=True)
    epochs = [frames] if isinstance(frames, NoisyDigits) else frames
    with _one_thread():
        for epoch in epochs:
            total = torch.zeros((), dtype=torch.float64)
            for images, labels in epoch.batches(batch_size):
                x = normalised(images).contiguous(memory_format=torch.channels_last)
                loss = F.nll_loss(cnn(x), torch.from_numpy(labels))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.detach() * len(labels)
                if progress is not None:
                    progress(len(labels))
    cnn.eval().requires_grad_(False)
    return float(total) / len(epochs[-1])


@torch.no_grad()
def frame_accuracy(cnn: FrameCNN, frames: NoisyDigits) -> float:
    """The share of frames whose class the CNN (in eval mode) names."""
    correct = 0
    with _one_thread():
        for images, labels in frames.batches(256):
            x = normalised(images).contiguous(memory_format=torch.channels_last)
            correct += int((cnn(x).argmax(-1) == torch.from_numpy(labels)).sum())
    return correct / len(frames)


def extract_features(
    cnn: FrameCNN,
    videos: FlashMNIST,
    *,
    out: npt.NDArray[np.float32] | None = None,
    progress: Callable[[int], object] | None = None,
) -> npt.NDArray[np.float32]:
    """Local features of all videos, ``(V, length, 50)`` float32. ``progress(n)`` hears of each n videos done.

    Args:
        cnn: in eval mode.
        videos: V of them.
        out: where the features go, a memory-mapped file for instance; a new array unless given.
        progress: called from this thread.

    Raises:
        ValueError: the CNN is in training mode, in which dropout would be in the features; or out has another
            shape or dtype.
    """
    if cnn.training:
        raise ValueError("cnn must be in eval mode, it is in training mode")
    shape = (len(videos), videos.length, FEATURES)
    features = np.empty(shape, dtype=np.float32) if out is None else out
    if features.shape != shape or features.dtype != np.float32:
        raise ValueError(f"out must be {shape} float32, got {features.shape} {features.dtype}")

    def fill(number: int) -> int:
        block = torch.from_numpy(videos.block(number))
        rows = features[number * BLOCK : number * BLOCK + len(block)].reshape(-1, FEATURES)
        with torch.no_grad():
            for first in range(0, len(rows), 400):
                x = normalised(block.view(-1, 28, 28)[first : first + 400])
                computed = cnn.features(x.contiguous(memory_format=torch.channels_last))
                rows[first : first + 400] = computed.numpy()
        return len(block)

    # One block per thread scales; torch's own threads within such small convolutions do not.
    with ThreadPoolExecutor(
        torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        for done in pool.map(fill, range(videos.num_blocks)):
            if progress is not None:
                progress(done)
    return features


class FlashMNISTClassifier(nn.Module):
    """Attention cluster, dropout, one linear layer.

    Args:
        cluster_size: N, the number of attention units.
        weighting, shift: as for ``fastac.AttentionCluster``. "average" repeats the mean N times, as the
            paper's table does, so that the last layer keeps its size.
        in_features: M of the local features.
        num_classes: sets of digits.
        dropout: probability of dropping an entry of the cluster's output.
    """

    def __init__(
        self,
        cluster_size: int = 64,
        *,
        weighting: str = "fc1",
        shift: bool = True,
        in_features: int = FEATURES,
        num_classes: int = 1024,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.cluster: nn.Module = AttentionCluster(
            in_features, cluster_size, weighting=weighting, shift=shift
        )
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(cluster_size * in_features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Local features ``(B, L, M)`` to class scores ``(B, num_classes)``, for ``F.cross_entropy``."""
        scores: Tensor = self.fc(self.dropout(self.cluster(x)))
        return scores


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, labels: Tensor) -> Tensor:
    """One step on features ``(B, L, M)`` and labels ``(B,)``; returns the loss, detached."""
    loss = F.cross_entropy(model(x), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def shuffled_batches(count: int, batch_size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Index tensors that visit 0…count-1 once, in random order."""
    batches: tuple[Tensor, ...] = torch.randperm(count, generator=generator).split(batch_size)
    return batches


@torch.no_grad()
def accuracy(model: nn.Module, features: Tensor, labels: Tensor, *, batch_size: int = 1024) -> float:
    """The share of videos whose label has the highest score; leaves the model in the mode it was in."""
    was_training = model.training
    model.eval()
    correct: int = sum(
        int((model(x).argmax(-1) == y).sum())
        for x, y in zip(features.split(batch_size), labels.split(batch_size), strict=True)
    )
    model.train(was_training)
    return correct / len(labels)
