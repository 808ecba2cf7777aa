"""Confidence intervals by bootstrap over windows or documents."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def mean_over(weight: Tensor, values: Tensor) -> Tensor:
    """Weighted mean over windows: `[draws, windows]`, `[windows]` -> `[draws]`."""
    return weight @ values / weight.sum(dim=-1)


def bootstrap(
    windows: int,
    statistic: Callable[[Tensor], Tensor],
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
    groups: Sequence[int] | None = None,
) -> tuple[float, float]:
    """Percentile interval of a statistic when windows are drawn with replacement.

    Args:
        groups: of each window, a number such as its book's: whole groups are drawn then.
        statistic: how often each window counts, float64 `[draws, windows]` -> `[draws]`; a draw for which it is NaN is
            left out.
    """
    generator = torch.Generator().manual_seed(seed)
    member = torch.tensor(range(windows) if groups is None else groups).unique(return_inverse=True)[1]
    count = int(member.max()) + 1
    drawn = torch.randint(count, (draws, count), generator=generator)
    weight = torch.zeros(draws, count, dtype=torch.float64).scatter_add_(1, drawn, torch.ones_like(drawn).double())
    weight = weight[:, member]
    edges = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = statistic(weight).nanquantile(edges).tolist()
    return low, high
