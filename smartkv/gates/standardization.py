"""Streamed mean and standard deviation of the keys of each head, which standardise the inputs of gates."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from smartkv.errors import SmartKVError


@dataclass
class Moments:
    """Sums over rows of keys and targets, in float64.

    Attributes:
        count: Number of rows, a scalar.
        key_sum: `[gates, head_dim]`.
        key_square_sum: `[gates, head_dim]`.
        target_sum: `[gates, outputs]`, over the targets that are known (not NaN).
        target_count: `[gates, outputs]`, number of known targets.
    """

    count: Tensor
    key_sum: Tensor
    key_square_sum: Tensor
    target_sum: Tensor
    target_count: Tensor

    @classmethod
    def zeros(cls, gates: int, head_dim: int, outputs: int = 1, device: torch.device | str = "cpu") -> "Moments":
        """Start from no rows."""

        def zero(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        sums = (zero(gates, head_dim), zero(gates, head_dim), zero(gates, outputs), zero(gates, outputs))
        return cls(zero(), *sums)

    def update(self, keys: Tensor, target: Tensor) -> None:
        """Add rows to the sums.

        Args:
            keys: `[gates, rows, head_dim]`, any float dtype.
            target: `[gates, rows, outputs]`; NaN where a target is unknown.
        """
        self.count += keys.shape[1]
        # One gate at a time: in float64 a window of all gates takes gigabytes, one gate fits in the CPU's caches.
        for gate, gate_keys in enumerate(keys):
            keys64 = gate_keys.double()
            self.key_sum[gate] += keys64.sum(dim=0)
            self.key_square_sum[gate] += (keys64 * keys64).sum(dim=0)
        self.target_sum += target.double().nansum(dim=1)
        self.target_count += (~target.isnan()).sum(dim=1)

    def tensors(self) -> list[Tensor]:
        """Return the sums themselves, to be reduced over processes in place."""
        return [self.count, self.key_sum, self.key_square_sum, self.target_sum, self.target_count]

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the statistics of the rows so far.

        A dimension that never varies gets the standard deviation 1, so that it is centred and not divided by zero.

        Returns:
            Mean of the keys `[gates, head_dim]`, their standard deviation `[gates, head_dim]`, and mean of the known
            targets `[gates, outputs]`, all float32.
        """
        mean = self.key_sum / self.count
        variance = (self.key_square_sum / self.count - mean.square()).clamp(min=0)
        scale = mean.square() + 1
        std = torch.where(variance > 1e-10 * scale, variance.sqrt(), torch.ones_like(variance))
        return mean.float(), std.float(), (self.target_sum / self.target_count).float()


def key_moments(keys: Iterable[list[Tensor]], layers: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Compute mean and standard deviation of the keys of some windows.

    Args:
        keys: Of each window, of each layer of the model `[1, kv_heads, tokens, head_dim]`, any float dtype.
        layers: Indices of the layers that have gates.

    Returns:
        Both float32 `[gates, head_dim]`, on the CPU, ordered by layer and head.
    """
    moments = None
    for window in keys:
        rows = torch.cat([window[layer][0].cpu() for layer in layers])
        moments = moments or Moments.zeros(rows.shape[0], rows.shape[2])
        moments.update(rows, rows.new_empty(rows.shape[0], 0, 1))
    if moments is None:
        raise SmartKVError("mean and standard deviation of keys need at least one window")
    mean, std, _ = moments.result()
    return mean, std
