"""Counts of what a KV footprint is made of: keys that queries saw, and keys that a full cache would have held."""

from dataclasses import dataclass

import torch
from torch import Tensor

from smartkv.policies.lifetimes import HOLE


@dataclass(frozen=True)
class FootprintCount:
    """What the counted queries of one layer saw so far.

    Attributes:
        visible: int64 `[batch, kv_heads]`, the sum over queries of the keys that each saw.
        full: int64 `[batch]`, the same of a full cache.
        first_query: position of the first query that is counted.
    """

    visible: Tensor
    full: Tensor
    first_query: int

    @classmethod
    def zeros(cls, batch: int, kv_heads: int, first_query: int, device: torch.device) -> "FootprintCount":
        """The count before the first query."""
        visible = torch.zeros(batch, kv_heads, dtype=torch.int64, device=device)
        return cls(visible, visible.new_zeros(batch), first_query)

    def plus(self, visible: Tensor, start: Tensor, end: Tensor, sliding_window: int) -> "FootprintCount":
        """The count with the queries `start ≤ i < end`.

        Args:
            visible: int64 `[pairs]`, what those of them that count saw (see `count_queries`).
            start, end: int64 `[batch]`.
            sliding_window: keys that a full cache would hold at most.
        """

        def held(query: Tensor) -> Tensor:  # Σ min(i + 1, sliding_window) over i < query
            growing = query.clamp(max=sliding_window)
            return growing * (growing + 1) // 2 + (query - growing) * sliding_window

        full = held(end) - held(torch.minimum(start.clamp(min=self.first_query), end))
        return FootprintCount(self.visible + visible.view(self.visible.shape), self.full + full, self.first_query)

    def select(self, rows: Tensor) -> "FootprintCount":
        """The count of these rows of the batch, int64 `[rows]`."""
        return FootprintCount(self.visible.index_select(0, rows), self.full.index_select(0, rows), self.first_query)


def count_queries(position: Tensor, ends: Tensor, start: Tensor, end: Tensor, first_query: int) -> Tensor:
    """How many of the queries `start ≤ i < end` from `first_query` on saw each key.

    Args:
        position: of the keys, `HOLE` where there is none; all arguments broadcast.
        ends: first position whose query does not see the key.
    """
    earliest = torch.maximum(position, start.clamp(min=first_query))
    return (torch.minimum(ends, end) - earliest).clamp(min=0).masked_fill(position == HOLE, 0)
