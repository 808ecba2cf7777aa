"""Comparison of stored keys and values with those that a model computes of the same first tokens."""

import torch
from torch import nn

from smartkv.cache.lifespan_cache import LifespanCache
from smartkv.cache.ragged import Ragged
from smartkv.models.key_hooks import key_modules
from smartkv.models.wrappers import input_device
from smartkv.policies.hybrid import HybridPolicy, LayerRule

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
    own_windows = [storage.sliding_window for storage in cache.storage]  # beyond which a first token is hidden
    first = cache.seen_tokens.ids[:, : min(FIRST, *(window - 1 for window in own_windows))]
    rows = (first >= 0).all(dim=1).nonzero().flatten().tolist() if first.numel() else []
    if not rows or cache.bits is not None or not _comparable(cache):
        return None
    row, tokens = rows[0], first.shape[1]
    ids = first[row : row + 1].long().to(input_device(cache.model))
    with LifespanCache(cache.model, None, HybridPolicy((LayerRule("all", "full"),))) as computed:
        cache.model.base_model(input_ids=ids, past_key_values=computed, use_cache=True)
    for number, storage in enumerate(cache.storage):
        store, again_store = storage.store, computed.storage[number].store
        if not isinstance(store, Ragged) or not isinstance(again_store, Ragged):
            raise RuntimeError("settle the cache first")
        tolerance = TOLERANCE.get(storage.dtype, ROUGH)
        for head in range(storage.kv_heads):
            own, layer = store.by_pair()[row * storage.kv_heads + head], again_store.by_pair()[head]
            here = (own.position >= 0) & (own.position < tokens)
            place = own.position[here].long()
            values, keys = (tensor.to(own.key.device)[place].float() for tensor in (layer.value, layer.key))
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
