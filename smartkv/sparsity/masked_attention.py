"""Attention in which some keys are gone: a 4-D mask (causal, padding, dropped keys) for `scaled_dot_product_attention`.

Query `i` sees key `j ≤ i` iff `j` is a real token and its key stays, or is among the latest `recent` tokens. Unlike
dropout of activations nothing is scaled: an evicted key is not there, and the softmax is over what is left.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from smartkv.models.attention_interface import attention_switched_to, default_scaling, register_attention

SPARSE = "smartkv_sparse"
_RULE = "_smartkv_sparse_rule"

Stays = Callable[[int], Tensor]


def sparse_mask(stays: Tensor, recent: int, real: Tensor | None = None, sliding_window: int | None = None) -> Tensor:
    """What each query sees, bool `[batch, kv_heads, queries, keys]`.

    Args:
        stays: bool `[batch, kv_heads, tokens]`, keys that stay for good.
        recent: latest tokens that are seen in any case, the query's own included; at least 1.
        real: bool `[batch, tokens]`, False for padding; None: there is none. A query of padding sees itself alone.
        sliding_window: of the model itself, in tokens; None: it has none.
    """
    tokens = stays.shape[2]
    place = torch.arange(tokens, device=stays.device)
    at = place[:, None]
    if real is not None:
        place = real.cumsum(dim=1) - 1  # padding is no distance
        at = place[:, None, :, None]
        place = place[:, None, None, :]
    seen = stays[:, :, None, :] | (at - place < recent)
    index = torch.arange(tokens, device=stays.device)
    seen = seen & (index <= index[:, None])
    if sliding_window is not None:
        seen = seen & (index > index[:, None] - sliding_window)
    if real is not None:
        seen = seen & real[:, None, None, :]
        seen = seen | (torch.eye(tokens, dtype=torch.bool, device=stays.device) & ~real[:, None, :, None])
    return seen


class _Rule:
    """What the attention modules find."""

    def __init__(self, stays: Stays, recent: int, real: Tensor | None) -> None:
        self.stays, self.recent, self.real = stays, recent, real


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
    layer: int = module.layer_idx  # type: ignore[assignment]
    group = query.shape[1] // key.shape[1]
    mask = sparse_mask(rule.stays(layer), rule.recent, rule.real, sliding_window)
    if mask.shape[1] > 1:  # one line for all heads broadcasts by itself
        mask = mask.repeat_interleave(group, dim=1)
    scaling = default_scaling(module, query.shape[-1]) if scaling is None else scaling
    key, value = (tensor.repeat_interleave(group, dim=1) for tensor in (key, value))
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
    return output.transpose(1, 2).contiguous(), None


register_attention(SPARSE, _attention)


@contextmanager
def sparse_attention(model: PreTrainedModel, stays: Stays, recent: int, real: Tensor | None = None) -> Iterator[None]:
    """Inside, forward passes of `model` (no cache) see only what stays. Gradients flow as ever.

    The model is as it was on leaving, also after an exception.

    Args:
        stays: called with a layer; returns bool `[batch, kv_heads, tokens]`, or `[batch, 1, tokens]` for all heads. It
            is called again where activations are computed anew in the backward pass: it must then return the same.
        recent, real: as `sparse_mask`.
    """
    with attention_switched_to(model, SPARSE, _RULE, _Rule(stays, recent, real)):
        yield
