"""Named policies, and policies in YAML files."""

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from smartkv.errors import SmartKVError
from smartkv.policies.hybrid import HybridPolicy, LayerRule
from smartkv.policies.named import NAMED, named_policy, read_policy
from tests.conftest import ROOT


@pytest.mark.parametrize("name", NAMED)
def test_a_named_policy_covers_each_layer_of_any_depth_once(name: str) -> None:
    assert all(len(named_policy(name, layers).by_layer(layers)) == layers for layers in range(1, 81))


@pytest.mark.parametrize(
    ("name", "rule", "figures"),
    [
        ("all-gated", LayerRule("all", "gated"), {}),
        ("lifespan", LayerRule("all", "gated", 32), {"price": -math.inf, "multiple": None}),
        ("window", LayerRule("all", "window"), {}),
        ("full", LayerRule("all", "full"), {}),
    ],
)
def test_a_name_stands_for_one_rule_in_all_layers(name: str, rule: LayerRule, figures: dict[str, Any]) -> None:
    assert named_policy(name, 4) == HybridPolicy((rule,), name=name, **figures)


@pytest.mark.parametrize("name", NAMED)
def test_a_name_is_read_before_a_file(name: str) -> None:
    assert read_policy(name, 24) == named_policy(name, 24)


def test_the_default_names_the_layers_of_this_model() -> None:
    assert [rule.layers for rule in named_policy("default", 24).rules] == ["0-2", "3-19", "20-23"]


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
        ("{rules: [{layers: all, rule: gated}], price: cheap}", "price must be a number, got 'cheap'$"),
        ("{rules: [{layers: all, rule: gated}], sinks: some}", "sinks must be a number"),
        ("{rules: [{layers: all, rule: gated}], window_share: 1.0}", "window_share must lie between 0 and 1"),
        ("rules: [{rule: full}]", "a rule needs layers, got rule"),
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


@pytest.mark.parametrize("layers", [1, 2, 12, 24, 28, 30, 36, 80])
def test_the_hybrid_file_is_the_default_at_any_depth(layers: int) -> None:
    file = read_policy(ROOT / "configs/policies/hybrid.yaml", layers)
    assert file.name == "hybrid" and file.price is None and file.sinks == 4

    def rules(policy: HybridPolicy) -> list[tuple[str, int | None, float | None]]:
        return [(rule.rule, rule.window, rule.price) for rule in policy.by_layer(layers)]

    assert rules(file) == rules(named_policy("default", layers))


def test_figures_that_yaml_reads_as_text_are_numbers(tmp_path: Path) -> None:
    (tmp_path / "some.yaml").write_text(
        "{price: 1e-3, multiple: 2e0, window_share: 5e-1, rules: [{layers: all, rule: gated}]}"
    )
    policy = read_policy(tmp_path / "some.yaml", 4)
    assert (policy.price, policy.multiple, policy.window_share) == (0.001, 2.0, 0.5)


def test_neither_a_name_nor_a_file_is_refused() -> None:
    with pytest.raises(SmartKVError, match="neither one of"):
        read_policy("no-such-policy", 4)


@pytest.mark.parametrize("name", ["", 3, None])
def test_what_is_no_name_is_refused(name: Any) -> None:
    with pytest.raises(SmartKVError, match=r"expected one of default, .* or a YAML file, got "):
        read_policy(name, 4)


def test_a_file_without_a_name_is_called_after_itself(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("rules: [{layers: all, rule: full}]")
    assert read_policy(tmp_path / "mine.yaml", 4).name == "mine"


def test_a_name_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(SmartKVError, match="'forget' is unknown: expected one of default, all-gated"):
        named_policy("forget", 4)
