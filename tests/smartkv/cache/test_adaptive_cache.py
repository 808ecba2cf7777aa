"""AdaptiveCache: importance by attention or by gates, the budget, and what it refuses."""

import copy
import gc
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from smartkv.cache import adaptive_cache
from smartkv.cache.adaptive_cache import AdaptiveCache, importance_by
from smartkv.cache.ragged import storage_bytes
from smartkv.errors import SmartKVError
from smartkv.models.observation import observe_attention
from smartkv.quantization.codecs import Adaptive
from tests.models import FAMILIES, llama, token_ids
from tests.smartkv.cache.fixtures import random_gates, state
from tests.smartkv.cache.quantized_fixtures import ADAPTIVE, MODELS, TOKENS, fed


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("source", ["attention", "gates"])
def test_adaptive_with_nothing_encoded_yet_is_a_full_cache_and_leaves_the_model_as_it_was(
    family: str, source: str
) -> None:
    model, ids = MODELS[family], token_ids(2 * TOKENS).view(2, -1)
    before = state(model)
    gates = random_gates(model) if source == "gates" else None
    with torch.inference_mode():
        want = model(ids).logits
    cache = AdaptiveCache(model, gates, ADAPTIVE, residual=64)
    assert torch.allclose(fed(model, ids, cache, 7), want, atol=1e-4)
    cache.reset()
    assert torch.allclose(fed(model, ids, cache, TOKENS), want, atol=1e-4)
    del cache
    gc.collect()
    assert state(model) == before


@pytest.mark.parametrize("source", ["attention", "gates"])
def test_a_copy_goes_on_as_the_cache_does_and_shares_nothing_with_it_but_model_and_gates(source: str) -> None:
    model, ids = MODELS["llama"], token_ids(TOKENS)[None]
    gates = random_gates(model) if source == "gates" else None
    cache = AdaptiveCache(model, gates, ADAPTIVE, residual=64)
    begun = fed(model, ids[:, :-4], cache, 7)
    twin = copy.deepcopy(cache)
    assert twin.model is model and (source == "attention" or twin.gates is gates)
    rest = fed(model, ids[:, -4:], cache, 1)
    assert torch.equal(fed(model, ids[:, -4:], twin, 1), rest) and begun.shape[1] == TOKENS - 4


def test_importance_by_attention_is_what_a_key_was_given_so_far() -> None:
    model, ids = MODELS["qwen2"], token_ids(TOKENS)[None]
    cache = AdaptiveCache(model, None, ADAPTIVE, residual=64)
    fed(model, ids, cache, 3)
    total: dict[int, Tensor] = {}

    class Observer:
        def on_keys(self, *_: Any) -> None: ...

        def on_rotated_keys(self, *_: Any) -> None: ...

        def on_tile(self, layer: int, first_query: int, probabilities: Tensor) -> None:
            padded = torch.nn.functional.pad(probabilities.sum(dim=(1, 2)), (0, TOKENS - probabilities.shape[-1]))
            total[layer] = total.get(layer, 0) + padded

    with torch.inference_mode(), observe_attention(model, Observer()):
        model(ids, use_cache=False)
    for layer, storage in enumerate(cache.storage):
        assert torch.allclose(storage.importance[0], total[layer], atol=1e-4)


@pytest.mark.parametrize("elements", [2**22, 2 * 4 * TOKENS * 3, 1])
def test_importance_in_a_padded_batch_is_that_of_each_row_alone_in_blocks_of_any_size(
    elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids, mask = MODELS["llama"], token_ids(2 * TOKENS, 3).view(2, TOKENS), torch.ones(2, TOKENS).long()
    mask[1, :9] = 0
    alone = [AdaptiveCache(model, None, ADAPTIVE, residual=64) for _ in range(2)]
    want = [
        fed(model, row[real.bool()][None], cache, TOKENS) for row, real, cache in zip(ids, mask, alone, strict=True)
    ]
    monkeypatch.setattr(adaptive_cache, "SCORE_ELEMENTS", elements)
    cache = AdaptiveCache(model, None, ADAPTIVE, residual=64)
    with torch.inference_mode():
        got = model(ids, attention_mask=mask, past_key_values=cache).logits
    for row, real in enumerate(mask.bool()):
        torch.testing.assert_close(got[row, real], want[row][0], atol=1e-4, rtol=0)
        for mine, own in zip(cache.storage, alone[row].storage, strict=True):
            torch.testing.assert_close(mine.importance[row][:, real], own.importance[0], atol=1e-4, rtol=0)


def test_importance_by_gates_is_their_prediction() -> None:
    model, ids = MODELS["llama"], token_ids(TOKENS)[None]
    gates, seen = random_gates(model), {}
    gates.details["target"] = "log4 lifespan"
    score = gates.score
    gates.score = lambda layer, keys: seen.setdefault(layer, score(layer, keys))  # type: ignore[method-assign]
    cache = AdaptiveCache(model, gates, ADAPTIVE, residual=64)
    fed(model, ids, cache, TOKENS)
    for layer, storage in enumerate(cache.storage):
        assert torch.allclose(storage.importance, 4.0 ** seen[layer])


@pytest.mark.parametrize("source", ["attention", "gates"])
def test_adaptive_stays_within_its_budget(source: str) -> None:
    model = llama(head_dim=64, num_hidden_layers=1, max_position_embeddings=600)
    cache = AdaptiveCache(model, random_gates(model) if source == "gates" else None, Adaptive(0.4), residual=64)
    fed(model, token_ids(576)[None], cache, 64)
    encoded = cache.storage[0].encoded
    stored = storage_bytes(cache.storage[0].parts.values())
    assert encoded == 448 and stored <= 0.4 * encoded * 2 * 2 * 64 * 2
    assert stored > 0.38 * encoded * 2 * 2 * 64 * 2


def test_gates_of_another_model_or_device_or_lacking_a_layer_are_refused() -> None:
    model, lacking = MODELS["llama"], random_gates(MODELS["llama"])
    lacking.layers = lacking.layers[:1]
    for gates, message in (
        (random_gates(MODELS["gpt2"]), r"gpt2.*llama"),
        (random_gates(model).to("meta"), "are on meta"),
        (lacking, "none for layers 1"),
    ):
        with pytest.raises(SmartKVError, match=message):
            AdaptiveCache(model, gates)


@pytest.mark.parametrize(("target", "base"), [("log4 lifespan", 4.0), ("log future attention", math.e)])
def test_importance_by_gates_is_in_the_unit_of_their_target(target: str, base: float) -> None:
    gates = random_gates(MODELS["llama"])
    gates.details["target"] = target
    keys = torch.randn(1, 2, 6, gates.fingerprint.head_dim, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(importance_by(gates, 1, keys), base ** gates.score(1, keys))
