"""Comparison of stored keys and values with those that a model computes of the same first tokens."""

from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from smartkv.cache.lifespan_cache import LifespanCache
from smartkv.cache.ragged import Ragged
from smartkv.models.key_hooks import key_modules
from smartkv.models.wrappers import input_device

FIRST = 4  # tokens that are computed; as sinks they stay in most caches
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # relative to a layer's largest figure
ROUGH = 0.05  # in half precision


@torch.inference_mode()
def differing_layer(cache: LifespanCache) -> int | None:
    """Return the first layer whose stored keys or values are not the model's.

    The first tokens of a row are computed again, as far as they are stored. Compared are values, and the lengths of
    keys, which no rotary embedding changes: positions may have been given by hand. A row whose first tokens are padding
    or of unknown ids is not compared; nor are packed keys, quantised models, and those with learned positions.

    Args:
        cache: a settled cache.

    Returns:
        The layer; None: no difference was found.
    """
    first = cache.seen_tokens.ids[:, :FIRST]
    rows = (first >= 0).all(dim=1).nonzero().flatten().tolist() if first.numel() else []
    if not rows or cache.bits is not None or not _comparable(cache):
        return None
    row, tokens = rows[0], first.shape[1]
    computed = DynamicCache(config=cache.model.config)
    ids = first[row : row + 1].long().to(input_device(cache.model))
    cache.model.base_model(input_ids=ids, past_key_values=computed, use_cache=True)
    for number, storage in enumerate(cache.storage):
        layer: Any = computed.layers[number]
        store = storage.store
        if not isinstance(store, Ragged):
            raise RuntimeError("settle the cache first")
        tolerance = TOLERANCE.get(storage.dtype, ROUGH)
        for head in range(storage.kv_heads):
            own = store.by_pair()[row * storage.kv_heads + head]
            here = (own.position >= 0) & (own.position < tokens)
            place = own.position[here].long()
            values, keys = (tensor[0, head].to(own.key.device)[place].float() for tensor in (layer.values, layer.keys))
            lengths = own.key[here].float().norm(dim=-1)
            for stored, again in ((own.value[here].float(), values), (lengths, keys.norm(dim=-1))):
                if stored.numel() and not (stored - again).abs().max() <= tolerance * again.abs().max():
                    return number
    return None


def _comparable(cache: LifespanCache) -> bool:
    """Return whether a model computes the same values of a token in every call: floats, without learned positions."""
    weights = [getattr(module, "weight", None) for module in key_modules(cache.model)]
    plain = all(type(weight) is nn.Parameter and weight.is_floating_point() for weight in weights)
    return plain and hasattr(cache.model.base_model, "rotary_emb")
