"""The common style, and the pictures of values by layer and head."""

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_hex

from eval.common.contender_styles import STYLES
from eval.common.figures import (
    DPI,
    heads_heatmap,
    lifespan_histogram,
    lines_by_layer,
    new_figure,
    predicted_against_true,
    styled,
    survival,
)


def test_a_styled_picture_has_the_common_resolution_and_leaves_the_settings_alone() -> None:
    before = dict(matplotlib.rcParams)
    assert styled(new_figure)().dpi == DPI
    assert dict(matplotlib.rcParams) == before


def test_a_heatmap_has_layers_across_and_a_figure_in_each_cell() -> None:
    axes = heads_heatmap(np.arange(6.0).reshape(3, 2) / 10, [4, 5, 6], "title", "share").axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["4", "5", "6"]
    cells = {tuple(int(place) for place in text.get_position()): text.get_text() for text in axes.texts}
    assert cells == {(layer, head): f"{(2 * layer + head) / 10:.2f}" for layer in range(3) for head in range(2)}


def test_a_heatmap_leaves_cells_without_a_figure_empty_and_writes_no_minus_zero() -> None:
    axes = heads_heatmap(np.array([[np.nan, -0.001]]), [0], "title", "share", low=-0.1).axes[0]
    assert [text.get_text() for text in axes.texts] == ["0.00"]


def test_a_heatmap_of_many_heads_has_no_figures_in_its_cells() -> None:
    assert not heads_heatmap(np.zeros((2, 17)), [0, 1], "title", "share").axes[0].texts


def test_a_histogram_counts_each_key_once_and_clips_predictions_to_its_border() -> None:
    truth, prediction = np.array([0.1, 0.1, 3.9]), np.array([-5.0, 1.5, 9.0])
    counts = lifespan_histogram(prediction, truth, limit=4.0, bins=4)
    assert counts.sum() == 3 and counts[0, 0] == counts[0, 1] == counts[3, 3] == 1


def test_histograms_of_several_heads_share_one_colour_scale() -> None:
    panels = {"one": np.eye(4, dtype=int), "two": 50 * np.eye(4, dtype=int)}
    figure = predicted_against_true(panels, 4.0)
    scales = [axes.collections[0].norm.vmax for axes in figure.axes[:2]]
    assert scales == [50, 50] and [axes.get_title(loc="left") for axes in figure.axes[:2]] == ["one", "two"]


def test_lines_of_contenders_have_their_colours() -> None:
    figure = lines_by_layer(
        {"window 0.22": [1.0, 2.0], "gates 0.22": [3.0, 4.0]}, [0, 1], "t", "share", contenders=True
    )
    window, gates = figure.axes[0].lines
    assert (window.get_color(), gates.get_color()) == (STYLES["window"].colour, STYLES["gates"].colour)
    assert [text.get_text() for text in figure.legends[0].texts] == ["StreamingLLM window, 0.22", "SmartKV gates, 0.22"]


def test_lines_of_other_series_have_different_colours_and_markers() -> None:
    lines = lines_by_layer({str(n): [0.1, 0.2] for n in range(5)}, [0, 1], "t", "share", log=True).axes[0].lines
    assert len({to_hex(line.get_color()) for line in lines}) == len({line.get_marker() for line in lines}) == 5


def test_survival_is_the_share_of_longer_lives() -> None:
    lifespans = np.array([1, 1, 4, 64])
    line = survival({"threshold 0.05": lifespans}, 64, "t").axes[0].lines[0]
    for age, alive in zip(*line.get_data(), strict=True):
        assert alive == pytest.approx(sum(life > age for life in lifespans) / 4)
