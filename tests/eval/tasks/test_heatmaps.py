"""Heatmaps of tasks."""

import numpy as np
import pytest

from eval.tasks.heatmaps import panels


@pytest.mark.parametrize("loss", [False, True])
def test_each_measured_cell_has_its_figure_and_the_others_have_none(loss: bool) -> None:
    grids = {"full": np.array([[1.0, 0.5]]), "window": np.array([[np.nan, 0.25]])}
    figure = panels(grids, ["10 %"], ["1,024", "2,048"], ("depth", "tokens"), "Needle", "share", loss)
    shown = [sorted(text.get_text() for text in axes.texts) for axes in figure.axes[:2]]
    assert shown == [["0.50", "1.00"], ["0.25"]]


def test_all_panels_have_one_colour_scale() -> None:
    grids = {"a": np.array([[0.2]]), "b": np.array([[4.0]])}
    for loss, top in ((True, 4.0), (False, 1.0)):
        figure = panels(grids, ["row"], ["column"], ("", ""), "", "", loss)
        assert [axes.images[0].get_clim() for axes in figure.axes[:2]] == [(0.0, top)] * 2


def test_a_place_without_a_panel_stays_empty() -> None:
    figure = panels({str(n): np.zeros((1, 1)) for n in range(4)}, ["row"], ["column"], ("", ""), "", "")
    assert [axes.axison for axes in figure.axes[:6]] == [True] * 4 + [False] * 2
