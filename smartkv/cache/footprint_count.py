"""The two counts of a KV footprint: keys that queries saw, and keys that a full cache would have held."""

from dataclasses import dataclass

import torch
from torch import Tensor

from smartkv.policies.lifetimes import HOLE


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

        def full_keys(query: Tensor) -> Tensor:  # Σ min(i + 1, sliding_window) over i < query
            growing = query.clamp(max=sliding_window)
            return growing * (growing + 1) // 2 + (query - growing) * sliding_window

        full = full_keys(end) - full_keys(torch.minimum(start.clamp(min=self.first_query), end))
        return FootprintCount(self.visible + visible.view(self.visible.shape), self.full + full, self.first_query)

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
