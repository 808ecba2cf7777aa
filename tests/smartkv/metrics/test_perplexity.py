"""Losses of windows against the model's own loss, and figures of evicted windows."""

import pytest
import torch
from transformers import DynamicCache

from smartkv.errors import SmartKVError
from smartkv.metrics.perplexity import LOGITS_AT_ONCE, evicted_nll, full_cache_bytes, token_losses, window_nll
from smartkv.policies.hybrid import HybridPolicy, LayerRule
from tests.models import FAMILIES, llama, token_ids


@pytest.mark.parametrize("family", FAMILIES)
def test_nll_is_the_models_own_loss(family: str) -> None:
    model, tokens = FAMILIES[family](), token_ids(40)
    with torch.no_grad():
        expected = float(model(tokens[None], labels=tokens[None]).loss)
    assert window_nll(model, tokens) == pytest.approx(expected, rel=1e-5)


def test_only_tokens_from_the_first_on_are_scored() -> None:
    model, tokens = llama(max_position_embeddings=600), token_ids(LOGITS_AT_ONCE + 50)
    with torch.no_grad():
        logs = model(tokens[None]).logits[0].log_softmax(dim=-1)
    expected = -sum(float(logs[i - 1, tokens[i]]) for i in range(20, len(tokens))) / (len(tokens) - 20)
    assert window_nll(model, tokens, first_token=20) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("first", [0, 10, 11])
def test_nothing_to_score_is_refused(first: int) -> None:
    with pytest.raises(SmartKVError, match=f"10 tokens has nothing to score from token {first}"):
        window_nll(llama(), token_ids(10), first)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bytes_of_a_full_cache_are_those_of_transformers(family: str) -> None:
    model, cache = FAMILIES[family](sliding_window=None) if "sliding" in family else FAMILIES[family](), DynamicCache()
    with torch.no_grad():
        model(token_ids(21)[None], past_key_values=cache, use_cache=True)
    assert full_cache_bytes(model, 21) == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def test_the_rank_of_a_token_is_how_many_are_likelier() -> None:
    model, tokens = llama(), token_ids(12)
    with torch.no_grad():
        logits = model(tokens[None]).logits[0]
    order = logits.argsort(dim=-1, descending=True).tolist()
    assert token_losses(model, tokens, 5).rank.tolist() == [order[i - 1].index(int(tokens[i])) for i in range(5, 12)]


def test_a_window_that_holds_all_keys_loses_nothing_and_a_small_one_keeps_its_share() -> None:
    model, tokens = llama(), token_ids(30)
    whole = evicted_nll(model, None, HybridPolicy((LayerRule("all", "window", 30),), sinks=2), tokens, 10)
    assert whole.nll == pytest.approx(window_nll(model, tokens, 10), rel=1e-5)
    assert torch.equal(whole.footprint, torch.ones(2, 2, dtype=torch.float64))
    small = evicted_nll(model, None, HybridPolicy((LayerRule("all", "window", 4),), sinks=2), tokens, 10)
    queries = range(9, 29)  # the queries that predict tokens 10 to 29
    assert small.footprint.flatten().tolist() == pytest.approx([6 * len(queries) / sum(q + 1 for q in queries)] * 4)
