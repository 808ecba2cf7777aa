"""Pictures of contenders by footprint."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from eval.common.contender_styles import STYLES
from eval.common.footprint_figures import contenders_figure, frontier

GATES = ("ours", [(0.25, 0.01, 0.008, 0.012), (0.125, 0.03, 0.02, 0.04)])
WINDOW = ("rule", [(0.125, 0.16, 0.14, 0.18), (0.25, 0.08, 0.07, 0.09)])
INT8 = ("quantised", [(0.56, 0.0002, -0.0004, 0.0007)])


def bars(figure: Figure) -> dict[str, np.ndarray]:
    """Ends of the intervals of each contender, `[points, 2]`."""
    drawn = figure.axes[0].containers
    return {each.get_label(): np.array(each.lines[2][0].get_segments())[:, :, 1] for each in drawn}


def test_points_are_joined_in_the_order_of_their_footprint() -> None:
    line = contenders_figure({"gates": GATES}, "t", "loss").axes[0].containers[0].lines[0]
    assert line.get_xdata().tolist() == [0.125, 0.25] and line.get_color() == STYLES["gates"].colour


def test_a_quantised_contender_is_a_point_with_its_whole_interval() -> None:
    figure = contenders_figure({"gates": GATES, "quant:int8": INT8}, "t", "loss")
    point = figure.axes[0].containers[1]
    assert point.lines[0].get_linestyle() == "None" and point.lines[2][0].get_linewidth()[0] > 0
    assert bars(figure)["INT8"] == pytest.approx(np.array([[-0.0004, 0.0007]]))


def test_an_interval_that_reaches_0_is_shown_on_an_axis_that_has_0() -> None:
    axes = contenders_figure({"quant:int8": INT8, "window": WINDOW}, "t", "loss").axes[0]
    assert axes.get_yscale() == "symlog" and axes.get_ylim()[0] < -0.0004 and "linear" in axes.get_ylabel()
    assert contenders_figure({"window": WINDOW}, "t", "loss").axes[0].get_yscale() == "log"


def test_every_point_lies_inside_the_axes() -> None:
    axes = contenders_figure({"gates": GATES, "window": WINDOW, "quant:int8": INT8}, "t", "loss").axes[0]
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    for _, points in (GATES, WINDOW, INT8):
        assert all(left < share < right and low < bottom and top < high for share, _, bottom, top in points)


def test_shares_have_an_axis_from_0_to_1_and_equal_ones_are_moved_apart() -> None:
    same = ("rule", [(0.25, 0.5, 0.4, 0.6)])
    axes = contenders_figure({"h2o": same, "tova": same}, "t", "share", loss=False).axes[0]
    first, second = (container.lines[0].get_xdata()[0] for container in axes.containers)
    assert axes.get_yscale() == "linear" and first < 0.25 < second and second / first < 1.05


def test_the_frontier_of_policies_has_both_axes_linear_and_each_contender_s_label() -> None:
    figure = frontier({"all-gated": GATES[1], "window": WINDOW[1]}, "t")
    assert (figure.axes[0].get_xscale(), figure.axes[0].get_yscale()) == ("linear", "linear")
    names = [text.get_text() for text in figure.legends[0].texts]
    assert names == [STYLES["all-gated"].label, STYLES["window"].label]


def test_a_picture_without_contenders_can_be_drawn() -> None:
    assert not contenders_figure({}, "t", "loss").axes[0].containers
