"""R² of each head from sums per window, so that windows can be pooled and resampled."""

from dataclasses import dataclass

import torch
from torch import Tensor

from smartkv.metrics.bootstrap import bootstrap


@dataclass
class RegressionSums:
    """Sums per window and head from which R² is computed, float64.

    Attributes:
        count: Number of rows, `[windows]`.
        target: Sum of the targets, `[windows, gates]`.
        target_square: Sum of their squares, `[windows, gates]`.
        residual_square: Sum of the squared errors of the predictions, `[windows, gates]`.
    """

    count: Tensor
    target: Tensor
    target_square: Tensor
    residual_square: Tensor

    @classmethod
    def zeros(cls, windows: int, gates: int) -> "RegressionSums":
        """Start from no rows."""

        def zero(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64)

        return cls(zero(windows), zero(windows, gates), zero(windows, gates), zero(windows, gates))

    def update(self, window: int, prediction: Tensor, target: Tensor) -> None:
        """Add rows of one window.

        Args:
            window: Index of the window.
            prediction: `[gates, rows]`.
            target: `[gates, rows]`.
        """
        target64 = target.double()
        self.count[window] += target.shape[1]
        self.target[window] += target64.sum(dim=1)
        self.target_square[window] += target64.square().sum(dim=1)
        self.residual_square[window] += (prediction.double() - target64).square().sum(dim=1)

    def tensors(self) -> list[Tensor]:
        """Return the sums themselves, to be reduced over processes in place."""
        return [self.count, self.target, self.target_square, self.residual_square]

    def r2(self, weight: Tensor | None = None) -> Tensor:
        """Compute the R² of each head over all windows.

        Args:
            weight: How often each window counts, `[…, windows]`. None means once.

        Returns:
            float64 `[…, gates]`; NaN for a head whose target never varies.
        """
        weight = torch.ones(len(self.count), dtype=torch.float64) if weight is None else weight.double()
        count = weight @ self.count
        mean_square = (weight @ self.target).square() / count[..., None]
        total = weight @ self.target_square - mean_square
        varies = total > 1e-9 * count[..., None]
        return torch.where(varies, 1 - (weight @ self.residual_square) / total, torch.nan)

    def interval(self, draws: int = 2000, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
        """Compute the bootstrap interval, over windows, of the mean R² over heads.

        Args:
            draws: Number of draws.
            level: Confidence level.
            seed: Seed of the draws.

        Returns:
            The lower and the upper end.
        """
        return bootstrap(len(self.count), lambda weight: self.r2(weight).nanmean(dim=-1), draws, level, seed)
