"""The full cache as a contender, and bytes in float16."""

from typing import Any

import pytest
import torch

from eval.contenders.base import FullCache, stored_share
from smartkv import HybridPolicy, LayerRule, LifespanCache
from smartkv.metrics.perplexity import token_losses
from tests.models import token_ids


def test_the_full_cache_reads_with_all_keys(tiny_lm: Any) -> None:
    tokens, contender = token_ids(40), FullCache(tiny_lm)
    assert contender.solved(0.25) == 1.0
    reading = contender.read(1.0, tokens, 10, 5, None)
    losses = token_losses(tiny_lm.model, tokens, 10)
    assert torch.equal(reading.nll, losses.nll) and torch.equal(reading.rank, losses.rank)
    assert (reading.footprint, reading.peak_bytes, reading.stored) == (1.0, None, None)


def test_the_rank_of_a_token_is_the_number_of_likelier_ones(tiny_lm: Any) -> None:
    tokens = token_ids(20)
    with torch.inference_mode():
        logits = tiny_lm.model(tokens[None]).logits[0]
    ranks = [int((logits[place - 1] > logits[place - 1, tokens[place]]).sum()) for place in range(8, 20)]
    assert FullCache(tiny_lm).read(1.0, tokens, 8, 7, None).rank.tolist() == ranks


@pytest.mark.parametrize(("window", "share"), [(60, 1.0), (30, 0.5)])
def test_a_cache_in_float32_counts_as_if_it_were_in_float16(window: int, share: float, tiny_lm: Any) -> None:
    policy = HybridPolicy((LayerRule("all", "window", window),), sinks=0)
    with torch.inference_mode(), LifespanCache(tiny_lm.model, None, policy) as cache:
        tiny_lm.model(token_ids(60)[None], past_key_values=cache)
        cache.settle()
        assert stored_share(tiny_lm, cache, 60) == pytest.approx(share, abs=0.45)
        keys = sum(int(layer.store.fields.position.numel()) for layer in cache.storage)
        assert keys >= cache.live_keys.sum()
