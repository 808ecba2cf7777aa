"""A LifespanCache in place of any other cache, without a `with`."""

import gc

import pytest
import torch
from torch import Tensor

from smartkv.cache import LifespanCache
from smartkv.policies import HybridPolicy, LayerRule
from tests.models import FAMILIES, token_ids
from tests.smartkv.cache_fixtures import MODELS, Injected, random_ttl, recent, sliding, state
from tests.smartkv.masked_reference import masked_logits, visibility


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "mistral_sliding"])
def test_generate_takes_the_cache_without_a_with_and_the_model_is_free_when_it_dies(family: str) -> None:
    model, ids = MODELS[family], token_ids(12)[None]
    before = state(model)
    call = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    want = model.generate(ids, **call)
    got = model.generate(ids, past_key_values=LifespanCache(model, None, recent(64), chunk=5), **call)
    assert got.tolist() == want.tolist()
    gc.collect()
    assert state(model) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation_gives_the_tokens_of_the_masked_model(family: str) -> None:
    model, prompt, count = MODELS[family], token_ids(12, 4)[None], 8
    ttl = random_ttl(model, 1, 12 + count, 5)
    cache = Injected(model, None, recent(3, 1))
    cache.table = ttl
    with cache:
        options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        got = model.generate(prompt, past_key_values=cache, attention_mask=torch.ones_like(prompt), **options)
    ids = prompt
    for _ in range(count):
        real = torch.ones_like(ids, dtype=torch.bool)
        masks = [visibility(layer[..., : ids.shape[1]], 3, 1, real, sliding(model)) for layer in ttl]
        scores = masked_logits(model, ids, masks, real)[:, -1].clone()
        scores[:, model.config.eos_token_id] = float("-inf")  # min_new_tokens
        ids = torch.cat([ids, scores.argmax(dim=-1, keepdim=True)], dim=1)
    assert got.tolist() == ids.tolist()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_padded_batch_generates_what_each_row_generates_alone(family: str) -> None:
    model, ids = MODELS[family], token_ids(24, 2).clamp(min=1).view(2, 12)
    real = torch.ones_like(ids, dtype=torch.bool)
    real[1, :5] = False
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}

    def generate(prompt: Tensor, mask: Tensor) -> list[list[int]]:
        with LifespanCache(model, None, recent(4, 2)) as cache:
            return model.generate(prompt, attention_mask=mask.long(), past_key_values=cache, **options)[:, -6:].tolist()

    alone = [generate(row[own][None], own[own][None])[0] for row, own in zip(ids, real, strict=True)]
    assert generate(ids, real) == alone


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_beam_search_with_everything_kept_is_that_of_the_usual_cache(family: str) -> None:
    model, prompt = MODELS[family], token_ids(10, 7).clamp(min=1)[None]
    options = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    usual = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    with LifespanCache(model, None, HybridPolicy((LayerRule("all", "full"),))) as cache:
        ours = model.generate(prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache, **options)
    assert ours.tolist() == usual.tolist()
