"""Attention under a soft eviction, through which gates learn from what the model loses.

Query `i` sees key `j` in full while `i − j < ages[0]` or where `j` is a sink; afterwards the key's weight before
normalisation, `exp(score)`, is multiplied by `keep_js` in (0, 1], which may be another one from each age on:
`ages[s] ≤ i − j < ages[s + 1]`. At `keep` 0 or 1, falling with age, this is the rule of `smartkv.policies.hybrid`; in
between it has a gradient. (The relaxation of DMS, Łańcucki et al. 2025, arXiv 2506.05345, with ages.)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from smartkv.models.attention_interface import attention_switched_to, default_scaling, register_attention
from smartkv.models.key_hooks import hook_keys
from smartkv.policies.lifetimes import FOREVER

SOFT = "smartkv_soft"
BLOCK = 128  # queries at a time: memory grows with tokens × block, never with tokens²
HIDDEN = -1e4  # log of a share that is none
_RULE = "_smartkv_soft_rule"

LogKeep = Callable[[int, Tensor], Tensor]


class _Shape(NamedTuple):
    """Figures of one call: factor on the scores, ages from which on keys count less, sinks, the model's own window."""

    scaling: float
    ages: tuple[int, ...]
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
            for age, columns, far in _aged(start, scores.shape[-2], ctx.shape, key.device):
                d_log_keep[age, :, :, columns] += (d_scores[..., columns] * far).sum(dim=(2, 3))
            d_scores = d_scores.mul_(ctx.shape.scaling).to(key.dtype).flatten(2, 3)
            d_query[:, :, :, here] = (d_scores @ key[:, :, keys]).unflatten(2, weights.shape[2:4])
            d_key[:, :, keys] += d_scores.mT @ grouped[:, :, :, here].flatten(2, 3)
        return d_query.flatten(1, 2), d_key.to(key.dtype), d_value.to(value.dtype), d_log_keep, None


def _scores(queries: Tensor, key: Tensor, log_keep: Tensor, start: int, shape: _Shape) -> Tensor:
    """float32 `[batch, kv_heads, group, queries, keys up to the block's last query]`, −inf where nothing is seen."""
    stop = start + queries.shape[3]
    scores = (queries.flatten(2, 3) @ key[:, :, :stop].mT).float().mul_(shape.scaling).unflatten(2, queries.shape[2:4])
    for age, columns, far in _aged(start, stop - start, shape, key.device):
        scores[..., columns] += log_keep[age, :, :, None, None, columns] * far
    index = torch.arange(start, stop, device=key.device)[:, None]
    scores[..., start:].masked_fill_(index.mT > index, float("-inf"))
    if shape.sliding_window is not None and stop > shape.sliding_window:
        past = torch.arange(stop, device=key.device)
        scores.masked_fill_(past <= index - shape.sliding_window, float("-inf"))
    return scores


def _aged(start: int, queries: int, shape: _Shape, device: torch.device) -> Iterator[tuple[int, slice, Any]]:
    """Of each age's number: columns of the keys that some of a block's queries see at that age and before the next,
    and which queries see which: 1 for all, or bool `[queries, columns]`."""
    last, index = start + queries - 1, torch.arange(start, start + queries, device=device)[:, None]
    for number, (age, until) in enumerate(pairwise((*shape.ages, FOREVER))):
        first, stop = max(shape.sinks, start - until + 1), last - age + 1  # some query sees these at that age
        whole = slice(max(first, last - until + 1), min(stop, start - age + 1))  # and all queries these
        if whole.start >= whole.stop:
            whole = slice(first, first)
        else:
            yield number, whole, 1.0
        for part in (slice(first, whole.start), slice(whole.stop, stop)):
            if part.start < part.stop:
                old = index - torch.arange(part.start, part.stop, device=device)
                yield number, part, (old >= age) & (old < until)


def soft_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_keep: Tensor,
    scaling: float,
    ages: tuple[int, ...],
    sinks: int = 4,
    sliding_window: int | None = None,
) -> Tensor:
    """Causal attention in which keys count as much as they are kept at their age. Gradients flow to all four.

    Args:
        query: `[batch, query_heads, tokens, head_dim]`, after the rotary embedding.
        key, value: `[batch, kv_heads, tokens, head_dim]`.
        log_keep: float32 `[ages, batch, kv_heads, tokens]`, log of the share that is kept from each age on, until the
            next.
        scaling: factor on the scores.
        ages: tokens, ascending, at least 1; before the first a key is seen in full.
        sinks: keys at the start that are always seen in full.
        sliding_window: of the model itself: beyond it nothing is seen; None: it has none.

    Returns:
        Like `query`.
    """
    found: Tensor = _SoftAttention.apply(
        query, key, value, log_keep, _Shape(scaling, tuple(ages), sinks, sliding_window)
    )
    return found


class _Rule:
    """What the attention modules find while a model is softly evicted."""

    def __init__(self, log_keep: LogKeep, ages: tuple[int, ...], sinks: int) -> None:
        self.log_keep, self.ages, self.sinks = log_keep, ages, sinks
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
    dropout: float = 0.0,  # in this place: kvpress, once imported, gives it by position
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function."""
    rule: _Rule = getattr(module, _RULE)
    scaling = default_scaling(module, query.shape[-1]) if scaling is None else scaling
    layer: int = module.layer_idx  # type: ignore[assignment]
    log_keep = rule.of_layer.pop(layer)
    output = soft_attention(query, key, value, log_keep, scaling, rule.ages, rule.sinks, sliding_window)
    return output.transpose(1, 2).contiguous(), None


register_attention(SOFT, _attention)


@contextmanager
def soft_eviction(model: PreTrainedModel, log_keep: LogKeep, ages: tuple[int, ...], sinks: int = 4) -> Iterator[None]:
    """Inside, forward passes of `model` (no padding, no cache) attend under a soft eviction.

    The model is as it was on leaving, also after an exception.

    Args:
        log_keep: called with (layer, its keys before the rotary embedding `[batch, kv_heads, tokens, head_dim]`);
            returns float32 `[ages, batch, kv_heads, tokens]`.
        ages, sinks: as `soft_attention`.
    """
    rule = _Rule(log_keep, ages, sinks)
    with hook_keys(model, rule.on_keys), attention_switched_to(model, SOFT, _RULE, rule):
        yield
