"""The full cache as a contender, and bytes in float16."""

from pathlib import Path
from typing import Any

import pytest
import torch

from eval.contenders.base import FullCache, stored_share
from smartkv import HybridPolicy, LayerRule, LifespanCache, load_backbone
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


def test_a_cache_in_float32_counts_as_one_in_bfloat16(tiny_backbone: Path) -> None:
    policy, shares = HybridPolicy((LayerRule("all", "window", 30),), sinks=0), []
    for dtype in ("float32", "bfloat16"):
        lm = load_backbone(str(tiny_backbone), dtype)
        with torch.inference_mode(), LifespanCache(lm.model, None, policy) as cache:
            lm.model(token_ids(60)[None], past_key_values=cache)
            cache.settle()
            shares.append(stored_share(lm, cache, 60))
    assert shares[0] == pytest.approx(shares[1]) and shares[0] > 0.5
