"""Rules and policies made of wrong things are refused in one line, in Python and in YAML alike."""

import math
from typing import Any

import numpy
import pytest
import torch
import yaml

from smartkv.errors import SmartKVError
from smartkv.policies.hybrid import HybridPolicy, LayerRule

RULE = {"layers": "all", "rule": "gated", "window": 8}


def built(rule: dict[str, Any], figures: dict[str, Any], by: str) -> HybridPolicy:
    """A policy of one rule."""
    if by == "python":
        return HybridPolicy((LayerRule(**rule),), **figures)
    return HybridPolicy.from_dict(yaml.safe_load(yaml.safe_dump({"rules": [rule], **figures})))


@pytest.mark.parametrize("by", ["python", "yaml"])
@pytest.mark.parametrize(
    ("figures", "message"),
    [
        ({"price": "1"}, "price must be a number, got '1': write it without quotes"),
        ({"price": "cheap"}, "price must be a number, got 'cheap'"),
        ({"price": True}, "price must be a number, got True"),
        ({"price": [1]}, "price must be a number, got a list"),
        ({"price": math.nan}, "price must be a number, got nan"),
        ({"multiple": "4"}, "multiple must be a number, got '4': write it without quotes"),
        ({"multiple": True}, "multiple must be a number, got True"),
        ({"multiple": -1}, "multiple must be above 0, got -1"),
        ({"window_share": "0.3"}, "window_share must be a number, got '0.3': write it without quotes"),
        ({"window_share": None}, "window_share must be a number, got None"),
        ({"sinks": "4"}, "sinks must be a number of tokens, 0 or more, got '4'"),
        ({"sinks": True}, "sinks must be a number of tokens, 0 or more, got True"),
        ({"max_tokens": 2.5}, "max_tokens must be a number of keys, at least 1, got 2.5"),
        ({"max_tokens_per": ["head"]}, "max_tokens_per must be head or layer, got a list"),
        ({"name": 3}, "the name of a policy must be text, got 3: write it in quotes"),
    ],
    ids=str,
)
def test_a_policys_figure_of_a_wrong_type_is_refused(figures: dict[str, Any], message: str, by: str) -> None:
    with pytest.raises(SmartKVError) as refusal:
        built(RULE, figures, by)
    assert str(refusal.value) == message


@pytest.mark.parametrize("by", ["python", "yaml"])
@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"window": True}, "window of layers all must be a number of tokens, at least 1, got True"),
        ({"window": "8"}, "window of layers all must be a number of tokens, at least 1, got '8'"),
        ({"price": "1"}, "price of layers all must be a number, got '1': write it without quotes"),
        ({"price": math.nan}, "price of layers all must be a number, got nan"),
        ({"rule": None}, "rule None is unknown: expected window, gated, full"),
        ({"layers": "1-0"}, "layers '1-0' has its ends the wrong way round: write '0-1'"),
        ({"layers": "a"}, "layers 'a' is no list of ranges: write for example '0-2,20-23', 'early,late' or 'all'"),
        ({"layers": [0]}, "layers must be ranges as text, got a list: write for example '0-2,20-23', 'early,late' or"),
    ],
    ids=str,
)
def test_a_rules_part_of_a_wrong_type_is_refused(part: dict[str, Any], message: str, by: str) -> None:
    with pytest.raises(SmartKVError) as refusal:
        built(RULE | part, {}, by)
    assert str(refusal.value).startswith(message) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("by", ["python", "yaml"])
def test_layers_that_the_model_lacks_are_refused_with_those_it_has(by: str) -> None:
    policy = built(RULE | {"layers": "0-99"}, {}, by)
    with pytest.raises(SmartKVError, match="layers '0-99' asks for 0-99, but the model has layers 0-29"):
        policy.by_layer(30)


@pytest.mark.parametrize("by", ["python", "yaml"])
def test_a_single_layer_may_be_a_number(by: str) -> None:
    assert [rule.layers for rule in built(RULE | {"layers": 0}, {}, by).by_layer(1)] == ["0"]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (LayerRule("all", "full"), r"got one LayerRule: write HybridPolicy\(\(LayerRule\(…\),\)\), with a comma"),
        ("full", "rules must be a tuple of LayerRules, got 'full'"),
        (None, "rules must be a tuple of LayerRules, got None"),
        ({LayerRule("all", "full")}, "rules must be a tuple of LayerRules, got a set"),
        (({"layers": "all", "rule": "full"},), r"got a dict among them: read a mapping with HybridPolicy\.from_dict"),
        (("full",), "rules must be LayerRules, got 'full' among them"),
        ((), "at least one rule"),
    ],
    ids=str,
)
def test_rules_that_are_no_tuple_of_rules_are_refused(rules: Any, message: str) -> None:
    with pytest.raises(SmartKVError, match=message):
        HybridPolicy(rules)


def test_a_list_of_rules_becomes_a_tuple() -> None:
    rule = LayerRule("all", "full")
    assert HybridPolicy([rule]) == HybridPolicy((rule,))  # type: ignore[arg-type]
    assert hash(HybridPolicy([rule])) == hash(HybridPolicy((rule,)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 0.001), ("inf", math.inf), ("-inf", -math.inf), (".inf", math.inf)]
)
def test_a_file_may_have_numbers_that_yaml_takes_for_text(text: str, value: float) -> None:
    figures = yaml.safe_load(f"{{price: {text}, rules: [{{layers: all, rule: gated, price: {text}}}]}}")
    policy = HybridPolicy.from_dict(figures)
    assert (policy.price, policy.rules[0].price) == (value, value)


def test_numbers_of_numpy_are_numbers_and_tensors_are_not() -> None:
    assert HybridPolicy((LayerRule("all", "gated", 8),), price=numpy.float32(0.5)).price == 0.5  # type: ignore[arg-type]
    with pytest.raises(SmartKVError, match=r"price must be a number, got a Tensor: write float\(…\)"):
        HybridPolicy((LayerRule("all", "gated", 8),), price=torch.tensor(0.5))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"rules": [{"layers": "all"}]}, "a rule needs rule, got layers"),
        ({"rules": [{}]}, "a rule needs layers and rule, got an empty mapping"),
        ({"rules": ["full"]}, "a rule is a mapping, got 'full'"),
        ({"rules": [{"layers": "all", "rule": "full", "prize": 1}]}, "a rule has no prize: expected layers, price"),
        ({"rules": [], "prize": 1}, "a policy has no prize: expected max_tokens"),
        ({"layers": "all"}, "a policy is a mapping with a list of rules"),
    ],
    ids=str,
)
def test_a_mapping_that_is_no_policy_is_refused(content: Any, message: str) -> None:
    with pytest.raises(SmartKVError, match=message):
        HybridPolicy.from_dict(content)


def test_the_old_name_of_read_policy_answers_with_the_new_one() -> None:
    with pytest.raises(SmartKVError, match=r"HybridPolicy\.read is now smartkv\.read_policy"):
        HybridPolicy.read("full", 2)
