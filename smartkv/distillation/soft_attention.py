"""Attention under soft eviction, through which gates learn from the loss of the model.

Query `i` sees key `j` in full while `i − j < ages[0]`, or if `j` is a sink. Afterwards the key's weight before
normalisation, `exp(score)`, is multiplied by a share `keep[s, j]` in (0, 1]. There is one share per age, and the share
of age `s` holds while `ages[s] ≤ i − j < ages[s + 1]`. With shares of 0 or 1 that fall with age, this is the rule of
`smartkv.policies.hybrid`; between 0 and 1 it has a gradient. It is the relaxation of DMS (Łańcucki et al. 2025,
arXiv 2506.05345) with ages.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from smartkv.models.attention_interface import AttentionInputs, attention_switched_to, register_attention
from smartkv.models.key_hooks import hook_keys
from smartkv.models.softmax import Softmax
from smartkv.models.wrappers import attention_layer
from smartkv.policies.lifetimes import FOREVER

SOFT = "smartkv_soft"
TILE = 128  # queries per tile, so that memory grows with tokens × TILE and not with tokens²
HIDDEN = -1e4  # log of the share 0
_RULE = "_smartkv_soft_rule"

LogKeep = Callable[[int, Tensor], Tensor | None]
"""Function of a layer and its keys before the rotary embedding; see `soft_eviction`."""


class _Shape(NamedTuple):
    """Arguments of one call, as in `soft_attention`."""

    softmax: Softmax
    ages: tuple[int, ...]
    sinks: int
    sliding_window: int | None


class _SoftAttention(torch.autograd.Function):
    """Soft attention that computes probabilities again in the backward pass instead of keeping them."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        log_keep: Tensor,
        learned_sinks: Tensor | None,
        shape: _Shape,
    ) -> Tensor:
        grouped = query.unflatten(1, (key.shape[1], -1))  # [batch, kv_heads, group, tokens, head_dim]
        output, total = torch.empty_like(grouped), query.new_empty(grouped.shape[:-1], dtype=torch.float32)
        for start in range(0, query.shape[2], TILE):
            tile = slice(start, start + TILE)
            scores = _scores(grouped[:, :, :, tile], key, log_keep, start, shape)
            total[..., tile] = shape.softmax.log_total(scores)
            weights = scores.sub_(total[..., tile, None]).exp_().to(value.dtype)
            mixed = weights.flatten(2, 3) @ value[:, :, : weights.shape[-1]]
            output[:, :, :, tile] = mixed.unflatten(2, weights.shape[2:4])
        ctx.save_for_backward(query, key, value, log_keep, output, total, learned_sinks)
        ctx.shape = shape
        return output.flatten(1, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, log_keep, output, total, learned_sinks = ctx.saved_tensors
        softmax: Softmax = ctx.shape.softmax
        grouped, grad = (tensor.unflatten(1, (key.shape[1], -1)) for tensor in (query, grad))
        mean = (grad.float() * output.float()).sum(dim=-1)
        d_query = torch.empty_like(grouped)
        d_key, d_value = (torch.zeros_like(tensor, dtype=torch.float32) for tensor in (key, value))
        d_log_keep = torch.zeros_like(log_keep)
        for start in range(0, query.shape[2], TILE):
            tile = slice(start, start + TILE)
            scores = _scores(grouped[:, :, :, tile], key, log_keep, start, ctx.shape)
            weights, keys = scores.sub_(total[..., tile, None]).exp_(), slice(0, scores.shape[-1])
            grads = grad[:, :, :, tile].flatten(2, 3)
            d_value[:, :, keys] += weights.flatten(2, 3).to(value.dtype).mT @ grads
            d_scores = (grads @ value[:, :, keys].mT).unflatten(2, weights.shape[2:4]).float()
            d_scores = d_scores.sub_(mean[..., tile, None]).mul_(weights)
            for age, columns, far in _aged(start, scores.shape[-2], ctx.shape, key.device):
                d_log_keep[age, :, :, columns] += (d_scores[..., columns] * far).sum(dim=(2, 3))
            if softmax.cap is not None:
                products = (grouped[:, :, :, tile].flatten(2, 3) @ key[:, :, keys].mT).unflatten(2, weights.shape[2:4])
                d_scores *= 1 - (softmax.scores(products) / softmax.cap).square_()  # the derivative of tanh
            d_scores = d_scores.mul_(softmax.scaling).to(key.dtype).flatten(2, 3)
            d_query[:, :, :, tile] = (d_scores @ key[:, :, keys]).unflatten(2, weights.shape[2:4])
            d_key[:, :, keys] += d_scores.mT @ grouped[:, :, :, tile].flatten(2, 3)
        d_sinks = None
        if learned_sinks is not None:  # they have weight, and a value of zero
            weights = (learned_sinks.float().view(*mean.shape[1:3], 1) - total).exp_()
            d_sinks = -(weights * mean).sum(dim=(0, 3)).flatten().to(learned_sinks.dtype)
        return d_query.flatten(1, 2), d_key.to(key.dtype), d_value.to(value.dtype), d_log_keep, d_sinks, None


def _scores(queries: Tensor, key: Tensor, log_keep: Tensor, start: int, shape: _Shape) -> Tensor:
    """Compute the scores of a tile of queries over the keys up to its last query.

    Returns:
        float32 `[batch, kv_heads, group, queries, keys]`, −inf where a query does not see a key.
    """
    stop = start + queries.shape[3]
    scores = shape.softmax.scores(queries.flatten(2, 3) @ key[:, :, :stop].mT).unflatten(2, queries.shape[2:4])
    for age, columns, far in _aged(start, stop - start, shape, key.device):
        scores[..., columns] += log_keep[age, :, :, None, None, columns] * far
    index = torch.arange(start, stop, device=key.device)[:, None]
    scores[..., start:].masked_fill_(index.mT > index, float("-inf"))
    if shape.sliding_window is not None and stop > shape.sliding_window:
        past = torch.arange(stop, device=key.device)
        scores.masked_fill_(past <= index - shape.sliding_window, float("-inf"))
    return scores


def _aged(start: int, queries: int, shape: _Shape, device: torch.device) -> Iterator[tuple[int, slice, Any]]:
    """Find the keys that the queries of a tile see between an age and the next.

    Yields:
        Number of the age, columns of the keys, and which queries see which of them at that age: 1.0 for all, or bool
        `[queries, columns]`.
    """
    last, index = start + queries - 1, torch.arange(start, start + queries, device=device)[:, None]
    for number, (age, until) in enumerate(pairwise((*shape.ages, FOREVER))):
        first, stop = max(shape.sinks, start - until + 1), last - age + 1  # keys that some query sees at that age
        whole = slice(max(first, last - until + 1), min(stop, start - age + 1))  # keys that all queries see at that age
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
    softmax: Softmax,
    ages: tuple[int, ...],
    sinks: int = 4,
    sliding_window: int | None = None,
) -> Tensor:
    """Compute causal attention in which each key is weighted by the share that is kept at its age.

    Gradients flow to `query`, `key`, `value`, `log_keep` and learned sinks.

    Args:
        query: `[batch, query_heads, tokens, head_dim]`, after the rotary embedding.
        key: `[batch, kv_heads, tokens, head_dim]`, after the rotary embedding.
        value: `[batch, kv_heads, tokens, head_dim]`.
        log_keep: Log of the share that is kept from each age on until the next, float32
            `[ages, batch, kv_heads, tokens]`.
        softmax: The step from products of queries and keys to probabilities. A cap comes before the share of a key.
        ages: Ages in tokens, ascending, at least 1. A key younger than the first is seen in full.
        sinks: Number of keys at the start that are always seen in full.
        sliding_window: Window of the model itself, beyond which no key is seen. None if it has none.

    Returns:
        A tensor like `query`.
    """
    output: Tensor = _SoftAttention.apply(
        query, key, value, log_keep, softmax.learned_sinks, _Shape(softmax, tuple(ages), sinks, sliding_window)
    )
    return output


class _Rule:
    """State on the attention modules of a model under soft eviction."""

    def __init__(self, log_keep: LogKeep, ages: tuple[int, ...], sinks: int) -> None:
        self.log_keep, self.ages, self.sinks = log_keep, ages, sinks
        self.of_layer: dict[int, Tensor] = {}

    def on_keys(self, module: nn.Module, keys: Tensor) -> None:
        """Compute the shares of a layer before its attention runs."""
        layer = attention_layer(module)
        if (log_keep := self.log_keep(layer, keys)) is not None:
            self.of_layer[layer] = log_keep


def _attend(inputs: AttentionInputs) -> Tensor:
    """Compute the attention of one layer under the rule on its module."""
    rule: _Rule = getattr(inputs.module, _RULE)
    query, key, value, softmax = inputs.query, inputs.key, inputs.value, inputs.softmax
    log_keep, ages = rule.of_layer.pop(inputs.layer, None), rule.ages
    if log_keep is None:  # nothing is evicted here but what the model's own window hides
        log_keep, ages = query.new_empty(0, *key.shape[:3], dtype=torch.float32), ()
    return soft_attention(query, key, value, log_keep, softmax, ages, rule.sinks, inputs.sliding_window)


register_attention(SOFT, _attend)


@contextmanager
def soft_eviction(model: PreTrainedModel, log_keep: LogKeep, ages: tuple[int, ...], sinks: int = 4) -> Iterator[None]:
    """Run forward passes of `model` under soft eviction inside this context.

    The passes must have no padding and no cache. On exit the model is restored, also after an exception.

    Args:
        model: The model.
        log_keep: Called with a layer's index and its keys before the rotary embedding,
            `[batch, kv_heads, tokens, head_dim]`. Returns log shares as in `soft_attention`, or None for a layer in
            which nothing is evicted.
        ages: Ages in tokens, ascending, at least 1.
        sinks: Number of keys at the start that are always seen in full.
    """
    rule = _Rule(log_keep, ages, sinks)
    with hook_keys(model, rule.on_keys), attention_switched_to(model, SOFT, _RULE, rule):
        yield
