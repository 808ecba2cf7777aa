"""Attention without dropped keys, by a 4-D mask for `scaled_dot_product_attention`.

Query `i` sees key `j ≤ i` if and only if `j` is a real token and either stays or is one of the latest `recent` tokens.
Unlike dropout of activations, nothing is rescaled: the softmax is over the keys that are left.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from smartkv.models.attention_interface import AttentionInputs, attention_switched_to, register_attention

SPARSE = "smartkv_sparse"
_RULE = "_smartkv_sparse_rule"

Stays = Callable[[int], Tensor]
"""Function of a layer that returns which keys stay; see `sparse_attention`."""


def sparse_mask(stays: Tensor, recent: int, real: Tensor | None = None, sliding_window: int | None = None) -> Tensor:
    """Compute which keys each query sees.

    Args:
        stays: Keys that stay for good, bool `[batch, kv_heads, tokens]`.
        recent: Number of latest tokens that are always seen, the query's own included, at least 1.
        real: bool `[batch, tokens]`, False for padding. A padding query sees only itself. None means no padding.
        sliding_window: Window of the model itself, in tokens. None if it has none.

    Returns:
        bool `[batch, kv_heads, queries, keys]`.
    """
    tokens = stays.shape[2]
    key_position = torch.arange(tokens, device=stays.device)
    query_position = key_position[:, None]
    if real is not None:
        position = real.cumsum(dim=1) - 1  # padding takes up no position
        query_position = position[:, None, :, None]
        key_position = position[:, None, None, :]
    seen = stays[:, :, None, :] | (query_position - key_position < recent)
    index = torch.arange(tokens, device=stays.device)
    seen = seen & (index <= index[:, None])
    if sliding_window is not None:
        seen = seen & (index > index[:, None] - sliding_window)
    if real is not None:
        seen = seen & real[:, None, None, :]
        seen = seen | (torch.eye(tokens, dtype=torch.bool, device=stays.device) & ~real[:, None, :, None])
    return seen


class _Rule:
    """State on the attention modules of a model under sparse attention."""

    def __init__(self, stays: Stays, recent: int, real: Tensor | None) -> None:
        self.stays, self.recent, self.real = stays, recent, real


def _attend(inputs: AttentionInputs) -> Tensor:
    """Compute the attention of one layer under the rule on its module."""
    rule: _Rule = getattr(inputs.module, _RULE)
    group = inputs.query.shape[1] // inputs.key.shape[1]
    mask = sparse_mask(rule.stays(inputs.layer), rule.recent, rule.real, inputs.sliding_window)
    if not inputs.softmax.plain:
        grouped = inputs.query.unflatten(1, (inputs.key.shape[1], -1))
        return inputs.softmax.attend(grouped, inputs.key, inputs.value, mask, inputs.dropout).flatten(1, 2)
    if mask.shape[1] > 1:  # a mask for all heads together broadcasts
        mask = mask.repeat_interleave(group, dim=1)
    key, value = (tensor.repeat_interleave(group, dim=1) for tensor in (inputs.key, inputs.value))
    return F.scaled_dot_product_attention(
        inputs.query, key, value, attn_mask=mask, dropout_p=inputs.dropout, scale=inputs.softmax.scaling
    )


register_attention(SPARSE, _attend)


@contextmanager
def sparse_attention(model: PreTrainedModel, stays: Stays, recent: int, real: Tensor | None = None) -> Iterator[None]:
    """Run forward passes of `model`, without a cache, on the keys that stay inside this context.

    Gradients flow as usual. On exit the model is restored, also after an exception.

    Args:
        model: The model.
        stays: Called with a layer's index. Returns bool `[batch, kv_heads, tokens]`, or `[batch, 1, tokens]` for all
            heads. Activation checkpointing calls it again in the backward pass, and it must return the same then.
        recent: Number of latest tokens that are always seen, the query's own included, at least 1.
        real: bool `[batch, tokens]`, False for padding. None means that there is no padding.
    """
    with attention_switched_to(model, SPARSE, _RULE, _Rule(stays, recent, real)):
        yield
