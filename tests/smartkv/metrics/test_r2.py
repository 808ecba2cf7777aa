"""R² by head against torchmetrics, and its interval."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics import R2Score

from smartkv.metrics.r2 import RegressionSums
from tests.smartkv.metrics.fixtures import random

quick = settings(deadline=None, max_examples=25, derandomize=True)
seeds = st.integers(0, 10**6)


def sums_of(predictions: list[Tensor], targets: list[Tensor]) -> RegressionSums:
    sums = RegressionSums.zeros(len(targets), targets[0].shape[0])
    for window, (prediction, target) in enumerate(zip(predictions, targets, strict=True)):
        sums.update(window, prediction, target)
    return sums


def example(seed: int, windows: int = 6, gates: int = 3, rows: int = 9) -> tuple[list[Tensor], list[Tensor]]:
    """Predictions and targets, `[gates, rows]` a window."""
    target = 2.5 + random(seed, windows, gates, rows)
    return list(target + 0.5 * random(seed + 1, windows, gates, rows)), list(target)


@quick
@given(seed=seeds, windows=st.integers(1, 6), rows=st.integers(2, 12))
def test_r2_by_head_is_that_of_torchmetrics(seed: int, windows: int, rows: int) -> None:
    predictions, targets = example(seed, windows, 3, rows)
    metric = R2Score(multioutput="raw_values").set_dtype(torch.float64)
    for prediction, target in zip(predictions, targets, strict=True):
        metric.update(prediction.T.double(), target.T.double())
    torch.testing.assert_close(sums_of(predictions, targets).r2(), metric.compute(), atol=1e-9, rtol=1e-9)


def test_a_window_updated_in_parts_scores_as_in_one() -> None:
    (prediction,), (target,) = example(0, windows=1)
    sums = RegressionSums.zeros(1, 3)
    for part in (slice(0, 4), slice(4, None)):
        sums.update(0, prediction[:, part], target[:, part])
    torch.testing.assert_close(sums.r2(), sums_of([prediction], [target]).r2())


@pytest.mark.parametrize("value", [0.0, 2.5, 5.0])
def test_r2_of_a_target_that_never_varies_is_nan_for_that_head_alone(value: float) -> None:
    predictions, targets = example(0)
    for target in targets:
        target[1] = value
    assert sums_of(predictions, targets).r2().isnan().tolist() == [False, True, False]


def test_a_window_that_counts_twice_weighs_as_if_it_came_twice() -> None:
    predictions, targets = example(0)
    weight = torch.tensor([2, 0, 1, 0, 3, 1])
    drawn = [window for window, times in enumerate(weight.tolist()) for _ in range(times)]
    repeated = sums_of([predictions[window] for window in drawn], [targets[window] for window in drawn])
    torch.testing.assert_close(sums_of(predictions, targets).r2(weight), repeated.r2())


@quick
@given(seed=seeds)
def test_the_interval_holds_the_point_estimate(seed: int) -> None:
    sums = sums_of(*example(seed, windows=20))
    low, high = sums.interval(draws=300)
    assert low < sums.r2().nanmean() < high


def test_the_interval_is_the_same_every_time_and_another_for_another_seed() -> None:
    sums = sums_of(*example(0))
    assert sums.interval() == sums.interval()
    assert sums.interval(seed=0) != sums.interval(seed=1)


def test_a_wider_level_gives_a_wider_interval() -> None:
    sums = sums_of(*example(0))
    narrow, wide = sums.interval(level=0.5), sums.interval(level=0.99)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_one_window_gives_an_interval_of_no_width() -> None:
    sums = sums_of(*example(0, windows=1))
    low, high = sums.interval(draws=10)
    assert low == high == pytest.approx(sums.r2().mean().item())
