"""Policies as contenders."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from eval.contenders.policies import BudgetContender, PolicyContender
from smartkv import GateBank, HybridPolicy, LayerRule
from smartkv.metrics.perplexity import token_losses
from smartkv.policies.budgets import Calibration
from smartkv.policies.named import read_policy
from tests.models import token_ids

TOKENS, FIRST = 96, 24


def contender(lm: Any, gates: Path, name: str, bits: tuple[int, int] | None = None) -> PolicyContender:
    bank = GateBank.from_pretrained(gates)
    windows = [token_ids(TOKENS, seed) for seed in (3, 4)]
    calibrate = partial(Calibration.measure, lm.model, bank, windows, FIRST - 1)
    policy = read_policy(name, lm.architecture.layers)
    return PolicyContender(lm, bank, policy, calibrate, bits=bits)


@pytest.mark.parametrize("name", ["all-gated", "window"])
def test_a_policy_keeps_the_footprint_that_it_was_solved_for(name: str, tiny_lm: Any, random_gates: Path) -> None:
    policy = contender(tiny_lm, random_gates, name)
    reading = policy.read(policy.solved(0.5), token_ids(TOKENS, 3), FIRST, FIRST - 1, None)
    assert reading.footprint == pytest.approx(0.5, abs=0.08)
    assert policy.needs == ("keys" if name == "all-gated" else "nothing")


def test_a_policy_that_leaves_nothing_open_is_not_solved(tiny_lm: Any, random_gates: Path) -> None:
    full = contender(tiny_lm, random_gates, "full")
    full.calibrate = None  # type: ignore[assignment]  # calling it would be an error
    reading = full.read(full.solved(0.1), token_ids(TOKENS), FIRST, FIRST - 1, None)
    expected = token_losses(tiny_lm.model, token_ids(TOKENS), FIRST).nll
    torch.testing.assert_close(reading.nll, expected, atol=1e-4, rtol=0)
    assert reading.footprint == 1.0


@pytest.mark.parametrize(("bits", "name"), [((8, 8), "window+8bit"), ((6, 4), "window+k6v4"), (None, "window")])
def test_bits_stand_behind_the_name_and_save_bytes(
    bits: tuple[int, int] | None, name: str, tiny_lm: Any, random_gates: Path
) -> None:
    packed, plain = contender(tiny_lm, random_gates, "window", bits), contender(tiny_lm, random_gates, "window")
    assert packed.name == name
    shares = [c.read(plain.solved(0.5), token_ids(TOKENS), FIRST, FIRST - 1, None).stored for c in (packed, plain)]
    assert shares[0] < shares[1] if bits else shares[0] == shares[1]


def budget_contender(lm: Any, gates: Path, bits: tuple[int, int] | None = None) -> BudgetContender:
    policy = HybridPolicy((LayerRule("all", "gated", 8),), sinks=2, name="gates")
    return BudgetContender(lm, GateBank.from_pretrained(gates), policy, bits)


def test_a_budget_is_a_share_of_the_whole_text_and_is_held_when_it_was_read(tiny_lm: Any, random_gates: Path) -> None:
    budget, text = budget_contender(tiny_lm, random_gates), token_ids(193, 3)
    assert budget.name == "gates@budget" and budget.solved(0.25) == {"budget": 0.25}
    reading = budget.read(budget.solved(0.25), text, FIRST, FIRST - 1, None)
    assert reading.held == pytest.approx(0.25, abs=0.005)
    assert reading.footprint > reading.held  # all keys stay until the budget is reached
    everything = budget.read(budget.solved(1.0), text, FIRST, FIRST - 1, None)
    torch.testing.assert_close(everything.nll, token_losses(tiny_lm.model, text, FIRST).nll, atol=1e-4, rtol=0)


def test_a_budget_in_few_bits_says_so_and_saves_bytes(tiny_lm: Any, random_gates: Path) -> None:
    packed, plain = (budget_contender(tiny_lm, random_gates, bits) for bits in ((6, 4), None))
    assert packed.name == "gates@budget+k6v4"
    stored = [each.read(each.solved(0.5), token_ids(129), FIRST, FIRST - 1, None).stored for each in (packed, plain)]
    assert stored[0] < stored[1]


def test_what_a_fixed_price_holds_in_the_end_is_told_too(tiny_lm: Any, random_gates: Path) -> None:
    window = contender(tiny_lm, random_gates, "window")
    reading = window.read(window.solved(0.5), token_ids(TOKENS), FIRST, FIRST - 1, None)
    with window.open(window.solved(0.5), 0) as cache, torch.no_grad():
        tiny_lm.model(token_ids(TOKENS - 1)[None], past_key_values=cache)
        assert reading.held == float(cache.live_keys.double().mean()) / (TOKENS - 1)
