"""The picture of losses by kind of text."""

import pytest

from eval.common.contender_styles import STYLES
from eval.eviction.kinds_figure import KindBar, kinds_picture, short_names

BARS = [
    KindBar(contender, kind, target, loss * (2 - 4 * target), (loss / 2, loss * 3))
    for contender, kind, loss in (("gates", "books", 0.01), ("window", "books", 0.1), ("gates", "code", 0.03))
    for target in (0.25, 0.125)
]


def test_folders_of_one_name_are_told_apart() -> None:
    assert short_names(["a/gates", "b/export", "window"]) == {
        "a/gates": "gates",
        "b/export": "export",
        "window": "window",
    }
    assert short_names(["a/gates", "b/gates"]) == {"a/gates": "a/gates", "b/gates": "b/gates"}


def test_a_bar_without_an_interval_is_drawn() -> None:
    (axes,) = kinds_picture([KindBar("gates", "books", 0.25, 0.01, None)]).axes
    assert [patch.get_height() for patch in axes.patches] == [0.01]


def test_each_footprint_has_a_panel_and_each_contender_its_colour() -> None:
    figure = kinds_picture(BARS)
    more, less = figure.axes
    assert [patch.get_height() for patch in more.patches] == pytest.approx([0.01, 0.03, 0.1])
    assert [patch.get_height() for patch in less.patches] == pytest.approx([0.015, 0.045, 0.15])
    assert [tick.get_text() for tick in less.get_xticklabels()] == ["books", "code"]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.texts] == [STYLES["gates"].label, STYLES["window"].label]
