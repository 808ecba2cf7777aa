"""Contenders that score keys, against plain loops."""

from typing import Any

import pytest
import torch

from eval.contenders.scored import ScoredContender, lifetimes_once, price_for_share
from smartkv import HybridPolicy, LayerRule
from smartkv.metrics.perplexity import token_losses
from smartkv.policies.lifetimes import FOREVER
from tests.models import token_ids


def test_scores_above_the_price_stay_and_nothing_else(tiny_lm: Any) -> None:
    """Beside a mask in plain loops would be beside the cache's own tests: here, that the table reaches the cache."""
    ids, table = token_ids(40, 3), torch.randn(2, 2, 40, generator=torch.Generator().manual_seed(0))
    contender = ScoredContender(tiny_lm, "mine", "rule", "keys", lambda _: table, [ids], 10, window=4, sinks=2)
    found = contender.read(0.3, ids, 11, 10, None)
    seen = full = 0
    for query in range(10, 39):
        for key in range(query + 1):
            seen += float((table[..., key] > 0.3).float().mean()) if key >= 2 and query - key >= 4 else 1
            full += 1
    assert found.footprint == pytest.approx(seen / full, abs=1e-6)
    everything = contender.read(-100.0, ids, 11, 10, None)
    torch.testing.assert_close(everything.nll, token_losses(tiny_lm.model, ids, 11).nll, atol=1e-4, rtol=0)
    assert (found.nll - everything.nll).abs().max() > 1e-3


def test_once_the_prefill_is_over_its_cheap_keys_go_and_later_ones_stay() -> None:
    policy = HybridPolicy((LayerRule("all", "gated", 3),), sinks=2)
    table = torch.arange(20.0)[None, None] % 7
    price = price_for_share([table], 0.5, 12, policy)
    ttl = lifetimes_once(table, price, 12, policy)[0, 0]
    kept = [key for key in range(12) if ttl[key] == FOREVER or key < 2]
    assert len(kept) in (6, 7) and {9, 10, 11} <= set(kept) and (ttl[12:] == FOREVER).all()
    assert all(ttl[key] == 12 - key for key in range(2, 12) if key not in kept)
    open_keys = [float(table[0, 0, key]) for key in range(2, 9)]
    assert min(table[0, 0, key] for key in kept if 2 <= key < 9) >= sorted(open_keys)[-2]
