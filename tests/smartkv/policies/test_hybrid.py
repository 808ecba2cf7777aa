"""HybridPolicy: what it refuses, the TTLs it gives and its files."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from smartkv.errors import SmartKVError
from smartkv.gates.bank import GateBank
from smartkv.models.architecture import Fingerprint
from smartkv.policies.hybrid import FOREVER, HybridPolicy, LayerRule
from smartkv.policies.named import NAMED, named_policy, read_policy

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
    "figures", [{"price": math.nan}, {"multiple": 0.0}, {"sinks": -1}, {"price": None, "multiple": None}]
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


def test_gates_that_judge_for_ages_keep_a_key_until_the_first_at_which_it_is_not_worth_its_price() -> None:
    rule = LayerRule("all", "gated", 8)
    prediction = torch.tensor([[0.9, 0.8, 0.71], [0.9, 0.8, 0.7], [0.9, 0.1, 0.0], [0.7, 0.6, 0.5]])
    ttl = HybridPolicy((rule,), price=0.7).times_to_live(rule, prediction, ages=(8, 32, 128))
    assert ttl.tolist() == [FOREVER, 128, 32, 0]


def test_other_rules_need_no_prediction() -> None:
    for rule, expected in ((LayerRule("all", "window", 8), 0), (LayerRule("all", "full"), FOREVER)):
        assert HybridPolicy((rule,)).times_to_live(rule, None) == expected


@pytest.mark.parametrize("name", NAMED)
def test_a_named_policy_covers_each_layer_of_any_depth_once(name: str) -> None:
    assert all(len(named_policy(name, layers).by_layer(layers)) == layers for layers in range(1, 81))


@pytest.mark.parametrize("layers", range(24, 29))
def test_the_default_is_short_windows_then_gates_then_recent_keys_from_layer_20(layers: int) -> None:
    rules = named_policy("default", layers).by_layer(layers)
    assert [rule.rule for rule in rules] == ["window"] * 3 + ["gated"] * 17 + ["window"] * (layers - 20)
    assert [rule.window for rule in rules[:3]] == [32] * 3


@pytest.mark.parametrize("name", NAMED)
def test_a_policy_is_the_same_after_a_dict_and_after_yaml(name: str, tmp_path: Path) -> None:
    policy = named_policy(name, 24)
    path = tmp_path / "some.yaml"
    path.write_text(yaml.safe_dump(policy.to_dict()))
    assert HybridPolicy.from_dict(policy.to_dict()) == read_policy(str(path), 24) == policy


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1", "is no YAML"),
        ("just words", "a mapping with a list of rules"),
        ("rules: 3", "a mapping with a list of rules"),
        ("rules: [window]", "a rule is a mapping, got 'window'"),
        ("rules: [{layers: all, rule: full, colour: 1}]", "a rule has no colour: expected layers, price, rule, window"),
        ("{rules: [], shade: 1}", "a policy has no shade"),
        ("rules: []", "at least one rule"),
        ("{rules: [{layers: all, rule: gated}], price: cheap}", "cannot be read"),
        ("{rules: [{layers: all, rule: gated}], sinks: some}", "sinks must be a number"),
        ("{rules: [{layers: all, rule: gated}], window_share: 1.0}", "window_share must lie between 0 and 1"),
        ("rules: [{rule: full}]", "cannot be read"),
    ],
)
def test_a_file_that_holds_no_policy_says_what_is_wrong(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "some.yaml"
    path.write_text(text)
    with pytest.raises(SmartKVError, match=message):
        read_policy(path, 4)


@pytest.mark.parametrize(("layers", "gated"), [(12, range(2, 10)), (30, range(3, 21)), (56, range(6, 40))])
def test_the_default_scales_with_depth(layers: int, gated: range) -> None:
    rules = named_policy("default", layers).by_layer(layers)
    assert [layer for layer, rule in enumerate(rules) if rule.rule == "gated"] == list(gated)


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


def test_neither_a_name_nor_a_file_is_refused() -> None:
    with pytest.raises(SmartKVError, match="neither one of"):
        read_policy("no-such-policy", 4)
