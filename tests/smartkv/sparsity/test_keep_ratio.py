"""Schedules of the keep ratio."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smartkv.errors import SmartKVError
from smartkv.sparsity.keep_ratio import Adaptive, Fixed, Linear


def test_the_curriculum_goes_in_a_straight_line() -> None:
    ratios = [Linear(0.9, 0.3).keep_ratio(step, 101) for step in (0, 25, 50, 100, 200)]
    assert ratios == pytest.approx([0.9, 0.75, 0.6, 0.3, 0.3])
    assert Linear().keep_ratio(0, 1) == 0.9 and Fixed(0.4).keep_ratio(7, 9) == 0.4


def test_the_adaptive_schedule_falls_while_the_model_keeps_up_and_goes_on_as_it_was() -> None:
    schedule = Adaptive(0.9, 0.3, 0.1, 0.05)
    ratios = []
    for cost in (0.0, 0.04, 0.2, 0.05, -0.1):
        schedule.validated(cost)
        ratios.append(schedule.keep_ratio(0, 1))
    assert ratios == pytest.approx([0.8, 0.7, 0.8, 0.7, 0.6])
    again = Adaptive(0.9, 0.3, 0.1, 0.05)
    again.load_state_dict(json.loads(json.dumps(schedule.state_dict())))
    for one in (schedule, again):
        one.validated(0.01)
    assert again.state_dict() == schedule.state_dict() and again.ratio == pytest.approx(0.5)


@given(st.lists(st.floats(0, 10), max_size=60))
def test_the_adaptive_schedule_stays_between_its_ends(losses: list[float]) -> None:
    schedule = Adaptive(0.9, 0.3, 0.07, 0.0)
    for loss in losses:
        schedule.validated(loss)
        assert 0.3 <= schedule.keep_ratio(0, 1) <= 0.9


def test_schedules_that_are_none_are_refused() -> None:
    for wrong in (
        lambda: Fixed(1.2),
        lambda: Linear(-0.1, 0.5),
        lambda: Adaptive(0.3, 0.9),
        lambda: Adaptive(change=2),
    ):
        with pytest.raises(SmartKVError):
            wrong()


def test_only_a_curriculum_by_steps_needs_to_know_how_many_there_are() -> None:
    assert [schedule.needs_end for schedule in (Fixed(), Linear(), Adaptive())] == [False, True, False]


def test_schedules_without_a_state_save_none() -> None:
    for schedule in (Fixed(0.4), Linear(0.9, 0.3)):
        before = schedule.keep_ratio(3, 9)
        schedule.validated(0.5)
        assert schedule.state_dict() == {} and schedule.keep_ratio(3, 9) == before
