"""Confidence intervals by bootstrap over windows or groups of windows."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def mean_over(weight: Tensor, values: Tensor) -> Tensor:
    """Compute the weighted mean over windows.

    Args:
        weight: How often each window counts, `[draws, windows]`.
        values: A figure of each window, `[windows]`.

    Returns:
        `[draws]`.
    """
    return weight @ values / weight.sum(dim=-1)


def bootstrap(
    windows: int,
    statistic: Callable[[Tensor], Tensor],
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
    groups: Sequence[int] | None = None,
) -> tuple[float, float]:
    """Compute the percentile bootstrap interval of a statistic of windows (Efron 1979).

    Args:
        windows: Number of windows, which are drawn with replacement.
        statistic: Function of the weights, float64 `[draws, windows]`, that say how often each window was drawn. It
            returns `[draws]`. Draws for which it is NaN are left out.
        draws: Number of draws.
        level: Confidence level.
        seed: Seed of the draws.
        groups: Number of each window's group, such as its book, `[windows]`. Whole groups are drawn then.

    Returns:
        The lower and the upper end.
    """
    generator = torch.Generator().manual_seed(seed)
    group_of_window = torch.tensor(range(windows) if groups is None else groups).unique(return_inverse=True)[1]
    count = int(group_of_window.max()) + 1
    drawn = torch.randint(count, (draws, count), generator=generator)
    weight = torch.zeros(draws, count, dtype=torch.float64).scatter_add_(1, drawn, torch.ones_like(drawn).double())
    weight = weight[:, group_of_window]
    edges = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = statistic(weight).nanquantile(edges).tolist()
    return low, high
