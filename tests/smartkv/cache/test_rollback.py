"""A cache that drops its latest tokens is as if it had never seen them."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smartkv.cache.lifespan_cache import LifespanCache
from smartkv.errors import SmartKVError
from smartkv.policies.hybrid import HybridPolicy, LayerRule
from tests.models import llama, token_ids
from tests.smartkv.cache.budget_fixtures import POLICY, aged_gates
from tests.smartkv.cache.fixtures import GATED, MODELS, fed, padding, random_gates, recent

MODEL = MODELS["llama"]
TOKENS = 140
CACHES: dict[str, dict[str, Any]] = {
    "budget": {"gates": aged_gates(MODEL), "policy": POLICY, "max_tokens": 30},
    "gated": {"gates": random_gates(MODEL), "policy": GATED},
    "window": {"policy": recent(6, 2)},
    "cap of a head": {
        "policy": HybridPolicy((LayerRule("all", "gated", 4),), price=0.0, max_tokens=20),
        "gates": random_gates(MODEL),
    },
    "cap of a layer": {
        "policy": HybridPolicy((LayerRule("all", "gated", 4),), price=0.0, max_tokens=50, max_tokens_per="layer"),
        "gates": random_gates(MODEL),
    },
}


def never_saw(kind: str, ids: torch.Tensor, real: torch.Tensor) -> tuple[torch.Tensor, LifespanCache]:
    """Logits of a cache that is fed once and drops nothing, and the cache."""
    cache = LifespanCache(MODEL, rollback=0, **CACHES[kind])
    return fed(MODEL, cache, ids, real, []), cache


@settings(deadline=None, max_examples=12)
@given(
    st.sampled_from(list(CACHES)), st.integers(0, 10**6), st.integers(1, 20), st.sampled_from([1, 7, 64]), st.booleans()
)
def test_whatever_is_dropped_leaves_no_trace(kind: str, seed: int, rollback: int, chunk: int, padded: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = token_ids(2 * TOKENS, seed % 97).view(2, TOKENS)
    real = padding(2, TOKENS, "left", seed % 89) if padded else torch.ones_like(ids, dtype=torch.bool)
    want, whole = never_saw(kind, ids, real)
    cache = LifespanCache(MODEL, chunk=chunk, rollback=rollback, **CACHES[kind])

    def draw(most: int) -> int:
        return int(torch.randint(1, most + 1, (), generator=generator))

    place, parts = 0, []
    with cache, torch.no_grad():
        while place < TOKENS:
            stop = min(TOKENS, place + draw(40 if draw(2) == 1 else 2))
            mask = real[:, :stop].long()
            parts.append(MODEL(ids[:, place:stop], attention_mask=mask, past_key_values=cache).logits)
            place = stop
            if draw(3) == 1 and real[:, place - 1].all():
                wrong = draw(rollback)
                others = torch.randint(1, 60, (2, wrong), generator=generator)
                step = wrong if draw(2) == 1 else 1
                for first in range(0, wrong, step):
                    seen = torch.cat([mask, torch.ones(2, first + step, dtype=torch.long)], dim=1)
                    MODEL(others[:, first : first + step], attention_mask=seen, past_key_values=cache)
                cache.crop(-wrong if draw(2) == 1 else place)
                assert cache.get_seq_length() == place
    got = torch.cat(parts, dim=1)
    torch.testing.assert_close(got[real], want[real], atol=1e-4, rtol=0)
    assert cache.footprint == pytest.approx(whole.footprint, abs=1e-12)
    cache.settle()
    assert cache.live_keys.equal(whole.live_keys)


def test_without_a_rollback_the_same_would_go_wrong() -> None:
    """Or the test above could not fail: keys are freed within the tokens that are dropped."""
    cache = LifespanCache(MODEL, rollback=20, **CACHES["window"])
    with torch.no_grad():
        MODEL(token_ids(60)[None], past_key_values=cache)
    assert int((cache.slots - cache.live_keys).min()) == 20


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize(
    "guess", [{"prompt_lookup_num_tokens": 8}, {"assistant_model": llama(1)}], ids=["lookup", "assistant"]
)
def test_assisted_generation_writes_what_greedy_decoding_does(kind: str, guess: dict[str, Any]) -> None:
    ids = token_ids(20, 2).repeat(3)[None]  # repeats itself, so that look-ups find something
    how = {"max_new_tokens": 60, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    greedy = MODEL.generate(ids, past_key_values=LifespanCache(MODEL, rollback=0, **CACHES[kind]), **how)
    cache = LifespanCache(MODEL, rollback=20, **CACHES[kind])
    assert torch.equal(MODEL.generate(ids, past_key_values=cache, **how, **guess), greedy)


def test_with_bits_the_first_call_stays() -> None:
    cache = LifespanCache(MODEL, None, recent(6, 2), bits=8, rollback=30)
    with torch.no_grad():
        MODEL(token_ids(50)[None], past_key_values=cache)
        MODEL(token_ids(10, 1)[None], past_key_values=cache)
        cache.crop(-10)
        got = MODEL(token_ids(9, 2)[None], past_key_values=cache).logits
        cache.crop(-9)
        with pytest.raises(SmartKVError, match="with bits, the 50 tokens of the first call stay"):
            cache.crop(-1)
        other = LifespanCache(MODEL, None, recent(6, 2), bits=8)
        MODEL(token_ids(50)[None], past_key_values=other)
        want = MODEL(token_ids(9, 2)[None], past_key_values=other).logits
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def test_dropping_nothing_changes_nothing() -> None:
    cache = LifespanCache(MODEL, None, recent(6), rollback=0)
    with torch.no_grad():
        MODEL(token_ids(30)[None], past_key_values=cache)
    before = cache.slots
    cache.crop(0)
    cache.crop(30)
    cache.crop(99)
    assert cache.slots.equal(before) and cache.get_seq_length() == 30
