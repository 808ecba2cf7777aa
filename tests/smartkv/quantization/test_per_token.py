"""Packed rows, and an evicting cache that stores its keys in them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface

from smartkv.cache.lifespan_cache import LifespanCache
from smartkv.cache.serialization import load_cache, save_cache
from smartkv.errors import SmartKVError
from smartkv.models.attention_interface import default_scaling
from smartkv.policies.hybrid import HybridPolicy, LayerRule
from smartkv.quantization.affine import dequantize, quantize
from smartkv.quantization.codecs import Kivi
from smartkv.quantization.per_token import PackedRows, key_and_value
from tests.families import OWN_SOFTMAX, make
from tests.models import FAMILIES, llama, token_ids
from tests.smartkv.cache import masked_reference
from tests.smartkv.cache.fixtures import GATED, Injected, fed, padding, random_gates, random_ttl, recent, sliding
from tests.smartkv.cache.masked_reference import masked_logits, visibility

MODELS = {name: build(**({"head_dim": 16} if name == "qwen3" else {})) for name, build in FAMILIES.items()}
FULL = HybridPolicy((LayerRule("all", "full"),))
TOKENS = 60


def ids_of(tokens: int = TOKENS, rows: int = 1) -> Tensor:
    return token_ids(rows * tokens).clamp(min=1).view(rows, tokens)


def test_rows_come_out_as_they_went_in_but_for_a_code_s_step() -> None:
    rows, random = PackedRows(8), torch.Generator().manual_seed(0)
    key = torch.randn(2, 50, 64, generator=random) + 5 * torch.randn(2, 1, 64, generator=random)
    query = torch.randn(2, 3, 64, generator=random)
    turned, packed, _ = rows.encode(query, key, key)
    assert packed.dtype == torch.uint8 and packed.shape == (2, 50, 64 + 4)
    want = (query @ key.mT).softmax(dim=-1)
    read, values = rows.decode(packed, rows.pack_values(key), torch.float32)
    found = (turned @ read.mT).softmax(dim=-1)  # the centre changes no softmax
    assert torch.allclose(found, want, atol=0.05)
    assert (rows.rotate_back(values) - key).norm() < 0.01 * key.norm()


def test_centred_and_turned_rows_err_little_more_than_kivi_and_half_of_what_plain_ones_do() -> None:
    random = torch.Generator().manual_seed(0)
    key = torch.randn(2, 256, 64, generator=random)
    key[..., ::16] = 10 * torch.randn(4, generator=random) + 2 * key[..., ::16]  # outlier channels, as real keys have

    def error(found: Tensor) -> float:
        return float((found - key).norm() / key.norm())

    rows = PackedRows(4)
    _, packed, values = rows.encode(key, key, key)
    own = error(rows.rotate_back(rows.decode(packed, values, torch.float32)[0]) + rows.centre[:, None])
    kivi = Kivi(4, 4)
    by_channel = error(kivi.decode(kivi.encode(key[None], key[None], None), torch.float32)[0][0])
    without = error(dequantize(quantize(key, 4, 64), 4, torch.float32))
    assert own < 1.8 * by_channel and own < 0.55 * without


@pytest.mark.parametrize("family", [*FAMILIES, *OWN_SOFTMAX])
@pytest.mark.parametrize("bits", [2, 4, (5, 3)])
def test_logits_are_those_of_the_masked_model_whose_keys_and_values_went_through_the_codes(
    family: str, bits: Any
) -> None:
    model = MODELS[family] if family in MODELS else make(family, head_dim=16)
    ids = ids_of(TOKENS, 2)
    ttl = random_ttl(model, 2, TOKENS, 3)
    cache = Injected(model, None, recent(3, 1), bits=bits)
    cache.table = ttl
    with cache, torch.inference_mode():
        found = model(ids[:, :40], past_key_values=cache).logits
        steps = [model(ids[:, place, None], past_key_values=cache).logits for place in range(40, TOKENS)]
    found = torch.cat([found, *steps], dim=1)
    plain = masked_reference.masked_attention

    def through_codes(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        rows, pairs = cache.storage[module.layer_idx].packed, key.shape[0] * key.shape[1]
        packed = rows.pack_keys(key.flatten(0, 1)), rows.pack_values(value.flatten(0, 1))
        keys, values = (rows.rotate_back(tensor) for tensor in rows.decode(*packed, key.dtype))
        keys, values = keys + rows.centre[:, None], values.view_as(value)
        assert len(keys) == pairs
        kwargs.setdefault("scaling", default_scaling(module, query.shape[-1]))
        return plain(module, query, keys.view_as(key), values, mask, **kwargs)

    AttentionInterface.register(masked_reference.NAME, through_codes)
    try:
        real = torch.ones(2, TOKENS, dtype=torch.bool)
        masks = [visibility(ttl[layer], 3, 1, real, sliding(model)) for layer in range(len(ttl))]
        want = masked_logits(model, ids, masks, real)
    finally:
        AttentionInterface.register(masked_reference.NAME, plain)
    gap = (found - want).abs()
    # a number half way between two codes may fall to either, and be seen by all later queries
    assert (gap < 1e-5).float().mean() > 0.75 and gap.max() < 0.1


@pytest.mark.parametrize("side", ["left", "right"])
def test_neither_padding_nor_where_a_prompt_is_cut_changes_a_logit(side: str) -> None:
    model, ids = MODELS["llama"], ids_of(TOKENS, 3)
    real = padding(3, TOKENS, side, 1)
    ttl = random_ttl(model, 3, TOKENS, 5)
    found = []
    for cuts in ([45], [45, 46, 47, 52]):
        cache = Injected(model, None, recent(3, 1), bits=8)
        cache.table = ttl
        found.append(fed(model, cache, ids, real, cuts)[real])
    gap = (found[0] - found[1]).abs()
    assert (gap < 1e-5).float().mean() > 0.75 and gap.max() < 0.1  # a number may fall to either of two codes


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "mistral_sliding"])
def test_generate_takes_it_greedily_and_by_beams(family: str) -> None:
    model, ids = MODELS[family], ids_of()
    call = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    with torch.inference_mode():
        cache = LifespanCache(model, random_gates(model), GATED, bits=4)
        assert model.generate(ids, past_key_values=cache, **call).shape == (1, TOKENS + 20)
        assert cache.footprint < 0.9
        beams = LifespanCache(model, random_gates(model), GATED, bits=4)
        assert model.generate(ids, past_key_values=beams, num_beams=3, **call).shape == (1, TOKENS + 20)


@pytest.mark.parametrize("bits", [3, 4, 8, (6, 4)])
def test_bytes_are_those_of_rows_and_of_what_finds_them(bits: Any) -> None:
    model = llama(head_dim=64, num_hidden_layers=1, max_position_embeddings=1024)
    with torch.inference_mode(), LifespanCache(model, None, FULL, bits=bits) as cache:
        model(ids_of(1000), past_key_values=cache)
        keys = 2 * 1000
        assert cache.live_bytes == keys * (64 * sum(key_and_value(bits)) // 8 + 8)
        small = 2 * 64 * 4 + 2 * 8 * 2 + 3 * 8  # centre, counts, seen
        assert cache.storage_bytes == pytest.approx(cache.live_bytes + keys * 8, abs=2 * small)
        assert cache.peak_bytes >= cache.storage_bytes + 2 * keys * 64 * 4  # what is read is unpacked for it


def test_a_saved_cache_goes_on_bit_for_bit(tmp_path: Path) -> None:
    model, ids = MODELS["qwen2"], ids_of(90)
    gates = random_gates(model)
    with torch.inference_mode(), LifespanCache(model, gates, GATED, bits=(6, 4)) as cache:
        model(ids[:, :70], past_key_values=cache)
        save_cache(cache, tmp_path / "prompt.safetensors")
        with load_cache(tmp_path / "prompt.safetensors", model, gates) as again:
            assert list(again.bits) == [6, 4] and again.live_bytes == cache.live_bytes
            found = model(ids[:, 70:], past_key_values=again).logits
        assert torch.equal(found, model(ids[:, 70:], past_key_values=cache).logits)


def test_a_short_prompt_and_single_tokens_from_the_first_on_work() -> None:
    model, ids = MODELS["llama"], ids_of(30)
    with torch.inference_mode():
        want = model(ids).logits
        for sizes in (1, 10):
            with LifespanCache(model, None, FULL, bits=8) as cache:
                parts = [model(part, past_key_values=cache).logits for part in ids.split(sizes, dim=1)]
            assert torch.allclose(torch.cat(parts, dim=1), want, atol=0.2)


def test_other_bits_are_refused() -> None:
    with pytest.raises(SmartKVError, match="bits must be one of"):
        LifespanCache(MODELS["llama"], None, FULL, bits=9)
