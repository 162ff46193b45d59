"""A classifier as a `torch.export` program, which runs on the fused operators, or as an ONNX file.

Both take any number of videos and any lengths. Neither needs an example: the model knows its shapes.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import fastac

from .classifier import AttentionClusterClassifier

_LARGEST_FILE = 2**31 - 2**20  # a protobuf message ends at 2 GiB
_TOLERANCE = 1e-5


class _Example(NamedTuple):
    """Features and their borders by modality, and which of their sizes vary."""

    features: dict[str, Tensor]
    borders: dict[str, Tensor]  # lengths (B,), or offsets (B + 1,) of packed features
    features_vary: dict[str, dict[int, Any]]
    borders_vary: dict[str, dict[int, Any]]


def _random_sets(
    model: AttentionClusterClassifier, batch: int, longest: int, *, empty: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Dense features (B, L, M), lengths (B,) by modality, another L for each; with ``empty`` some are 0."""
    features: dict[str, Tensor] = {}
    lengths: dict[str, Tensor] = {}
    like = model.fc.weight
    generator = torch.Generator().manual_seed(0)
    for number, (name, config) in enumerate(model.modalities.items()):
        length = longest + number
        if config.position_bias is not None:
            length = min(length, config.position_bias)
        x = torch.randn(batch, length, config.in_features, generator=generator)
        counts = torch.randint(1, length + 1, (batch,), generator=generator)
        if empty:
            counts[number % batch] = 0
        features[name], lengths[name] = x.to(like), counts.to(like.device)
    return features, lengths


def _example(model: AttentionClusterClassifier, packed: bool) -> _Example:
    # At least 2 everywhere: torch.export takes a size of 0 or 1 for a constant.
    features, lengths = _random_sets(model, batch=3, longest=4, empty=False)
    batch, borders = Dim("batch", min=1), Dim("borders", min=3)
    features_vary: dict[str, dict[int, Any]] = {}
    for name, x in features.items():
        bias = model.modalities[name].position_bias
        if packed:
            counts = lengths[name]
            valid = torch.arange(x.size(1), device=x.device) < counts.unsqueeze(1)
            features[name] = torch.cat([x[valid], x[0, :1]])  # one row more, lest T be 1
            lengths[name] = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
            features_vary[name] = {0: Dim(f"{name}_rows", min=1)}
        elif bias == 1:
            features_vary[name] = {0: batch}
        else:
            features_vary[name] = {0: batch, 1: Dim(f"{name}_length", min=1, max=bias)}
    borders_vary = {name: {0: borders if packed else batch} for name in features}
    return _Example(features, lengths, features_vary, borders_vary)


def _checked(model: object) -> AttentionClusterClassifier:
    """A copy in eval mode."""
    if not isinstance(model, AttentionClusterClassifier):
        raise TypeError(f"model must be an AttentionClusterClassifier, got {type(model).__name__}")
    return copy.deepcopy(model).eval()


def export_program(model: AttentionClusterClassifier, *, packed: bool = False) -> ExportedProgram:
    """The eval forward of a model, all modalities given, as ``torch.export`` makes it.

    ``program.module()`` is called as the model is, with ``features`` and ``lengths`` by modality. B and the
    L of each modality are free (with ``position_bias`` up to its L_max). The program holds a copy of the
    weights and the operators of the backend in force, so whatever loads it must import fastac first. A
    missing modality whose mean was not known gives NaN.

    Args:
        model: in either mode, on any device; it is left as it is.
        packed: take packed features and ``offsets`` instead, for two videos or more: torch.export would make
            a constant of B + 1 = 2. A lone video goes with an empty set behind it.

    Raises: TypeError for another model.
    """
    model = _checked(model)
    example = _example(model, packed)
    borders = "offsets" if packed else "lengths"
    with torch.no_grad():
        return torch.export.export(
            model,
            (example.features,),
            {borders: example.borders},
            dynamic_shapes={"features": example.features_vary, borders: example.borders_vary},
        )


class _Flat(nn.Module):
    """The model on features, lengths of the first modality, features, lengths of the second, and so on."""

    def __init__(self, model: AttentionClusterClassifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, *tensors: Tensor) -> Tensor:
        names = list(self.model.modalities)
        features = dict(zip(names, tensors[::2], strict=True))
        lengths = dict(zip(names, tensors[1::2], strict=True))
        scores: Tensor = self.model(features, lengths=lengths)
        return scores


def _interleaved(names: list[str], first: dict[str, Any], second: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(part[name] for name in names for part in (first, second))


def _needs(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"export_onnx needs {' and '.join(missing)}, not installed: pip install 'fastac[onnx]'"
        )


def export_onnx(
    model: AttentionClusterClassifier,
    path: str | os.PathLike[str],
    *,
    opset_version: int | None = None,
    check: bool = False,
) -> float | None:
    """Write the eval forward of a model as an ONNX file of standard operators.

    Inputs, for each modality in order: ``<name>`` (B, L, M) and ``<name>_lengths`` (B,) int64. Output:
    ``scores`` (B, C). B and the L of each modality are free (with ``position_bias`` up to its L_max). A
    length of 0 is a missing modality; its mean is in the file, and one that was not known gives NaN.

    Weights of 2 GiB and more go to a second file, ``<path>.data``, which belongs beside the first.

    Args:
        model: float32 or float64, in either mode, on any device; it is left as it is.
        path: the file to write.
        opset_version: ONNX operator set, that of torch's exporter unless given.
        check: run the file in onnxruntime on other sizes than it was traced with, missing modalities among
            them where the means are known, and compare with the model.

    Returns: with ``check`` the largest deviation relative to max(1, largest score), which is at most 1e-5;
        else None.
    Raises: ImportError without onnx and onnxscript, or onnxruntime for ``check``; TypeError for another model
        or dtype; ValueError if the names of inputs and output are not distinct; RuntimeError if the file's
        scores deviate.
    """
    _needs("onnx", "onnxscript", *(["onnxruntime"] if check else []))
    model = _checked(model).cpu()
    if model.fc.weight.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"model must be float32 or float64 for ONNX, got {model.fc.weight.dtype}")
    names = list(model.modalities)
    inputs = [text for name in names for text in (name, f"{name}_lengths")]
    if len({*inputs, "scores"}) != len(inputs) + 1:
        raise ValueError(
            f"modalities must give distinct names to inputs and output, got {', '.join(inputs)} and scores"
        )
    example = _example(model, packed=False)
    weights = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    # The fused operators have no ONNX form; the reference is plain torch, all of which has one.
    with torch.no_grad(), fastac.backend("reference"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "# The axis name", UserWarning)  # inputs share the batch axis
        torch.onnx.export(
            _Flat(model).eval(),
            _interleaved(names, example.features, example.borders),
            os.fspath(path),
            input_names=inputs,
            output_names=["scores"],
            opset_version=opset_version,
            dynamic_shapes=(_interleaved(names, example.features_vary, example.borders_vary),),
            dynamo=True,
            external_data=weights > _LARGEST_FILE,
            verbose=False,
        )
    return _deviation(model, Path(path), inputs) if check else None


def _deviation(model: AttentionClusterClassifier, path: Path, inputs: list[str]) -> float:
    """The largest deviation of the file's scores; RuntimeError if it is beyond the tolerance."""
    onnxruntime = importlib.import_module("onnxruntime")
    session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    worst = 0.0
    for batch, longest in ((1, 1), (2, 9), (7, 3)):
        features, lengths = _random_sets(model, batch, longest, empty=bool(model.means_known.all()))
        with torch.no_grad():
            expected = model(features, lengths=lengths)
        tensors = _interleaved(list(model.modalities), features, lengths)
        fed = {name: tensor.numpy() for name, tensor in zip(inputs, tensors, strict=True)}
        scores = torch.from_numpy(session.run(["scores"], fed)[0])
        difference = float((scores - expected).abs().max() / expected.abs().max().clamp(min=1))
        if not difference <= _TOLERANCE:
            raise RuntimeError(
                f"{path} deviates from the model by {difference:.2g} of the largest score "
                f"for {batch} videos of at most {longest} features, more than {_TOLERANCE:.0e}"
            )
        worst = max(worst, difference)
    return worst
