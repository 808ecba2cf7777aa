"""Caches under autocast: their logits are those of a full cache there, and what they hold has one dtype."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from smartkv.cache.adaptive_cache import AdaptiveCache
from smartkv.cache.lifespan_cache import LifespanCache
from smartkv.cache.quantized_cache import QuantizedCache
from smartkv.errors import SmartKVError
from tests.models import FAMILIES, token_ids
from tests.smartkv.cache.fixtures import GATED, random_gates, recent

PROMPT, TOKENS = 30, 60
CACHES: dict[str, Callable[[Any], Cache]] = {
    "full": lambda model: LifespanCache(model, None, recent(2 * TOKENS)),
    "full, packed": lambda model: LifespanCache(model, None, recent(2 * TOKENS), bits=8),
    "quantised": lambda model: QuantizedCache(model, "int8"),
    "adaptive, all exact": lambda model: AdaptiveCache(model, residual=2 * TOKENS),
}


def logits(model: Any, cache: Cache) -> Tensor:
    """Logits of a prompt, of single tokens and of short calls, under autocast."""
    ids, parts = token_ids(TOKENS)[None], []
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        for start, stop in [(0, PROMPT), *((at, at + 1) for at in range(PROMPT, 50)), (50, 55), (55, TOKENS)]:
            parts.append(model(ids[:, start:stop], past_key_values=cache).logits)
    return torch.cat(parts, dim=1).float()


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_a_full_cache_under_autocast(family: str, name: str) -> None:
    model = FAMILIES[family]()
    with torch.no_grad():
        exact = model(token_ids(TOKENS)[None]).logits
    theirs, ours = (logits(model, cache) - exact for cache in (DynamicCache(), CACHES[name](model)))
    error = float(ours.square().mean().sqrt() / exact.std())
    assert error < 1.5 * float(theirs.square().mean().sqrt() / exact.std()) + 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adaptive_cache_packs_under_autocast(family: str) -> None:
    model = FAMILIES[family]()
    cache = AdaptiveCache(model)
    assert logits(model, cache).isfinite().all() and cache.storage_bytes > 0


@pytest.mark.parametrize("bits", [None, 8])
def test_an_evicting_cache_goes_on_with_and_without_autocast(bits: int | None) -> None:
    model = FAMILIES["llama"]()
    cache = LifespanCache(model, random_gates(model), GATED, bits=bits)
    assert logits(model, cache).isfinite().all()
    layer = cache.storage[0]
    assert layer.dtype == torch.bfloat16 and {keys.dtype for keys in layer.pending_keys} <= {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        cache.crop(-3)
        cache.settle()
    assert cache.get_seq_length() == TOKENS - 3
    assert bits or layer.store.fields.key.dtype == layer.store.fields.value.dtype == torch.bfloat16


def test_a_cache_that_was_begun_under_autocast_is_not_continued_without() -> None:
    model = FAMILIES["llama"]()
    cache = LifespanCache(model, None, recent(8))
    logits(model, cache)
    with pytest.raises(SmartKVError, match=r"in torch.bfloat16, .* computes in torch.float32"):
        model(token_ids(1)[None], past_key_values=cache)
