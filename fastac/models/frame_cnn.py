"""The frame CNN of Long et al. (CVPR 2018, section 4) for Flash-MNIST: trained on single frames, then frozen.

An attention cluster sees its features only. Layers and settings are those of the authors' code.
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

    Raises:
        ValueError: an empty sequence.
    """
    epochs = [frames] if isinstance(frames, NoisyDigits) else list(frames)
    if not epochs:
        raise ValueError("frames must be at least one epoch, got none")
    cnn.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    cnn.train().requires_grad_(True)
    optimizer = torch.optim.Adam(cnn.parameters(), lr=lr, fused=True)
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
    """The share of frames whose class the CNN names.

    Raises:
        ValueError: the CNN is in training mode.
    """
    _check_eval(cnn)
    correct = 0
    with _one_thread():
        for images, labels in frames.batches(256):
            x = normalised(images).contiguous(memory_format=torch.channels_last)
            correct += int((cnn(x).argmax(-1) == torch.from_numpy(labels)).sum())
    return correct / len(frames)


def _check_eval(cnn: FrameCNN) -> None:
    if cnn.training:
        raise ValueError("cnn must be in eval mode, it is in training mode")


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
    _check_eval(cnn)
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
