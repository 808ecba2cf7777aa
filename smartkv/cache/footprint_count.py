"""Counts of keys: how many queries saw them, how many a full cache would have held, and how old the freed ones were."""

from dataclasses import dataclass

import torch
from torch import Tensor

from smartkv.policies.lifetimes import HOLE

DEATH_AGES = (16, 64, 256, 1024, 4096)  # tokens; bounds of the ages by which freed keys are counted


@dataclass(frozen=True)
class FootprintCount:
    """The keys that the counted queries of one layer saw so far.

    Attributes:
        visible: int64 `[batch, kv_heads]`, the sum over counted queries of the keys that each saw.
        full: int64 `[batch]`, the same sum for a full cache.
        first_query: position of the first counted query.
    """

    visible: Tensor
    full: Tensor
    first_query: int

    @classmethod
    def zeros(cls, batch: int, kv_heads: int, first_query: int, device: torch.device) -> "FootprintCount":
        """Return the count before the first query."""
        visible = torch.zeros(batch, kv_heads, dtype=torch.int64, device=device)
        return cls(visible, visible.new_zeros(batch), first_query)

    def plus(self, visible: Tensor, start: Tensor, end: Tensor, sliding_window: int) -> "FootprintCount":
        """Return the count with the queries `start ≤ i < end` added.

        Args:
            visible: int64 `[pairs]`, the keys that the counted ones among these queries saw (see `count_queries`).
            start, end: int64 `[batch]`, positions.
            sliding_window: largest number of keys that a full cache would hold.
        """
        full = self._full(start, end, sliding_window)
        return FootprintCount(self.visible + visible.view(self.visible.shape), self.full + full, self.first_query)

    def minus(self, visible: Tensor, start: Tensor, end: Tensor, sliding_window: int) -> "FootprintCount":
        """Return the count without the queries `start ≤ i < end`; the arguments are those of `plus`."""
        full = self._full(start, end, sliding_window)
        return FootprintCount(self.visible - visible.view(self.visible.shape), self.full - full, self.first_query)

    def _full(self, start: Tensor, end: Tensor, sliding_window: int) -> Tensor:
        """Return the keys that the counted ones among the queries `start ≤ i < end` see in a full cache, `[batch]`."""

        def full_keys(query: Tensor) -> Tensor:  # Σ min(i + 1, sliding_window) over i < query
            growing = query.clamp(max=sliding_window)
            return growing * (growing + 1) // 2 + (query - growing) * sliding_window

        return full_keys(end) - full_keys(torch.minimum(start.clamp(min=self.first_query), end))

    def select(self, rows: Tensor) -> "FootprintCount":
        """Return the count of these rows of the batch, int64 `[rows]`."""
        return FootprintCount(self.visible.index_select(0, rows), self.full.index_select(0, rows), self.first_query)


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
    ages = torch.bucketize((ends - position)[freed], bounds, right=True)
    return torch.bincount(ages, minlength=len(DEATH_AGES) + 1)
