"""Figures, tables and pictures of `python -m eval gates`."""

import pytest
import torch

from eval.common.contender_styles import STYLES
from eval.gates.report import calibration, order_table, r2_by_layer_picture, r2_figures, reliability_picture
from smartkv.metrics.nulls import NULLS
from smartkv.metrics.r2 import RegressionSums
from smartkv.metrics.ranking import Reliability


def sums(offset: float) -> RegressionSums:
    """Two windows of four keys of two heads, predicted with an error of `offset`."""
    target = torch.tensor([[0.0, 1.0, 2.0, 3.0], [0.0, 2.0, 4.0, 6.0]])
    made = RegressionSums.zeros(2, 2)
    for window in range(2):
        made.update(window, target + offset, target)
    return made


def test_r2_stands_beside_the_nulls_with_its_distance_to_the_token_table() -> None:
    nulls = {name: sums(1.0) for name in NULLS}
    found = r2_figures(sums(0.5), nulls, ["L00H0", "L00H1"])
    # mean squares of the targets' distance from their mean are 1.25 and 5
    assert found["r2_head"] == pytest.approx({"L00H0": 1 - 0.25 / 1.25, "L00H1": 1 - 0.25 / 5})
    assert found["r2_token_table"] == pytest.approx((1 - 1 / 1.25 + 1 - 1 / 5) / 2)
    assert found["r2_above_token_table"] == pytest.approx(found["r2_mean"] - found["r2_token_table"])


def test_the_picture_by_layer_shows_gates_before_nulls_that_stand_back() -> None:
    figure = r2_by_layer_picture({"gates": [0.5, 0.6], "token_table": [0.2, 0.3], "constant": [0.0, 0.0]}, [0, 1])
    names = [text.get_text() for text in figure.legends[0].texts]
    assert names == [STYLES[name].label for name in ("gates", "null:token_table", "null:constant")]
    gates, table, _ = figure.axes[0].lines
    assert gates.get_linewidth() > 2 * table.get_linewidth() and gates.get_zorder() > table.get_zorder()


def test_the_order_table_has_only_figures_that_are_there() -> None:
    order = {"future_attention_from_age": None, "scores": {"token_table": {"concordance": {"mean": 0.75}}}}
    table = order_table(order)
    assert [str(column.header) for column in table.columns] == ["scores", "pairs in order"]
    assert [list(column.cells) for column in table.columns] == [["token table"], ["0.750"]]


def test_calibration_sets_predicted_probabilities_beside_what_happened() -> None:
    reliability = Reliability.zeros(1)
    probability = torch.tensor([[[0.2], [0.2], [0.9], [0.9]]])
    reliability.update(probability, torch.tensor([[[0.0], [1.0], [1.0], [1.0]]]))
    found = calibration(reliability, [16])
    pairs = [(p, h) for p, h in zip(found["predicted"][0], found["happened"][0], strict=True) if p is not None]
    assert pairs == [pytest.approx((0.2, 0.5)), pytest.approx((0.9, 1.0))]
    assert found["expected_calibration_error"] == [pytest.approx((2 * 0.3 + 2 * 0.1) / 4)]
    line = reliability_picture(found).axes[0].lines[1]
    assert [list(values) for values in line.get_data()] == [list(values) for values in zip(*pairs, strict=True)]
    assert "16 tokens" in line.get_label()
