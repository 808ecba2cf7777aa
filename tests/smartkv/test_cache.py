"""The cache against the rule in plain loops, and what it holds and frees."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from smartkv.backbones import Fingerprint
from smartkv.cache import LifespanCache
from smartkv.errors import SmartKVError
from smartkv.gates import GateBank
from smartkv.policies import FOREVER, HybridPolicy, LayerRule
from tests.models import FAMILIES, token_ids
from tests.smartkv.masked_reference import masked_logits, positions, visibility

MODELS = {name: make() for name, make in FAMILIES.items()}


class Injected(LifespanCache):
    """TTLs from a table `[layers, batch, kv_heads, real tokens]`."""

    table: Tensor

    def times_to_live(self, layer: int, keys: Tensor, position: Tensor) -> Tensor:
        index = position.clamp(min=0)[:, None].expand(keys.shape[:3])
        return self.table[layer].gather(2, index)


class Recording(LifespanCache):
    """Keeps what was decided."""

    def times_to_live(self, layer: int, keys: Tensor, position: Tensor) -> Tensor | int:
        ttl = super().times_to_live(layer, keys, position)
        self.decided = getattr(self, "decided", {})
        self.decided.setdefault(layer, []).append(ttl)
        return ttl


def recent(window: int, sinks: int = 0) -> HybridPolicy:
    return HybridPolicy((LayerRule("all", "window", window),), sinks=sinks)


def kv_heads(model: PreTrainedModel) -> int:
    return Fingerprint.of(model).kv_heads


def sliding(model: PreTrainedModel) -> int | None:
    return getattr(model.config, "sliding_window", None) if model.config.model_type == "mistral" else None


def random_ttl(model: PreTrainedModel, batch: int, tokens: int, seed: int) -> Tensor:
    """Short and long lives, and some for good."""
    generator = torch.Generator().manual_seed(seed)
    shape = (model.config.num_hidden_layers, batch, kv_heads(model), tokens)
    ttl = torch.randint(0, tokens, shape, generator=generator)
    ttl[torch.rand(shape, generator=generator) < 0.4] = 0
    ttl[torch.rand(shape, generator=generator) < 0.1] = FOREVER
    return ttl


def padding(batch: int, tokens: int, side: str, seed: int) -> Tensor:
    """bool `[batch, tokens]`, False at up to half a row's tokens on one side; the first row has none."""
    real = torch.ones(batch, tokens, dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    for row in range(1, batch):
        count = int(torch.randint(0, tokens // 2, (1,), generator=generator))
        if side == "left":
            real[row, :count] = False
        else:
            real[row, tokens - count :] = False
    return real


@torch.inference_mode()
def fed(model: PreTrainedModel, cache: LifespanCache, ids: Tensor, real: Tensor, cuts: Sequence[int]) -> Tensor:
    """Logits when the sequence is given in several calls."""
    edges = [0, *sorted(set(cuts)), ids.shape[1]]
    parts = []
    with cache:
        for start, stop in itertools.pairwise(edges):
            here = slice(start, stop)
            call = {"attention_mask": real[:, :stop].long(), "position_ids": positions(real)[:, here]}
            parts.append(model(ids[:, here], past_key_values=cache, use_cache=True, **call).logits)
    return torch.cat(parts, dim=1)


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
    cuts=st.lists(st.integers(1, 17), max_size=3),
)
def test_logits_are_those_of_a_masked_full_cache(
    family: str, seed: int, tokens: int, batch: int, side: str, window: int, sinks: int, chunk: int, cuts: list[int]
) -> None:
    model = MODELS[family]
    ids = token_ids(batch * tokens, seed).view(batch, tokens)
    real, ttl = padding(batch, tokens, side, seed), random_ttl(model, batch, tokens, seed)
    cache = Injected(model, None, recent(window, sinks), chunk=chunk)
    cache.table = ttl
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


@pytest.mark.parametrize("multiple", [float("inf"), 1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_with_real_gates_the_logits_follow_from_the_recorded_decisions(family: str, multiple: float) -> None:
    model = MODELS[family]
    torch.manual_seed(1)
    gates = GateBank(Fingerprint.of(model))
    policy = HybridPolicy((LayerRule("all", "gated", 3),), sinks=1, price=0.0, multiple=multiple)
    ids, real = token_ids(24, 8)[None], torch.ones(1, 24, dtype=torch.bool)
    cache = Recording(model, gates, policy, chunk=4)
    got = fed(model, cache, ids, real, [5, 6, 17])
    decided = [torch.cat(cache.decided[layer], dim=2) for layer in range(model.config.num_hidden_layers)]
    assert 0.05 < torch.stack(decided).bool().float().mean() < 0.95  # some stay, some go
    masks = [visibility(ttl, 3, 1, real, sliding(model)) for ttl in decided]
    torch.testing.assert_close(got, masked_logits(model, ids, masks, real), atol=1e-4, rtol=0)


# -- what it holds ----------------------------------------------------------------------------------------------------


def test_what_is_stored_is_what_the_next_query_sees() -> None:
    model, tokens = MODELS["llama"], 20
    ids, real = token_ids(2 * tokens, 1).view(2, tokens), padding(2, tokens, "left", 4)
    ttl = random_ttl(model, 2, tokens, 6)
    cache = Injected(model, None, recent(3, 2), chunk=4)
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
        assert storage.storage_bytes == live * (2 * width * 4 + 2 * 4) + seen.numel() * 8 + 2 * 8
    assert cache.live_keys.shape == (2, 2, 2)
    assert cache.peak_bytes > cache.storage_bytes == sum(layer.storage_bytes for layer in cache.storage)


def test_memory_follows_the_policy_and_not_the_prompt() -> None:
    model, peaks = MODELS["llama"], []
    for tokens in (100, 200):
        cache = LifespanCache(model, None, recent(8, 2), chunk=16)
        fed(model, cache, token_ids(tokens)[None], torch.ones(1, tokens, dtype=torch.bool), [])
        peaks.append(cache.peak_bytes)
    assert peaks[0] == peaks[1]


def test_the_footprint_counts_the_keys_that_counted_queries_see() -> None:
    model, tokens, count_from = MODELS["qwen2"], 16, 6
    ids, real, ttl = (
        token_ids(tokens)[None],
        torch.ones(1, tokens, dtype=torch.bool),
        random_ttl(MODELS["qwen2"], 1, tokens, 9),
    )
    cache = Injected(model, None, recent(2, 1), chunk=5, count_from=count_from)
    cache.table = ttl
    fed(model, cache, ids, real, [])
    full = sum(query + 1 for query in range(count_from, tokens))
    seen = torch.stack([visibility(layer, 2, 1, real)[0, :, count_from:].sum(dim=(1, 2)) for layer in ttl])
    torch.testing.assert_close(cache.footprint_by_head, seen.double() / full)
    assert cache.footprint == pytest.approx(float(seen.double().mean() / full))


def test_a_full_policy_keeps_everything() -> None:
    model = MODELS["gpt2"]
    cache = LifespanCache(model, None, HybridPolicy((LayerRule("all", "full"),)))
    fed(model, cache, token_ids(30)[None], torch.ones(1, 30, dtype=torch.bool), [11])
    assert cache.footprint == 1.0 and cache.live_keys.unique().tolist() == [30]


# -- attach and detach ------------------------------------------------------------------------------------------------


def state(model: PreTrainedModel) -> list[object]:
    modules = list(model.modules())
    hooks = [len(module._forward_hooks) for module in modules]
    return [model.config._attn_implementation, hooks, [sorted(module.__dict__) for module in modules]]


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


def test_a_detached_cache_is_refused() -> None:
    model = MODELS["llama"]
    cache = LifespanCache(model, None, recent(4))
    cache.detach()
    with pytest.raises(SmartKVError, match=r"cache\.attach"):
        model(token_ids(4)[None], past_key_values=cache)


def test_other_caches_work_as_before_beside_a_lifespan_cache() -> None:
    model, ids = MODELS["llama"], token_ids(8)[None]
    alone = model(ids, past_key_values=DynamicCache()).logits
    cache = LifespanCache(model, None, recent(1))
    torch.testing.assert_close(model(ids, past_key_values=DynamicCache()).logits, alone, atol=0, rtol=0)
    assert (model(ids, past_key_values=cache).logits - alone).abs().max() > 0.05


def test_a_mask_of_the_users_own_is_refused() -> None:
    model = MODELS["llama"]
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    with LifespanCache(model, None, recent(4)) as cache, pytest.raises(SmartKVError, match="marks padding"):
        model(token_ids(4)[None], past_key_values=cache, attention_mask=mask)


def test_another_batch_is_refused() -> None:
    model = MODELS["llama"]
    with LifespanCache(model, None, recent(4)) as cache, pytest.raises(SmartKVError, match="1 rows"):
        model(token_ids(4)[None], past_key_values=cache)
        model(token_ids(4).view(2, 2), past_key_values=cache)


def test_gates_of_another_architecture_are_refused_by_name() -> None:
    gates = GateBank(Fingerprint.of(MODELS["gpt2"]))
    policy = HybridPolicy((LayerRule("all", "gated", 4),), price=0.0)
    with pytest.raises(SmartKVError, match=r"gpt2.*llama"):
        LifespanCache(MODELS["llama"], gates, policy)


def test_a_policy_with_something_open_is_refused() -> None:
    with pytest.raises(SmartKVError, match="leaves its window open"):
        LifespanCache(MODELS["llama"], None, HybridPolicy((LayerRule("all", "window"),)))


def test_crop_says_that_it_cannot() -> None:
    with pytest.raises(SmartKVError, match="cannot come back"):
        LifespanCache(MODELS["llama"], None, recent(4)).crop(-1)


def test_reset_makes_it_as_new() -> None:
    model, ids, real = MODELS["llama"], token_ids(12)[None], torch.ones(1, 12, dtype=torch.bool)
    cache = LifespanCache(model, None, recent(4))
    first = fed(model, cache, ids, real, [])
    assert cache.get_seq_length() == 12
    cache.reset()
    assert cache.get_seq_length() == cache.storage_bytes == cache.peak_bytes == 0
    assert torch.equal(fed(model, cache, ids, real, []), first)


# -- generate ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation_gives_the_tokens_of_the_masked_model(family: str) -> None:
    model, prompt, count = MODELS[family], token_ids(12, 4)[None], 8
    ttl = random_ttl(model, 1, 12 + count, 5)
    cache = Injected(model, None, recent(3, 1))
    cache.table = ttl
    with cache:
        options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        got = model.generate(prompt, past_key_values=cache, attention_mask=torch.ones_like(prompt), **options)
    ids = prompt
    for _ in range(count):
        real = torch.ones_like(ids, dtype=torch.bool)
        masks = [visibility(layer[..., : ids.shape[1]], 3, 1, real, sliding(model)) for layer in ttl]
        scores = masked_logits(model, ids, masks, real)[:, -1].clone()
        scores[:, model.config.eos_token_id] = float("-inf")  # min_new_tokens
        ids = torch.cat([ids, scores.argmax(dim=-1, keepdim=True)], dim=1)
    assert got.tolist() == ids.tolist()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_padded_batch_generates_what_each_row_generates_alone(family: str) -> None:
    model, ids = MODELS[family], token_ids(24, 2).clamp(min=1).view(2, 12)
    real = torch.ones_like(ids, dtype=torch.bool)
    real[1, :5] = False
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}

    def generate(prompt: Tensor, mask: Tensor) -> list[list[int]]:
        with LifespanCache(model, None, recent(4, 2)) as cache:
            return model.generate(prompt, attention_mask=mask.long(), past_key_values=cache, **options)[:, -6:].tolist()

    alone = [generate(row[own][None], own[own][None])[0] for row, own in zip(ids, real, strict=True)]
    assert generate(ids, real) == alone


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_beam_search_with_everything_kept_is_that_of_the_usual_cache(family: str) -> None:
    model, prompt = MODELS[family], token_ids(10, 7).clamp(min=1)[None]
    options = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    usual = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    with LifespanCache(model, None, HybridPolicy((LayerRule("all", "full"),))) as cache:
        ours = model.generate(prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache, **options)
    assert ours.tolist() == usual.tolist()
