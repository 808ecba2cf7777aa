"""Each family beyond those of `tests.models`: what its row in docs/families.md promises.

Every promise is checked on a tiny random model against plain loops or against the model's own attention.
"""

from functools import cache as once
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from smartkv.cache.lifespan_cache import LifespanCache
from smartkv.cache.serialization import load_cache, save_cache
from smartkv.labels.lifespans import LabelSpec, label_window
from smartkv.models import observation
from smartkv.models.backbone import freeze
from smartkv.models.key_hooks import read_keys
from smartkv.models.key_site_check import check_key_site
from smartkv.models.rotary import Rotation
from smartkv.policies.hybrid import HybridPolicy, LayerRule
from smartkv.sparsity.masked_attention import sparse_attention, sparse_mask
from tests.families import FORMS, make, sliding_windows
from tests.models import tiny_tokenizer, token_ids
from tests.smartkv.cache.fixtures import GATED, Injected, Recording, fed, padding, random_gates, random_ttl, recent
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
        with patch("smartkv.cache.key_storage.QUERIES", 4):
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
def test_saved_gates_decisions_go_on_bit_for_bit(form: str, tmp_path: Path) -> None:
    model, ids = model_of(form), token_ids(2 * TOKENS, 3).view(2, TOKENS)
    gates, real = random_gates(model), torch.ones(2, TOKENS, dtype=torch.bool)
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
        masks.append(visibility(recorded.decided[layer][0], GATED.rules[0].window or 0, GATED.sinks, real, own))
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
    arch = Rotation(model).lm.config
    stays = torch.rand(2, 2, arch.num_key_value_heads, TOKENS, generator=torch.Generator().manual_seed(5)) < 0.4
    masks = [sparse_mask(stays[layer], 3, real, own) for layer, own in enumerate(sliding_windows(model))]
    with torch.no_grad(), sparse_attention(model, lambda layer: stays[layer], 3, real):
        got = model(ids, position_ids=positions(real), use_cache=False).logits
    torch.testing.assert_close(got[real], masked_logits(model, ids, masks, real)[real], atol=2e-4, rtol=0)
