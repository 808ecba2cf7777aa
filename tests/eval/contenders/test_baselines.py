"""Published rules as contenders: budgets and footprints."""

from typing import Any

import pytest
import torch

from eval.contenders.base import FullCache
from eval.contenders.baselines import BASELINES, RECENT, SINKS, baseline
from smartkv.errors import FootprintOutOfReach
from smartkv.metrics.perplexity import query_before
from tests.models import token_ids

TOKENS, FIRST = 96, 24


@pytest.mark.parametrize("name", BASELINES)
def test_a_rule_keeps_the_footprint_that_it_was_solved_for(name: str, tiny_lm: Any) -> None:
    contender = baseline(name, tiny_lm, TOKENS, FIRST, "stream", 0)
    reading = contender.read(contender.solved(0.6), token_ids(TOKENS), FIRST, query_before(FIRST), None)
    assert reading.footprint == pytest.approx(0.6, abs=0.08)
    assert reading.nll.shape == (TOKENS - FIRST,) and reading.peak_bytes is None


def test_a_rule_that_keeps_all_is_the_full_cache(tiny_lm: Any) -> None:
    contender = baseline("h2o", tiny_lm, TOKENS, FIRST, "once", 0)
    reading = contender.read({"share": 1.0, "recent": 0.5}, token_ids(TOKENS), FIRST, 23, FIRST)
    full = FullCache(tiny_lm).read(1.0, token_ids(TOKENS), FIRST, 23, FIRST)
    torch.testing.assert_close(reading.nll, full.nll, atol=1e-4, rtol=0)
    assert reading.footprint == pytest.approx(1.0)


def test_once_a_share_of_the_prefill_stays(tiny_lm: Any) -> None:
    prefill = 40
    contender = baseline("key_norm", tiny_lm, TOKENS, prefill, "once", 0)
    assert contender.solved(0.5) == {"share": 0.5, "recent": RECENT["key_norm"]}
    reading = contender.read(contender.solved(0.5), token_ids(TOKENS), prefill, prefill, prefill)
    queries = range(prefill, TOKENS - 1)
    seen, full = sum(20 + query - prefill + 1 for query in queries), sum(query + 1 for query in queries)
    assert reading.footprint == pytest.approx(seen / full, abs=1e-6)
    with pytest.raises(FootprintOutOfReach, match=f"no key beside {SINKS} sinks"):
        contender.solved(0.05)


def test_seeds_of_random_have_names_of_their_own_and_differ(tiny_lm: Any) -> None:
    tokens, readings = token_ids(TOKENS), []
    for seed in (0, 1):
        contender = baseline("random", tiny_lm, TOKENS, FIRST, "stream", seed)
        assert (contender.name, contender.needs) == (f"random:{seed}", "nothing")
        readings.append(contender.read(contender.solved(0.5), tokens, FIRST, query_before(FIRST), None))
    assert not torch.allclose(readings[0].nll, readings[1].nll)
