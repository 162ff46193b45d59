"""The demo and its system, small: it learns, reuses its cache, draws, and notices a wrong operator."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from fastac import _native, backends, demo
from fastac.data import Digits, FlashMNIST, NoiseSampler, NoisyDigits, load_digits28
from fastac.models import FlashMNISTClassifier, FrameCNN
from fastac.models.flash_mnist import (
    accuracy,
    extract_features,
    frame_accuracy,
    normalised,
    pretrain,
    shuffled_batches,
    train_step,
)

pytestmark = pytest.mark.xdist_group("demo")  # what is built once is shared

SMALL = [
    "--data",
    "digits",
    "--train-videos",
    "1",
    "--test-videos",
    "1",
    "--cnn-frames",
    "4000",
    "--epochs",
    "2",
]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Everything here is small: a second thread would only wait for a core that other tests keep busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def digits() -> Digits:
    return load_digits28()


@pytest.fixture(scope="module")
def cnn(digits: Digits) -> FrameCNN:
    torch.manual_seed(0)
    cnn = FrameCNN()
    frames = NoisyDigits(digits.train_images, digits.train_labels, NoiseSampler(digits), count=15_000)
    pretrain(cnn, frames)
    return cnn


def test_the_system_learns_three_digits(digits: Digits, cnn: FrameCNN) -> None:
    noise = NoiseSampler(digits)
    frames = NoisyDigits(digits.test_images, digits.test_labels, noise, count=len(digits.test_images), seed=1)
    assert frame_accuracy(cnn, frames) > 0.6  # chance: 1/11
    train, test = (
        FlashMNIST(images, labels, noise, videos_per_set=count, seed=seed, num_digits=3, length=8)
        for images, labels, count, seed in (
            (digits.train_images, digits.train_labels, 60, 2),
            (digits.test_images, digits.test_labels, 20, 3),
        )
    )
    features, test_features = extract_features(cnn, train), extract_features(cnn, test)
    assert features.shape == (480, 8, 50)
    torch.testing.assert_close(features.exp().sum(-1), torch.ones(480, 8))
    for number in (0, 479):
        expected = cnn.features(normalised(train.video(number)))
        torch.testing.assert_close(features[number], expected, rtol=1e-4, atol=1e-4)
    labels, test_labels = torch.from_numpy(train.set_labels), torch.from_numpy(test.set_labels)
    torch.manual_seed(0)
    model = FlashMNISTClassifier(16, num_classes=8)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    order = torch.Generator().manual_seed(0)
    before = accuracy(model, test_features, test_labels)
    for _ in range(25):
        for batch in shuffled_batches(len(labels), 32, order):
            train_step(model, optimizer, features[batch], labels[batch])
    assert before < 0.4
    assert accuracy(model, test_features, test_labels) > 0.6  # chance: 1/8


def test_pretraining_freezes_the_cnn(cnn: FrameCNN) -> None:
    assert not cnn.training
    assert not any(parameter.requires_grad for parameter in cnn.parameters())


def test_features_of_a_cnn_in_training_are_refused(digits: Digits) -> None:
    videos = FlashMNIST(
        digits.test_images, digits.test_labels, NoiseSampler(digits), videos_per_set=1, num_digits=1, length=2
    )
    with pytest.raises(ValueError, match="cnn must be in eval mode"):
        extract_features(FrameCNN(), videos)


def test_pixels_are_standardised() -> None:
    frames = np.array([0, 255], dtype=np.uint8).repeat(784).reshape(2, 28, 28)
    x = normalised(frames)
    assert x.shape == (2, 1, 28, 28)
    torch.testing.assert_close(x[:, 0, 0, 0], torch.tensor([-0.1307 / 0.3081, (1 - 0.1307) / 0.3081]))


@pytest.mark.parametrize("weighting", ["fc1", "fc2", "gated", "average"])
def test_the_classifier_takes_every_weighting(weighting: str) -> None:
    model = FlashMNISTClassifier(4, weighting=weighting)
    assert model(torch.randn(2, 25, 50)).shape == (2, 1024)


def test_the_demo_runs_and_reuses_its_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(backends, "current", None)
    monkeypatch.setattr(demo, "COMPARED_STEPS", 15)
    picture = tmp_path / "pictures" / "video.png"
    assert demo.main([*SMALL, "--output", str(picture)]) == 0
    first = capsys.readouterr().out
    assert "\r" not in first  # no progress bar where standard output is not a terminal
    assert "reduced set" in first
    assert "training the frame CNN" in first
    assert "epoch  2/2" in first
    assert "losses agree" in first
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert ("the fused native operator" in first) == _native.available

    monkeypatch.setattr(_native, "available", False)
    monkeypatch.setattr(_native, "why_not", "taken away by this test")
    assert demo.main([*SMALL, "--output", str(picture)]) == 0
    second = capsys.readouterr().out
    assert "reusing the features of an earlier run" in second
    assert "training the frame CNN" not in second
    assert (
        "The native operator is not available (taken away by this test): running on the plain torch" in second
    )


def test_no_cache_neither_reads_nor_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def refuse(path: Path, *_: object) -> None:
        raise AssertionError(f"the cache was touched: {path}")

    monkeypatch.setattr(demo, "_read_cache", refuse)
    monkeypatch.setattr(demo, "_write_cache", refuse)
    system = "fastac.models.flash_mnist."
    monkeypatch.setattr(system + "pretrain", lambda cnn, frames, progress: cnn.eval())
    monkeypatch.setattr(
        system + "extract_features", lambda cnn, videos, progress: torch.zeros(len(videos), 25, 50)
    )
    arguments = demo._parser().parse_args([*SMALL, "--no-cache"])
    prepared = demo._prepare(load_digits28(), arguments)
    assert prepared.train_features.shape == (1024, 25, 50)
    assert not (tmp_path / "cache").exists()


def test_a_broken_cache_file_is_named_and_ignored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "features.pt"
    path.write_bytes(b"not a torch file")
    assert demo._read_cache(path) is None
    assert f"{path} cannot be read" in capsys.readouterr().out
    demo._write_cache(path, {"train": torch.ones(2)})
    content = demo._read_cache(path)
    assert content is not None
    assert torch.equal(content["train"], torch.ones(2))
    assert list(tmp_path.iterdir()) == [path]


def test_the_comparison_notices_a_wrong_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    features = torch.randn(256, 25, 50).log_softmax(-1)
    labels = torch.randint(1024, (256,))
    model = FlashMNISTClassifier(8)
    right = demo.compare_with_plain_torch(model, features, labels, seed=0, steps=12)
    assert right.difference < 1e-4
    assert len(right.losses) == 12

    def unshifted(self: demo.PlainAttentionCluster, x: torch.Tensor) -> torch.Tensor:
        return (torch.nn.functional.linear(x, self.weight).softmax(dim=1).mT @ x).flatten(1)

    monkeypatch.setattr(demo.PlainAttentionCluster, "forward", unshifted)
    wrong = demo.compare_with_plain_torch(model, features, labels, seed=0, steps=12)
    assert wrong.difference > demo.AGREEMENT


def test_a_loss_that_is_not_finite_is_no_agreement() -> None:
    times = demo.Times(1.0, 2.0)
    assert demo.Comparison(times, times, [(1.0, 1.0), (math.nan, 1.0), (1.0, 1.0)]).difference == math.inf
    assert demo.Comparison(times, times, [(1.0, 1.0), (1.5, 1.0)]).difference == 0.5
    assert times.ratio == 2.0


def test_units_shown_cover_the_frames_with_digits() -> None:
    weights = torch.full((12, 6), 0.01)
    weights[3, 4] = weights[7, 1] = 0.9
    weights[5, 0] = 0.8
    units = demo.choose_units(weights, [1, 4])
    assert len(units) == demo.UNITS_SHOWN
    assert {3, 5, 7} <= set(units)
    assert units.index(7) < units.index(3)


@pytest.mark.parametrize("name", ["numpy", "tqdm", "matplotlib"])
def test_a_missing_dependency_is_one_line(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    assert demo.main([]) == 2
    captured = capsys.readouterr()
    assert captured.err == f"The demo needs {name}, which is not installed: pip install 'fastac[demo]'\n"
    assert captured.out == ""


def test_a_wrong_file_stops_the_demo_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FASTAC_DATA", str(tmp_path))
    assert demo.main(["--no-cache"]) == 2
    assert capsys.readouterr().err.startswith(f"The demo stops: FASTAC_DATA={tmp_path} must hold")


@pytest.mark.parametrize("argv", [["--epochs", "0"], ["--seed", "-1"], ["--data", "cifar"]])
def test_bad_options(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        demo.main(argv)
    assert stop.value.code == 2
    assert argv[0] in capsys.readouterr().err
