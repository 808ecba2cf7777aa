"""Each family beyond those of `tests.models`: what its row in docs/families.md promises.

Every promise is checked on a tiny random model against plain loops or against the model's own attention.
"""

from functools import cache as once
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from smartkv.cache.adaptive_cache import AdaptiveCache
from smartkv.cache.lifespan_cache import LifespanCache
from smartkv.cache.quantized_cache import QuantizedCache
from smartkv.cache.serialization import load_cache, save_cache
from smartkv.errors import SmartKVError
from smartkv.gates.bank import GateBank
from smartkv.labels.lifespans import LabelSpec, label_window
from smartkv.models import observation
from smartkv.models.architecture import Architecture, Fingerprint
from smartkv.models.backbone import freeze
from smartkv.models.key_hooks import read_keys
from smartkv.models.key_site_check import check_key_site
from smartkv.policies.budgets import Calibration
from smartkv.policies.hybrid import HybridPolicy, LayerRule
from smartkv.policies.lifetimes import FOREVER
from smartkv.sparsity.masked_attention import sparse_attention, sparse_mask
from tests.families import FORMS, make, sliding_windows, table
from tests.imports import ROOT
from tests.models import tiny_tokenizer, token_ids
from tests.smartkv.cache.fixtures import GATED, Injected, Recording, fed, padding, random_ttl, recent
from tests.smartkv.cache.masked_reference import masked_logits, positions, visibility
from tests.smartkv.labels.test_lifespans import naive_lifespan, same

model_of = once(make)
by_form = pytest.mark.parametrize("form", FORMS)
TOKENS = 19


@by_form
def test_the_key_is_what_the_familys_own_embedding_rotates(form: str) -> None:
    model = model_of(form)
    assert check_key_site(freeze(model, tiny_tokenizer(), form))["difference_after_rotation"] < 1e-5


@by_form
def test_logits_are_those_of_a_masked_full_cache(form: str) -> None:
    """Lives of any length, padding on either side, chunks, several calls."""
    model = model_of(form)
    for seed, side in enumerate(("left", "right")):
        ids, real = token_ids(3 * TOKENS, seed).view(3, TOKENS), padding(3, TOKENS, side, seed)
        ttl, cache = random_ttl(model, 3, TOKENS, seed), Injected(model, None, recent(3, 2), chunk=5)
        cache.table = ttl
        with patch("smartkv.cache.ragged_chunk_attention.QUERIES", 4):
            got = fed(model, cache, ids, real, [8, 9, 10])
        masks = [visibility(*layer, real, own) for layer, own in rules(ttl, model)]
        want = masked_logits(model, ids, masks, real)
        torch.testing.assert_close(got[real], want[real], atol=2e-4, rtol=0)
        everything = [
            visibility(torch.full_like(t, TOKENS), TOKENS, 2, real, own) for (t, *_), own in rules(ttl, model)
        ]
        assert (want - masked_logits(model, ids, everything, real))[real].abs().max() > 1e-2  # or nothing was tested


def rules(ttl: Tensor, model: PreTrainedModel) -> list[tuple[tuple[Tensor, int, int], int | None]]:
    return [((layer, 3, 2), own) for layer, own in zip(ttl, sliding_windows(model), strict=True)]


@by_form
def test_with_nothing_evicted_it_is_the_models_own_cache(form: str) -> None:
    """The model's own attention, mask and cache: none of them is ours."""
    model, ids, real = model_of(form), token_ids(3 * TOKENS, 7).view(3, TOKENS), padding(3, TOKENS, "left", 7)
    own, parts = DynamicCache(config=model.config), []
    with torch.inference_mode():
        for here in (slice(0, 12), slice(12, 13), slice(13, TOKENS)):
            call = {"attention_mask": real[:, : here.stop].long(), "position_ids": positions(real)[:, here]}
            parts.append(model(ids[:, here], past_key_values=own, use_cache=True, **call).logits)
    full = LifespanCache(model, None, HybridPolicy((LayerRule("all", "full"),)), chunk=5)
    got = fed(model, full, ids, real, [12, 13])
    torch.testing.assert_close(got[real], torch.cat(parts, dim=1)[real], atol=2e-4, rtol=0)
    assert full.footprint == 1.0


@by_form
def test_it_generates_what_the_models_own_cache_generates(form: str) -> None:
    model, ids, mask = model_of(form), token_ids(24, 8).view(2, 12), padding(2, 12, "left", 8).long()
    call = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    everything = HybridPolicy((LayerRule("all", "full"),))
    with LifespanCache(model, None, everything, chunk=5) as cache:
        got = model.generate(ids, past_key_values=cache, **call)
    assert torch.equal(got, model.generate(ids, **call))


@by_form
def test_quantised_caches_that_encode_nothing_yet_are_the_models_own_cache(form: str) -> None:
    model, ids = model_of(form), token_ids(2 * TOKENS, 9).view(2, TOKENS)
    caches = [DynamicCache(config=model.config), QuantizedCache(model, "int8", residual=64)]
    caches.append(AdaptiveCache(model, None, residual=64))
    with torch.inference_mode():
        own, *others = (
            torch.cat([model(part, past_key_values=each).logits for part in ids.split([11, 1, 7], dim=1)], dim=1)
            for each in caches
        )
    for logits in others:
        torch.testing.assert_close(logits, own, atol=2e-4, rtol=0)


@by_form
def test_saved_gates_decisions_go_on_bit_for_bit(form: str, tmp_path: Path) -> None:
    model, ids = model_of(form), token_ids(2 * TOKENS, 3).view(2, TOKENS)
    torch.manual_seed(1)
    gates = GateBank(Fingerprint.of(model), Architecture.of(model.config).gated_layers)
    real = torch.ones(2, TOKENS, dtype=torch.bool)
    straight, first = (LifespanCache(model, gates, GATED, chunk=6) for _ in range(2))
    with torch.inference_mode():
        want = torch.cat([model(part, past_key_values=straight).logits for part in ids.split([11, 8], dim=1)], dim=1)
        model(ids[:, :11], past_key_values=first)
        save_cache(first, tmp_path / "prompt.safetensors")
        got = model(ids[:, 11:], past_key_values=load_cache(tmp_path / "prompt.safetensors", model, gates)).logits
    assert torch.equal(got, want[:, 11:])
    recorded = Recording(model, gates, GATED, chunk=TOKENS)
    fed(model, recorded, ids, real, [])
    masks = []
    for layer, own in enumerate(sliding_windows(model)):
        ttl = recorded.decided[layer][0]
        if layer not in gates.layers:
            assert ttl == FOREVER and own  # no gate: all that the layer's own window lets it see
            ttl = torch.full((2, Fingerprint.of(model).kv_heads, TOKENS), FOREVER)
        masks.append(visibility(ttl, GATED.rules[0].window or 0, GATED.sinks, real, own))
    torch.testing.assert_close(want, masked_logits(model, ids, masks, real), atol=2e-4, rtol=0)


@by_form
def test_labels_are_those_of_a_plain_loop_over_the_models_own_attention(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observation, "TILE_ELEMENTS", 1)  # tiles of 16 queries
    model, ids = model_of(form), token_ids(TOKENS, 4)
    before = model.config._attn_implementation
    labels = label_window(model, ids, LabelSpec((0.15,)), post_rope=True)
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        attentions = model(ids[None], use_cache=False, output_attentions=True).attentions
    model.set_attn_implementation(before)
    heads = labels.keys.shape[1]
    for layer, attention in enumerate(attentions):
        same(labels.lifespan[:, layer], naive_lifespan(attention[0].unflatten(0, (heads, -1)), (0.15,)))
    keys = torch.cat(read_keys(model, ids))
    torch.testing.assert_close(labels.keys, keys.half(), atol=1e-3, rtol=1e-2)  # rounding of two kernels


@by_form
def test_attention_without_dropped_keys_is_that_under_a_mask(form: str) -> None:
    """What eviction tuning trains under."""
    model, ids, real = model_of(form), token_ids(2 * TOKENS, 5).view(2, TOKENS), padding(2, TOKENS, "right", 5)
    stays = torch.rand(2, 2, Fingerprint.of(model).kv_heads, TOKENS, generator=torch.Generator().manual_seed(5)) < 0.4
    masks = [sparse_mask(stays[layer], 3, real, own) for layer, own in enumerate(sliding_windows(model))]
    with torch.no_grad(), sparse_attention(model, lambda layer: stays[layer], 3, real):
        got = model(ids, position_ids=positions(real), use_cache=False).logits
    torch.testing.assert_close(got[real], masked_logits(model, ids, masks, real)[real], atol=2e-4, rtol=0)


def test_the_table_of_the_docs_is_what_the_models_say() -> None:
    if not hasattr(transformers, "MinistralConfig") or transformers.__version__.startswith("5.2."):
        pytest.skip("this transformers lacks a family")
    said = (ROOT / "docs" / "families.md").read_text()
    assert table() in said, "print it by python -m tests.families"


# -- a model in which some layers slide and others see everything ------------------------------------------------------


@torch.inference_mode()
def test_the_footprint_counts_what_a_full_cache_of_that_model_would_hold() -> None:
    """Gemma 3: layer 0 slides over 6 tokens, layer 1 is gated, and its gates keep nothing past 3 tokens."""
    model, policy = model_of("gemma3_text, sliding"), HybridPolicy((LayerRule("all", "gated", 3),), sinks=0, price=99.0)
    architecture = Architecture.of(model.config)
    assert architecture.sliding_windows == (6, None) and architecture.gated_layers == [1]
    assert architecture.gates == 2 and architecture.keys_of_full_cache(TOKENS) == 2 * (6 + TOKENS)
    gates = GateBank(Fingerprint.of(model), [1])
    with LifespanCache(model, gates, policy) as cache:
        model(token_ids(TOKENS)[None], past_key_values=cache)

    def keys(queries: int, *windows: int) -> int:
        return sum(min(query + 1, window) for query in range(queries) for window in windows)

    assert cache.footprint == pytest.approx(keys(TOKENS, 6, 3) / keys(TOKENS, 6, TOKENS))
    calibrated = Calibration.measure(model, gates, [token_ids(TOKENS)])  # the last query predicts none of its tokens
    assert calibrated.footprint(policy) == pytest.approx(keys(TOKENS - 1, 6, 3) / keys(TOKENS - 1, 6, TOKENS))


def test_a_policy_for_all_layers_asks_no_gates_of_those_that_slide() -> None:
    model = model_of("gemma3_text, sliding")
    architecture, both = Architecture.of(model.config), HybridPolicy((LayerRule("all", "gated", 3),), price=0.0)
    rules = both.check(architecture, GateBank(Fingerprint.of(model), [1]))
    assert [rule.rule for rule in rules] == ["full", "gated"]
    window = HybridPolicy((LayerRule("all", "window", 3),))  # windows shorter than its own are the user's to choose
    assert [rule.rule for rule in window.check(architecture, None)] == ["window", "window"]


def test_router_logits_which_a_prompt_in_chunks_would_lose_are_refused() -> None:
    model = model_of("mixtral")
    with LifespanCache(model, None, recent(4)) as cache, pytest.raises(SmartKVError, match="output_router_logits=True"):
        model(token_ids(8)[None], past_key_values=cache, output_router_logits=True)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_model_that_reads_positions_out_of_the_mask_finds_them(side: str) -> None:
    """OPT, whose position of a token is the number of real ones before it, unless it is given."""
    model, ids, real = model_of("opt"), token_ids(3 * TOKENS, 7).view(3, TOKENS), padding(3, TOKENS, side, 7)
    full, own = LifespanCache(model, None, HybridPolicy((LayerRule("all", "full"),)), chunk=5), DynamicCache()
    with full, torch.inference_mode():
        for here in (slice(0, 12), slice(12, 13), slice(13, TOKENS)):
            mask = real[:, : here.stop].long()
            got, want = (
                model(ids[:, here], attention_mask=mask, past_key_values=each).logits[real[:, here]]
                for each in (full, own)
            )
            torch.testing.assert_close(got, want, atol=2e-4, rtol=0)
