"""``python -m fastac demo``: Flash-MNIST end to end, on a reduced set, in a few minutes on two cores.

Trains the paper's frame CNN on digits in noise, then an attention cluster of 64 units with shift on its
features through the fused operator, compares that with plain torch step by step, and draws what the units
look at.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import itertools
import math
import os
import pickle
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastac
from fastac import _native, backends

if TYPE_CHECKING:
    from fastac.data import Digits, FlashMNIST
    from fastac.models import FlashMNISTClassifier, FrameCNN

CLUSTER_SIZE = 64
BATCH_SIZE = 64
LEARNING_RATE = 1e-3
COMPARED_STEPS = 60
WARM_UP_STEPS = 10
AGREEMENT = 1e-3
"""Largest relative difference of the two losses of one step that still counts as agreement."""

UNITS_SHOWN = 8
CACHE_FORMAT = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo; returns the exit status: 0, 1 if the implementations disagree, 2 if it cannot run."""
    arguments = _parser().parse_args(argv)
    for name in ("numpy", "tqdm", "matplotlib"):
        try:
            importlib.import_module(name)
        except ImportError:
            print(
                f"The demo needs {name}, which is not installed: pip install 'fastac[demo]'", file=sys.stderr
            )
            return 2
    # These import NumPy, which the package itself does not need.
    from fastac.data import DigestMismatchError

    try:
        return _run(arguments)
    except (DigestMismatchError, FileNotFoundError, ImportError) as error:
        print(f"The demo stops: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    def at_least(minimum: int) -> Callable[[str], int]:
        def integer(text: str) -> int:
            if int(text) < minimum:
                raise ValueError
            return int(text)

        integer.__name__ = f"integer of at least {minimum}"
        return integer

    parser = argparse.ArgumentParser(
        prog="python -m fastac demo",
        description="Trains an attention cluster on a reduced Flash-MNIST (Long et al., CVPR 2018) and draws "
        "what its units attend to.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--epochs", type=at_least(1), default=20, help="epochs of the attention cluster")
    parser.add_argument(
        "--seed", type=at_least(0), default=1, help="seed of data, initial values and dropout"
    )
    parser.add_argument("--output", type=Path, default=Path("flash_mnist.png"), help="where the picture goes")
    parser.add_argument("--no-cache", action="store_true", help="neither read nor write cached features")
    parser.add_argument(
        "--data",
        choices=("auto", "digits"),
        default="auto",
        help="auto: MNIST, or scikit-learn's digits where it cannot be had; digits: the latter at once",
    )
    parser.add_argument(
        "--train-videos", type=at_least(1), default=20, help="training videos per set of digits"
    )
    parser.add_argument("--test-videos", type=at_least(1), default=5, help="test videos per set of digits")
    parser.add_argument(
        "--cnn-frames", type=at_least(64), default=300_000, help="digit frames the CNN trains on"
    )
    return parser


def _run(arguments: argparse.Namespace) -> int:
    from fastac.data import load_digits28, load_mnist
    from fastac.models import FlashMNISTClassifier

    started = time.perf_counter()
    backend = backends.current or ("cpu" if _native.available else "reference")
    print(f"fastac demo: Flash-MNIST, torch {torch.__version__}, {torch.get_num_threads()} threads")
    if backend == "cpu" and _native.available:
        print("attention cluster: the fused native operator")
    elif backends.current is None:
        print(
            f"The native operator is not available ({_native.why_not}): running on the plain torch reference."
        )
    else:
        print(f"attention cluster: backend {backend!r}, as FASTAC_BACKEND or fastac.backend asks")

    digits = load_digits28() if arguments.data == "digits" else load_mnist()
    print(
        f"digits: {digits.source}, {len(digits.train_images):,} for training, "
        f"{len(digits.test_images):,} for testing"
    )
    prepared = _prepare(digits, arguments)
    train, test = prepared.train_features, prepared.test_features
    train_labels = torch.from_numpy(prepared.train.set_labels)
    test_labels = torch.from_numpy(prepared.test.set_labels)

    torch.manual_seed(arguments.seed)
    model = FlashMNISTClassifier(CLUSTER_SIZE)
    initial = copy.deepcopy(model)
    with fastac.backend(backend):
        final = _train(model, (train, train_labels), (test, test_labels), arguments)
        comparison = compare_with_plain_torch(
            initial, train, train_labels, seed=arguments.seed, steps=COMPARED_STEPS
        )
        picture = _draw_test_video(model, prepared, arguments.output)
    ours = "fused" if backend == "cpu" else backend
    agree = comparison.difference <= AGREEMENT
    print(f"the same {COMPARED_STEPS} steps, {ours} and plain torch in turn (median times):")
    print(f"  cluster, forward + backward  {comparison.cluster.describe(ours)}")
    print(f"  whole training step          {comparison.step.describe(ours)}")
    verdict = "agree" if agree else "DO NOT AGREE"
    print(f"  losses {verdict}: largest relative difference {comparison.difference:.1e}")
    print()
    print("summary")
    print(
        f"  test accuracy         {final:.1%} "
        f"(chance {1 / prepared.test.num_sets:.2%}; {_size_of_set(arguments)})"
    )
    print(f"  frame accuracy (CNN)  {prepared.frame_accuracy:.1%}")
    print(
        f"  speed, cluster alone  {comparison.cluster.ratio:.2f} x plain torch "
        f"(whole step {comparison.step.ratio:.2f} x)"
    )
    print(f"  picture               {picture.resolve()}")
    print(f"  time                  {time.perf_counter() - started:.0f} s")
    return 0 if agree else 1


def _size_of_set(arguments: argparse.Namespace) -> str:
    full = arguments.train_videos >= 100 and arguments.test_videos >= 10
    return "a full set" if full else "a reduced set"


@dataclass
class Prepared:
    """The videos of both splits, their features, and the CNN's accuracy on single test frames."""

    train: FlashMNIST
    test: FlashMNIST
    train_features: Tensor
    test_features: Tensor
    frame_accuracy: float


def _prepare(digits: Digits, arguments: argparse.Namespace) -> Prepared:
    """Describes the videos, trains the CNN and extracts features, or takes the features from the cache."""
    from fastac.data import FlashMNIST, NoiseSampler, NoisyDigits
    from fastac.data.mnist import cache_dir
    from fastac.models import FrameCNN
    from fastac.models.flash_mnist import extract_features, frame_accuracy, pretrain

    seed = arguments.seed
    noise = NoiseSampler(digits)
    train = FlashMNIST(
        digits.train_images, digits.train_labels, noise, videos_per_set=arguments.train_videos, seed=4 * seed
    )
    test = FlashMNIST(
        digits.test_images, digits.test_labels, noise, videos_per_set=arguments.test_videos, seed=4 * seed + 1
    )
    print(
        f"videos: {len(train):,} for training, {len(test):,} for testing "
        f"({arguments.train_videos} and {arguments.test_videos} per set of digits; "
        f"{_size_of_set(arguments)}, the paper's has 100 and 10)"
    )
    name = (
        f"flash-mnist-{digits.name}-cnn{arguments.cnn_frames}-train{arguments.train_videos}"
        f"-test{arguments.test_videos}-seed{seed}-v{CACHE_FORMAT}.pt"
    )
    path = cache_dir() / name
    if not arguments.no_cache:
        cached = _read_cache(path)
        if cached is not None:
            print(f"reusing the features of an earlier run: {path} (--no-cache computes them again)")
            return Prepared(train, test, cached["train"], cached["test"], cached["frame_accuracy"])

    torch.manual_seed(seed)
    cnn: FrameCNN = FrameCNN()
    frames = NoisyDigits(
        digits.train_images, digits.train_labels, noise, count=arguments.cnn_frames, seed=4 * seed + 2
    )
    with _stage(
        f"training the frame CNN, one epoch of {len(frames):,} frames", len(frames), "frames"
    ) as advance:
        pretrain(cnn, frames, progress=advance)
    test_frames = NoisyDigits(
        digits.test_images, digits.test_labels, noise, count=len(digits.test_images), seed=4 * seed + 3
    )
    correct = frame_accuracy(cnn, test_frames)
    print(f"frame accuracy on {len(test_frames):,} test frames: {correct:.1%}")
    count = len(train) + len(test)
    with _stage(f"extracting the features of {count:,} videos", count, "videos") as advance:
        train_features = extract_features(cnn, train, progress=advance)
        test_features = extract_features(cnn, test, progress=advance)
    if not arguments.no_cache:
        _write_cache(path, {"train": train_features, "test": test_features, "frame_accuracy": correct})
    return Prepared(train, test, train_features, test_features, correct)


def _read_cache(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content: dict[str, Any] = torch.load(path, weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        print(f"the cached features {path} cannot be read ({error}): computing them again")
        return None
    return content


def _write_cache(path: Path, content: dict[str, Any]) -> None:
    """Saves beside ``path`` and renames. A full disk or a read-only home slows the next run, not this one."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
        with os.fdopen(descriptor, "wb") as file:
            torch.save(content, file)
        os.replace(temporary, path)
        print(f"features cached for the next run: {path} ({path.stat().st_size / 1e6:.0f} MB)")
    except (OSError, RuntimeError) as error:
        print(f"the features could not be cached ({error})")
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _train(
    model: FlashMNISTClassifier,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    arguments: argparse.Namespace,
) -> float:
    """Trains the classifier, printing test accuracy per epoch; returns the last one."""
    from fastac.models.flash_mnist import accuracy, shuffled_batches, train_step

    features, labels = train
    torch.manual_seed(arguments.seed)
    order = torch.Generator().manual_seed(arguments.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True)
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"training {CLUSTER_SIZE} attention units with shift and the last layer ({parameters:,} parameters):"
    )
    reached = 0.0
    for epoch in range(1, arguments.epochs + 1):
        started = time.perf_counter()
        total = torch.zeros((), dtype=torch.float64)
        with _bar(f"epoch {epoch}", len(labels), "videos") as bar:
            for batch in shuffled_batches(len(labels), BATCH_SIZE, order):
                total += train_step(model, optimizer, features[batch], labels[batch]) * len(batch)
                bar.update(len(batch))
        seconds = time.perf_counter() - started
        reached = accuracy(model, *test)
        loss = float(total) / len(labels)
        print(
            f"  epoch {epoch:2d}/{arguments.epochs}  loss {loss:.4f}  test accuracy {reached:6.1%}"
            f"  ({seconds:.1f} s)",
            flush=True,
        )
    return reached


class PlainAttentionCluster(nn.Module):
    """The same cluster as one writes it in plain torch, with the parameters of ``cluster`` copied."""

    def __init__(self, cluster: nn.Module) -> None:
        super().__init__()
        self.weight = nn.Parameter(cluster.get_parameter("weight").detach().clone())  # (N, M)
        self.alpha = nn.Parameter(cluster.get_parameter("alpha").detach().clone())  # (N,)
        self.beta = nn.Parameter(cluster.get_parameter("beta").detach().clone())  # (N,)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, L, M)`` to ``(B, N*M)``."""
        weights = F.linear(x, self.weight).softmax(dim=1)  # Eq. 4: a = softmax over L of x Wᵀ, (B, L, N)
        z = weights.transpose(1, 2) @ x  # Eq. 2: (B, N, M)
        u = self.alpha[:, None] * z + self.beta[:, None]
        y: Tensor = F.normalize(u, dim=-1) / self.weight.size(0) ** 0.5  # Eq. 7
        return y.flatten(1)


@dataclass
class Times:
    """Median seconds of the operator's path and of plain torch, taken in turn."""

    ours: float
    plain: float

    @property
    def ratio(self) -> float:
        """How many times faster the operator's path is."""
        return self.plain / self.ours

    def describe(self, name: str) -> str:
        """Both times in milliseconds and their ratio."""
        return f"{name} {self.ours * 1e3:6.2f} ms   plain {self.plain * 1e3:6.2f} ms   {self.ratio:.2f} x"


@dataclass
class Comparison:
    """Outcome of training two copies of one model side by side."""

    step: Times
    cluster: Times
    losses: list[tuple[float, float]]

    @property
    def difference(self) -> float:
        """Largest relative difference of the two losses of one step; infinite if a loss is not finite."""
        if not all(map(math.isfinite, itertools.chain(*self.losses))):
            return math.inf
        return max(abs(a - b) / abs(b) for a, b in self.losses)


def compare_with_plain_torch(
    initial: FlashMNISTClassifier,
    features: Tensor,
    labels: Tensor,
    *,
    seed: int,
    steps: int,
) -> Comparison:
    """Trains two copies of ``initial`` on the same batches and dropout masks, one with a plain torch cluster.

    Both take every step one after the other, in changing order: what else the machine does meets both.
    """
    from fastac.models.flash_mnist import shuffled_batches, train_step

    ours, plain = copy.deepcopy(initial).train(), copy.deepcopy(initial).train()
    plain.cluster = PlainAttentionCluster(initial.cluster)
    models = (ours, plain)
    optimizers = [torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True) for model in models]
    order = torch.Generator().manual_seed(seed)
    batches: list[Tensor] = []
    while len(batches) < steps:
        batches.extend(shuffled_batches(len(labels), BATCH_SIZE, order))
    losses = []
    step_times: tuple[list[float], list[float]] = ([], [])
    cluster_times: tuple[list[float], list[float]] = ([], [])
    dy = torch.randn(BATCH_SIZE, initial.fc.in_features)
    with _bar("comparing", steps, "steps") as bar:
        for step, batch in enumerate(batches[:steps]):
            x, y = features[batch], labels[batch]
            turn = (0, 1) if step % 2 == 0 else (1, 0)
            loss = [0.0, 0.0]
            for which in turn:
                torch.manual_seed(seed + step)  # the same dropout mask for both
                with _timed(step_times[which]):
                    value = train_step(models[which], optimizers[which], x, y)
                loss[which] = float(value)
            losses.append((loss[0], loss[1]))
            bar.update(1)
    with _bar("comparing", 5 * steps, "passes") as bar:
        for step in range(5 * steps):
            x = features[batches[step % steps]]
            for which in (0, 1) if step % 2 == 0 else (1, 0):
                with _timed(cluster_times[which]):
                    models[which].cluster(x).backward(dy[: len(x)])
            bar.update(1)
    return Comparison(_medians(step_times), _medians(cluster_times), losses)


def _medians(times: tuple[list[float], list[float]]) -> Times:
    skipped = min(WARM_UP_STEPS, len(times[0]) - 1)
    return Times(*(statistics.median(seconds[skipped:]) for seconds in times))


@contextmanager
def _timed(times: list[float]) -> Iterator[None]:
    """Appends the seconds its block took to a list."""
    started = time.perf_counter()
    yield
    times.append(time.perf_counter() - started)


@torch.no_grad()
def _draw_test_video(model: FlashMNISTClassifier, prepared: Prepared, output: Path) -> Path:
    """Draws a test video of five digits, a rightly labelled one if there is any."""
    model.eval()
    of_five = [i for i, label in enumerate(prepared.test.set_labels.tolist()) if bin(label).count("1") == 5]
    predicted = model(prepared.test_features[of_five]).argmax(-1).tolist()
    right = [i for i, p in zip(of_five, predicted, strict=True) if p == prepared.test.set_labels[i]]
    shown = right or of_five
    number = shown[len(shown) // 2]
    label, guess = int(prepared.test.set_labels[number]), predicted[of_five.index(number)]
    _, weights = model.cluster(prepared.test_features[number : number + 1], return_weights=True)
    title = f"Test video {number}: shows {_digits_of(label)}, recognised {_digits_of(guess)}"
    return draw(
        prepared.test.video(number), prepared.test.frame_labels[number], weights[0], output, title=title
    )


def _digits_of(label: int) -> str:
    return "{" + ", ".join(str(digit) for digit in range(10) if label >> digit & 1) + "}"


def choose_units(weights: Tensor, digit_frames: Sequence[int], count: int = UNITS_SHOWN) -> list[int]:
    """The units to show, ordered by the frame they look at most.

    For each frame with a digit the unit that looks at it most, then the most concentrated of the others.

    Args:
        weights: ``(N, L)``.
        digit_frames: the frames with a digit.
        count: how many units.
    """
    chosen: list[int] = []
    for frame in digit_frames:
        for unit in weights[:, frame].argsort(descending=True).tolist():
            if unit not in chosen:
                chosen.append(unit)
                break
    for unit in weights.amax(dim=1).argsort(descending=True).tolist():
        if unit not in chosen:
            chosen.append(unit)
    return sorted(chosen[:count], key=lambda unit: int(weights[unit].argmax()))


def draw(frames: Any, frame_labels: Any, weights: Tensor, output: Path, *, title: str) -> Path:
    """The paper's Figure 5: the frames of one video, below them the weights of eight units in HSV colours.

    Args:
        frames: ``(L, 28, 28)`` uint8 array.
        frame_labels: ``(L,)``, the digit in each frame or ``fastac.data.flash_mnist.NOISE``.
        weights: ``(N, L)``.
        output: the image file; its suffix decides the format.
    """
    import numpy as np
    from matplotlib.colors import ListedColormap, hsv_to_rgb
    from matplotlib.figure import Figure

    from fastac.data.flash_mnist import NOISE

    length = len(frames)
    digit_frames = [i for i in range(length) if frame_labels[i] != NOISE]
    units = choose_units(weights, digit_frames)
    # Hue from blue to red: the whole circle would give weights 0 and 1 the same red.
    hues = np.linspace(2 / 3, 0, 256)
    colours = ListedColormap(hsv_to_rgb(np.stack([hues, np.full(256, 0.85), np.full(256, 0.95)], axis=1)))

    figure = Figure(figsize=(0.52 * length, 4.2), dpi=120, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1, len(units) / 2))
    extent = (-0.5, length - 0.5, 1.0, 0.0)
    above.imshow(np.concatenate(list(frames), axis=1), cmap="gray", extent=extent, aspect="auto")
    above.set_yticks([])
    above.set_ylabel("frames", rotation=0, ha="right", va="center")
    above.set_title(title, fontsize=11)
    image = below.imshow(weights[units].numpy(), cmap=colours, vmin=0, vmax=1, aspect="auto")
    below.set_yticks(range(len(units)), [f"unit {unit}" for unit in units])
    names = [str(label) if label != NOISE else "–" for label in frame_labels]
    below.set_xticks(range(length), names)
    for frame, tick in enumerate(below.get_xticklabels()):
        tick.set_fontweight("bold" if frame in digit_frames else "normal")
    below.set_xlabel("digit in the frame (– noise only)")
    for axis in (above, below):
        axis.tick_params(length=0)
        axis.vlines(np.arange(length - 1) + 0.5, *sorted(axis.get_ylim()), color="white", linewidth=1)
        for spine in axis.spines.values():
            spine.set_visible(False)
    below.hlines(np.arange(len(units) - 1) + 0.5, -0.5, length - 0.5, color="white", linewidth=1)
    figure.colorbar(image, ax=[above, below], label="attention weight", pad=0.01)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)
    return output


def _bar(label: str, total: int, unit: str) -> Any:
    """A progress bar on a terminal; nothing where standard output is a file or a pipe."""
    from tqdm import tqdm

    return tqdm(
        total=total,
        desc=label,
        unit=f" {unit}",
        leave=False,
        file=sys.stdout,
        disable=not sys.stdout.isatty(),
    )


@contextmanager
def _stage(title: str, total: int, unit: str) -> Iterator[Callable[[int], object]]:
    """Announces a stage, shows its bar, says how long it took; gives the function that advances the bar."""
    print(f"{title} ...", flush=True)
    started = time.perf_counter()
    with _bar(unit, total, unit) as bar:
        yield bar.update
    print(f"  done in {time.perf_counter() - started:.1f} s", flush=True)
