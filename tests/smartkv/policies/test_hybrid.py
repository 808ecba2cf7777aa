"""HybridPolicy: what it refuses, and the TTLs it gives."""

import math
from typing import Any

import pytest
import torch

from smartkv.errors import SmartKVError
from smartkv.gates.bank import GateBank
from smartkv.models.architecture import Fingerprint
from smartkv.policies.hybrid import FOREVER, HybridPolicy, LayerRule

SHAPE = Fingerprint("llama", 4, 2, 8, "feedfacecafebeef")


@pytest.mark.parametrize(
    ("figures", "message"),
    [
        ({"rule": "forget"}, "unknown"),
        ({"rule": "window", "window": 0}, "at least 1"),
        ({"rule": "window", "window": -3}, "at least 1"),
        ({"rule": "window", "window": 2.5}, "number of tokens"),
        ({"rule": "window", "window": 8, "price": 1.0}, "price"),
        ({"rule": "full", "window": 8}, "no window"),
    ],
)
def test_a_rule_that_means_nothing_is_refused(figures: dict[str, Any], message: str) -> None:
    with pytest.raises(SmartKVError, match=message):
        LayerRule("all", **figures)


@pytest.mark.parametrize(
    "figures",
    [
        {"price": math.nan},
        {"multiple": 0.0},
        {"sinks": -1},
        {"price": None, "multiple": None},
        {"window_share": 0.0},
        {"window_share": 1.0},
    ],
)
def test_figures_that_mean_nothing_are_refused(figures: dict[str, Any]) -> None:
    with pytest.raises(SmartKVError):
        HybridPolicy((LayerRule("all", "gated", 8),), **figures)


@pytest.mark.parametrize(
    ("ranges", "message"), [(("0-2", "2-3"), "two rules"), (("0-2",), "no rule"), (("0-4",), "the model has layers")]
)
def test_each_layer_needs_exactly_one_rule(ranges: tuple[str, ...], message: str) -> None:
    policy = HybridPolicy(tuple(LayerRule(part, "window", 8) for part in ranges))
    with pytest.raises(SmartKVError, match=message):
        policy.by_layer(4)


def test_check_refuses_missing_gates() -> None:
    gated = HybridPolicy((LayerRule("all", "gated", 8),), price=1.0)
    with pytest.raises(SmartKVError, match="no gates were given"):
        gated.check(SHAPE, None)
    with pytest.raises(SmartKVError, match=r"gates layers 2-3.*for layers 0-1"):
        gated.check(SHAPE, GateBank(SHAPE, [0, 1], hidden=4))
    assert len(gated.check(SHAPE, GateBank(SHAPE, hidden=4))) == 4


@pytest.mark.parametrize("multiple", [math.inf, 1.5])
@pytest.mark.parametrize("own", [None, 0.2])
def test_a_gated_ttl_follows_the_formula(multiple: float, own: float | None) -> None:
    prediction = torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(0))
    rule = LayerRule("all", "gated", 8, price=own)
    ttl = HybridPolicy((rule,), price=0.7, multiple=multiple).times_to_live(rule, prediction)
    price = 0.7 if own is None else own
    for y, found in zip(prediction.flatten().tolist(), ttl.flatten().tolist(), strict=True):
        lives = FOREVER if math.isinf(multiple) else math.ceil(multiple * 4.0**y)
        assert found == (lives if y > price else 0)


@pytest.mark.parametrize("multiple", [math.inf, 1.5])
def test_a_key_worth_its_price_exactly_goes(multiple: float) -> None:
    rule = LayerRule("all", "gated", 8)
    assert HybridPolicy((rule,), price=0.5, multiple=multiple).times_to_live(rule, torch.tensor([0.5])).tolist() == [0]


def test_an_open_window_is_closed_in_every_range_that_leaves_it_open() -> None:
    rules = (LayerRule("0", "window"), LayerRule("1", "full"), LayerRule("2", "window", 5), LayerRule("3", "gated"))
    assert [rule.window for rule in HybridPolicy(rules).closed(8.9).rules] == [8, None, 5, 8]


def test_gates_that_judge_for_ages_keep_a_key_until_the_first_at_which_it_is_not_worth_its_price() -> None:
    rule = LayerRule("all", "gated", 8)
    prediction = torch.tensor([[0.9, 0.8, 0.71], [0.9, 0.8, 0.7], [0.9, 0.1, 0.0], [0.7, 0.6, 0.5]])
    ttl = HybridPolicy((rule,), price=0.7).times_to_live(rule, prediction, ages=(8, 32, 128))
    assert ttl.tolist() == [FOREVER, 128, 32, 0]


def test_other_rules_need_no_prediction() -> None:
    for rule, expected in ((LayerRule("all", "window", 8), 0), (LayerRule("all", "full"), FOREVER)):
        assert HybridPolicy((rule,)).times_to_live(rule, None) == expected


def test_check_refuses_gates_that_cannot_serve_the_policy() -> None:
    price = HybridPolicy((LayerRule("all", "gated", 8),), price=1.0)
    with pytest.raises(SmartKVError, match="read keys_post_rope"):
        price.check(SHAPE, GateBank(SHAPE, hidden=4, details={"inputs": "keys_post_rope"}))
    other = GateBank(SHAPE, hidden=4, details={"target": "future attention"})
    price.check(SHAPE, other)  # a price is in the unit of any target
    with pytest.raises(SmartKVError, match="these predict future attention"):
        HybridPolicy(price.rules, price=1.0, multiple=2.0).check(SHAPE, other)


@pytest.mark.parametrize("ttl", [3, 8, 20, FOREVER])
@pytest.mark.parametrize("rule", [LayerRule("all", "window", 8), LayerRule("all", "full")])
def test_a_key_lives_for_its_ttl_or_the_window_and_a_sink_for_good(ttl: int, rule: LayerRule) -> None:
    lifetime = HybridPolicy((rule,), sinks=2).lifetime(rule, ttl, torch.arange(4))
    longest = max(ttl, rule.window or FOREVER)
    assert lifetime.tolist() == [FOREVER, FOREVER, longest, longest]
