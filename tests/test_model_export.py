"""`fastac.models.export`: torch.export programs on the fused operators, ONNX files under onnxruntime."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastac import _native
from fastac.models import export as export_module
from fastac.models.classifier import AttentionClusterClassifier, ClusterConfig
from fastac.models.export import export_onnx, export_program

NAN = float("nan")
C = 6
MODALITIES = {
    "rgb": ClusterConfig(8, 3),
    "flow": ClusterConfig(5, 2, "fc2", hidden_features=4, shift=False),
    "audio": ClusterConfig(4, 1, "gated", hidden_features=3, position_bias=6),
}
SIZES = {
    "one of one": {"rgb": (1,), "flow": (1,), "audio": (1,)},
    "one": {"rgb": (9,), "flow": (4,), "audio": (0,)},
    "five": {"rgb": (4, 1, 0, 2, 30), "flow": (0, 0, 1, 5, 2), "audio": (6, 2, 1, 0, 0)},
}

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="onnx, onnxscript and onnxruntime are not all installed",
)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(modalities: Any = None, *, means: bool = True, **options: Any) -> AttentionClusterClassifier:
    model = AttentionClusterClassifier(MODALITIES if modalities is None else modalities, C, **options)
    for name, parameter in model.named_parameters():
        if name.endswith("position_bias"):
            torch.nn.init.normal_(parameter)
    if means:
        model.set_means({name: torch.randn(c.in_features) for name, c in model.modalities.items()})
    return model


def dense(sizes: dict[str, tuple[int, ...]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Features with NaN where excluded, and lengths."""
    features, lengths = {}, {}
    for name, counts in sizes.items():
        lengths[name] = torch.tensor(counts)
        longest = max(1, *counts)
        x = torch.randn(len(counts), longest, MODALITIES[name].in_features)
        x[torch.arange(longest) >= lengths[name].unsqueeze(1)] = NAN
        features[name] = x
    return features, lengths


def packed(sizes: dict[str, tuple[int, ...]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    features, offsets = {}, {}
    for name, counts in sizes.items():
        offsets[name] = torch.tensor([0, *counts]).cumsum(0)
        features[name] = torch.randn(sum(counts), MODALITIES[name].in_features)
    return features, offsets


# torch.export


@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_program(layout: str) -> None:
    """Saved, loaded, and called with other sizes; it runs on the operators of the CPU."""
    model = make()
    buffer = io.BytesIO()
    torch.export.save(export_program(model, packed=layout == "packed"), buffer)
    buffer.seek(0)
    program = torch.export.load(buffer)
    if _native.available:
        assert "fastac.cpu_forward" in str(program.graph)
    run = program.module()
    model.eval()
    for name, sizes in SIZES.items():
        if layout == "packed" and name != "five":  # a lone video goes with an empty set
            sizes = {modality: (*counts, 0) for modality, counts in sizes.items()}
        features, borders = dense(sizes) if layout == "dense" else packed(sizes)
        arguments = {"lengths" if layout == "dense" else "offsets": borders}
        torch.testing.assert_close(run(features, **arguments), model(features, **arguments))


def test_program_holds_a_copy() -> None:
    model = make(dropout=0.5)
    assert model.training
    run = export_program(model).module()
    features, lengths = dense(SIZES["five"])
    before = run(features, lengths=lengths)
    assert model.training
    assert model.clusters["rgb"].training
    with torch.no_grad():
        model.fc.bias.add_(1)
    assert torch.equal(run(features, lengths=lengths), before)
    torch.testing.assert_close(model.eval()(features, lengths=lengths), before + 1)


def test_program_of_a_one_position_modality() -> None:
    """L_max = 1: that L is a constant, all else is free."""
    model = make({"rgb": ClusterConfig(8, 3), "audio": ClusterConfig(4, 2, position_bias=1)})
    run = export_program(model).module()
    features, lengths = dense({"rgb": (3, 0), "audio": (0, 1)})
    torch.testing.assert_close(run(features, lengths=lengths), model.eval()(features, lengths=lengths))


def test_only_this_model() -> None:
    for export in (export_program, lambda model: export_onnx(model, "unused.onnx")):
        with pytest.raises(TypeError, match="model must be an AttentionClusterClassifier, got Linear"):
            export(torch.nn.Linear(2, 2))  # type: ignore[arg-type]


# ONNX


def run_onnx(path: Path, features: dict[str, Tensor], lengths: dict[str, Tensor]) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    fed = {name: x.numpy() for name, x in features.items()}
    fed.update({f"{name}_lengths": n.numpy() for name, n in lengths.items()})
    assert [given.name for given in session.get_inputs()] == [
        text for name in features for text in (name, f"{name}_lengths")
    ]
    assert [made.name for made in session.get_outputs()] == ["scores"]
    return torch.from_numpy(session.run(None, fed)[0])


@needs_onnx
def test_onnx(tmp_path: Path) -> None:
    """Ragged sets, missing modalities, NaN in excluded positions, other sizes than those traced."""
    model = make(dropout=0.5)
    path = tmp_path / "model.onnx"
    deviation = export_onnx(model, path, check=True)
    assert deviation is not None
    assert 0 <= deviation <= 1e-5
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert model.training
    model.eval()
    for sizes in SIZES.values():
        features, lengths = dense(sizes)
        expected = model(features, lengths=lengths)
        torch.testing.assert_close(run_onnx(path, features, lengths), expected, atol=1e-5, rtol=1e-5)


@needs_onnx
@pytest.mark.parametrize("shift", [True, False], ids=["shift", "no shift"])
def test_onnx_with_an_unknown_mean(tmp_path: Path, shift: bool) -> None:
    """NaN for the videos that need it; the average, float64 and an older operator set on the way."""
    model = make({"rgb": ClusterConfig(8, 3, "average", shift=shift)}, means=False, dtype=torch.float64)
    path = tmp_path / "model.onnx"
    assert export_onnx(model, path, opset_version=18) is None
    features, lengths = dense({"rgb": (3, 0, 2)})
    features = {"rgb": features["rgb"].double()}
    scores = run_onnx(path, features, lengths)
    assert scores.isnan().all(1).tolist() == [False, True, False]
    expected = model.eval()(features["rgb"][::2], lengths=lengths["rgb"][::2])
    torch.testing.assert_close(scores[::2], expected, atol=1e-5, rtol=1e-5)


@needs_onnx
def test_the_check_finds_a_wrong_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export = torch.onnx.export

    def wrong(flat: torch.nn.Module, *arguments: Any, **options: Any) -> None:
        with torch.no_grad():
            flat.model.fc.bias[2] += 1e-4
            export(flat, *arguments, **options)
            flat.model.fc.bias[2] -= 1e-4

    monkeypatch.setattr(torch.onnx, "export", wrong)
    model = make({"rgb": ClusterConfig(8, 3)})
    with pytest.raises(RuntimeError, match=r"model.onnx deviates from the model by .* more than 1e-05"):
        export_onnx(model, tmp_path / "model.onnx", check=True)


@needs_onnx
def test_large_weights_go_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_module, "_LARGEST_FILE", 1000)
    model = make({"rgb": ClusterConfig(8, 64)})
    assert export_onnx(model, tmp_path / "m.onnx", check=True) is not None
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]


@needs_onnx
@pytest.mark.parametrize(
    ("names", "dtype", "error", "message"),
    [
        (
            ("a", "a_lengths"),
            None,
            ValueError,
            "distinct names .*, got a, a_lengths, a_lengths, a_lengths_le",
        ),
        (("scores",), None, ValueError, "distinct names .*, got scores, scores_lengths and scores"),
        (("a",), torch.bfloat16, TypeError, "model must be float32 or float64 for ONNX, got torch.bfloat16"),
    ],
)
def test_what_onnx_cannot_hold(
    tmp_path: Path, names: tuple[str, ...], dtype: Any, error: type[Exception], message: str
) -> None:
    model = make({name: ClusterConfig(4, 2) for name in names}, dtype=dtype)
    with pytest.raises(error, match=message):
        export_onnx(model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("absent", "check", "message"),
    [
        (
            {"onnx", "onnxscript"},
            False,
            "needs onnx and onnxscript, not installed: pip install 'fastac\\[onnx\\]'",
        ),
        ({"onnxruntime"}, True, "needs onnxruntime, not installed: pip install 'fastac\\[onnx\\]'"),
    ],
)
def test_missing_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, absent: set[str], check: bool, message: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else object())
    with pytest.raises(ImportError, match=message):
        export_onnx(make(), tmp_path / "model.onnx", check=check)
