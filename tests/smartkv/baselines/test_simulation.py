"""Models under an eviction method, beside their own attention and beside the evicting cache."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from smartkv import HybridPolicy, LayerRule, LifespanCache
from smartkv.baselines import (
    H2O,
    TOVA,
    ExpectedAttention,
    KeyDiff,
    KeyNorm,
    Method,
    Once,
    Random,
    Schedule,
    SnapKV,
    Streaming,
    StreamingLLM,
    simulated_eviction,
)
from smartkv.errors import SmartKVError
from smartkv.metrics.perplexity import token_losses
from tests.families import OWN_SOFTMAX, make
from tests.models import FAMILIES, token_ids
from tests.smartkv.cache.fixtures import MODELS

METHODS = (StreamingLLM, Random, KeyNorm, KeyDiff, SnapKV, TOVA, H2O, ExpectedAttention)


def nll(model: PreTrainedModel, tokens: Tensor, method: Method, schedule: Schedule) -> tuple[Tensor, Tensor]:
    with simulated_eviction(model, method, schedule) as simulation:
        return token_losses(model, tokens).nll, simulation.footprint_by_head()


@pytest.mark.parametrize("family", [*FAMILIES, *OWN_SOFTMAX])
@pytest.mark.parametrize("method", METHODS)
def test_room_for_all_keys_is_the_model_s_own_attention(family: str, method: type[Method]) -> None:
    model, tokens = MODELS[family] if family in MODELS else make(family), token_ids(50)
    want = token_losses(model, tokens).nll
    for schedule in (Streaming(50, 4, 2, 7), Once(30, 40, 4, 2)):
        got, footprint = nll(model, tokens, method(), schedule)
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
        if family != "mistral_sliding":
            assert torch.equal(footprint, torch.ones_like(footprint))


@pytest.mark.parametrize("family", FAMILIES)
def test_streaming_llm_token_by_token_is_the_cache_s_window_with_sinks(family: str) -> None:
    model, tokens = MODELS[family], token_ids(50)
    got, footprint = nll(model, tokens, StreamingLLM(), Streaming(budget=14, window=10, sinks=4, chunk=1))
    policy = HybridPolicy((LayerRule("all", "window", 11),), sinks=4)  # ten were kept, and the query's own
    with LifespanCache(model, None, policy) as cache:
        torch.testing.assert_close(got, token_losses(model, tokens, 1, cache).nll, atol=2e-5, rtol=1e-4)
        if family != "mistral_sliding":  # the cache counts what it holds, the model's own window hides some of it
            assert float(footprint.mean()) == pytest.approx(cache.footprint, abs=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_loses_something_at_a_small_budget_and_keeps_what_it_said(method: type[Method]) -> None:
    model, tokens = MODELS["llama"], token_ids(80)
    got, footprint = nll(model, tokens, method(), Streaming(12, 4, 2, 4))
    assert not torch.allclose(got, token_losses(model, tokens).nll, atol=1e-3)
    seen = [min(i - i % 4, 12) + i % 4 + 1 for i in range(79)]
    assert footprint.flatten().tolist() == pytest.approx([sum(seen) / sum(range(1, 80))] * 4)


def test_the_model_is_as_it_was_even_after_an_error() -> None:
    model, tokens = MODELS["qwen2"], token_ids(30)
    before, implementation = token_losses(model, tokens).nll, model.config._attn_implementation
    refused = pytest.raises(SmartKVError, match="one text without a cache, got 2 rows")
    with refused, simulated_eviction(model, KeyNorm(), Streaming(12, 4)):
        model(input_ids=tokens.expand(2, -1))
    assert model.config._attn_implementation == implementation
    assert torch.equal(token_losses(model, tokens).nll, before)


def test_a_footprint_of_nothing_is_refused() -> None:
    refused = pytest.raises(SmartKVError, match="the text that was read has no query 0")
    with simulated_eviction(MODELS["llama"], KeyNorm(), Streaming(12, 4)) as simulation, refused:
        simulation.footprint_by_head()
