"""Objectives of gates: their targets, and the outputs at which each loss is smallest."""

import math

import pytest
import torch
from torch import Tensor

from smartkv.errors import SmartKVError
from smartkv.gates.objectives import FutureAttention, Log4Lifespan, Objective, OrdinalAges, Ranking, objective_of_target
from smartkv.labels.key_labels import Labels

LIVES = torch.tensor([[1.0, 3, 4, 5, 16, 17, 64, 1024]])  # tokens
LABELS = Labels(
    LIVES.log2() / 2,
    torch.tensor([[[0.0, 0.1, 0.0, 0.3, 0.0, 0.0, 0.2, 0.0]], [[0.0, 0.0, 0.0, 0.5, 0.0, 0.0, torch.nan, 0.0]]]),
    (16, 128),
)


def least(objective: Objective, target: Tensor) -> Tensor:
    """Fit the outputs of a gate that ignores its key, `[outputs]`."""
    bias = torch.zeros(1, 1, objective.outputs, requires_grad=True)
    optimizer = torch.optim.LBFGS([bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = objective.row_loss(bias.expand_as(target), target).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    return bias.detach().flatten()


def test_mse_is_least_at_the_mean_and_huber_near_the_median() -> None:
    target = Log4Lifespan().targets(LABELS)
    assert float(least(Log4Lifespan("mse"), target)) == pytest.approx(float(LABELS.log4_lifespan.mean()), abs=1e-4)
    median = LABELS.log4_lifespan.flatten().quantile(0.5)
    assert float(least(Log4Lifespan(huber_delta=1e-3), target)) == pytest.approx(float(median), abs=0.3)


def test_ordinal_ages_are_passed_by_keys_that_live_longer() -> None:
    objective = OrdinalAges([4, 16, 64])
    target = objective.targets(LABELS)
    assert target[0].T.tolist() == [[0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 1]]
    shares = target.mean(dim=1)
    torch.testing.assert_close(least(objective, target), shares.logit()[0], atol=1e-3, rtol=0)
    torch.testing.assert_close(objective.start(shares), shares.logit())


def test_the_ordinal_score_is_a_mean_log4_age() -> None:
    objective = OrdinalAges([4, 16, 256])
    certain = torch.tensor([[-50.0, -50, -50], [50, -50, -50], [50, 50, -50], [50, 50, 50], [0, -50, -50]])
    assert objective.score(certain).tolist() == pytest.approx([0, 1, 2, 4, 0.5], abs=1e-6)


def test_future_attention_is_least_at_the_log_of_the_mean_with_zeros_in_it_and_unknown_ones_left_out() -> None:
    objective = FutureAttention([128, 16], scale=10)
    target = objective.targets(LABELS)
    assert target.shape == (1, 8, 2) and float(target[0, 3, 0]) == 5.0 and float(target[0, 3, 1]) == 3.0
    want = [math.log(10 * 0.5 / 7), math.log(10 * 0.6 / 8)]
    torch.testing.assert_close(least(objective, target), torch.tensor(want), atol=2e-3, rtol=0)
    mean = torch.tensor([0.2, 0.4])
    score = objective.score((10 * mean).log())
    assert float(score.exp()) == pytest.approx(0.3)


def test_ranking_puts_longer_lives_first_and_cares_more_for_larger_gaps() -> None:
    objective, target = Ranking(pairs=7), Ranking().targets(LABELS)
    order = torch.arange(8.0)[None, :, None]
    right, wrong = (objective.row_loss(sign * order, target).sum() for sign in (1, -1))
    assert right < wrong / 5
    gaps = torch.tensor([[[0.0], [1.0]], [[0.0], [3.0]]])
    small, large = Ranking(1).row_loss(torch.zeros(2, 2, 1), gaps).sum(dim=1)
    assert float(large) == pytest.approx(3 * float(small))


def test_gates_of_one_output_are_read_as_they_are_and_others_by_their_objective() -> None:
    assert objective_of_target("log4 lifespan", {}) is None and objective_of_target("log worth", {}) is None
    prediction = torch.randn(3, 2)
    for objective in (OrdinalAges([4, 64]), FutureAttention([16, 128])):
        read = objective_of_target(objective.target, objective.settings)
        torch.testing.assert_close(read.score(prediction), objective.score(prediction))


def test_future_attention_that_was_not_harvested_is_asked_for() -> None:
    with pytest.raises(SmartKVError, match=r"no future attention from ages \[512\]"):
        FutureAttention([16, 512]).targets(LABELS)
    with pytest.raises(SmartKVError, match=r"no future attention from ages \[16\]"):
        FutureAttention([16]).targets(Labels(LABELS.log4_lifespan))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Log4Lifespan("mae"), "loss must be huber or mse"),
        (lambda: Log4Lifespan(huber_delta=0), "huber_delta must be above 0"),
        (lambda: OrdinalAges([16, 4]), "ages must be ascending"),
        (lambda: OrdinalAges([]), "ages must be ascending"),
        (lambda: FutureAttention([]), "ages must not be empty"),
        (lambda: FutureAttention(scale=-1), "scale must be above 0"),
        (lambda: Ranking(0), "pairs must be at least 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(make: object, message: str) -> None:
    with pytest.raises(SmartKVError, match=message):
        make()  # type: ignore[operator]
