"""Policies as contenders."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from eval.contenders.policies import PolicyContender
from smartkv import GateBank
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
