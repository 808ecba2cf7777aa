"""Attention under a soft eviction, through which gates learn from what the model loses.

Query `i` sees key `j` in full while `i − j < window` or where `j` is a sink; afterwards the key's weight before
normalisation, `exp(score)`, is multiplied by `keep_j` in (0, 1]. At `keep` 0 or 1 this is the rule of
`smartkv.policies`, in between it has a gradient. (The relaxation of DMS, Łańcucki et al. 2025, arXiv 2506.05345.)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from smartkv.attention import default_scaling, hook_keys
from smartkv.backbones import attention_modules

SOFT = "smartkv_soft"
BLOCK = 128  # queries at a time: memory grows with tokens × block, never with tokens²
_RULE = "_smartkv_soft_rule"

LogKeep = Callable[[int, Tensor], Tensor]


class _Shape(NamedTuple):
    """Figures of one call: factor on the scores, tokens that see a key in full, sinks, the model's own window."""

    scaling: float
    window: int
    sinks: int
    sliding_window: int | None


class _SoftAttention(torch.autograd.Function):
    """Probabilities are computed again in the backward pass, not kept."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, log_keep: Tensor, shape: _Shape) -> Tensor:
        grouped = query.unflatten(1, (key.shape[1], -1))  # [batch, kv_heads, group, tokens, head_dim]
        output, total = torch.empty_like(grouped), query.new_empty(grouped.shape[:-1], dtype=torch.float32)
        for start in range(0, query.shape[2], BLOCK):
            here = slice(start, start + BLOCK)
            scores = _scores(grouped[:, :, :, here], key, log_keep, start, shape)
            total[..., here] = scores.logsumexp(dim=-1)
            weights = scores.sub_(total[..., here, None]).exp_().to(value.dtype)
            mixed = weights.flatten(2, 3) @ value[:, :, : weights.shape[-1]]
            output[:, :, :, here] = mixed.unflatten(2, weights.shape[2:4])
        ctx.save_for_backward(query, key, value, log_keep, output, total)
        ctx.shape = shape
        return output.flatten(1, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, log_keep, output, total = ctx.saved_tensors
        grouped, grad = (tensor.unflatten(1, (key.shape[1], -1)) for tensor in (query, grad))
        mean = (grad.float() * output.float()).sum(dim=-1)
        d_query = torch.empty_like(grouped)
        d_key, d_value = (torch.zeros_like(tensor, dtype=torch.float32) for tensor in (key, value))
        d_log_keep = torch.zeros_like(log_keep)
        for start in range(0, query.shape[2], BLOCK):
            here = slice(start, start + BLOCK)
            scores = _scores(grouped[:, :, :, here], key, log_keep, start, ctx.shape)
            weights, keys = scores.sub_(total[..., here, None]).exp_(), slice(0, scores.shape[-1])
            grads = grad[:, :, :, here].flatten(2, 3)
            d_value[:, :, keys] += weights.flatten(2, 3).to(value.dtype).mT @ grads
            d_scores = (grads @ value[:, :, keys].mT).unflatten(2, weights.shape[2:4]).float()
            d_scores = d_scores.sub_(mean[..., here, None]).mul_(weights)
            for columns, far in _beyond_window(start, scores.shape[-2], ctx.shape, key.device):
                d_log_keep[:, :, columns] += (d_scores[..., columns] * far).sum(dim=(2, 3))
            d_scores = d_scores.mul_(ctx.shape.scaling).to(key.dtype).flatten(2, 3)
            d_query[:, :, :, here] = (d_scores @ key[:, :, keys]).unflatten(2, weights.shape[2:4])
            d_key[:, :, keys] += d_scores.mT @ grouped[:, :, :, here].flatten(2, 3)
        return d_query.flatten(1, 2), d_key.to(key.dtype), d_value.to(value.dtype), d_log_keep, None


def _scores(queries: Tensor, key: Tensor, log_keep: Tensor, start: int, shape: _Shape) -> Tensor:
    """float32 `[batch, kv_heads, group, queries, keys up to the block's last query]`, −inf where nothing is seen."""
    stop = start + queries.shape[3]
    scores = (queries.flatten(2, 3) @ key[:, :, :stop].mT).float().mul_(shape.scaling).unflatten(2, queries.shape[2:4])
    for columns, far in _beyond_window(start, stop - start, shape, key.device):
        scores[..., columns] += log_keep[:, :, None, None, columns] * far
    index = torch.arange(start, stop, device=key.device)[:, None]
    scores[..., start:].masked_fill_(index.mT > index, float("-inf"))
    if shape.sliding_window is not None and stop > shape.sliding_window:
        past = torch.arange(stop, device=key.device)
        scores.masked_fill_(past <= index - shape.sliding_window, float("-inf"))
    return scores


def _beyond_window(start: int, queries: int, shape: _Shape, device: torch.device) -> Iterator[tuple[slice, Any]]:
    """Columns of keys that some of a block's queries see no longer in full, and which of them: 1 for all, or bool
    `[queries, columns]`."""
    first = max(shape.sinks, start - shape.window + 1)  # keys before it have left the window of every query
    if first > shape.sinks:
        yield slice(shape.sinks, first), 1.0
    last = start + queries - shape.window
    if last > first - 1:
        index = torch.arange(start, start + queries, device=device)[:, None]
        yield slice(first, last), index - torch.arange(first, last, device=device) >= shape.window


def soft_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_keep: Tensor,
    scaling: float,
    window: int,
    sinks: int = 4,
    sliding_window: int | None = None,
) -> Tensor:
    """Causal attention in which keys beyond the window count as much as they are kept. Gradients flow to all four.

    Args:
        query: `[batch, query_heads, tokens, head_dim]`, after the rotary embedding.
        key, value: `[batch, kv_heads, tokens, head_dim]`.
        log_keep: float32 `[batch, kv_heads, tokens]`, log of the share that is kept, at most 0.
        scaling: factor on the scores.
        window: queries that see a key in full, its own included; at least 1.
        sinks: keys at the start that are always seen in full.
        sliding_window: of the model itself: beyond it nothing is seen; None: it has none.

    Returns:
        Like `query`.
    """
    found: Tensor = _SoftAttention.apply(query, key, value, log_keep, _Shape(scaling, window, sinks, sliding_window))
    return found


class _Rule:
    """What the attention modules find while a model is softly evicted."""

    def __init__(self, log_keep: LogKeep, window: int, sinks: int) -> None:
        self.log_keep, self.window, self.sinks = log_keep, window, sinks
        self.of_layer: dict[int, Tensor] = {}

    def on_keys(self, module: nn.Module, keys: Tensor) -> None:
        layer: int = module.layer_idx  # type: ignore[assignment]
        self.of_layer[layer] = self.log_keep(layer, keys)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function."""
    rule: _Rule = getattr(module, _RULE)
    scaling = default_scaling(module, query.shape[-1]) if scaling is None else scaling
    layer: int = module.layer_idx  # type: ignore[assignment]
    log_keep = rule.of_layer.pop(layer)
    output = soft_attention(query, key, value, log_keep, scaling, rule.window, rule.sinks, sliding_window)
    return output.transpose(1, 2).contiguous(), None


def _no_mask(*_: Any, **__: Any) -> None:
    """Causality is computed in `_scores`."""


AttentionInterface.register(SOFT, _attention)
AttentionMaskInterface.register(SOFT, _no_mask)


@contextmanager
def softly_evicted(model: PreTrainedModel, log_keep: LogKeep, window: int, sinks: int = 4) -> Iterator[None]:
    """Inside, forward passes of `model` (no padding, no cache) attend under a soft eviction.

    The model is as it was on leaving, also after an exception.

    Args:
        log_keep: called with (layer, its keys before the rotary embedding `[batch, kv_heads, tokens, head_dim]`);
            returns float32 `[batch, kv_heads, tokens]`.
        window, sinks: as `soft_attention`.
    """
    rule, modules = _Rule(log_keep, window, sinks), attention_modules(model)
    implementation = model.config._attn_implementation
    try:
        for module in modules:
            setattr(module, _RULE, rule)
        with hook_keys(model, rule.on_keys):
            model.set_attn_implementation(SOFT)
            yield
    finally:
        model.set_attn_implementation(implementation)
        for module in modules:
            module.__dict__.pop(_RULE, None)
