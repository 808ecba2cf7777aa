"""A cache under a budget: the price floats so that the budget holds, and no logit depends on calls, rows or padding."""

import copy
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from smartkv.cache.cache_budget import CacheBudget
from smartkv.cache.lifespan_cache import LifespanCache
from smartkv.cache.serialization import load_cache, save_cache
from smartkv.errors import SmartKVError
from smartkv.gates.bank import GateBank
from smartkv.models.architecture import Architecture, Fingerprint
from smartkv.policies.floating_price import MOVES, PINNED
from smartkv.policies.hybrid import HybridPolicy, LayerRule
from smartkv.policies.lifetimes import FOREVER
from tests.families import make
from tests.models import token_ids
from tests.smartkv.cache.budget_fixtures import POLICY, SINKS, WINDOW, aged_gates
from tests.smartkv.cache.fixtures import MODELS, fed, padding, recent
from tests.smartkv.cache.masked_reference import masked_logits
from tests.smartkv.policies.naive_floating_price import AGES, naive

TOKENS = 150


class Recording(LifespanCache):
    """Keeps the worth of all keys."""

    def scores(self, layer: int, keys: Tensor) -> Tensor | None:
        score = super().scores(layer, keys)
        self.worth = getattr(self, "worth", {})
        self.worth.setdefault(layer, []).append(score)
        return score


@pytest.mark.parametrize("family", ["llama", "mistral_sliding", "gpt2", "gemma3_text, sliding"])
def test_the_logits_are_those_of_a_mask_that_hides_what_the_naive_loop_lets_go(family: str) -> None:
    model, ids = make(family) if family not in MODELS else MODELS[family], token_ids(TOKENS)[None]
    architecture, real = Architecture.of(model.config), torch.ones(1, TOKENS, dtype=torch.bool)
    cache = Recording(model, aged_gates(model), POLICY, chunk=TOKENS, max_tokens=45)
    fed(model, cache, ids, real, [])
    masks, born = [], torch.arange(TOKENS)
    for layer in range(architecture.layers):
        own = cache.storage[layer].sliding_window
        ends = (born + own).clamp(max=FOREVER).expand(architecture.kv_heads, -1)
        if layer in cache.worth:
            worth = torch.cat(cache.worth[layer], dim=2)[0].half().float()
            worth[:, :SINKS] = PINNED
            budget = int(cache.storage[layer].limit.budget)
            ends, _ = naive(worth, TOKENS, budget, WINDOW, ends)
        query = born[:, None]
        masks.append(((born <= query) & (ends[:, None] > query))[None])
    want = masked_logits(model, ids, masks, real)
    for cuts, chunk in (([], TOKENS), ([3, 50, 51, 52, 70, 130], 7), (list(range(60, TOKENS)), 64)):
        again = LifespanCache(model, cache.gates, POLICY, chunk=chunk, max_tokens=45)
        torch.testing.assert_close(fed(model, again, ids, real, cuts), want, atol=1e-4, rtol=0)
    assert int(again.live_keys.sum()) < 0.7 * architecture.keys_of_full_cache(TOKENS)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_of_a_padded_batch_is_as_if_it_were_alone(side: str) -> None:
    model, gates = MODELS["llama"], aged_gates(MODELS["llama"])
    real, ids = padding(3, TOKENS, side, 1), token_ids(3 * TOKENS, 5).view(3, TOKENS)
    together = fed(model, LifespanCache(model, gates, POLICY, footprint=0.4, chunk=33), ids, real, [])
    for row in range(3):
        own = ids[row, real[row]][None]
        alone = LifespanCache(model, gates, POLICY, footprint=0.4)
        logits = fed(model, alone, own, torch.ones_like(own, dtype=torch.bool), [])
        torch.testing.assert_close(together[row, real[row]], logits[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("max_tokens", [30, 60])
def test_the_budget_holds_exactly_at_a_move_and_nearly_between_two_also_beyond_the_plan(max_tokens: int) -> None:
    model, ids = MODELS["llama"], token_ids(250)[None]
    cache = LifespanCache(model, aged_gates(model), POLICY, max_tokens=max_tokens, plan=100)
    with torch.no_grad():
        for place in range(250):
            model(ids[:, place : place + 1], past_key_values=cache)
            if place < MOVES:
                continue
            cache.settle()
            held = float(cache.live_keys.double().mean())
            assert held <= max_tokens + MOVES
            if (place + 1) % MOVES == 0:
                assert min(max_tokens, place + 1) - 3 <= held <= max_tokens


def test_everything_stays_until_the_budget_is_reached() -> None:
    model, ids = MODELS["llama"], token_ids(60)[None]
    cache = LifespanCache(model, aged_gates(model), POLICY, max_tokens=64)
    full = fed(model, LifespanCache(model, None, "full"), ids, torch.ones_like(ids, dtype=torch.bool), [])
    assert torch.allclose(fed(model, cache, ids, torch.ones_like(ids, dtype=torch.bool), [9]), full, atol=1e-4)
    assert cache.footprint == 1


def test_a_share_is_one_of_prompt_and_answer_in_generate_and_of_the_first_call_elsewhere() -> None:
    model, ids = MODELS["llama"], token_ids(60).clamp(min=1)[None]  # 0 would be taken for padding
    for plan, expected in ((None, 0.5 * (60 + 80)), (200, 100)):
        cache = LifespanCache(model, aged_gates(model), POLICY, footprint=0.5, plan=plan)
        model.generate(
            ids, past_key_values=cache, max_new_tokens=80, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert cache.report().budget == expected
        assert float(cache.live_keys.double().mean()) <= expected * (1 + MOVES / 128) + 1
    cache = LifespanCache(model, aged_gates(model), POLICY, footprint=0.5)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    assert cache.report().budget == 30
    cache.reset()
    with torch.no_grad():
        model(ids[:, :40], past_key_values=cache)
    assert cache.report().budget == 20


def test_a_short_text_keeps_what_always_stays() -> None:
    model, ids = MODELS["llama"], token_ids(20)[None]
    cache = LifespanCache(model, aged_gates(model), POLICY, footprint=0.25)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    assert cache.report().budget == SINKS + AGES[0]


@pytest.mark.parametrize("bits", [None, 8])
def test_bytes_stay_below_the_figure_that_was_given(bits: int | None) -> None:
    model, ids = MODELS["llama"], token_ids(2 * 250).view(2, 250)
    cache = LifespanCache(model, aged_gates(model), POLICY, max_bytes="150 kB", bits=bits)
    with torch.no_grad():
        model(ids[:, :100], past_key_values=cache)
        for place in range(100, 250):
            model(ids[:, place : place + 1], past_key_values=cache)
            assert cache.storage_bytes <= 150_000
    assert cache.storage_bytes > 75_000


def test_layers_share_the_budget_as_their_gates_remember() -> None:
    model = MODELS["llama"]
    gates = aged_gates(model, layer_shares=[[0.5, [0.5, 0.5]], [0.25, [0.4, 0.1]]])
    cache = LifespanCache(model, gates, POLICY, footprint=0.25, plan=200)
    with torch.no_grad():
        model(token_ids(192)[None], past_key_values=cache)
    budgets = [layer.budget for layer in cache.report().layers]
    assert budgets == [80, 20]
    assert [layer.held for layer in cache.report().layers] == budgets


@pytest.mark.parametrize("moment", [100, 131, MOVES * 2])
def test_saved_and_copied_caches_go_on_bit_for_bit(moment: int, tmp_path: Path) -> None:
    model, gates = MODELS["llama"], aged_gates(MODELS["llama"])
    ids, more = token_ids(2 * moment).view(2, -1), token_ids(160, 1).view(2, 80)
    cache = LifespanCache(model, gates, POLICY, max_tokens=30, pin_first=4, rollback=7)
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=cache)
        model(ids[:, -1:], past_key_values=cache)
    save_cache(cache, tmp_path / "c.safetensors")
    loaded, twin = load_cache(tmp_path / "c.safetensors", model, gates), copy.deepcopy(cache)
    held, again = ([replace(layer, bytes=0) for layer in each.report().layers] for each in (cache, loaded))
    assert held == again
    outputs = []
    for each in (cache, loaded, twin):
        each.crop(-3)
        with torch.no_grad():
            parts = [model(more[:, :9], past_key_values=each).logits]
            parts += [model(more[:, n : n + 1], past_key_values=each).logits for n in range(9, 80)]
        outputs.append(torch.cat(parts, dim=1))
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    assert loaded.rollback == 7 and loaded.live_keys.equal(cache.live_keys)


def test_gates_that_judge_once_and_layers_with_windows_take_part() -> None:
    model, ids = MODELS["llama"], token_ids(192)[None]
    torch.manual_seed(2)
    gates = GateBank(Fingerprint.of(model))
    policy = HybridPolicy((LayerRule("0", "window", 10), LayerRule("1", "gated", WINDOW)), sinks=SINKS)
    cache = LifespanCache(model, gates, policy, max_tokens=40)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    window, gated = cache.report().layers
    assert window.held == 10 + SINKS - 1 and window.budget is None  # the next query sees one key of the window less
    assert gated.held == gated.budget == 2 * 40 - 10 - SINKS


def test_beams_and_rows_take_their_prices_along() -> None:
    model, gates = MODELS["llama"], aged_gates(MODELS["llama"])
    ids = token_ids(2 * 140).view(2, 140)
    settings: dict[str, Any] = {"max_tokens": 30}
    cache = LifespanCache(model, gates, POLICY, **settings)
    alone = LifespanCache(model, gates, POLICY, **settings)
    with torch.no_grad():
        model(ids[:, :100], past_key_values=cache)
        cache.batch_select_indices(torch.tensor([1, 1]))
        got = model(ids[1:, 100:].repeat(2, 1), past_key_values=cache).logits
        model(ids[1:, :100], past_key_values=alone)
        want = model(ids[1:, 100:], past_key_values=alone).logits
    for row in got:
        torch.testing.assert_close(row, want[0], atol=1e-4, rtol=0)


def test_a_policy_with_an_open_price_needs_a_budget_and_one_without_refuses_it() -> None:
    model, gates = MODELS["llama"], aged_gates(MODELS["llama"])
    with pytest.raises(SmartKVError, match="leaves its price open"):
        LifespanCache(model, gates, POLICY)
    with pytest.raises(SmartKVError, match="already decides what is kept, max_tokens=30 cannot change"):
        LifespanCache(model, gates, replace(POLICY, price=0.0), max_tokens=30)
    with pytest.raises(SmartKVError, match="already decides"):
        LifespanCache(model, gates, recent(4), max_tokens=30)
    with pytest.raises(SmartKVError, match="already decides"):
        own = HybridPolicy((LayerRule("0", "gated", 4, price=0.0), LayerRule("1", "gated", 4)))
        LifespanCache(model, gates, own, max_tokens=30)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": 17}, "max_tokens=17 leaves 17 keys a KV head, but 18 always stay (2 sinks, a window of 16)"),
        (
            {"max_tokens": 30, "pin_first": 30},
            "30 keys a KV head, but 46 always stay (2 sinks, a window of 16 and 28 pinned)",
        ),
        ({"footprint": 0.1, "plan": 100}, "footprint=0.1 of 100 planned tokens leaves 10 keys a KV head, but 18"),
        ({"max_bytes": "2 kB"}, "max_bytes=2,000 leaves 0 keys"),
        ({"max_bytes": "2 parsec"}, "a text such as '200MB'"),
        ({"max_bytes": 0}, "a number of bytes above 0"),
        ({"max_tokens": 2.5}, "max_tokens must be a number of keys"),
        ({"footprint": 0.5, "max_tokens": 30}, "footprint and max_tokens both say how much may be kept"),
        ({"max_tokens": 30, "max_bytes": 30}, "max_tokens and max_bytes both say"),
        ({"footprint": 0.5, "plan": 0}, "plan must be a number of tokens, at least 1"),
        ({"plan": 100}, "plan=100 is the length for a budget, and none was given"),
        ({"max_tokens": 30, "rollback": -1}, "rollback must be a number of tokens"),
        ({"max_tokens": 30, "pin_first": "all"}, "pin_first must be a number of tokens"),
    ],
)
def test_a_budget_that_cannot_be_is_refused_with_its_figures(settings: dict[str, Any], message: str) -> None:
    model = MODELS["llama"]
    with pytest.raises(SmartKVError, match=re.escape(message)):
        LifespanCache(
            model,
            aged_gates(model),
            **({} if "plan" in settings and len(settings) == 1 else {"policy": POLICY}),
            **settings,
        )


def test_layers_that_keep_everything_need_a_plan() -> None:
    model, policy = MODELS["llama"], HybridPolicy((LayerRule("0", "full"), LayerRule("1", "gated", 4)))
    with pytest.raises(SmartKVError, match=r"keeps all keys of layers 0.*give plan=TOKENS"):
        LifespanCache(model, aged_gates(model), policy, max_tokens=60)
    cache = LifespanCache(model, aged_gates(model), policy, max_tokens=60, plan=100)
    assert isinstance(cache.budget, CacheBudget) and cache.budget.keys_by_layer(100, 0, 1) == [None, 2 * 20]
