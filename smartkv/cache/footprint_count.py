"""Counts of keys: how many queries saw them, how many a full cache would have held, and how old the freed ones were."""

from typing import NamedTuple

import torch
from torch import Tensor

from smartkv.policies.lifetimes import HOLE

DEATH_AGES = (16, 64, 256, 1024, 4096)  # tokens; bounds of the ages by which freed keys are counted


class FootprintCount(NamedTuple):
    """The keys that the counted queries of one layer saw so far.

    Attributes:
        visible: int64 `[batch, kv_heads]`, the sum over counted queries of the keys that each saw.
        full: int64 `[batch]`, the same sum for a full cache.
    """

    visible: Tensor
    full: Tensor


def count_full(seen: Tensor, first_query: int, sliding_window: int) -> Tensor:
    """Return the sum over counted queries of the keys that each sees in a full cache, int64 `[batch]`.

    Args:
        seen: int64 `[batch]`, real tokens of each row so far.
        first_query: position of the first counted query.
        sliding_window: largest number of keys that a full cache would hold.
    """

    def keys(query: Tensor) -> Tensor:  # Σ min(i + 1, sliding_window) over i < query
        growing = query.clamp(max=sliding_window)
        return growing * (growing + 1) // 2 + (query - growing) * sliding_window

    return keys(seen) - keys(seen.clamp(max=first_query))


def count_queries(position: Tensor, ends: Tensor, start: Tensor, end: Tensor, first_query: int) -> Tensor:
    """Return how many of the queries `start ≤ i < end`, counted from `first_query` on, saw each key.

    All tensors are ints and broadcast against each other.

    Args:
        position: position of each key, `HOLE` where there is none.
        ends: first position whose query does not see the key.
        start, end: positions of the first query and of the one after the last.
        first_query: position of the first counted query.
    """
    earliest = torch.maximum(position, start.clamp(min=first_query))
    return (torch.minimum(ends, end) - earliest).clamp(min=0).masked_fill(position == HOLE, 0)


def no_deaths(device: torch.device) -> Tensor:
    """Return the counts of `count_deaths` before any key is freed."""
    return torch.zeros(len(DEATH_AGES) + 1, dtype=torch.int64, device=device)


def count_deaths(position: Tensor, ends: Tensor, freed: Tensor) -> Tensor:
    """Count freed keys by the age at which queries ceased to see them.

    Args:
        position, ends: int, of the keys, as in `count_queries`.
        freed: bool of the same shape.

    Returns:
        int64 `[ages]`: keys younger than the first of `DEATH_AGES`, than the second and so on, and older ones.
    """
    bounds = torch.tensor(DEATH_AGES, device=position.device)
    ages = torch.bucketize(ends - position, bounds, right=True)
    return no_deaths(position.device).index_add_(0, ages.flatten(), freed.flatten().long())  # waits for no device
