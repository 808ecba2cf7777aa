"""Points of a frontier, and ratios at equal loss."""

import math

import pytest
import torch

from eval.eviction.frontier import Point, equal_loss_ratio
from smartkv.metrics.perplexity import EvictedWindow
from smartkv.policies.named import read_policy


def point(policy: str, footprint: float, deltas: list[float]) -> Point:
    settings = read_policy("full", 2)
    windows = [EvictedWindow(1 + delta, torch.full((2, 1), footprint).double(), 10) for delta in deltas]
    return Point.of(settings, None, [1.0] * len(deltas), windows, 100)


def test_equal_loss_is_read_off_the_reference_in_logarithms() -> None:
    reference = [point("window", f, [0.01 / f, 0.01 / f]) for f in (0.1, 0.2, 0.4)]  # a straight line in logarithms
    ratio = equal_loss_ratio(point("gated", 0.15, [0.01 / 0.3, 0.01 / 0.3]), reference)
    assert ratio is not None and ratio[0] == pytest.approx(0.15 / 0.3)
    assert ratio[1] == pytest.approx((0.5, 0.5))


def test_a_loss_that_the_reference_never_comes_to_has_no_ratio() -> None:
    reference = [point("window", f, [0.01 / f]) for f in (0.1, 0.2)]
    assert equal_loss_ratio(point("gated", 0.15, [0.001]), reference) is None
    assert equal_loss_ratio(point("gated", 0.15, [0.07]), reference[:1]) is None


def test_a_point_s_interval_and_perplexity_are_over_windows() -> None:
    found = point("x", 0.5, [0.1, 0.3])
    assert found.delta_nll == pytest.approx(0.2) and found.interval == pytest.approx((0.1, 0.3))
    assert found.perplexity == pytest.approx(math.exp(1.2))
