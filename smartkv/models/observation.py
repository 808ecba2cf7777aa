"""Attention that is looked at: what harvest and calibration read from a model.

`observe_attention` swaps a model's attention for one that walks over the queries block by block, hands each block's
probabilities to an observer and forgets them. Memory grows with tokens × block, never with tokens².

(The one that leaves the work to a cache is in `smartkv.cache.model_patch`.)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from smartkv.errors import SmartKVError
from smartkv.io.checks import all_finite
from smartkv.models.attention_interface import attention_switched_to, default_scaling, register_attention
from smartkv.models.key_hooks import hook_keys

OBSERVED = "smartkv_observed"
TILE_ELEMENTS = 2**22  # probabilities held at once, over all heads: 16 MiB in float32
_OBSERVER = "_smartkv_observer"


class AttentionObserver(Protocol):
    """What `observe_attention` calls, layer by layer, for one sequence a forward pass."""

    def on_keys(self, layer: int, keys: Tensor) -> None:
        """`keys`: before the rotary embedding, `[kv_heads, tokens, head_dim]`, the model's dtype."""

    def on_rotated_keys(self, layer: int, keys: Tensor) -> None:
        """`keys`: as attention uses them (equal to `on_keys` where the model has no rotary embedding)."""

    def on_tile(self, layer: int, first_query: int, probabilities: Tensor) -> None:
        """`probabilities`: float32 `[kv_heads, group, queries, keys]` of queries `first_query …` over the keys up to
        the last of these queries; what causality or a sliding window hides is 0. Valid during the call only."""


def attention_tiles(
    query: Tensor, key: Tensor, scaling: float, sliding_window: int | None = None
) -> Iterator[tuple[int, Tensor]]:
    """Causal attention probabilities, a block of queries at a time.

    Args:
        query: `[query_heads, tokens, head_dim]`.
        key: `[kv_heads, tokens, head_dim]`.
        scaling: factor on the scores.
        sliding_window: a query sees only the last so many keys, itself included; None: all.

    Yields:
        (first query, float32 probabilities `[kv_heads, group, queries, keys up to the block's last query]`).
    """
    query_heads, tokens, _ = query.shape
    kv_heads = key.shape[0]
    grouped = query.unflatten(0, (kv_heads, query_heads // kv_heads))
    block = max(16, min(128, TILE_ELEMENTS // (query_heads * tokens)))
    future = torch.full((block, block), float("-inf"), device=key.device).triu_(1)
    nothing = key.new_empty(())
    for start in range(0, tokens, block):
        stop = min(start + block, tokens)
        queries = grouped[:, :, start:stop].flatten(1, 2)  # [kv_heads, group · queries, head_dim]
        scores = torch.baddbmm(nothing, queries, key[:, :stop].transpose(1, 2), beta=0, alpha=scaling)  # beta 0: unread
        scores = scores.float().unflatten(1, (-1, stop - start))
        # only the last `block` columns can lie in a query's future
        scores[..., start:].add_(future[: stop - start, : stop - start])
        if sliding_window is not None and stop > sliding_window:
            index = torch.arange(start, stop, device=key.device)
            past = torch.arange(stop, device=key.device)
            scores.masked_fill_(past[None, :] <= index[:, None] - sliding_window, float("-inf"))
        yield start, scores.softmax(dim=-1)


def observed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,  # in this place: kvpress, once imported, gives it by position
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: `query` `[1, query_heads, tokens, head_dim]` ->
    (output `[1, tokens, query_heads, head_dim]`, None)."""
    observer: AttentionObserver = getattr(module, _OBSERVER)
    layer: int = module.layer_idx  # type: ignore[assignment]
    scaling = default_scaling(module, query.shape[-1]) if scaling is None else scaling
    observer.on_rotated_keys(layer, key[0])
    output = torch.empty_like(query[0])
    for start, probabilities in attention_tiles(query[0], key[0], scaling, sliding_window):
        observer.on_tile(layer, start, probabilities)
        queries, keys = probabilities.shape[2:]
        mixed = torch.matmul(probabilities.to(value.dtype).flatten(1, 2), value[0, :, :keys])
        output[:, start : start + queries] = mixed.view(query.shape[1], queries, -1)
    if not all_finite(output):  # a NaN probability is above no threshold: it would pass as "never hit"
        raise SmartKVError(f"layer {layer} gave attention that is NaN or infinite: check the model's weights and dtype")
    return output.transpose(0, 1).unsqueeze(0), None


register_attention(OBSERVED, observed_attention)


@contextmanager
def observe_attention(model: PreTrainedModel, observer: AttentionObserver) -> Iterator[None]:
    """Inside, forward passes of `model` (one unpadded sequence each, no cache) report to `observer`.

    The model is as it was on leaving, also after an exception.
    """

    def on_keys(module: nn.Module, keys: Tensor) -> None:
        if keys.shape[0] != 1:
            raise ValueError(f"observe_attention takes one sequence a forward pass, got {keys.shape[0]}")
        observer.on_keys(module.layer_idx, keys[0])  # type: ignore[arg-type]

    with hook_keys(model, on_keys), attention_switched_to(model, OBSERVED, _OBSERVER, observer):
        yield
