"""Metrics of all heads together, summed exactly over processes."""

import torch
from torch import Tensor
from torchmetrics import Metric


class HeadMean(Metric):
    """Mean over rows for each head, in float64; a process without rows adds nothing.

    Args:
        gates: number of heads.
    """

    full_state_update = False
    total: Tensor
    rows: Tensor

    def __init__(self, gates: int) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(gates, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("rows", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        """Add rows: `values` `[gates, rows]`."""
        self.total += values.double().sum(dim=1)
        self.rows += values.shape[1]

    def compute(self) -> Tensor:
        """Return the mean of each head, float64 `[gates]`."""
        return self.total / self.rows

    def sums(self) -> dict[str, Tensor]:
        """Return the sums over all processes so far, for a checkpoint; every process must call it."""
        with self.sync_context():
            return {"total": self.total.clone(), "rows": self.rows.clone()}

    def go_on_from(self, sums: dict[str, Tensor]) -> None:
        """Continue from sums of a checkpoint, on one process only: they count as its own."""
        self.update(self.total.new_zeros(len(self.total), 0))  # torchmetrics counts the metric as updated from here on
        self.total, self.rows = sums["total"].to(self.total), sums["rows"].to(self.rows)
