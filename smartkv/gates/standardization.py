"""Mean and standard deviation of the keys of each head, which standardise the inputs of gates in training.

The keys of some models have biases of hundreds of times their spread, as in layer 0 of Qwen2.5. On raw keys one step of
Adam would throw such a gate far from all prices, where no gradient reaches it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smartkv.errors import SmartKVError
from smartkv.gates.bank import GateBank


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


class StandardizedGates(nn.Module):
    """Gates that learn on standardised keys while they decide in a language model.

    Args:
        gates: Gates for raw keys. They say the same here.
        keys: Keys whose mean and standard deviation are taken, as in `key_moments`.

    Attributes:
        bank: The gates on standardised keys, which are trained.
        key_mean: Mean of the keys, float32 `[gates, head_dim]`.
        key_std: Their standard deviation, like `key_mean`.
    """

    key_mean: Tensor
    key_std: Tensor

    def __init__(self, gates: GateBank, keys: Iterable[list[Tensor]]) -> None:
        super().__init__()
        mean, std = (moment.to(gates.device) for moment in key_moments(keys, gates.layers))
        self.register_buffer("key_mean", mean)
        self.register_buffer("key_std", std)
        self.bank = gates.unfolded(mean, std)

    @property
    def layers(self) -> list[int]:
        """Indices of the layers that have gates."""
        return self.bank.layers

    def predict(self, layer: int, keys: Tensor) -> Tensor:
        """Predict with the gates of one layer from raw keys, like `GateBank.predict`."""
        first = self.layers.index(layer) * keys.shape[1]
        gates = slice(first, first + keys.shape[1])
        return self.bank.predict(layer, (keys.float() - self.key_mean[gates, None]) / self.key_std[gates, None])

    def raw(self) -> GateBank:
        """Return a copy for raw keys."""
        return self.bank.folded(self.key_mean, self.key_std)

    def named_as_here(self, state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """Return a checkpoint's tensors under the names of this module, also those of SmartKV 0.1.

        Gates were then trained on raw keys. They go on with a mean of 0 and a standard deviation of 1.

        Args:
            state: Tensors by name.
            prefix: Of this module's names, such as `bank.`.
        """
        if f"{prefix}weight1" not in state:
            return state
        names = ("weight1", "bias1", "weight2", "bias2")
        moved = {f"{prefix}bank.{name}": state[f"{prefix}{name}"] for name in names}
        units = {"key_mean": torch.zeros_like(self.key_mean), "key_std": torch.ones_like(self.key_std)}
        rest = {name: tensor for name, tensor in state.items() if name.removeprefix(prefix) not in names}
        return rest | moved | {f"{prefix}{name}": tensor for name, tensor in units.items()}
