"""Warm-up, cosine, and the number of steps of a run."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_modules.lr_schedules import total_steps, warmup_then_cosine


def trainer(**changes: Any) -> Any:
    """What the schedule asks of a trainer; 10 batches an epoch."""
    data = SimpleNamespace(train_dataloader=lambda: range(10))
    settings = {"max_steps": -1, "max_epochs": 3, "limit_train_batches": 1.0, "accumulate_grad_batches": 1}
    return SimpleNamespace(datamodule=data, **settings | changes)


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({}, 30),
        ({"max_steps": 7}, 7),
        ({"max_steps": 70}, 30),
        ({"max_steps": 70, "max_epochs": -1}, 70),
        ({"max_steps": 70, "max_epochs": None}, 70),
        ({"max_epochs": -1}, math.inf),
        ({"limit_train_batches": 4}, 12),
        ({"limit_train_batches": 40}, 30),
        ({"limit_train_batches": 0.5}, 15),
        ({"accumulate_grad_batches": 4}, 9),
    ],
)
def test_the_steps_of_a_run_are_the_first_limit_it_meets(changes: dict[str, Any], steps: float) -> None:
    assert total_steps(trainer(**changes)) == steps


def rates(warmup: int, count: int, **changes: Any) -> list[float]:
    """Learning rates of the first `count` steps, of a base rate of 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    config = warmup_then_cosine(optimizer, trainer(**changes), warmup)
    assert config["lr_scheduler"]["interval"] == "step"
    found = []
    for _ in range(count):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        config["lr_scheduler"]["scheduler"].step()
    return found


def test_rates_rise_linearly_and_fall_by_a_cosine_to_zero() -> None:
    expected = [(step + 1) / 4 for step in range(4)]
    expected += [0.5 * (1 + math.cos(math.pi * (step - 4) / 26)) for step in range(4, 30)]
    assert rates(4, 31) == pytest.approx([*expected, 0.0], abs=1e-12)


def test_a_run_without_an_end_keeps_its_rate() -> None:
    assert rates(2, 50, max_epochs=-1) == [0.5] + [1.0] * 49
