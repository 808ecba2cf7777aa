"""Random eviction under a budget: how much stays, which keys, and that no call decides about them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from eval.contenders.random_keys import BLOCK, WINDOW, RandomCache
from smartkv.policies.floating_price import MOVES
from tests.models import token_ids

TOKENS = 4 * MOVES


def kept(lm: Any, calls: list[int], pin: tuple[int, int] | None = None, **options: Any) -> Tensor:
    """The positions that each head of the first layer holds after some calls, bool `[kv_heads, tokens]`."""
    ids = token_ids(sum(calls))
    with torch.no_grad(), RandomCache(lm.model, rollback=0, **options) as cache:
        if pin:
            cache.pin(*pin)
        for part in ids.split(calls):
            lm.model(part[None], past_key_values=cache)
        cache.settle()
        layer = cache.storage[0]
        return torch.stack([layer.visible(place, place + 1)[0] > 0 for place in range(len(ids))], dim=1)


def test_as_many_keys_stay_as_the_budget_says(lm: Any) -> None:
    held = kept(lm, [TOKENS], footprint=0.25)
    assert int(held.sum()) == TOKENS // 4 * len(held)
    assert held[:, :4].all() and held[:, -WINDOW + 1 :].all(), "sinks and the latest tokens stay"


def test_those_that_stay_are_spread_over_the_text(lm: Any) -> None:
    draws = [kept(lm, [TOKENS], footprint=0.5, seed=seed)[:, 4 : -2 * WINDOW].double() for seed in range(8)]
    first, last = torch.stack(draws).mean(dim=(0, 1)).chunk(2)
    assert float(first.mean()) == pytest.approx(float(last.mean()), abs=0.08)
    assert not torch.equal(draws[0], draws[1]), "a seed draws the same keys as another"


def test_no_call_decides_which_keys_stay(lm: Any) -> None:
    whole, parts = kept(lm, [TOKENS], max_tokens=40), kept(lm, [100, 1, 1, TOKENS - 102], max_tokens=40)
    assert torch.equal(whole, parts)


def test_a_worth_is_the_same_however_many_positions_are_asked_for(lm: Any) -> None:
    with RandomCache(lm.model, footprint=0.5) as few, RandomCache(lm.model, footprint=0.5) as many:
        assert torch.equal(few._drawn(1, 5), many._drawn(1, BLOCK + 1)[:, :BLOCK])
        assert not torch.equal(many._drawn(0, 5), many._drawn(1, 5))


def test_pinned_tokens_stay_within_the_budget(lm: Any) -> None:
    held = kept(lm, [TOKENS], pin=(50, 80), footprint=0.25)
    assert held[:, 50:80].all() and int(held.sum()) == TOKENS // 4 * len(held)


def test_others_draw_what_they_would_have_drawn(lm: Any) -> None:
    torch.manual_seed(7)
    want = torch.rand(3)
    torch.manual_seed(7)
    RandomCache(lm.model, max_tokens=40).detach()
    assert torch.equal(torch.rand(3), want)
