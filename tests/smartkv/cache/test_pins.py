"""Pinned tokens stay whatever the policy says."""

from typing import Any

import pytest
import torch

from smartkv.cache.lifespan_cache import LifespanCache
from smartkv.errors import SmartKVError
from smartkv.policies.floating_price import MOVES
from smartkv.policies.hybrid import HybridPolicy, LayerRule
from tests.models import token_ids
from tests.smartkv.cache.budget_fixtures import POLICY, aged_gates
from tests.smartkv.cache.fixtures import GATED, MODELS, fed, padding, random_gates, recent

MODEL = MODELS["llama"]
CACHES: dict[str, dict[str, Any]] = {
    "budget": {"gates": aged_gates(MODEL), "policy": POLICY, "max_tokens": 40},
    "gated": {"gates": random_gates(MODEL), "policy": GATED},
    "window": {"policy": recent(6, 2)},
}


def positions(cache: LifespanCache) -> list[set[int]]:
    """The positions of the stored keys of each row and head of each layer."""
    cache.settle()
    return [set(keys.position.tolist()) for layer in cache.storage for keys in layer.store.by_pair()]  # type: ignore[union-attr]


def read(cache: LifespanCache, start: int, stop: int) -> None:
    with torch.no_grad():
        MODEL(token_ids(250)[None, start:stop], past_key_values=cache)


@pytest.mark.parametrize("kind", CACHES)
def test_the_beginning_and_the_end_of_the_prompt_stay_through_a_long_answer(kind: str) -> None:
    cache = LifespanCache(MODEL, pin_first=7, pin_last_prompt=5, rollback=0, **CACHES[kind])
    read(cache, 0, 90)
    for place in range(90, 230):
        read(cache, place, place + 1)
    for held in positions(cache):
        assert set(range(7)) | set(range(85, 90)) <= held
        assert not set(range(7, 85)) <= held
    if kind == "budget":
        assert float(cache.live_keys.double().mean()) <= 40 * (1 + MOVES / 192)  # two moves after the budget


@pytest.mark.parametrize("kind", CACHES)
def test_tokens_are_pinned_before_they_come_and_soon_after(kind: str) -> None:
    cache = LifespanCache(MODEL, rollback=0, **CACHES[kind])
    cache.pin(100, 103)
    read(cache, 0, 60)
    cache.pin(58, 60)
    read(cache, 60, 250)
    for held in positions(cache):
        assert {58, 59, 100, 101, 102} <= held


def test_the_prompt_of_generate_ends_where_the_answer_begins_also_beside_padding() -> None:
    ids, real = token_ids(2 * 60).view(2, 60), padding(2, 60, "left", 3)
    cache = LifespanCache(MODEL, None, recent(4), pin_last_prompt=3, rollback=0)
    answer = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    MODEL.generate(ids, attention_mask=real.long(), past_key_values=cache, **answer)
    for number, held in enumerate(positions(cache)):
        tokens = int(real[number // 2 % 2].sum())
        assert set(range(tokens - 3, tokens)) <= held and tokens - 4 not in held


def test_logits_with_pins_do_not_depend_on_calls() -> None:
    ids = token_ids(200)[None]
    real = torch.ones_like(ids, dtype=torch.bool)
    outputs = []
    for cuts, chunk in (([90], 90), ([90, 91, 92, 93, 150], 11)):
        cache = LifespanCache(MODEL, pin_first=7, chunk=chunk, **CACHES["budget"])
        outputs.append(fed(MODEL, cache, ids, real, cuts))
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-4, rtol=0)


def test_pins_that_cannot_be_are_refused_with_their_figures() -> None:
    cache = LifespanCache(MODEL, rollback=0, **CACHES["budget"])
    read(cache, 0, 200)
    with pytest.raises(SmartKVError, match=r"keys of the tokens 70 to 79 are freed already in layer 0"):
        cache.pin(70, 80)
    with pytest.raises(SmartKVError, match=r"100 pinned tokens outgrow the budget: layer 0 may hold 40 keys a KV head"):
        cache.pin(300, 400)
    with pytest.raises(SmartKVError, match="stop must be a number of tokens, at least 10"):
        cache.pin(9, 9)
    assert not len(cache.pins)
    capped = HybridPolicy((LayerRule("all", "window", 4),), max_tokens=20)
    with pytest.raises(SmartKVError, match="has a cap"):
        LifespanCache(MODEL, None, capped).pin(0, 9)
    with pytest.raises(SmartKVError, match="has a cap"):
        LifespanCache(MODEL, None, capped, pin_first=9)


def test_a_cache_that_is_reset_pins_what_it_was_made_to_pin() -> None:
    cache = LifespanCache(MODEL, None, recent(4), pin_first=2, pin_last_prompt=2, rollback=0)
    for _ in range(2):
        cache.reset()
        read(cache, 0, 30)
        cache.pin(29, 31)
        assert cache.pins.most(0) == 2 + 3
