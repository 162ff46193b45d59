"""The demo and its system, small: it learns, reuses its cache, draws, and notices a wrong operator."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from fastac import _native, backends
from fastac.cli import demo, main
from fastac.data import Digits, FeatureArray, FlashMNIST, NoiseSampler, NoisyDigits
from fastac.experiments import speed
from fastac.experiments.flash_mnist import MODALITY, class_names
from fastac.experiments.table1 import make_model
from fastac.models import FrameCNN
from fastac.models.frame_cnn import extract_features, frame_accuracy, normalised, pretrain
from fastac.training import OptimizerConfig, Trainer, TrainingConfig, evaluate

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
    np.testing.assert_allclose(np.exp(features).sum(-1), np.ones((480, 8)), rtol=1e-5)
    for number in (0, 479):
        expected = cnn.features(normalised(train.video(number)))
        np.testing.assert_allclose(features[number], expected.numpy(), rtol=1e-4, atol=1e-4)
    data, test_data = (
        FeatureArray({MODALITY: array}, videos.set_labels, class_names(8))
        for array, videos in ((features, train), (test_features, test))
    )
    torch.manual_seed(0)
    model = make_model("fc1", 16, shift=True, num_classes=8)
    assert evaluate(model, test_data)["accuracy"] < 0.4
    config = TrainingConfig(
        epochs=25,
        batch_size=32,
        optimizer=OptimizerConfig(name="adam", lr=3e-3),
        clip_norm=None,
        class_weights=False,
        seed=0,
    )
    results = Trainer(model, data, test_data, config).fit()
    assert results[-1].values["validation_accuracy"] > 0.6  # chance: 1/8
    assert evaluate(model, test_data)["accuracy"] == results[-1].values["validation_accuracy"]


def test_pretraining_freezes_the_cnn(cnn: FrameCNN) -> None:
    assert not cnn.training
    assert not any(parameter.requires_grad for parameter in cnn.parameters())


def test_a_cnn_in_training_is_refused(digits: Digits) -> None:
    noise = NoiseSampler(digits)
    videos = FlashMNIST(
        digits.test_images, digits.test_labels, noise, videos_per_set=1, num_digits=1, length=2
    )
    with pytest.raises(ValueError, match="cnn must be in eval mode"):
        extract_features(FrameCNN(), videos)
    with pytest.raises(ValueError, match="cnn must be in eval mode"):
        frame_accuracy(FrameCNN(), NoisyDigits(digits.test_images, digits.test_labels, noise, count=10))


def test_features_go_where_they_are_asked_for(digits: Digits, cnn: FrameCNN) -> None:
    videos = FlashMNIST(
        digits.test_images,
        digits.test_labels,
        NoiseSampler(digits),
        videos_per_set=3,
        num_digits=5,
        length=10,
    )
    out = np.zeros((96, 10, 50), dtype=np.float32)
    done: list[int] = []
    assert extract_features(cnn, videos, out=out, progress=done.append) is out
    assert done == [64, 32]
    np.testing.assert_array_equal(out, extract_features(cnn, videos))
    with pytest.raises(ValueError, match=r"out must be \(96, 10, 50\) float32, got \(95, 10, 50\) float32"):
        extract_features(cnn, videos, out=out[:95])
    with pytest.raises(ValueError, match="frames must be at least one epoch, got none"):
        pretrain(FrameCNN(), [])


def test_pixels_are_standardised() -> None:
    frames = np.array([0, 255], dtype=np.uint8).repeat(784).reshape(2, 28, 28)
    x = normalised(frames)
    assert x.shape == (2, 1, 28, 28)
    torch.testing.assert_close(x[:, 0, 0, 0], torch.tensor([-0.1307 / 0.3081, (1 - 0.1307) / 0.3081]))


@pytest.mark.parametrize("weighting", ["fc1", "fc2", "gated", "average"])
def test_the_classifier_takes_every_weighting(weighting: str) -> None:
    model = make_model(weighting, 4, shift=True, num_classes=1024)
    assert model(torch.randn(2, 25, 50)).shape == (2, 1024)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "ROUNDS", 2)
    monkeypatch.setattr(demo, "STEPS", 4)
    monkeypatch.setattr(speed, "PASSES", 10)


def test_the_demo_runs_and_reuses_its_features(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(backends, "current", None)
    picture = tmp_path / "pictures" / "video.png"
    assert main(["demo", *SMALL, "--output", str(picture)]) == 0
    out, err = capsys.readouterr()
    assert "\r" not in out + err  # no progress bar where nothing is a terminal
    assert "reduced set" in out
    assert "training the frame CNN" in err
    assert "frame accuracy of the CNN: " in out
    assert "epoch 2/2" in err
    assert "validation_accuracy" in err
    assert "the same 8 steps, " in out
    assert "losses agree" in out
    assert f"picture               {picture}" in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert ("the fused native operator" in out) == _native.available

    monkeypatch.setattr(_native, "available", False)
    monkeypatch.setattr(_native, "why_not", "taken away by this test")
    assert main(["demo", *SMALL, "--output", str(picture)]) == 0
    out, err = capsys.readouterr()
    assert "reusing the features of an earlier run" in err
    assert "training the frame CNN" not in err
    assert "The native operator is not available (taken away by this test): running on the plain torch" in out
    assert "the same 8 steps, reference and plain torch in turn" in out


def test_a_disagreement_is_the_exit_status(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unshifted(self: speed.PlainAttentionCluster, x: torch.Tensor, **_: object) -> torch.Tensor:
        return (torch.nn.functional.linear(x, self.weight).softmax(dim=1).mT @ x).flatten(1)

    def without_work(cnn: FrameCNN, epochs: object, progress: object) -> None:
        cnn.eval()

    monkeypatch.setattr(speed.PlainAttentionCluster, "forward", unshifted)
    monkeypatch.setattr("fastac.experiments.flash_mnist.pretrain", without_work)
    argv = ["demo", *SMALL[:-1], "1", "--no-cache", "--output", str(tmp_path / "video.png")]
    assert main(argv) == 1
    assert "losses DO NOT AGREE" in capsys.readouterr().out


@pytest.mark.parametrize("asked", [None, "reference"])
def test_which_operator_computes(asked: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "current", asked)
    name, line = speed.describe_backend()
    assert name == (asked or ("cpu" if _native.available else "reference"))
    assert ("as FASTAC_BACKEND or fastac.backend asks" in line) == (asked is not None)


MISSING = """
import os, sys
from fastac.cli import main
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name == blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
for blocked in ("numpy", "matplotlib", "pandas"):
    child = os.fork()
    if not child:
        sys.meta_path.insert(0, Blocked())
        for name in [name for name in sys.modules if name.partition(".")[0] == blocked]:
            del sys.modules[name]
        status = main(["demo", "--help"])
        sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_missing_dependency_is_one_line() -> None:
    done = subprocess.run([sys.executable, "-c", MISSING], capture_output=True, text=True, check=True)
    names = ("numpy", "matplotlib", "pandas")
    assert done.stderr.splitlines() == [
        f"Error: fastac demo needs {name}: pip install 'fastac[train]'" for name in names
    ]
    assert done.stdout.split() == ["1"] * len(names)


def test_a_wrong_file_stops_the_demo_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FASTAC_DATA", str(tmp_path))
    assert main(["demo", "--no-cache"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"Error: FASTAC_DATA={tmp_path} must hold")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "argv", [["--epochs", "0"], ["--seed", "-1"], ["--data", "cifar"], ["--output", "video.doc"]]
)
def test_bad_options(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", *argv]) == 2
    assert argv[0] in capsys.readouterr().err
