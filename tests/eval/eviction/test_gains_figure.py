"""The picture of what training took away from the cost of eviction."""

import pytest

from eval.common.contender_styles import STYLES
from eval.eviction.gains_figure import GainBar, gains_picture


def bar(run: str, contender: str, fall: float | None) -> GainBar:
    interval = None if fall is None else (fall - 0.05, fall + 0.1)
    return GainBar(run, "books", contender, 0.125, 0.0427, fall, interval)


def test_a_bar_is_what_is_left_with_its_interval_and_the_colour_of_its_policy() -> None:
    axes = gains_picture([bar("runs/window", "gates", 0.25), bar("runs/gates", "gates", 0.33)]).axes[0]
    assert [patch.get_height() for patch in axes.patches] == pytest.approx([75, 67])
    assert [patch.get_facecolor()[:3] for patch in axes.patches] != []
    ends = [container.errorbar.lines[2][0].get_segments()[0][:, 1].tolist() for container in axes.containers[1::2]]
    assert ends[0] == pytest.approx([65, 80])


def test_a_run_has_the_label_of_the_policy_that_its_folder_is_named_after() -> None:
    (legend,) = gains_picture([bar("runs/window", "gates", 0.25), bar("runs/gates", "gates", 0.33)]).legends
    names = [text.get_text() for text in legend.texts]
    assert names == ["before training", STYLES["window"].label, STYLES["gates"].label]


def test_there_is_no_bar_where_nothing_was_lost_before() -> None:
    axes = gains_picture([bar("a", "gates", None), bar("a", "window", 0.5)]).axes[0]
    assert [patch.get_height() for patch in axes.patches] == [50]
