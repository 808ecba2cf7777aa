"""Many single tokens and short calls: repacking keys again and again changes no logit."""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from smartkv.cache.layer import Judge, LifespanLayer
from smartkv.cache.lifespan_cache import LifespanCache
from smartkv.cache.paged import MAX_SPARE
from smartkv.cache.quantized_cache import QuantizedCache
from smartkv.policies.hybrid import FOREVER, HybridPolicy, LayerRule
from tests.models import FAMILIES, llama, token_ids
from tests.smartkv.cache.fixtures import MODELS, Injected, fed, kv_heads, padding, random_ttl, recent, sliding
from tests.smartkv.cache.masked_reference import drop_over_cap, masked_logits, visibility

PROMPT, TOKENS = 20, 100  # the tokens between are fed one by one


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch) -> list[LifespanLayer]:
    """A layer each time it packs its keys for single tokens."""
    found: list[LifespanLayer] = []
    settle = LifespanLayer.settle

    def spy(self: LifespanLayer, judge: Judge, pack: bool = False) -> None:
        if pack:
            found.append(self)
        settle(self, judge, pack)

    monkeypatch.setattr(LifespanLayer, "settle", spy)
    return found


def one_by_one(
    model: PreTrainedModel, ttl: Tensor, window: int, sinks: int, ids: Tensor, real: Tensor, together: int = 1
) -> Tensor:
    """Logits of a cache that evicts by `ttl`, given one token after the other, or a few at a time."""
    cache = Injected(model, None, recent(window, sinks), chunk=16)
    cache.table = ttl
    return fed(model, cache, ids, real, range(PROMPT, ids.shape[1], together))


@pytest.mark.parametrize(("window", "together"), [(1, 1), (24, 1), (24, 5)])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_past_many_packings_are_those_of_a_masked_full_cache(
    family: str, window: int, together: int, packings: list[LifespanLayer]
) -> None:
    """Three rows, two of them padded on the left."""
    model, ids, real = MODELS[family], token_ids(3 * TOKENS, 1).view(3, TOKENS), torch.ones(3, TOKENS).bool()
    real[:, :PROMPT] = padding(3, PROMPT, "left", 2)
    ttl = random_ttl(model, 3, TOKENS, 3)
    got = one_by_one(model, ttl, window, 2, ids, real, together)
    assert len(packings) >= 5 * model.config.num_hidden_layers
    masks = [visibility(layer, window, 2, real, sliding(model)) for layer in ttl]
    torch.testing.assert_close(got[real], masked_logits(model, ids, masks, real)[real], atol=1e-4, rtol=0)


@pytest.mark.parametrize("greedy_head", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_head_may_keep_everything_and_the_others_nothing(family: str, greedy_head: int) -> None:
    model, ids, real = MODELS[family], token_ids(TOKENS, 4)[None], torch.ones(1, TOKENS).bool()
    ttl = torch.zeros(model.config.num_hidden_layers, 1, kv_heads(model), TOKENS, dtype=torch.int64)
    ttl[:, :, greedy_head] = FOREVER
    got = one_by_one(model, ttl, 1, 0, ids, real)
    masks = [visibility(layer, 1, 0, real, sliding(model)) for layer in ttl]
    torch.testing.assert_close(got, masked_logits(model, ids, masks, real), atol=1e-4, rtol=0)


@pytest.mark.parametrize("per", ["head", "layer"])
@pytest.mark.parametrize("rule", ["full", "window"])
@pytest.mark.parametrize("family", ["llama", "mistral_sliding", "gpt2"])
def test_a_cap_drops_keys_at_their_time_between_two_packings_too(family: str, rule: str, per: str) -> None:
    model, ids, real = MODELS[family], token_ids(60, 8)[None], torch.ones(1, 60).bool()
    sinks, heads = 2, kv_heads(model) if per == "layer" else 1
    policy = recent(5, sinks) if rule == "window" else HybridPolicy((LayerRule("all", "full"),), sinks)
    cap = 20 * heads + 1
    cache = Injected(model, None, replace(policy, max_tokens=cap, max_tokens_per=per), chunk=16)
    cache.table = random_ttl(model, 1, 60, 9)
    cache.score_table = torch.randint(0, 3, cache.table.shape, generator=torch.Generator().manual_seed(9)).float()
    got = fed(model, cache, ids, real, range(PROMPT, 60))
    window, masks = (1 if rule == "full" else 5), []
    for ttl, score in zip(cache.table, cache.score_table, strict=True):
        ttl = ttl if rule == "window" else torch.full_like(ttl, FOREVER)
        seen = visibility(ttl, window, sinks, real, sliding(model))
        masks.append(drop_over_cap(seen, ttl, score, real, cap, per == "layer", window, sinks, sliding(model)))
    torch.testing.assert_close(got, masked_logits(model, ids, masks, real), atol=1e-4, rtol=0)


def test_keys_die_at_their_time_also_where_they_are_packed_seldom(packings: list[LifespanLayer]) -> None:
    """More than 2,048 keys a head: 64 tokens are taken in before they are packed anew."""
    model, prompt, tokens, window, sinks = llama(max_position_embeddings=2300), 2080, 2250, 2060, 4
    ids, real = token_ids(tokens, 5)[None], torch.ones(1, tokens, dtype=torch.bool)
    got = fed(model, LifespanCache(model, None, recent(window, sinks)), ids, real, range(prompt, tokens))
    assert {layer.store.spare for layer in packings} == {MAX_SPARE} and len(packings) == 2 * 3
    age = torch.arange(tokens)[:, None] - torch.arange(tokens)
    seen = (age >= 0) & ((age < window) | (torch.arange(tokens) < sinks))
    assert not seen[-1].all()
    want = masked_logits(model, ids, [seen.expand(1, 2, -1, -1)] * 2, real)
    torch.testing.assert_close(got[:, prompt:], want[:, prompt:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_costs_no_more_than_it_costs_a_masked_full_cache(family: str) -> None:
    """Both are compared with the same weights in float32: sums in another order, no worse ones."""
    half = deepcopy(MODELS[family]).bfloat16()
    exact = deepcopy(half).float()
    ids, real = token_ids(2 * TOKENS, 6).view(2, TOKENS), torch.ones(2, TOKENS).bool()
    ttl = random_ttl(half, 2, TOKENS, 7)
    masks = [visibility(layer, 8, 2, real, sliding(half)) for layer in ttl]
    true = masked_logits(exact, ids, masks, real)

    def error(logits: Tensor) -> float:
        return float((logits.float() - true).square().mean().sqrt() / true.std())

    ours, theirs = error(one_by_one(half, ttl, 8, 2, ids, real)), error(masked_logits(half, ids, masks, real))
    assert 0 < ours < 1.1 * theirs < 0.1


def test_attention_may_leave_its_output_in_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """As kernels on GPUs do: tokens before heads in memory."""
    model, ids, real = MODELS["llama"], token_ids(TOKENS, 4)[None], torch.ones(1, TOKENS).bool()
    ttl, plain = random_ttl(model, 1, TOKENS, 3), F.scaled_dot_product_attention
    expected = one_by_one(model, ttl, 8, 2, ids, real)
    turned = lambda *a, **k: plain(*a, **k).transpose(1, 2).contiguous().transpose(1, 2)  # noqa: E731
    monkeypatch.setattr(F, "scaled_dot_product_attention", turned)
    assert torch.equal(one_by_one(model, ttl, 8, 2, ids, real), expected)


@pytest.mark.parametrize("make", [LifespanCache, lambda model, *_: QuantizedCache(model, "int8")])
def test_a_layer_tells_transformers_that_it_sees_all_tokens_and_has_no_limit(make: Any) -> None:
    """A number of new tokens today; their positions in transformers 5.2, which also had another name for the limit."""
    model = MODELS["llama"]
    cache = make(model, None, recent(2))
    model(token_ids(5)[None], past_key_values=cache)
    layer = cache.layers[0]
    assert layer.get_mask_sizes(3) == layer.get_mask_sizes(torch.arange(5, 8)) == (8, 0)
    assert layer.get_max_length() == layer.get_max_cache_shape() == -1


def test_a_drafted_continuation_that_is_dropped_moves_no_key(packings: list[LifespanLayer]) -> None:
    model, ids = MODELS["llama"], token_ids(TOKENS, 4)[None]
    cache = LifespanCache(model, None, recent(24, 2))
    with cache, torch.no_grad():
        model(ids[:, :60], past_key_values=cache)
        for start in range(60, 72, 2):  # of each draft of five, two tokens are right
            model(ids[:, start : start + 5], past_key_values=cache)
            cache.crop(-3)
        assert len(packings) == 2  # once a layer
        assert not any(layer.settled for layer in cache.storage)
