"""Caches that keep every key in few bits."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from smartkv.cache.adaptive_cache import AdaptiveCache
from smartkv.cache.lifespan_cache import LifespanCache
from smartkv.cache.quantized_cache import QuantizedCache
from smartkv.cache.ragged import storage_bytes
from smartkv.errors import SmartKVError
from smartkv.quantization.codecs import Codec, Half, Kivi, Uniform
from tests.models import FAMILIES, llama, token_ids
from tests.smartkv.cache.fixtures import random_gates, recent
from tests.smartkv.cache.quantized_fixtures import ADAPTIVE, MODELS, TOKENS, fed

CODECS: dict[str, tuple[Codec, int]] = {
    "half": (Half(), 0),
    "int8": (Uniform(8), 0),
    "int4": (Uniform(4), 0),
    "kivi": (Kivi(2, 4, group=4), 8),
    "kivi4": (Kivi(4, 4, group=8), 16),
}


class Naive(DynamicLayer):
    """Remembers everything exactly, and works out anew for each token what a query reads."""

    codec: Codec
    residual: int

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        before = self.get_seq_length()
        key, value = super().update(key_states, value_states)
        exact_from = before - self.residual if self.residual else before + 1
        block = self.codec.block
        read_key, read_value = key.clone(), value.clone()
        for start in range(0, max(0, exact_from) // block * block, block):
            here = slice(start, start + block)
            parts = self.codec.encode(key[:, :, here], value[:, :, here], None)
            read_key[:, :, here], read_value[:, :, here] = self.codec.decode(parts, key.dtype)
        return read_key, read_value


def naive(model: PreTrainedModel, codec: Codec, residual: int) -> Cache:
    cache = DynamicCache()
    cache.layer_class_to_replicate = None
    for _ in range(model.config.num_hidden_layers):
        layer = Naive()
        layer.codec, layer.residual = codec, residual
        cache.layers.append(layer)
    return cache


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CODECS)
def test_logits_are_those_of_a_cache_that_works_everything_out_anew(family: str, name: str) -> None:
    model, ids = MODELS[family], token_ids(2 * TOKENS).view(2, -1)
    codec, residual = CODECS[name]
    cache = QuantizedCache(model, codec, residual)
    found = fed(model, ids, cache)
    assert torch.allclose(found, fed(model, ids, naive(model, codec, residual)), atol=1e-5)
    assert cache.get_seq_length() == TOKENS
    if name != "half" and not (residual and family == "mistral_sliding"):  # whose queries see exact keys alone
        assert not torch.allclose(found, model(ids).logits, atol=1e-5)


def test_the_scheme_adaptive_is_its_codec_for_tokens_of_equal_importance() -> None:
    model, ids = MODELS["llama"], token_ids(TOKENS)[None]
    assert torch.allclose(
        fed(model, ids, QuantizedCache(model, ADAPTIVE)), fed(model, ids, naive(model, ADAPTIVE, 8)), atol=1e-5
    )
    wide = llama(head_dim=64, num_hidden_layers=1)
    cache = QuantizedCache(wide, "adaptive")
    fed(wide, token_ids(128)[None], cache, 128)
    fed(wide, token_ids(1)[None], cache)
    assert cache.storage[0].encoded == 64 and cache.storage[0].importance is None


@pytest.mark.parametrize("name", CODECS)
def test_blocks_of_tokens_give_the_logits_of_single_ones(name: str) -> None:
    model, ids = MODELS["llama"], token_ids(TOKENS)[None]
    codec, residual = CODECS[name]
    single = fed(model, ids, QuantizedCache(model, codec, residual))
    together = fed(model, ids, QuantizedCache(model, codec, residual), sizes=4)
    assert torch.allclose(single, together, atol=1e-5)


def test_what_was_encoded_is_never_touched_again() -> None:
    model, ids = MODELS["llama"], token_ids(200)[None]
    cache = QuantizedCache(model, Kivi(2, 2, group=8), 8)
    fed(model, ids[:, :60], cache, 4)
    first = {name: tensor.clone() for name, tensor in cache.storage[1].parts.items()}
    key = cache.storage[1].read()[0][:, :, :40].clone()
    fed(model, ids[:, 60:], cache, 4)
    for name, tensor in first.items():
        assert torch.equal(cache.storage[1].parts[name][:, :, : tensor.shape[2]], tensor)
    assert torch.equal(cache.storage[1].read()[0][:, :, :40], key)


@pytest.mark.parametrize(
    ("name", "payload", "stored"),
    [
        # a scale and a zero of 2 bytes each for every 32 values of head_dim 64
        ("fp16", 1.0, 1.0),
        ("int8", 0.5, 0.5 + 4 / 64),
        ("int4", 0.25, 0.25 + 4 / 64),
        ("kivi", 0.1875, 0.1875 + 4 / 64),
        ("kivi2", 0.125, 0.125 + 4 / 64),
        ("kivi4", 0.25, 0.25 + 4 / 64),
    ],
)
def test_bytes_are_those_of_codes_scales_and_residual(name: str, payload: float, stored: float) -> None:
    model = llama(head_dim=64, num_hidden_layers=1, max_position_embeddings=1024)
    cache = QuantizedCache(model, name)
    fed(model, token_ids(1024)[None], cache, 128)
    assert cache.ratio_payload == payload
    exact = cache.get_seq_length() - cache.storage[0].encoded
    residual = 0 if name in ("fp16", "int8", "int4") else 256  # the last 128 tokens came with 128 before them
    assert exact == residual
    share = residual / 1024
    assert cache.ratio_stored == pytest.approx(share * 2 + (1 - share) * stored)  # the model computes in float32
    assert cache.storage_bytes == sum(
        storage_bytes([*layer.parts.values(), layer.keys, layer.values]) for layer in cache.storage
    )


def makers() -> dict[str, Callable[[PreTrainedModel], QuantizedCache]]:
    return {
        "int4": lambda model: QuantizedCache(model, "int4"),
        "kivi": lambda model: QuantizedCache(model, Kivi(4, 4, group=4), 8),
        "adaptive": lambda model: AdaptiveCache(model, None, ADAPTIVE),
        "by_gates": lambda model: AdaptiveCache(model, random_gates(model), ADAPTIVE),
    }


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "mistral_sliding"])
@pytest.mark.parametrize("name", makers())
def test_generate_takes_it_greedily_and_by_beams(family: str, name: str) -> None:
    model, ids = MODELS[family], token_ids(30).clamp(min=1)[None]
    call = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    cache = makers()[name](model)
    assert model.generate(ids, past_key_values=cache, **call).shape == (1, 50)
    assert cache.get_seq_length() == 49 and cache.storage[0].encoded >= 30
    beams = model.generate(ids, past_key_values=makers()[name](model), num_beams=3, **call)
    assert beams.shape == (1, 50)


@pytest.mark.parametrize("name", makers())
def test_a_row_with_padding_has_the_logits_of_the_row_alone(name: str) -> None:
    tokens = 24 if name == "int4" else 12  # blocks hold padding too: only exact tokens are alike
    model, ids = MODELS["llama"], token_ids(tokens).clamp(min=1)[None]
    padded = torch.cat([ids.new_zeros(1, 5), ids], dim=1)
    mask = (torch.arange(tokens + 5) >= 5).long()[None]
    both, lines = torch.cat([padded, padded]), torch.cat([mask, torch.ones_like(mask)])
    with torch.inference_mode():
        alone = model(ids, past_key_values=makers()[name](model)).logits
        cache = makers()[name](model)
        position = (lines.cumsum(1) - 1).clamp(min=0)
        found = model(both, attention_mask=lines, position_ids=position, past_key_values=cache).logits
    assert torch.allclose(found[0, 5:], alone[0], atol=1e-5)


@pytest.mark.parametrize(
    ("choose", "rows"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0])), [1, 1, 0]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
        (lambda cache: cache.batch_select_indices(torch.tensor([False, True, True])), [1, 2]),
    ],
)
@pytest.mark.parametrize("make", [lambda model: QuantizedCache(model, Kivi(4, 4, group=4), 8), AdaptiveCache])
def test_rows_that_are_chosen_go_on_as_they_would_have(make: Any, choose: Any, rows: list[int]) -> None:
    model, ids, more = MODELS["llama"], token_ids(60).view(3, 20), token_ids(18, 1).view(3, 6)
    cache, whole = make(model), make(model)
    for each in (cache, whole):
        fed(model, ids, each, 4)
    choose(cache)
    torch.testing.assert_close(fed(model, more[rows], cache), fed(model, more, whole)[rows], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "make",
    [lambda model: QuantizedCache(model, "int8"), AdaptiveCache, lambda model: LifespanCache(model, None, recent(4))],
)
def test_a_cache_without_tokens_has_no_rows_to_choose(make: Any) -> None:
    cache = make(MODELS["llama"])
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0]))
    fed(MODELS["llama"], token_ids(6).view(3, 2), cache, 2)
    assert cache.get_seq_length() == 2


def test_the_latest_exact_tokens_can_be_cropped_and_no_others() -> None:
    model, ids = MODELS["llama"], token_ids(TOKENS)[None]
    for make in (lambda: QuantizedCache(model, Kivi(4, 4, group=4), 8), lambda: AdaptiveCache(model, None, ADAPTIVE)):
        cache = make()
        fed(model, ids, cache, 4)
        cache.crop(TOKENS - 3)
        assert cache.get_seq_length() == TOKENS - 3
        for layer in cache.storage:
            key, value = layer.read()
            assert key.shape == value.shape and key.shape[2] == TOKENS - 3
            assert layer.importance is None or layer.importance.shape[2] == layer.keys.shape[2]
        with pytest.raises(SmartKVError, match="encoded"):
            cache.crop(4)


CROPPED: dict[str, Callable[[Any], Any]] = {
    "int8": lambda model: QuantizedCache(model, "int8"),
    "kivi4": lambda model: QuantizedCache(model, "kivi4"),
    "adaptive": lambda model: AdaptiveCache(model, None, ADAPTIVE),
}


@pytest.mark.parametrize("name", CROPPED)
@pytest.mark.parametrize(("crop", "left"), [(0, 10), (-3, 7), (-10, 0), (-99, 0), (1, 1), (6, 6), (99, 10)])
def test_crop_means_what_it_means_in_transformers(name: str, crop: int, left: int) -> None:
    """0 drops nothing and −n drops the last n tokens, as transformers calls it; n keeps n, as transformers 5.2 did."""
    model, ids = MODELS["llama"], token_ids(14)[None]
    cache, fresh = CROPPED[name](model), CROPPED[name](model)
    with torch.no_grad():
        fed(model, ids[:, :10], cache, 10)
        cache.crop(crop)
        assert cache.get_seq_length() == left
        got = model(ids[:, left : left + 4], past_key_values=cache).logits
        if left:
            fed(model, ids[:, :left], fresh, left)
        want = model(ids[:, left : left + 4], past_key_values=fresh).logits
    if name != "adaptive" or left in (0, 10):  # its bits follow attention, which dropped queries paid too
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_mistakes_are_told() -> None:
    model = MODELS["llama"]
    for call in (
        lambda: QuantizedCache(model, "int5"),
        lambda: QuantizedCache(model, "int8", residual=-1),
        lambda: QuantizedCache(model, Kivi(), residual=0),
        lambda: QuantizedCache(model, "int8").ratio_stored,
    ):
        with pytest.raises(SmartKVError):
            call()


def test_other_rows_and_another_dtype_than_those_in_the_cache_are_refused() -> None:
    layer = QuantizedCache(MODELS["llama"], "int8").storage[0]
    key = torch.zeros(2, 2, 3, 8)
    layer.update(key, key)
    for other in (key[:1], key.bfloat16()):
        with pytest.raises(SmartKVError, match="holds 2 rows in torch"):
            layer.update(other, other)


@pytest.mark.parametrize(("name", "exact"), [("fp16", 0), ("int8", 0), ("int4", 0), ("kivi", 128), ("kivi2", 128)])
def test_a_scheme_keeps_whole_blocks_of_the_latest_tokens_exact(name: str, exact: int) -> None:
    layer = QuantizedCache(MODELS["llama"], name).storage[0]
    assert layer.residual == exact and layer.get_max_length() == -1  # no limit
    assert QuantizedCache(MODELS["llama"], Uniform(8)).storage[0].residual == 0
    assert QuantizedCache(MODELS["llama"], Kivi(group=16)).storage[0].residual == 16


def test_keys_of_more_importance_get_more_bits() -> None:
    layer = AdaptiveCache(MODELS["llama"], None, ADAPTIVE, residual=8).storage[0]
    key = torch.randn(1, 2, 40, MODELS["llama"].config.head_dim, generator=torch.Generator().manual_seed(5))
    layer.update(key, key)
    layer.importance = torch.ones(1, 2, 40)
    layer.importance[:, :, ::4] = 1e3
    layer.update(key[:, :, :1], key[:, :, :1])
    error = (layer.read()[0][:, :, :32] - key[:, :, :32]).norm(dim=-1).mean(dim=(0, 1))
    important = torch.arange(32) % 4 == 0
    assert layer.encoded == 32 and error[important].mean() < 0.5 * error[~important].mean()


def test_a_reset_cache_is_as_new() -> None:
    model, ids = MODELS["llama"], token_ids(TOKENS)[None]
    for make in makers().values():
        cache = make(model)
        first = fed(model, ids, cache, 4)
        cache.reset()
        assert cache.get_seq_length() == 0 and math.isclose(cache.storage_bytes, 0)
        assert torch.allclose(fed(model, ids, cache, 4), first, atol=1e-5)
