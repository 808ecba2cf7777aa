"""Metrics of every head at once, summed exactly over processes."""

import torch
from torch import Tensor
from torchmetrics import Metric


class HeadMean(Metric):
    """Mean over rows for each of `gates` heads, in float64. A process without rows adds nothing."""

    full_state_update = False

    def __init__(self, gates: int) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(gates, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("rows", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        """`values` `[gates, rows]`."""
        self.total += values.double().sum(dim=1)
        self.rows += values.shape[1]

    def compute(self) -> Tensor:
        """float64 `[gates]`."""
        return self.total / self.rows

    def sums(self) -> dict[str, Tensor]:
        """Those of all processes so far, for a checkpoint. Every process must ask for them."""
        with self.sync_context():
            return {"total": self.total.clone(), "rows": self.rows.clone()}

    def go_on_from(self, sums: dict[str, Tensor]) -> None:
        """`sums` count as this process's own: give them to one."""
        self.update(self.total.new_zeros(len(self.total), 0))  # so that torchmetrics knows that there is a mean
        self.total, self.rows = sums["total"].to(self.total), sums["rows"].to(self.rows)
