"""The rule in plain loops: a full cache under a mask of its own for each layer, row and KV head."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from smartkv.models.architecture import attention_modules

NAME = "tests_masked"


def masked_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Eager attention with repeated KV heads and the module's own mask `[batch, kv_heads, queries, keys]`."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling  # GPT-2 of 5.2 names none
    group = query.shape[1] // key.shape[1]
    mask = module.__dict__["mask"].repeat_interleave(group, dim=1)
    scores = query @ key.repeat_interleave(group, dim=1).transpose(2, 3) * scaling
    if softcap is not None:  # Gemma 2
        scores = softcap * (scores / softcap).tanh()
    scores = scores.masked_fill(~mask, float("-inf"))
    if s_aux is None:
        weights = scores.softmax(dim=-1)
    else:  # GPT-OSS: one more score of each query head, whose value is nothing
        weights = torch.cat([scores, s_aux.view(-1, 1, 1).expand(*scores.shape[:-1], 1)], dim=-1).softmax(dim=-1)
        weights = weights[..., :-1]
    return (weights @ value.repeat_interleave(group, dim=1)).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, masked_attention)
AttentionMaskInterface.register(NAME, lambda *_, **__: None)


def visibility(ttl: Tensor, window: int, sinks: int, real: Tensor, sliding_window: int | None = None) -> Tensor:
    """bool `[batch, kv_heads, queries, keys]` from `ttl` `[batch, kv_heads, real tokens]` and `real` `[batch, tokens]`.

    A query of padding sees itself, so that its softmax is defined.
    """
    batch, tokens = real.shape
    mask = torch.zeros(batch, ttl.shape[1], tokens, tokens, dtype=torch.bool)
    lives = ttl.tolist()
    for row in range(batch):
        places = real[row].nonzero().flatten().tolist()  # column of each real token
        for head in range(ttl.shape[1]):
            for i, column_i in enumerate(places):
                for j, column_j in enumerate(places[: i + 1]):
                    age = i - j
                    seen = age < max(lives[row][head][j], window) or j < sinks
                    if sliding_window is not None:
                        seen = seen and age < sliding_window
                    mask[row, head, column_i, column_j] = seen
        for column in set(range(tokens)) - set(places):
            mask[row, :, column, column] = True
    return mask


def drop_over_cap(
    seen: Tensor,
    ttl: Tensor,
    score: Tensor,
    real: Tensor,
    cap: int,
    per_layer: bool,
    window: int,
    sinks: int,
    sliding_window: int | None = None,
) -> Tensor:
    """What is left of `seen` (from `visibility`) under a cap, token by token: of the keys past their window that whose
    expiry is first goes first, of equals the older, then the lower score, then the later head. A model's own sliding
    window hides sinks, but their places stay theirs. `score` like `ttl`."""
    left = seen.clone()
    for row in range(seen.shape[0]):
        places = real[row].nonzero().flatten().tolist()
        heads = range(seen.shape[1])
        for pool in [list(heads)] if per_layer else [[head] for head in heads]:
            dropped: set[tuple[int, int]] = set()
            for i, column in enumerate(places):
                keys = [(h, j) for h in pool for j in range(i + 1) if seen[row, h, column, places[j]]]
                keys = [key for key in keys if key not in dropped]

                def worth(key: tuple[int, int], row: int = row) -> tuple[float, ...]:
                    head, j = key
                    life = min(max(int(ttl[row, head, j]), window), sliding_window or 2**31)
                    return j + life, j, float(score[row, head, j]), -head

                free = sorted((key for key in keys if key[1] >= sinks and i - key[1] >= window), key=worth)
                gone = len(pool) * sum(j < sinks and i - j >= (sliding_window or 2**31) for j in range(i + 1))
                dropped |= set(free[: max(0, len(keys) + gone - cap)])
                for head, j in dropped:
                    left[row, head, column, places[j]] = False
    return left


@contextmanager
def masked(model: PreTrainedModel, masks: list[Tensor]) -> Iterator[None]:
    """Inside, the model's layers attend under `masks`."""
    implementation = model.config._attn_implementation
    for module, mask in zip(attention_modules(model), masks, strict=True):
        module.__dict__["mask"] = mask
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(implementation)
        for module in attention_modules(model):
            del module.__dict__["mask"]


@torch.inference_mode()
def masked_logits(model: PreTrainedModel, ids: Tensor, masks: list[Tensor], real: Tensor) -> Tensor:
    """Logits of a whole sequence in one pass without a cache."""
    with masked(model, masks):
        return model(ids, attention_mask=real.long(), position_ids=positions(real), use_cache=False).logits


def positions(real: Tensor) -> Tensor:
    """Position ids as `generate` makes them: padding does not count."""
    return (real.long().cumsum(dim=1) - 1).clamp(min=0)
