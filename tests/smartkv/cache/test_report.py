"""The report of a cache says what it holds, what it may hold, and how old the freed keys were."""

import json

import pytest
import torch

from smartkv.cache.footprint_count import DEATH_AGES
from smartkv.cache.lifespan_cache import LifespanCache
from smartkv.errors import SmartKVError
from tests.models import token_ids
from tests.smartkv.cache.budget_fixtures import POLICY, aged_gates
from tests.smartkv.cache.fixtures import MODELS, recent

MODEL = MODELS["llama"]


def read(cache: LifespanCache, prompt: int, answer: int, rows: int = 1) -> LifespanCache:
    ids = token_ids(rows * (prompt + answer)).view(rows, -1)
    with torch.no_grad():
        model_input = ids[:, :prompt]
        MODEL(model_input, past_key_values=cache)
        for place in range(prompt, prompt + answer):
            MODEL(ids[:, place : place + 1], past_key_values=cache)
    cache.settle()
    return cache


def test_the_figures_are_those_of_the_cache() -> None:
    report = read(LifespanCache(MODEL, aged_gates(MODEL), POLICY, max_tokens=30), 100, 92, rows=2).report()
    assert report.asked == "max_tokens=30" and report.tokens == 192 and report.budget == 30
    assert 28 <= report.held <= 30 and report.full == 192
    assert sum(layer.bytes for layer in report.layers) == report.storage_bytes <= report.peak_bytes
    assert all(layer.price is not None for layer in report.layers)


@pytest.mark.parametrize("prompt", [1, 60, 250])
def test_every_key_is_held_or_counted_among_the_freed_at_its_age(prompt: int) -> None:
    cache = read(LifespanCache(MODEL, None, recent(20, 3), chunk=16, rollback=0), prompt, 250 - prompt, rows=2)
    heads = 2 * MODEL.config.num_key_value_heads
    for layer in cache.report().layers:
        assert layer.budget is None and layer.price is None and layer.held == 3 + 19
        freed = [0] * (len(DEATH_AGES) + 1)
        freed[1] = heads * (250 - 22)  # at an age of 20 tokens
        assert layer.deaths == freed


def test_it_is_a_table_and_fit_for_json() -> None:
    report = read(LifespanCache(MODEL, aged_gates(MODEL), POLICY, footprint=0.25, plan=192), 192, 0).report()
    lines = str(report).splitlines()
    assert lines[0].startswith("footprint=0.25: 192 tokens, ") and lines[1].split()[:3] == ["layer", "budget", "held"]
    assert lines[-2].split()[:4] == ["all", "48.0", "48.0", "25.0%"]
    assert len({len(line) for line in lines[1:-1]}) == 1  # columns are aligned
    assert json.loads(json.dumps(report.to_dict()))["held"] == 48


def test_a_cache_without_tokens_has_nothing_to_report() -> None:
    with pytest.raises(SmartKVError, match="not seen a token"):
        LifespanCache(MODEL, None, recent(4)).report()
