"""The soft decision which keys stay, and the footprint that results from it."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def keep_share(worth: Tensor, price: float | Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Compute the share of each key that is kept from each age on, and the log of that share.

    An evicted key cannot come back, so the share at an age is the product of the shares at all ages up to it.

    Args:
        worth: Log worth of the keys, `[…, ages]`.
        price: Price in the same unit.
        temperature: Width of the soft decision, in the same unit.

    Returns:
        Share and log share, float32, both shaped like `worth`.
    """
    log = F.logsigmoid((worth.float() - price) / temperature).cumsum(dim=-1)
    return log.exp(), log


def hard_keep(worth: Tensor, price: float | Tensor) -> Tensor:
    """Decide which keys stay from each age on, as the cache does.

    Args:
        worth: Log worth of the keys, `[…, ages]`.
        price: Price in the same unit.

    Returns:
        bool, shaped like `worth`; False from the first age on at which the worth is not above the price.
    """
    return worth.cummin(dim=-1).values > price


def queries_per_age(
    tokens: int, ages: Sequence[int], sinks: int, first_query: int, device: torch.device | None = None
) -> Tensor:
    """Count the queries `first_query ≤ i < tokens` that see each key between an age and the next.

    Args:
        tokens: Length of the window.
        ages: Ages in tokens, ascending.
        sinks: Number of sinks, for which the counts are 0.
        first_query: Index of the first query that counts.
        device: Device of the result.

    Returns:
        int64 `[tokens, ages]`.
    """
    key = torch.arange(tokens, device=device)[:, None]
    age = torch.tensor(ages, device=device)
    from_age_on = (tokens - (key + age).clamp(min=first_query)).clamp(min=0)
    until_next_age = torch.cat([from_age_on[:, :-1] - from_age_on[:, 1:], from_age_on[:, -1:]], dim=1)
    return until_next_age.masked_fill(key < sinks, 0)


def footprint(
    keep: Tensor, ages: Sequence[int], sinks: int, first_query: int, sliding_windows: Sequence[int | None] = ()
) -> Tensor:
    """Compute the footprint of soft decisions over the queries from `first_query` on.

    Sinks and keys younger than the first age count in full, other keys by their share. A layer with a sliding window of
    its own holds what a full cache would hold there.

    Args:
        keep: Share of each key that is kept from each age on, `[heads, tokens, ages]`, for all heads of all layers that
            have gates.
        ages: Ages in tokens, ascending.
        sinks: Number of sinks.
        first_query: Index of the first query that counts.
        sliding_windows: The model's own window in each layer, in tokens, None for layers that have gates. Empty if no
            layer has one.

    Returns:
        A scalar with a gradient to `keep`: the share of a full cache's keys that is kept, mean over heads.
    """
    tokens = keep.shape[1]
    aged_pairs = queries_per_age(tokens, ages, sinks, first_query, keep.device)
    all_pairs = (torch.arange(first_query, tokens, device=keep.device) + 1).sum()
    full_pairs = all_pairs - aged_pairs.sum()  # of a query and a key that is a sink or younger than the first age
    gated = (full_pairs + (keep * aged_pairs).sum(dim=(1, 2)).mean()) / all_pairs
    share = gated_share(tokens, first_query, sliding_windows)
    return gated * share + (1 - share)


def gated_share(tokens: int, first_query: int, sliding_windows: Sequence[int | None]) -> float:
    """Compute the share of a full cache's keys in layers with gates; the arguments are those of `footprint`."""
    seen = range(first_query + 1, tokens + 1)  # keys that each query could see
    pairs = [sum(seen if own is None else (min(keys, own) for keys in seen)) for own in sliding_windows]
    gated = sum(count for count, own in zip(pairs, sliding_windows, strict=True) if own is None)
    return gated / sum(pairs) if pairs else 1.0
