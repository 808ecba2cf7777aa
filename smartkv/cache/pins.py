"""Pins: tokens whose keys stay whatever the policy says."""

import torch
from torch import Tensor


class Pins:
    """Ranges of positions in each row of a batch.

    Attributes:
        ranges: int64 `[rows, ranges, 2]`, first position and the one after the last. One row stands for all rows.
    """

    def __init__(self) -> None:
        self.ranges = torch.empty(1, 0, 2, dtype=torch.int64)

    def __len__(self) -> int:
        """Number of ranges."""
        return self.ranges.shape[1]

    def add(self, start: Tensor, stop: Tensor) -> None:
        """Pin the positions from `start` to before `stop`, int64 `[rows]` each; one row stands for all rows."""
        new = torch.stack([start, stop], dim=-1)[:, None].cpu()
        rows = max(len(new), len(self.ranges))
        self.ranges = torch.cat([self.ranges.expand(rows, -1, -1), new.expand(rows, -1, -1)], dim=1)

    def cover(self, position: Tensor) -> Tensor:
        """Return whether positions `[batch, …]` are pinned, bool of the same shape."""
        covered = torch.zeros_like(position, dtype=torch.bool)
        ranges = self.ranges.to(position.device).view(*self.ranges.shape, *[1] * (position.dim() - 1))
        for number in range(len(self)):
            start, stop = ranges[:, number].unbind(dim=1)
            covered |= (position >= start) & (position < stop)
        return covered

    def most(self, sinks: int) -> int:
        """Return how many positions from `sinks` on are pinned in the row with the most of them."""
        if not len(self):
            return 0
        last = int(self.ranges[..., 1].max())
        position = torch.arange(sinks, max(sinks, last)).expand(len(self.ranges), -1)
        return int(self.cover(position).sum(dim=1).max())

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, int64 `[rows]`, which may repeat."""
        if len(self.ranges) > 1:
            self.ranges = self.ranges.index_select(0, rows.cpu())
