"""The soft decision of which keys stay, and the footprint it amounts to."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def keep_share(worth: Tensor, price: float | Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Share of each key that is kept from each age on, and its log.

    What is gone does not come back: the share at an age is the product of what stayed at each age so far.

    Args:
        worth: log of nats, `[…, ages]`.
        price: in the same unit.

    Returns:
        Two float32 tensors shaped like `worth`.
    """
    log = F.logsigmoid((worth.float() - price) / temperature).cumsum(dim=-1)
    return log.exp(), log


def hard_keep(worth: Tensor, price: float | Tensor) -> Tensor:
    """The same where keys stay or go, as in the cache: bool, shaped like `worth`."""
    return worth.cummin(dim=-1).values > price


def queries_per_age(
    tokens: int, ages: Sequence[int], sinks: int, first_query: int, device: torch.device | None = None
) -> Tensor:
    """How many of the queries `first_query ≤ i < tokens` see each key at each age and before the next, int64
    `[tokens, ages]`; sinks: 0."""
    key = torch.arange(tokens, device=device)[:, None]
    since = torch.tensor(ages, device=device)
    older = (tokens - (key + since).clamp(min=first_query)).clamp(min=0)
    at = torch.cat([older[:, :-1] - older[:, 1:], older[:, -1:]], dim=1)
    return at.masked_fill(key < sinks, 0)


def footprint(keep: Tensor, ages: Sequence[int], sinks: int, first_query: int) -> Tensor:
    """Share of a full cache's keys that the queries from `first_query` on see: sinks and keys younger than the
    first age in full, others by `keep`.

    Args:
        keep: `[heads, tokens, ages]`, of all heads of all layers.
    """
    tokens = keep.shape[1]
    old = queries_per_age(tokens, ages, sinks, first_query, keep.device)
    full = (torch.arange(first_query, tokens, device=keep.device) + 1).sum()
    in_full = full - old.sum()
    return (in_full + (keep * old).sum(dim=(1, 2)).mean()) / full
