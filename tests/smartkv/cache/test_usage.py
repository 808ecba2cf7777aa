"""Memory figures of a cache: every tensor is counted once, and the figures agree with each other."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from smartkv.cache.lifespan_cache import LifespanCache
from smartkv.policies.hybrid import HybridPolicy, LayerRule
from tests.models import FAMILIES, token_ids
from tests.smartkv.cache.fixtures import GATED, MODELS, fed, padding, random_gates, recent, sliding, tensors_of

FULL = HybridPolicy((LayerRule("all", "full"),))
FLOATING = replace(GATED, price=None)
CACHES: dict[str, dict[str, Any]] = {
    "gated": {"policy": GATED},
    "window": {"policy": recent(12, 2)},
    "full": {"policy": FULL},
    "cap of a head": {"policy": replace(FULL, max_tokens=12)},
    "cap of a layer": {"policy": replace(GATED, max_tokens=48, max_tokens_per="layer")},
    "budget": {"policy": FLOATING, "max_tokens": 9},
}


def moments(family: str, policy: str, rollback: int = 0) -> Iterator[LifespanCache]:
    """A cache after a prompt with padding, after each of some tokens, after rows were changed, and with all dead keys
    freed."""
    model = MODELS[family]
    cache = LifespanCache(model, random_gates(model), chunk=16, rollback=rollback, **CACHES[policy])
    ids, real = token_ids(2 * 60, 3).view(2, 60), padding(2, 60, "left", 1)
    fed(model, cache, ids[:, :30], real[:, :30], [20])
    cache.attach()
    yield cache
    with torch.no_grad():
        for place in range(30, 50):
            model(ids[:, place : place + 1], past_key_values=cache)
            yield cache
        cache.batch_repeat_interleave(2)
        yield cache
        model(ids.repeat_interleave(2, dim=0)[:, 50:51], past_key_values=cache)
        yield cache
        cache.settle()
        yield cache


each_policy = pytest.mark.parametrize("policy", CACHES)
each_family = pytest.mark.parametrize("family", FAMILIES)


@each_policy
@pytest.mark.parametrize(("family", "rollback"), [*((family, 0) for family in FAMILIES), ("llama", 5)])
def test_no_tensor_is_forgotten_and_none_counted_twice(family: str, policy: str, rollback: int) -> None:
    for cache in moments(family, policy, rollback):
        for layer, said in zip(cache.storage, cache.bytes_by_layer.tolist(), strict=True):
            storages = [tensor.untyped_storage() for tensor in tensors_of(layer)]
            assert said == sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_a_tensor_that_is_not_counted_would_be_found() -> None:
    cache = next(moments("llama", "window"))
    cache.storage[0].forgotten = {"by": [torch.zeros(3)]}  # type: ignore[attr-defined]
    assert any(tensor.shape == (3,) for tensor in tensors_of(cache.storage[0]))


@each_policy
def test_what_lives_has_a_slot_and_what_has_a_slot_has_bytes(policy: str) -> None:
    model = MODELS["qwen3"]
    width = 2 * model.config.head_dim * 4  # key and value in float32
    for cache in moments("qwen3", policy):
        rows = len(cache.storage[0].seen)
        assert cache.live_keys.shape == cache.slots.shape == (2, rows, 2)
        assert (cache.live_keys >= 1).all() and (cache.live_keys <= cache.slots).all()
        assert cache.live_bytes == int(cache.live_keys.sum()) * width
        assert cache.storage_bytes == int(cache.bytes_by_layer.sum()) >= int(cache.slots.sum()) * width
        for layer in cache.storage:
            assert layer.store.fields.key.untyped_storage().nbytes() == int(layer.slots.sum()) * width // 2
    assert cache.live_keys.equal(cache.slots)  # settled


@each_policy
def test_the_peak_is_never_below_what_is_held(policy: str) -> None:
    before = 0
    for cache in moments("gpt2", policy):
        assert cache.peak_bytes >= max(before, cache.storage_bytes)
        before = cache.peak_bytes


@each_policy
@each_family
def test_the_footprint_is_the_sum_of_the_live_keys_of_all_queries(family: str, policy: str) -> None:
    model, batch, tokens = MODELS[family], 2, 40
    cache, ids = (
        LifespanCache(model, random_gates(model), rollback=0, **CACHES[policy]),
        token_ids(batch * tokens).view(batch, -1),
    )
    seen, full = 0, 0
    with torch.no_grad():
        for place in range(tokens):
            model(ids[:, place : place + 1], past_key_values=cache)
            seen = seen + cache.live_keys.sum(dim=1).double()
            full += batch * min(place + 1, sliding(model) or tokens)
            torch.testing.assert_close(cache.footprint_by_head, seen / full)
            assert cache.footprint == pytest.approx(float((seen / full).mean()))
