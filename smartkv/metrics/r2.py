"""R² by head from sums, so that windows can be pooled and resampled."""

from dataclasses import dataclass

import torch
from torch import Tensor

from smartkv.metrics.bootstrap import bootstrap


@dataclass
class RegressionSums:
    """What R² needs of each window and head, float64 `[windows, gates]` (`count` `[windows]`)."""

    count: Tensor
    target: Tensor
    target_square: Tensor
    residual_square: Tensor

    @classmethod
    def zeros(cls, windows: int, gates: int) -> "RegressionSums":
        def zero(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64)

        return cls(zero(windows), zero(windows, gates), zero(windows, gates), zero(windows, gates))

    def update(self, window: int, prediction: Tensor, target: Tensor) -> None:
        """`prediction`, `target`: `[gates, rows]` of one window."""
        wide = target.double()
        self.count[window] += target.shape[1]
        self.target[window] += wide.sum(dim=1)
        self.target_square[window] += wide.square().sum(dim=1)
        self.residual_square[window] += (prediction.double() - wide).square().sum(dim=1)

    def tensors(self) -> list[Tensor]:
        """The sums, for a reduction over processes in place."""
        return [self.count, self.target, self.target_square, self.residual_square]

    def r2(self, weight: Tensor | None = None) -> Tensor:
        """R² of each head over all windows, `[..., gates]`; NaN for a head whose target never varies.

        Args:
            weight: how often each window counts, `[..., windows]`; None: once.
        """
        weight = torch.ones(len(self.count), dtype=torch.float64) if weight is None else weight.double()
        count = weight @ self.count
        mean_square = (weight @ self.target).square() / count[..., None]
        total = weight @ self.target_square - mean_square
        varies = total > 1e-9 * count[..., None]
        return torch.where(varies, 1 - (weight @ self.residual_square) / total, torch.nan)

    def interval(self, draws: int = 2000, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
        """Bootstrap interval over windows of the mean R² over heads."""
        return bootstrap(len(self.count), lambda weight: self.r2(weight).nanmean(dim=-1), draws, level, seed)
