"""Bootstrap draws of windows and groups, and the intervals from them."""

import pytest
import torch
from torch import Tensor

from smartkv.metrics.bootstrap import bootstrap, mean_over


def test_each_draw_counts_as_many_windows_as_there_are() -> None:
    seen = []

    def statistic(weight: Tensor) -> Tensor:
        seen.append(weight)
        return weight[:, 0]

    bootstrap(7, statistic, draws=50)
    assert seen[0].shape == (50, 7)
    assert (seen[0].sum(dim=1) == 7).all()
    assert len(seen[0].unique(dim=0)) > 40


def test_groups_are_drawn_whole() -> None:
    seen = []

    def statistic(weight: Tensor) -> Tensor:
        seen.append(weight)
        return weight[:, 0]

    bootstrap(6, statistic, draws=50, groups=[9, 4, 4, 9, 9, 7])
    weight = seen[0]
    assert torch.equal(weight[:, [0, 0]], weight[:, [3, 4]]) and torch.equal(weight[:, 1], weight[:, 2])
    assert (weight[:, [0, 1, 5]].sum(dim=1) == 3).all() and len(weight.unique(dim=0)) > 5


def test_the_weighted_mean_is_that_of_the_windows_repeated() -> None:
    values, weight = torch.tensor([1.0, 5.0, 9.0]), torch.tensor([[1.0, 1, 1], [0, 2, 1], [3, 0, 0]])
    repeated = [[1.0, 5, 9], [5.0, 5, 9], [1.0, 1, 1]]
    assert mean_over(weight, values).tolist() == pytest.approx([sum(drawn) / 3 for drawn in repeated])


def test_the_interval_of_a_mean_is_that_of_the_normal_approximation() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = bootstrap(400, lambda weight: mean_over(weight, values))
    half = 1.96 * float(values.std()) / 20
    assert (low, high) == pytest.approx((float(values.mean()) - half, float(values.mean()) + half), abs=0.015)


def test_draws_without_a_figure_are_left_out() -> None:
    values = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)

    def of_draws_with_the_first(weight: Tensor) -> Tensor:
        return torch.where(weight[:, 0] > 0, mean_over(weight, values), torch.nan)

    low, high = bootstrap(3, of_draws_with_the_first, level=1.0)
    assert low == 1.0 and high == pytest.approx(7 / 3)  # the largest mean of a draw that holds the first window
