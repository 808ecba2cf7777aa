"""LifespanCache against its rule in plain loops, and the keys that it stores and frees."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from smartkv.cache.lifespan_cache import LifespanCache
from smartkv.gates.bank import GateBank
from smartkv.models.architecture import Fingerprint
from smartkv.policies.hybrid import HybridPolicy, LayerRule
from smartkv.policies.lifetimes import FOREVER
from tests.models import FAMILIES, token_ids
from tests.smartkv.cache.fixtures import MODELS, Injected, Recording, fed, padding, random_ttl, recent, sliding, state
from tests.smartkv.cache.masked_reference import masked_logits, visibility

# -- one rule ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    tokens=st.integers(4, 18),
    batch=st.integers(1, 3),
    side=st.sampled_from(["left", "right"]),
    window=st.integers(1, 12),
    sinks=st.integers(0, 4),
    chunk=st.integers(1, 20),
    together=st.integers(1, 20),
    cuts=st.lists(st.integers(1, 17), max_size=3),
)
def test_logits_are_those_of_a_masked_full_cache(
    family: str,
    seed: int,
    tokens: int,
    batch: int,
    side: str,
    window: int,
    sinks: int,
    chunk: int,
    together: int,
    cuts: list[int],
) -> None:
    model = MODELS[family]
    ids = token_ids(batch * tokens, seed).view(batch, tokens)
    real, ttl = padding(batch, tokens, side, seed), random_ttl(model, batch, tokens, seed)
    cache = Injected(model, None, recent(window, sinks), chunk=chunk)
    cache.table = ttl
    with patch("smartkv.cache.ragged_chunk_attention.QUERIES", together):
        got = fed(model, cache, ids, real, [cut for cut in cuts if cut < tokens])
    masks = [visibility(layer, window, sinks, real, sliding(model)) for layer in ttl]
    want = masked_logits(model, ids, masks, real)
    torch.testing.assert_close(got[real], want[real], atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mask_makes_a_difference(family: str) -> None:
    """Or the test above could not fail."""
    model, real = MODELS[family], torch.ones(1, 18, dtype=torch.bool)
    ids, ttl = token_ids(18, 3)[None], random_ttl(MODELS[family], 1, 18, 3)
    masks = [visibility(layer, 2, 1, real, sliding(model)) for layer in ttl]
    everything = [visibility(layer, 18, 1, real, sliding(model)) for layer in ttl]
    assert (masked_logits(model, ids, masks, real) - masked_logits(model, ids, everything, real)).abs().max() > 0.05


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_a_row_of_a_padded_batch_is_as_if_it_were_alone(family: str, side: str) -> None:
    model = MODELS[family]
    real, ids = padding(3, 16, side, 1), token_ids(48, 5).view(3, 16)
    ttl = random_ttl(model, 3, 16, 2)
    cache = Injected(model, None, recent(3, 2), chunk=5)
    cache.table = ttl
    together = fed(model, cache, ids, real, [9])
    for row in range(3):
        alone = Injected(model, None, recent(3, 2), chunk=16)
        alone.table = ttl[:, row : row + 1]
        own = ids[row, real[row]][None]
        logits = fed(model, alone, own, torch.ones_like(own, dtype=torch.bool), [])
        torch.testing.assert_close(together[row, real[row]], logits[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_keys_of_a_padded_batch_are_packed_as_those_of_each_row_alone(side: str) -> None:
    """The mean key that is subtracted before packing is that of the real tokens.

    A number that lies between two codes may be packed as either, since a batch rounds otherwise than a row. That
    changes a logit by about 0.001. The mean of all tokens, padding included, would change one by 0.3.
    """
    model, tokens = MODELS["llama"], 96  # of fewer than 32 real tokens no mean is taken
    real, ids = padding(3, tokens, side, 1), token_ids(3 * tokens, 5).view(3, tokens)
    together = fed(model, LifespanCache(model, None, recent(9, 2), bits=6), ids, real, [])
    assert (~real).any()
    for row in range(3):
        own = ids[row, real[row]][None]
        cache = LifespanCache(model, None, recent(9, 2), bits=6)
        logits = fed(model, cache, own, torch.ones_like(own, dtype=torch.bool), [])
        torch.testing.assert_close(together[row, real[row]], logits[0], atol=0.01, rtol=0)


@pytest.mark.parametrize(("multiple", "ages"), [(float("inf"), ()), (1.0, ()), (float("inf"), (3, 5, 9))])
@pytest.mark.parametrize("family", FAMILIES)
def test_with_real_gates_the_logits_follow_from_the_recorded_decisions(
    family: str, multiple: float, ages: tuple[int, ...]
) -> None:
    model = MODELS[family]
    torch.manual_seed(1)
    gates = GateBank(Fingerprint.of(model), outputs=len(ages) or 1, details={"ages": ages} if ages else {})
    policy = HybridPolicy((LayerRule("all", "gated", 3),), sinks=1, price=-0.15 if ages else 0.0, multiple=multiple)
    ids, real = token_ids(24, 8)[None], torch.ones(1, 24, dtype=torch.bool)
    cache = Recording(model, gates, policy, chunk=4)
    got = fed(model, cache, ids, real, [5, 6, 17])
    cache.settle()  # the last tokens may wait to be judged
    decided = [torch.cat(cache.decided[layer], dim=2) for layer in range(model.config.num_hidden_layers)]
    assert 0.05 < torch.stack(decided).bool().float().mean() < 0.95  # some stay, some go
    assert not ages or torch.stack(decided).unique().tolist() == [0, 5, 9, FOREVER]
    masks = [visibility(ttl, 3, 1, real, sliding(model)) for ttl in decided]
    torch.testing.assert_close(got, masked_logits(model, ids, masks, real), atol=1e-4, rtol=0)


# -- what it holds ----------------------------------------------------------------------------------------------------


def test_what_is_stored_is_what_the_next_query_sees() -> None:
    model, tokens = MODELS["llama"], 20
    ids, real = token_ids(2 * tokens, 1).view(2, tokens), padding(2, tokens, "left", 4)
    ttl = random_ttl(model, 2, tokens, 6)
    cache = Injected(model, None, recent(3, 2), chunk=4, rollback=0)
    cache.table = ttl
    fed(model, cache, ids, real, [7])
    cache.settle()
    for layer, storage in enumerate(cache.storage):
        longer = torch.cat([real, torch.ones(2, 1, dtype=torch.bool)], dim=1)  # the next query
        table = torch.cat([ttl[layer], torch.zeros(2, 2, 1, dtype=torch.int64)], dim=2)
        seen = visibility(table, 3, 2, longer)[:, :, -1, :-1].sum(dim=-1)
        assert storage.live.tolist() == storage.slots.tolist() == seen.tolist()
        live, width = int(seen.sum()), model.config.hidden_size // model.config.num_attention_heads
        assert storage.store.fields.key.untyped_storage().nbytes() == live * width * 4
        # keys of each head, and seen; tokens of each row, and final ones; deaths by age
        counts = 2 * seen.numel() + 2 * 2 + 6
        assert storage.storage_bytes == live * (2 * width * 4 + 2 * 4) + counts * 8
    assert cache.live_keys.shape == (2, 2, 2)
    assert cache.peak_bytes > cache.storage_bytes == sum(layer.storage_bytes for layer in cache.storage)


def test_memory_follows_the_policy_and_not_the_prompt() -> None:
    model, peaks = MODELS["llama"], []
    for tokens in (100, 200):
        cache = LifespanCache(model, None, recent(8, 2), chunk=16)
        fed(model, cache, token_ids(tokens)[None], torch.ones(1, tokens, dtype=torch.bool), [])
        peaks.append(cache.peak_bytes)
    assert peaks[0] == peaks[1]


def test_keys_that_die_within_a_chunk_are_freed_before_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    model, peaks = MODELS["llama"], []
    monkeypatch.setattr("smartkv.cache.ragged_chunk_attention.QUERIES", 16)
    for chunk in (16, 192):
        cache = LifespanCache(model, None, recent(8, 2), chunk=chunk)
        fed(model, cache, token_ids(192)[None], torch.ones(1, 192, dtype=torch.bool), [])
        peaks.append(cache.peak_bytes)
    width, key_bytes = model.config.hidden_size // model.config.num_attention_heads, 4
    a_token = model.config.num_key_value_heads * (2 * width * key_bytes + 2 * 4)
    assert peaks[1] - peaks[0] <= (192 - 16) * a_token  # of one layer, which the model hands over together


def test_the_footprint_counts_the_keys_that_counted_queries_see() -> None:
    model, tokens, first_query = MODELS["qwen2"], 16, 6
    ids, real, ttl = (
        token_ids(tokens)[None],
        torch.ones(1, tokens, dtype=torch.bool),
        random_ttl(MODELS["qwen2"], 1, tokens, 9),
    )
    cache = Injected(model, None, recent(2, 1), chunk=5, first_query=first_query)
    cache.table = ttl
    fed(model, cache, ids, real, [])
    full = sum(query + 1 for query in range(first_query, tokens))
    seen = torch.stack([visibility(layer, 2, 1, real)[0, :, first_query:].sum(dim=(1, 2)) for layer in ttl])
    torch.testing.assert_close(cache.footprint_by_head, seen.double() / full)
    assert cache.footprint == pytest.approx(float(seen.double().mean() / full))


def test_a_full_policy_keeps_everything() -> None:
    model = MODELS["gpt2"]
    cache = LifespanCache(model, None, HybridPolicy((LayerRule("all", "full"),)))
    fed(model, cache, token_ids(30)[None], torch.ones(1, 30, dtype=torch.bool), [11])
    assert cache.footprint == 1.0 and cache.live_keys.unique().tolist() == [30]


# -- attach and detach ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_restored_also_after_an_exception(family: str) -> None:
    model = MODELS[family]
    before, cache = state(model), LifespanCache(model, None, recent(4))
    with pytest.raises(ZeroDivisionError), cache, torch.inference_mode():
        model(token_ids(8)[None], past_key_values=cache)
        assert state(model) != before
        raise ZeroDivisionError
    assert state(model) == before


def test_caches_can_be_nested_and_do_not_mix() -> None:
    model, ids, real = MODELS["llama"], token_ids(20)[None], torch.ones(1, 20, dtype=torch.bool)
    alone = fed(model, LifespanCache(model, None, recent(3)), ids, real, [9])
    outer, inner = LifespanCache(model, None, recent(3)), LifespanCache(model, None, recent(6))
    with outer, torch.inference_mode():
        first = model(ids[:, :9], past_key_values=outer).logits
        fed(model, inner, ids, real, [])
        second = model(ids[:, 9:], past_key_values=outer).logits
    torch.testing.assert_close(torch.cat([first, second], dim=1), alone, atol=1e-5, rtol=0)


def test_other_caches_work_as_before_beside_a_lifespan_cache() -> None:
    model, ids = MODELS["llama"], token_ids(8)[None]
    alone = model(ids, past_key_values=DynamicCache()).logits
    cache = LifespanCache(model, None, recent(1))
    torch.testing.assert_close(model(ids, past_key_values=DynamicCache()).logits, alone, atol=0, rtol=0)
    assert (model(ids, past_key_values=cache).logits - alone).abs().max() > 0.05


def test_reset_makes_it_as_new() -> None:
    model, ids, real = MODELS["llama"], token_ids(12)[None], torch.ones(1, 12, dtype=torch.bool)
    cache = LifespanCache(model, None, recent(4))
    first = fed(model, cache, ids, real, [])
    assert cache.get_seq_length() == 12
    cache.reset()
    assert cache.get_seq_length() == cache.storage_bytes == cache.peak_bytes == 0
    assert torch.equal(fed(model, cache, ids, real, []), first)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_mask_made_for_few_queries_at_a_time_hides_the_same_keys(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smartkv.cache.chunk_attention.MASK_ELEMENTS", 1)  # 16 queries at a time
    model, ids, real = MODELS["llama"], token_ids(180, 3).view(3, 60), padding(3, 60, side, 5)
    cache = Injected(model, None, recent(5, 2), chunk=50)
    cache.table = ttl = random_ttl(model, 3, 60, 6)
    masks = [visibility(layer, 5, 2, real) for layer in ttl]
    got = fed(model, cache, ids, real, [])
    torch.testing.assert_close(got[real], masked_logits(model, ids, masks, real)[real], atol=1e-4, rtol=0)


@pytest.mark.parametrize("ages", [None, (), (4, 9, 20)], ids=["no gates", "a price", "ages"])
def test_heads_that_share_a_cap_keep_to_it_whatever_ranks_their_keys(ages: tuple[int, ...] | None) -> None:
    model = MODELS["llama"]
    rule = LayerRule("all", "window", 3) if ages is None else LayerRule("all", "gated", 3)
    policy = HybridPolicy((rule,), sinks=1, price=None if ages is None else 0.0, max_tokens=12, max_tokens_per="layer")
    torch.manual_seed(2)
    details = {"ages": ages} if ages else {}
    gates = None if ages is None else GateBank(Fingerprint.of(model), outputs=len(ages) or 1, details=details)
    parts = []
    for cuts in ([], list(range(15, 40))):
        cache = LifespanCache(model, gates, policy, chunk=8)
        parts.append(fed(model, cache, token_ids(40)[None], torch.ones(1, 40, dtype=torch.bool), cuts))
        cache.settle()
        assert int(cache.live_keys.sum(dim=2).max()) <= 12
    torch.testing.assert_close(parts[0], parts[1], atol=1e-4, rtol=0)
