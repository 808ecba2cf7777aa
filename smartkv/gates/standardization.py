"""Per-head mean and standard deviation of keys, streamed; what the gates' inputs are standardised by."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Moments:
    """Sums over rows, in float64.

    Attributes:
        count: rows seen.
        key_sum, key_square_sum: `[gates, head_dim]`.
        target_sum, target_count: `[gates, outputs]`, over the targets that are known (not NaN).
    """

    count: Tensor
    key_sum: Tensor
    key_square_sum: Tensor
    target_sum: Tensor
    target_count: Tensor

    @classmethod
    def zeros(cls, gates: int, head_dim: int, outputs: int = 1, device: torch.device | str = "cpu") -> "Moments":
        def zero(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        sums = (zero(gates, head_dim), zero(gates, head_dim), zero(gates, outputs), zero(gates, outputs))
        return cls(zero(), *sums)

    def update(self, keys: Tensor, target: Tensor) -> None:
        """`keys` `[gates, rows, head_dim]`, `target` `[gates, rows, outputs]`."""
        self.count += keys.shape[1]
        for gate, narrow in enumerate(keys):  # a window of all gates in float64 is gigabytes, of one it stays in caches
            wide = narrow.double()
            self.key_sum[gate] += wide.sum(dim=0)
            self.key_square_sum[gate] += (wide * wide).sum(dim=0)
        self.target_sum += target.double().nansum(dim=1)
        self.target_count += (~target.isnan()).sum(dim=1)

    def tensors(self) -> list[Tensor]:
        """The sums, for a reduction over processes in place."""
        return [self.count, self.key_sum, self.key_square_sum, self.target_sum, self.target_count]

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """float32 (mean `[gates, head_dim]`, std `[gates, head_dim]`, mean target `[gates, outputs]`).

        A dimension that never varies gets std 1, so that it is centred and not divided by zero.
        """
        mean = self.key_sum / self.count
        variance = (self.key_square_sum / self.count - mean.square()).clamp(min=0)
        scale = mean.square() + 1
        std = torch.where(variance > 1e-10 * scale, variance.sqrt(), torch.ones_like(variance))
        return mean.float(), std.float(), (self.target_sum / self.target_count).float()
