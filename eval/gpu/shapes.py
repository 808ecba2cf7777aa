"""Models of known shapes with random weights, and caches that are filled without a prompt."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
    StaticCache,
)

from smartkv.cache.lifespan_cache import LifespanCache
from smartkv.cache.ragged import Fields, Ragged
from smartkv.gates.bank import GateBank
from smartkv.models.architecture import Fingerprint
from smartkv.policies.hybrid import HybridPolicy, LayerRule
from smartkv.policies.lifetimes import FOREVER

AGES = (16, 64, 256)  # tokens, those of the gates that come with SmartKV
SPREAD = 0.5  # a head's keys differ from the mean by up to this share of it


@dataclass(frozen=True)
class Shape:
    """The shape of a model.

    Attributes:
        family: qwen2 or llama.
        layers, hidden, heads, kv_heads, head_dim, inner, vocabulary: as in the model's config; `inner` is the width of
            the MLP.
        tied: whether input and output embeddings are one matrix.
    """

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocabulary: int
    tied: bool = True


SHAPES = {
    "SmolLM2-135M": Shape("llama", 30, 576, 9, 3, 64, 1536, 49_152),
    "Qwen2.5-0.5B": Shape("qwen2", 24, 896, 14, 2, 64, 4864, 151_936),
    "Llama-3.1-8B": Shape("llama", 32, 4096, 32, 8, 128, 14_336, 128_256, tied=False),
}
TINY = {
    "tiny Llama": Shape("llama", 2, 32, 4, 2, 8, 48, 64),
    "tiny Qwen2": Shape("qwen2", 2, 32, 4, 2, 8, 48, 64, tied=False),
}


def build(shape: Shape, device: torch.device, dtype: torch.dtype, positions: int) -> PreTrainedModel:
    """Return a model with random weights for so many positions."""
    kind: Any = {"llama": LlamaConfig, "qwen2": Qwen2Config}[shape.family]
    config = kind(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=positions,
        tie_word_embeddings=shape.tied,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.to(device).eval().requires_grad_(False)


def random_gates(model: PreTrainedModel) -> GateBank:
    """Return untrained gates, which cost what trained ones cost."""
    bank = GateBank(Fingerprint.of(model), hidden=128, outputs=len(AGES), details={"ages": list(AGES)})
    return bank.to(model.device).requires_grad_(False)


def ragged_store(
    pairs: int,
    keys: int,
    context: int,
    head_dim: int,
    device: torch.device,
    dtype: torch.dtype,
    judged: bool = False,
) -> Ragged:
    """Return random keys that live for good.

    Args:
        pairs: rows of the batch times KV heads.
        keys: mean keys of a pair. Pairs hold unlike numbers, as under gates.
        context: tokens so far; the keys' positions lie before it.
        head_dim: of a key.
        device, dtype: of keys and values.
        judged: whether they have a worth at each of `AGES`, as under a budget.
    """
    generator = torch.Generator().manual_seed(1)
    share = 1 + SPREAD * (2 * torch.rand(pairs, generator=generator) - 1)
    counts = (keys * share).long().clamp(1, context)
    total = int(counts.sum())
    last = torch.arange(total) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    position = (last * context // counts.repeat_interleave(counts)).int().to(device)
    key, value = (torch.randn(total, head_dim, device=device, dtype=dtype) for _ in range(2))
    worth = torch.randn(total, len(AGES), device=device).cummin(dim=-1).values.half() if judged else None
    return Ragged(Fields(key, value, position, torch.full_like(position, FOREVER), worth), counts.to(device))


def evicting_cache(
    model: PreTrainedModel, gates: GateBank, batch: int, context: int, share: float, budget: bool = False
) -> LifespanCache:
    """Return a cache that holds a share of a text that was never read.

    Args:
        model: the model.
        gates: of the model, which judge the tokens to come.
        batch: rows.
        context: tokens so far.
        share: of them that are stored, mean over heads.
        budget: whether the share is a budget, which the tokens to come must share; else the price is 0 for them.
    """
    keys, config = int(share * context), model.config
    rules = (LayerRule("all", "gated", AGES[0]),)
    if budget:
        cache = LifespanCache(model, gates, HybridPolicy(rules), max_tokens=keys, rollback=0)
    else:
        cache = LifespanCache(model, gates, HybridPolicy(rules, price=0.0), rollback=0)
    by_row = cache.budget.keys_by_row([context] * batch, 0) if cache.budget else [None] * len(cache.storage)
    pairs, seen = batch * config.num_key_value_heads, torch.full((batch,), context, device=model.device)
    for layer, held in zip(cache.storage, by_row, strict=True):
        store = ragged_store(pairs, keys, context, config.head_dim, model.device, model.dtype, budget)
        layer.restore(store, seen, model.dtype)
        layer.columns, layer.limit.budget = context, held
    return cache


def full_cache(model: PreTrainedModel, way: str, batch: int, context: int, room: int) -> Cache:
    """Return transformers' cache of a text that was never read.

    Args:
        model: the model.
        way: static (preallocated) or dynamic (it grows by copying itself).
        batch: rows.
        context: tokens so far.
        room: tokens that a static cache has room for.
    """
    config = model.config
    cache: Cache = DynamicCache() if way == "dynamic" else StaticCache(config=config, max_cache_len=room)
    shape = (batch, config.num_key_value_heads, context, config.head_dim)
    for layer in range(config.num_hidden_layers):
        key, value = (torch.randn(shape, device=model.device, dtype=model.dtype) for _ in range(2))
        cache.update(key, value, layer)
    return cache


def keys_bytes(model: PreTrainedModel, batch: int, context: int) -> int:
    """Return the bytes of a full cache's keys and values."""
    config = model.config
    numbers = 2 * config.num_hidden_layers * batch * config.num_key_value_heads * context * config.head_dim
    return int(numbers * model.dtype.itemsize)


def pairs_of(query: Tensor, pairs: int) -> Tensor:
    """Return queries `[batch, heads, 1, head_dim]` as `[pairs, group, head_dim]`."""
    return query.reshape(pairs, -1, query.shape[-1])
