"""Standardized features: their moments, the models that use them, the settings that ask for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastac.data import FeatureArray, FeatureSetDataset, RandomSampling
from fastac.data.moments import Moments
from fastac.models import AttentionBoostedLSTM, PoolingClassifier
from fastac.models.one_modality import OneModalityClassifier
from fastac.training.systems import AttentionBoostedLSTMSettings, PoolingSettings

M, T = 5, 6
MODELS: dict[str, dict[str, Any]] = {
    "mean": {"pooling": "mean"},
    "netvlad": {"pooling": "netvlad", "cluster_size": 3},
    "sdpa": {"pooling": "sdpa", "cluster_size": 3},
    "none": {"position": "none"},
    "before": {"position": "before"},
    "after": {"position": "after"},
}


def make(name: str, *, standardize: bool = True, dtype: torch.dtype = torch.float64) -> OneModalityClassifier:
    torch.manual_seed(0)
    settings = {**MODELS[name], "standardize": standardize, "dtype": dtype, "dropout": 0.0}
    if "pooling" in settings:
        return PoolingClassifier(M, 4, **settings)
    return AttentionBoostedLSTM(M, 4, sequence_length=T, hidden_features=3, dense_features=7, **settings)


def moments() -> tuple[Tensor, Tensor]:
    return torch.linspace(-7, 7, M, dtype=torch.float64), torch.linspace(0.5, 3, M, dtype=torch.float64)


# Moments


def test_moments_of_blocks_are_those_of_all_rows() -> None:
    rows = np.random.default_rng(0).normal(size=(1000, M)) * [1e-3, 1, 10, 100, 0] + [5e3, 0, -7, 1e4, 4]
    found = Moments(M)
    for block in np.split(rows.astype(np.float32), [0, 1, 2, 700, 999]):
        found.add(block)
    exact = rows.astype(np.float32).astype(np.float64)
    assert found.count == 1000
    np.testing.assert_allclose(found.mean.numpy(), exact.mean(0), rtol=1e-6)
    np.testing.assert_allclose(found.std.numpy()[:-1], exact.std(0)[:-1], rtol=1e-6)
    assert found.std[-1] == 1, "a feature that never changes"


def test_an_array_has_the_moments_of_its_rows() -> None:
    x = np.random.default_rng(1).normal(3, 2, size=(2050, 4, M)).astype(np.float32)  # more than two blocks
    data = FeatureArray({"f": x}, np.zeros(2050, dtype=np.int64), ["only"])
    mean, std = data.feature_moments()["f"]
    np.testing.assert_allclose(mean.numpy(), x.mean((0, 1), dtype=np.float64), rtol=1e-6)
    np.testing.assert_allclose(std.numpy(), x.astype(np.float64).std((0, 1)), rtol=1e-6)


def test_files_have_the_moments_of_all_their_rows(tmp_path: Path) -> None:
    generator, sets = np.random.default_rng(2), []
    (tmp_path / "rgb").mkdir()
    for video, length in (("a", 3), ("b", 17), ("c", 1)):
        sets.append(generator.normal(-7, 3, size=(length, M)).astype(np.float32))
        np.save(tmp_path / "rgb" / f"{video}.npy", sets[-1])
    data = FeatureSetDataset(tmp_path, sampling=RandomSampling(2))
    mean, std = data.feature_moments()["rgb"]
    rows = np.concatenate(sets).astype(np.float64)  # all of them, not a sample
    np.testing.assert_allclose(mean.numpy(), rows.mean(0), rtol=1e-6)
    np.testing.assert_allclose(std.numpy(), rows.std(0), rtol=1e-6)
    assert len(data[0].features["rgb"]) == 2, "sampling goes on as before"


# Models


@pytest.mark.parametrize("name", MODELS)
def test_standardizing_is_an_affine_map_of_the_features(name: str) -> None:
    mean, std = moments()
    model, plain = make(name), make(name, standardize=False)
    model.set_moments(mean, std)
    x, lengths = torch.randn(3, T, M, dtype=torch.float64) * std + mean, torch.tensor([T, 2, 4])
    torch.testing.assert_close(model(x), plain((x - mean) / std))
    torch.testing.assert_close(model(x, lengths=lengths), plain((x - mean) / std, lengths=lengths))
    offsets = torch.tensor([0, T, T + 1, 3 * T])
    packed = x.flatten(0, 1)
    standardized = (packed - mean) / std
    torch.testing.assert_close(model(packed, offsets=offsets), plain(standardized, offsets=offsets))
    assert not torch.allclose(model(x), plain(x)), "without it the scores are others"


@pytest.mark.parametrize("name", MODELS)
def test_excluded_positions_have_no_influence(name: str) -> None:
    model = make(name)
    model.set_moments(*moments())
    x, lengths = torch.randn(2, T, M, dtype=torch.float64), torch.tensor([T, 2])
    spoiled = x.clone()
    spoiled[1, 2:] = float("nan")
    spoiled.requires_grad_()
    scores = model(spoiled, lengths=lengths)
    torch.testing.assert_close(scores, model(x, lengths=lengths))
    (gradient,) = torch.autograd.grad(scores.sum(), spoiled)
    assert bool((gradient[1, 2:] == 0).all()) and bool(gradient.isfinite().all())


@pytest.mark.parametrize("name", MODELS)
def test_gradients(name: str) -> None:
    model = make(name)
    model.set_moments(*moments())
    x = torch.randn(2, T, M, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([3, T])
    assert torch.autograd.gradcheck(lambda v: model(v, lengths=lengths), (x,))


@pytest.mark.parametrize("name", MODELS)
def test_moments_are_part_of_the_state(name: str) -> None:
    model = make(name)
    assert {"feature_mean", "feature_std"} <= set(model.state_dict())
    assert not {"feature_mean", "feature_std"} & set(make(name, standardize=False).state_dict())
    model.set_moments(*moments())
    again = type(model).from_config(model.config, dtype=torch.float64)
    again.load_state_dict(model.state_dict())
    x = torch.randn(2, T, M, dtype=torch.float64)
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)


def test_until_they_are_given_nothing_changes() -> None:
    x = torch.randn(2, T, M, dtype=torch.float64)
    torch.testing.assert_close(make("mean")(x), make("mean", standardize=False)(x), rtol=0, atol=0)


def test_autocast() -> None:
    model = make("after", dtype=torch.float32)
    model.set_moments(*moments())
    x = torch.randn(2, T, M) * 3 - 7
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(x)
    torch.testing.assert_close(half.float(), model(x), rtol=0.05, atol=0.02)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"mean": [1.0] * M}, TypeError, "mean must be a torch.Tensor, got list"),
        (
            {"std": torch.ones(M, dtype=torch.int64)},
            TypeError,
            "std must be a floating type, got torch.int64",
        ),
        ({"mean": torch.ones(M + 1)}, ValueError, r"mean must have shape \(M,\) with M = 5, got \(6,\)"),
        (
            {"mean": torch.full((M,), float("nan"))},
            ValueError,
            "mean must be finite, got 5 values that are not",
        ),
        ({"std": torch.tensor([1.0, 1, 0, 1, 1])}, ValueError, "std must be > 0, got 0"),
    ],
    ids=["kind", "type", "shape", "values", "zero"],
)
def test_wrong_moments(changes: dict[str, Any], error: type[Exception], match: str) -> None:
    model = make("mean")
    with pytest.raises(error, match=match):
        model.set_moments(**{"mean": torch.zeros(M), "std": torch.ones(M), **changes})
    assert bool((model.feature_mean == 0).all() and (model.feature_std == 1).all()), "nothing was changed"


def test_a_model_that_does_not_standardize_says_so() -> None:
    with pytest.raises(ValueError, match="standardize=True"):
        make("sdpa", standardize=False).set_moments(*moments())
    with pytest.raises(TypeError, match="standardize must be"):
        PoolingClassifier(M, 2, standardize=1)  # type: ignore[arg-type]


# Settings


@pytest.mark.parametrize(
    "settings",
    [PoolingSettings(pooling="sdpa", cluster_size=2, standardize=True),
     AttentionBoostedLSTMSettings(sequence_length=T, standardize=True)],
    ids=["pooling", "lstm"],
)  # fmt: skip
def test_a_system_takes_the_moments_of_its_training_set(settings: Any) -> None:
    x = np.random.default_rng(3).normal(-7, 3, size=(20, T, M)).astype(np.float32)
    data = FeatureArray({"f": x}, np.zeros(20, dtype=np.int64), ["a", "b"])
    model = settings.build(data)
    np.testing.assert_allclose(model.feature_mean.numpy(), x.mean((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(model.feature_std.numpy(), x.std((0, 1)), rtol=1e-5)
