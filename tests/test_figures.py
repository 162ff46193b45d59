"""Pictures: the units they show, that they are drawn, and what stands in them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread

from fastac import figures


def check_drawn(figure: Figure, path: Path) -> None:
    """The file is there, and neither blank nor of one colour per column."""
    assert figures.save(figure, path) == path
    pixels = imread(path)[..., :3]
    assert pixels.shape[0] > 100
    assert pixels.shape[1] > 100
    assert pixels.std() > 0.05
    assert len(np.unique((pixels * 255).astype(np.uint8).reshape(-1, 3), axis=0)) > 10


def epochs(kinds: list[tuple[str, bool]]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "weighting": weighting,
                "shift": shift,
                "cluster_size": size,
                "seed": seed,
                "epoch": epoch,
                "accuracy": 10.0 * epoch + seed + (30 if shift else 0),
            }
            for weighting, shift in kinds
            for size in (4, 64)
            for seed in (1, 3)
            for epoch in (1, 2, 3)
        ]
    )


def test_units_shown_cover_the_named_positions() -> None:
    weights = np.full((12, 6), 0.01)
    weights[3, 4] = weights[7, 1] = 0.9
    weights[5, 0] = 0.8
    units = figures.choose_units(weights, [1, 4])
    assert len(units) == len(set(units)) == figures.UNITS_SHOWN
    assert {3, 5, 7} <= set(units)
    assert units.index(7) < units.index(3)


def test_one_unit_is_not_shown_twice() -> None:
    weights = np.full((12, 6), 0.01)
    weights[3, 4] = weights[3, 1] = 0.4  # the best for two positions
    weights[8, 4] = 0.3
    assert {3, 8} <= set(figures.choose_units(weights, [1, 4]))


def test_fewer_units_than_are_shown() -> None:
    weights = np.eye(2, 6)[::-1]
    assert figures.choose_units(weights, [0, 1, 2, 3]) == [1, 0]


def test_figure_5_has_the_frames_and_the_chosen_units(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    frames = generator.integers(0, 256, (6, 28, 28)).astype(np.uint8)
    weights = np.full((12, 6), 0.02)
    weights[9, 2] = 0.9
    figure = figures.weights_under_frames(frames, ["", "", "7", "", "", ""], weights, title="a video")
    above, below = figure.axes[:2]
    assert above.get_title() == "a video"
    assert np.array_equal(np.asarray(above.images[0].get_array()), np.concatenate(list(frames), axis=1))
    assert [tick.get_text() for tick in below.get_xticklabels()] == ["–", "–", "7", "–", "–", "–"]
    shown = [tick.get_text() for tick in below.get_yticklabels()]
    assert len(shown) == figures.UNITS_SHOWN
    row = shown.index("unit 9")
    assert np.array_equal(np.asarray(below.images[0].get_array())[row], weights[9])
    assert below.images[0].get_clim() == (0, 1)
    check_drawn(figure, tmp_path / "new" / "video.png")


def test_the_colours_run_from_blue_to_red() -> None:
    colours = figures.hsv_colours()
    (r0, _, b0, _), (r1, _, b1, _) = colours(0.0), colours(1.0)
    assert b0 > 0.9 > 0.2 > r0
    assert r1 > 0.9 > 0.2 > b1


def legend(axis: Axes) -> list[str]:
    found = axis.get_legend()
    assert found is not None
    return [text.get_text() for text in found.get_texts()]


@pytest.mark.parametrize("kinds", [[("fc1", True)], [("fc1", False), ("fc1", True)]], ids=["one", "two"])
def test_figure_4_has_a_panel_per_kind_and_a_line_per_size(
    kinds: list[tuple[str, bool]], tmp_path: Path
) -> None:
    figure = figures.accuracy_per_epoch(epochs(kinds))
    assert len(figure.axes) == len(kinds)
    for axis, (weighting, shift) in zip(figure.axes, kinds, strict=True):
        assert axis.get_title() == f"{weighting}, {'with shift' if shift else 'no shift'}"
        assert legend(axis) == ["N = 4", "N = 64"]
        for line in axis.lines:
            assert np.array_equal(line.get_xdata(), [1, 2, 3])
            np.testing.assert_allclose(line.get_ydata(), np.array([12, 22, 32]) + (30 if shift else 0))
        band = axis.collections[0].get_paths()[0].vertices  # of the seeds, 1 and 3
        assert band[:, 1].min() == pytest.approx(11 + (30 if shift else 0))
        assert band[:, 1].max() == pytest.approx(33 + (30 if shift else 0))
    check_drawn(figure, tmp_path / "figure4.png")


def test_one_size_has_one_colour_in_all_panels() -> None:
    rows = epochs([("fc1", False), ("fc1", True)])
    rows = rows[~((rows["cluster_size"] == 4) & ~rows["shift"])]
    left, right = figures.accuracy_per_epoch(rows).axes
    assert legend(left) == ["N = 64"]
    assert left.lines[0].get_color() == right.lines[1].get_color() != right.lines[0].get_color()


def test_figure_4_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="epochs must have at least one row, got none"):
        figures.accuracy_per_epoch(epochs([]))


def test_training_curves_take_losses_and_metrics_apart(tmp_path: Path) -> None:
    metrics = pd.DataFrame(
        {
            "epoch": [1, 2],
            "train_loss": [3.0, 2.0],
            "train_seconds": [9.0, 9.0],
            "validation_loss": [3.5, 2.5],
            "validation_accuracy": [0.1, 0.4],
        }
    )
    figure = figures.training_curves(metrics)
    losses, scores = figure.axes
    assert legend(losses) == ["train loss", "validation loss"]
    assert legend(scores) == ["validation accuracy"]
    assert np.array_equal(scores.lines[0].get_ydata(), [0.1, 0.4])
    check_drawn(figure, tmp_path / "curves.png")


def test_attention_maps_have_a_row_per_video_and_a_column_per_modality(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    videos = [
        ("first", {"rgb": generator.random((9, 5)), "audio": generator.random((3, 4))}),
        ("silent", {"rgb": generator.random((9, 7)), "audio": np.zeros((3, 0))}),
    ]
    figure = figures.attention_maps(videos)
    panels = figure.axes[:4]
    assert [axis.get_title(loc="left") for axis in panels] == ["first  rgb", "audio", "silent  rgb", "audio"]
    assert [np.asarray(i.get_array()).shape for axis in panels for i in axis.images] == [
        (8, 5),
        (3, 4),
        (8, 7),
    ]
    assert [text.get_text() for text in panels[3].texts] == ["no features"]
    assert panels[0].get_yticklabels()[0].get_text().startswith("unit ")
    other = figures.attention_maps(videos, rows="feature").axes[0]
    assert other.get_yticklabels()[0].get_text().startswith("feature ")
    check_drawn(figure, tmp_path / "attention.png")


def test_names_are_drawn_as_they_are(tmp_path: Path) -> None:
    """matplotlib would set what stands between dollars as a formula, or raise."""
    video = (r"cost $5 \or $7 a_b", {"$\\foo$": np.ones((2, 3))})
    figure = figures.attention_maps([video, ("other", {"$\\foo$": np.ones((2, 3))})])
    assert figure.axes[0].get_title(loc="left") == r"cost $5 \or $7 a_b  $\foo$"
    check_drawn(figure, tmp_path / "attention.png")
    flash = figures.weights_under_frames(
        np.zeros((2, 4, 4), np.uint8), ["3", ""], np.ones((2, 2)), title=r"$\or$"
    )
    assert flash.axes[0].get_title() == r"$\or$"


def test_the_suffix_decides_the_format(tmp_path: Path) -> None:
    figure = Figure(figsize=(1, 1))
    assert {"png", "pdf", "svg"} <= set(figures.formats())
    assert figures.save(figure, tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
    with pytest.raises(ValueError, match="doc"):
        figures.save(figure, tmp_path / "a.doc")
