"""Caps: at most so many keys per head or layer, whatever the chunks."""

import math
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smartkv.cache.lifespan_cache import LifespanCache
from smartkv.errors import SmartKVError
from smartkv.gates.bank import GateBank
from smartkv.models.architecture import Architecture, Fingerprint
from smartkv.policies.budgets import Calibration, solve
from smartkv.policies.capacity import Cap
from smartkv.policies.hybrid import HybridPolicy, LayerRule
from smartkv.policies.lifetimes import HOLE
from tests.models import FAMILIES, token_ids
from tests.smartkv.cache.fixtures import MODELS, Injected, fed, padding, random_gates, random_ttl, recent, sliding
from tests.smartkv.cache.masked_reference import drop_over_cap, masked_logits, visibility


def capped(window: int, sinks: int, room: int, per: str, heads: int) -> HybridPolicy:
    """Room for so many keys beside what is pinned."""
    pinned = (window + sinks) * (heads if per == "layer" else 1)
    return replace(recent(window, sinks), max_tokens=pinned + room, max_tokens_per=per)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    tokens=st.integers(4, 18),
    batch=st.integers(1, 2),
    side=st.sampled_from(["left", "right"]),
    window=st.integers(1, 6),
    sinks=st.integers(0, 3),
    room=st.integers(0, 8),
    per=st.sampled_from(["head", "layer"]),
    chunk=st.integers(1, 20),
    together=st.integers(1, 20),
    cuts=st.lists(st.integers(1, 17), max_size=6),
)
def test_logits_are_those_of_keys_dropped_token_by_token(
    family: str,
    seed: int,
    tokens: int,
    batch: int,
    side: str,
    window: int,
    sinks: int,
    room: int,
    per: str,
    chunk: int,
    together: int,
    cuts: list[int],
) -> None:
    model = MODELS[family]
    heads = Fingerprint.of(model).kv_heads
    ids, real = token_ids(batch * tokens, seed).view(batch, tokens), padding(batch, tokens, side, seed)
    ttl = random_ttl(model, batch, tokens, seed)
    scores = torch.randint(0, 3, ttl.shape, generator=torch.Generator().manual_seed(seed)).float()  # with ties
    policy = capped(window, sinks, room, per, heads)
    cache = Injected(model, None, policy, chunk=chunk)
    cache.table, cache.score_table = ttl, scores
    with patch("smartkv.cache.ragged_chunk_attention.QUERIES", together):
        got = fed(model, cache, ids, real, [cut for cut in cuts if cut < tokens])
    masks = []
    for layer, score in zip(ttl, scores, strict=True):
        seen = visibility(layer, window, sinks, real, sliding(model))
        masks.append(
            drop_over_cap(
                seen, layer, score, real, policy.max_tokens or 0, per == "layer", window, sinks, sliding(model)
            )
        )
    want = masked_logits(model, ids, masks, real)
    torch.testing.assert_close(got[real], want[real], atol=1e-4, rtol=0)


def one_by_one(cap: Cap, position: list[int], expiry: list[int], score: list[int], start: int, steps: int) -> list[int]:
    """The first query that does not see each key of one pool, query by query; a key's index stands for its head."""
    ends = list(expiry)
    for query in range(start, start + steps):
        past = [k for k, j in enumerate(position) if j >= cap.sinks and query - j >= cap.window and ends[k] > query]
        past.sort(key=lambda k: (expiry[k], position[k], score[k], -k))
        for k in past[: max(0, len(past) - cap.room)]:
            ends[k] = query
    return ends


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), steps=st.integers(1, 6), heads=st.integers(1, 3), room=st.integers(0, 6))
def test_ends_are_those_of_keys_dropped_query_by_query(seed: int, steps: int, heads: int, room: int) -> None:
    """With holes, ties, lives that nothing cuts short, and keys that enter at the first query."""
    random = torch.Generator().manual_seed(seed)
    keys, start = 8, int(torch.randint(4, 9, (1,), generator=random))
    cap = Cap(room, heads, window=int(torch.randint(1, 4, (1,), generator=random)), sinks=seed % 3)
    position = torch.stack([torch.randperm(start + steps, generator=random)[:keys] for _ in range(heads)])
    position = position[:, :keys].masked_fill(torch.rand(position.shape, generator=random) < 0.2, HOLE)
    score = torch.randint(0, 2, position.shape, generator=random).float()
    expiry = torch.randint(1, 4, position.shape, generator=random) * 40 + start
    found = cap.ends(position, expiry, score, torch.full((heads,), start), steps)
    want = one_by_one(cap, *(x.flatten().int().tolist() for x in (position, expiry, score)), start, steps)
    real = position != HOLE
    assert found[real].tolist() == torch.tensor(want).view(position.shape)[real].tolist()


@pytest.mark.parametrize("per", ["head", "layer"])
def test_no_head_or_layer_holds_more_than_its_cap(per: str) -> None:
    model, ids = MODELS["llama"], token_ids(120)[None]
    policy = replace(HybridPolicy((LayerRule("all", "full"),), sinks=2), max_tokens=20, max_tokens_per=per)
    cache = LifespanCache(model, None, policy, chunk=7)
    with torch.inference_mode():
        for place in range(0, 120, 3):
            model(ids[:, place : place + 3], past_key_values=cache)
            held = cache.live_keys if per == "head" else cache.live_keys.sum(dim=2)
            assert held.max() <= 20
    assert held.min() >= (19 if per == "head" else 18)  # room for the token to come


def test_what_is_dropped_is_freed() -> None:
    model, sizes = MODELS["llama"], []
    for tokens in (60, 120):
        cache = LifespanCache(model, None, replace(HybridPolicy((LayerRule("all", "full"),)), max_tokens=16), chunk=20)
        fed(model, cache, token_ids(tokens)[None], torch.ones(1, tokens, dtype=torch.bool), [])
        sizes.append((cache.storage_bytes, cache.peak_bytes, int(cache.live_keys.max())))
    assert sizes[0] == sizes[1] and sizes[0][2] == 15  # and room for the token to come


def test_a_layers_budget_goes_to_the_heads_whose_keys_live_longer() -> None:
    model = MODELS["llama"]
    policy = HybridPolicy((LayerRule("all", "window", 2),), sinks=0, max_tokens=12, max_tokens_per="layer")
    cache = Injected(model, None, policy, chunk=8)
    cache.table = torch.zeros(2, 1, 2, 40, dtype=torch.int64)
    cache.table[:, :, 1] = 1000
    fed(model, cache, token_ids(40)[None], torch.ones(1, 40, dtype=torch.bool), [])
    cache.settle()
    assert cache.live_keys[0, 0].tolist() == [
        1,
        9,
    ]  # one through the window of 2, and the room of 8 for the heads whose keys live on


def test_the_footprint_counts_what_the_cap_left() -> None:
    model, tokens, ttl = MODELS["llama"], 20, random_ttl(MODELS["llama"], 1, 20, 3)
    real = torch.ones(1, tokens, dtype=torch.bool)
    for cuts in ([], [5, 6, 7, 8, 9, 15]):
        cache = Injected(model, None, replace(recent(2, 1), max_tokens=6), chunk=4)
        cache.table = ttl
        fed(model, cache, token_ids(tokens)[None], real, cuts)
        seen = [
            drop_over_cap(visibility(layer, 2, 1, real), layer, torch.zeros(layer.shape), real, 6, False, 2, 1)
            for layer in ttl
        ]
        shares = torch.stack([layer[0].sum(dim=(1, 2)) for layer in seen]).double() / (tokens * (tokens + 1) // 2)
        torch.testing.assert_close(cache.footprint_by_head, shares)


@pytest.mark.parametrize(("figure", "message"), [(0, "at least 1"), (-3, "at least 1"), (2.5, "number of keys")])
def test_a_budget_of_nothing_is_refused(figure: float, message: str) -> None:
    with pytest.raises(SmartKVError, match=message):
        replace(recent(2), max_tokens=figure)


def test_a_budget_without_room_for_sinks_and_window_is_refused_with_what_it_takes() -> None:
    model = MODELS["llama"]
    with pytest.raises(SmartKVError, match="give at least 12"):
        LifespanCache(model, None, replace(recent(8, 4), max_tokens=11))
    with pytest.raises(SmartKVError, match="give at least 24"):
        LifespanCache(model, None, replace(recent(8, 4), max_tokens=23, max_tokens_per="layer"))
    assert [cap.room for cap in replace(recent(8, 4), max_tokens=12).caps(Architecture.of(model.config)) if cap] == [
        0
    ] * 2


def test_a_cap_on_rules_without_a_window_takes_room_for_sinks_and_the_token_itself() -> None:
    policy = HybridPolicy((LayerRule("all", "full"),), sinks=4, max_tokens=4)
    with pytest.raises(SmartKVError, match="give at least 5"):
        policy.caps(Architecture.of(MODELS["llama"].config))


def test_a_cap_and_a_footprint_exclude_each_other() -> None:
    policy = replace(HybridPolicy((LayerRule("all", "window"),)), max_tokens=64)
    with pytest.raises(SmartKVError, match="has a cap"):
        solve(policy, 0.5, Calibration.without_gates(2, 64))


@pytest.mark.parametrize(("multiple", "ages"), [(2.0, ()), (math.inf, (4, 9, 20))])
def test_gates_decide_under_a_cap_too(multiple: float, ages: tuple[int, ...]) -> None:
    model = MODELS["qwen2"]
    torch.manual_seed(2)
    gates = GateBank(Fingerprint.of(model), outputs=len(ages) or 1, details={"ages": ages} if ages else {})
    ids = token_ids(60)[None]
    policy = HybridPolicy((LayerRule("all", "gated", 4),), sinks=1, price=0.0, multiple=multiple, max_tokens=12)
    seen: list[Tensor] = []
    for cuts in ([], list(range(20, 60))):
        cache = LifespanCache(model, gates, policy, chunk=16)
        seen.append(fed(model, cache, ids, torch.ones(1, 60, dtype=torch.bool), cuts))
    torch.testing.assert_close(seen[0], seen[1], atol=1e-4, rtol=0)


def test_each_key_is_scored_once_also_where_the_heads_of_a_layer_share_a_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    model, scored = MODELS["llama"], []
    score = GateBank.score
    monkeypatch.setattr(GateBank, "score", lambda self, *args: (scored.append(args), score(self, *args))[1])
    policy = HybridPolicy((LayerRule("all", "gated", 3),), sinks=1, price=0.0, max_tokens=12, max_tokens_per="layer")
    cache = LifespanCache(model, random_gates(model), policy, chunk=8)
    fed(model, cache, token_ids(40)[None], torch.ones(1, 40, dtype=torch.bool), range(24, 40))
    cache.settle()
    for layer in range(2):
        assert sum(keys.shape[2] for number, keys in scored if number == layer) == 40
