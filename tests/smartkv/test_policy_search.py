"""Policy search: the measured effects of rules in single layers, and the policy made from them."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from smartkv.cache.lifespan_cache import LifespanCache
from smartkv.errors import SmartKVError
from smartkv.policies.budgets import Calibration
from smartkv.policies.hybrid import HybridPolicy, LayerRule
from smartkv.policy_search import Trade, auto_policy, measure_trade
from tests.models import token_ids
from tests.smartkv.cache.fixtures import MODELS, random_gates

OPTIONS = (LayerRule("all", "gated", 2), LayerRule("all", "gated", 6), LayerRule("all", "window", 4))
POLICY = HybridPolicy(OPTIONS[:1], sinks=1, price=0.0)
NEARBY = (replace(POLICY, price=0.2), replace(POLICY, price=-0.2))
FIRST = 5


def texts() -> list[Tensor]:
    return [token_ids(20, 1), token_ids(20, 2)]


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_each_option_is_measured_in_each_layer_while_the_others_stay(family: str) -> None:
    model = MODELS[family]
    gates = random_gates(model)
    trade = measure_trade(model, gates, POLICY, NEARBY, OPTIONS, texts(), FIRST)
    assert trade.base == 0 and trade.divergence.shape == trade.footprint.shape == (2, 3)
    for layer, number in itertools.product(range(2), range(3)):
        own, other = OPTIONS[number], POLICY.rules[0]
        rules = [own if here == layer else other for here in range(2)]
        policy = HybridPolicy(
            tuple(LayerRule(str(here), rule.rule, rule.window) for here, rule in enumerate(rules)), sinks=1, price=0.0
        )
        lost, kept = 0.0, 0.0
        for ids in texts():
            with torch.no_grad(), LifespanCache(model, gates, policy, first_query=FIRST) as cache:
                evicted = model(ids[None], past_key_values=cache).logits[0, FIRST:].log_softmax(-1)
                kept += float(cache.footprint_by_head[layer].mean()) / 2
            with torch.no_grad():
                full = model(ids[None], use_cache=False).logits[0, FIRST:].log_softmax(-1)
            lost += float(F.kl_div(evicted, full, reduction="batchmean", log_target=True)) / 2
        assert float(trade.divergence[layer, number]) == pytest.approx(lost, abs=1e-6)
        assert float(trade.footprint[layer, number]) == pytest.approx(kept, abs=1e-9)


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_the_rate_is_what_a_lower_price_saves_for_what_it_keeps(family: str) -> None:
    model = MODELS[family]
    gates, measured = random_gates(model), []
    for policy in NEARBY:
        lost = kept = 0.0
        for ids in texts():
            with torch.no_grad(), LifespanCache(model, gates, policy, first_query=FIRST) as cache:
                evicted = model(ids[None], past_key_values=cache).logits[0, FIRST:].log_softmax(-1)
                kept += cache.footprint / 2
            with torch.no_grad():
                full = model(ids[None], use_cache=False).logits[0, FIRST:].log_softmax(-1)
            lost += float(F.kl_div(evicted, full, reduction="batchmean", log_target=True)) / 2
        measured.append((lost, kept))
    (dear, little), (cheap, much) = measured
    assert much > little
    trade = measure_trade(model, gates, POLICY, NEARBY, OPTIONS, texts(), FIRST)
    assert trade.rate == pytest.approx(max(0.0, (dear - cheap) / (much - little)), rel=1e-3, abs=1e-6)


def test_a_layer_pays_for_what_it_keeps_at_the_going_rate() -> None:
    divergence = torch.tensor([[0.010, 0.006, 0.014], [0.010, 0.010, 0.012]], dtype=torch.float64)
    footprint = torch.tensor([[0.2, 0.3, 0.1], [0.2, 0.3, 0.1]], dtype=torch.float64)
    for rate, want in ((0.0, [1, 0]), (0.05, [1, 2]), (0.2, [2, 2])):  # a tenth of a layer is a twentieth of the cache
        assert Trade(OPTIONS, 0, divergence, footprint, rate).choose().tolist() == want, rate


def test_the_policy_has_the_chosen_rules_and_its_price_is_solved() -> None:
    divergence = torch.tensor([[0.0, 9.0, 9.0], [9.0, 9.0, 0.0]], dtype=torch.float64)
    footprint = torch.tensor([[0.5, 0.6, 0.2], [0.5, 0.6, 0.2]], dtype=torch.float64)
    predictions = {layer: torch.randn(1, 2, 20, generator=torch.Generator().manual_seed(layer)) for layer in range(2)}
    calibration = Calibration(predictions, 2, 20, FIRST, 19)
    policy = auto_policy(Trade(OPTIONS, 0, divergence, footprint, 0.1), POLICY, 0.5, calibration)
    assert {(rule.layers, rule.rule, rule.window) for rule in policy.rules} == {("0", "gated", 2), ("1", "window", 4)}
    assert policy.name == "auto" and policy.sinks == 1 and policy.price is not None and math.isfinite(policy.price)
    assert calibration.footprint(policy) == pytest.approx(0.5, abs=0.03)


def test_a_policy_that_is_none_of_the_options_is_refused() -> None:
    with pytest.raises(SmartKVError, match="one of the options"):
        measure_trade(MODELS["llama"], random_gates(MODELS["llama"]), POLICY, NEARBY, OPTIONS[1:], texts(), FIRST)
