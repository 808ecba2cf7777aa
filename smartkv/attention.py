"""The attention functions that we register with transformers.

`observe_attention` swaps a model's attention for one that walks over the queries block by block, hands each block's
probabilities to an observer and forgets them. Memory grows with tokens × block, never with tokens².

`attach_eviction` swaps it for one that leaves the work to the cache (`smartkv.cache`), and gives it the pre-RoPE keys.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from smartkv.backbones import KEY_SITES, attention_modules
from smartkv.errors import SmartKVError

OBSERVED, EVICTING = "smartkv_observed", "smartkv_evicting"
BLOCK_ELEMENTS = 2**22  # probabilities held at once, over all heads: 16 MiB in float32
_OBSERVER, _CACHE, _KEYS = "_smartkv_observer", "_smartkv_cache", "_smartkv_keys"


class AttentionObserver(Protocol):
    """What `observe_attention` calls, layer by layer, for one sequence a forward pass."""

    def on_keys(self, layer: int, keys: Tensor) -> None:
        """`keys`: before the rotary embedding, `[kv_heads, tokens, head_dim]`, the model's dtype."""

    def on_rotated_keys(self, layer: int, keys: Tensor) -> None:
        """`keys`: as attention uses them (equal to `on_keys` where the model has no rotary embedding)."""

    def on_block(self, layer: int, first_query: int, probabilities: Tensor) -> None:
        """`probabilities`: float32 `[kv_heads, group, queries, keys]` of queries `first_query …` over the keys up to
        the last of these queries; what causality or a sliding window hides is 0. Valid during the call only."""


def attention_blocks(
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
    block = max(16, min(128, BLOCK_ELEMENTS // (query_heads * tokens)))
    for start in range(0, tokens, block):
        stop = min(start + block, tokens)
        queries = grouped[:, :, start:stop].flatten(1, 2)  # [kv_heads, group · queries, head_dim]
        scores = torch.matmul(queries, key[:, :stop].transpose(1, 2)).float()
        scores = scores.mul_(scaling).unflatten(1, (-1, stop - start))
        index = torch.arange(start, stop, device=key.device)
        # only the last `block` columns can lie in a query's future
        scores[..., start:].masked_fill_(index[None, :] > index[:, None], float("-inf"))
        if sliding_window is not None and stop > sliding_window:
            past = torch.arange(stop, device=key.device)
            scores.masked_fill_(past[None, :] <= index[:, None] - sliding_window, float("-inf"))
        yield start, scores.softmax(dim=-1)


def observed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: `query` `[1, query_heads, tokens, head_dim]` ->
    (output `[1, tokens, query_heads, head_dim]`, None)."""
    observer: AttentionObserver = getattr(module, _OBSERVER)
    layer: int = module.layer_idx  # type: ignore[assignment]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    observer.on_rotated_keys(layer, key[0])
    output = torch.empty_like(query[0])
    for start, probabilities in attention_blocks(query[0], key[0], scaling, sliding_window):
        observer.on_block(layer, start, probabilities)
        queries, keys = probabilities.shape[2:]
        mixed = torch.matmul(probabilities.to(value.dtype).flatten(1, 2), value[0, :, :keys])
        output[:, start : start + queries] = mixed.view(query.shape[1], queries, -1)
    if not torch.isfinite(output).all():  # a NaN probability is above no threshold: it would pass as "never hit"
        raise SmartKVError(f"layer {layer} gave attention that is NaN or infinite: check the model's weights and dtype")
    return output.transpose(0, 1).unsqueeze(0), None


def _no_mask(*_: Any, **__: Any) -> None:
    """Causality is computed in `attention_blocks`; no mask is built."""


AttentionInterface.register(OBSERVED, observed_attention)
AttentionMaskInterface.register(OBSERVED, _no_mask)


@contextmanager
def observe_attention(model: PreTrainedModel, observer: AttentionObserver) -> Iterator[None]:
    """Inside, forward passes of `model` (one unpadded sequence each, no cache) report to `observer`.

    The model is as it was on leaving, also after an exception.
    """
    modules = attention_modules(model)
    implementation = model.config._attn_implementation

    def on_keys(module: nn.Module, keys: Tensor) -> None:
        if keys.shape[0] != 1:
            raise ValueError(f"observe_attention takes one sequence a forward pass, got {keys.shape[0]}")
        observer.on_keys(module.layer_idx, keys[0])  # type: ignore[arg-type]

    try:
        for module in modules:
            setattr(module, _OBSERVER, observer)
        with hook_keys(model, on_keys):
            model.set_attn_implementation(OBSERVED)
            yield
    finally:
        model.set_attn_implementation(implementation)
        for module in modules:
            module.__dict__.pop(_OBSERVER, None)


@dataclass(frozen=True)
class EvictionStep:
    """What one layer's attention gets in a forward pass.

    Attributes:
        query: `[batch, query_heads, tokens, head_dim]`, after the rotary embedding.
        key, value: `[batch, kv_heads, tokens, head_dim]`, of the new tokens.
        pre_rope: the keys before the rotary embedding, shaped like `key`.
        real: bool `[batch, tokens]`, False for padding; None: no padding.
        scaling: factor on the scores.
        sliding_window: of the model itself, in tokens; None: it has none.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    pre_rope: Tensor
    real: Tensor | None
    scaling: float
    sliding_window: int | None


class EvictingCache(Protocol):
    """What `evicting_attention` leaves the work to."""

    def attend(self, layer: int, step: EvictionStep) -> Tensor:
        """Attention of one layer, `[batch, query_heads, tokens, head_dim]`."""


def offer_cache(module: nn.Module, cache: EvictingCache) -> None:
    """Say to a layer's attention module which cache its next attention works on."""
    module.__dict__[_CACHE] = cache


def evicting_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: `query` `[batch, query_heads, tokens, head_dim]` ->
    (output `[batch, tokens, query_heads, head_dim]`, None)."""
    cache: EvictingCache | None = module.__dict__.pop(_CACHE, None)
    if cache is None:
        raise SmartKVError("a LifespanCache is attached to this model: pass past_key_values=cache, with use_cache on")
    if attention_mask is not None and attention_mask.dim() != 2:
        raise SmartKVError(
            f"a LifespanCache takes an attention mask [batch, tokens] that marks padding, got {attention_mask.dim()}-D"
        )
    real = None if attention_mask is None else attention_mask[:, -query.shape[2] :].bool()
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    step = EvictionStep(query, key, value, module.__dict__.pop(_KEYS), real, scaling, sliding_window)
    output = cache.attend(module.layer_idx, step)  # type: ignore[arg-type]
    return output.transpose(1, 2).contiguous(), None


def _padding_mask(*_: Any, attention_mask: Tensor | None = None, **__: Any) -> Tensor | None:
    """The cache knows what is visible; all it needs is where padding is."""
    return attention_mask


AttentionInterface.register(EVICTING, evicting_attention)
AttentionMaskInterface.register(EVICTING, _padding_mask)


@contextmanager
def hook_keys(model: PreTrainedModel, on_keys: Callable[[nn.Module, Tensor], None]) -> Iterator[None]:
    """Inside, each layer's attention module hands its keys before the rotary embedding,
    `[batch, kv_heads, tokens, head_dim]`, to `on_keys(module, keys)`."""
    site = KEY_SITES[model.config.model_type]
    hooks = []
    try:
        for module in attention_modules(model):

            def on_output(_: nn.Module, __: Any, output: Tensor, module: nn.Module = module) -> None:
                on_keys(module, site.read(output, module))

            hooks.append(module.get_submodule(site.module).register_forward_hook(on_output))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def read_keys(model: PreTrainedModel, tokens: Tensor) -> list[Tensor]:
    """The keys before the rotary embedding of one window (ids `[tokens]`) under a full cache: of each layer
    `[1, kv_heads, tokens, head_dim]`, the model's dtype."""
    found: list[Tensor] = []
    with hook_keys(model, lambda _, keys: found.append(keys)):
        model.base_model(input_ids=tokens.long().to(model.device)[None], use_cache=False)
    return found


@contextmanager
def attach_eviction(model: PreTrainedModel) -> Iterator[None]:
    """Inside, `model` attends by way of the cache that `offer_cache` names, layer by layer.

    The model is as it was on leaving, also after an exception.
    """
    implementation = model.config._attn_implementation
    try:
        with hook_keys(model, lambda module, keys: module.__dict__.update({_KEYS: keys})):
            model.set_attn_implementation(EVICTING)
            yield
    finally:
        model.set_attn_implementation(implementation)
        for module in attention_modules(model):
            module.__dict__.pop(_KEYS, None)
            module.__dict__.pop(_CACHE, None)
