"""How well scores put keys in order, whatever they are scores of: what a cache needs of them."""

from dataclasses import dataclass

import torch
from torch import Tensor

AT_ONCE = 8  # gates whose pairs of keys are compared together: rows² each


def top_share(score: Tensor, future: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Share of all future attention that the keys of the highest scores hold; among ties, what is expected of a draw.

    Args:
        score: `[gates, rows]`.
        future: future attention of the same keys, at least 0.
        share: of the keys that are kept, in (0, 1).

    Returns:
        Of each gate by itself, float64 `[gates]` (NaN where nothing is looked at), and of all together, by one price,
        float64 scalar.
    """
    score, future = score.double(), future.double()
    return _held(score, future, share), _held(score.flatten()[None], future.flatten()[None], share)[0]


def _held(score: Tensor, future: Tensor, share: float) -> Tensor:
    count = score.shape[1] * share
    ordered = score.sort(dim=1, descending=True).values
    price = ordered[:, min(score.shape[1] - 1, int(count))][:, None]
    above, tied = score > price, score == price
    drawn = (count - above.sum(dim=1)) / tied.sum(dim=1)
    return ((future * above).sum(dim=1) + drawn * (future * tied).sum(dim=1)) / future.sum(dim=1)


def concordance(score: Tensor, lifespan: Tensor) -> Tensor:
    """Share of the pairs of keys with different lifespans that the scores put in the same order, ties for a half
    (Harrell's C, without censoring: every key was followed up as long).

    Args:
        score, lifespan: `[gates, rows]`; lifespans in any rising unit.

    Returns:
        float64 `[gates]`; NaN where all lifespans are equal.
    """
    found = []
    for scores, lives in zip(score.split(AT_ONCE), lifespan.split(AT_ONCE), strict=True):
        longer = lives[:, :, None] > lives[:, None, :]
        ahead = (scores[:, :, None] > scores[:, None, :]) & longer
        tied = (scores[:, :, None] == scores[:, None, :]) & longer
        right = ahead.sum(dim=(1, 2)).double() + 0.5 * tied.sum(dim=(1, 2))
        found.append(right / longer.sum(dim=(1, 2)))
    return torch.cat(found)


@dataclass
class Reliability:
    """Predicted probabilities against what happened, in bins of equal width.

    Attributes:
        count, predicted, happened: float64 `[outcomes, bins]`: how many, the sum of their
            probabilities, how many were so.
    """

    count: Tensor
    predicted: Tensor
    happened: Tensor

    @classmethod
    def zeros(cls, outcomes: int, bins: int = 10) -> "Reliability":
        return cls(*(torch.zeros(outcomes, bins, dtype=torch.float64) for _ in range(3)))

    def update(self, probability: Tensor, outcome: Tensor) -> None:
        """`probability` and `outcome` (0 or 1): `[…, outcomes]`."""
        outcomes, bins = self.count.shape
        probability = probability.double().reshape(-1, outcomes)
        place = (probability * bins).long().clamp(0, bins - 1) + bins * torch.arange(outcomes)
        for total, value in (
            (self.count, torch.ones_like(probability)),
            (self.predicted, probability),
            (self.happened, outcome.double().reshape(-1, outcomes)),
        ):
            total.view(-1).index_add_(0, place.flatten(), value.flatten())

    def error(self) -> Tensor:
        """Expected calibration error: mean distance of a bin's mean probability from its share of outcomes, weighted by
        how many it holds (Naeini et al. 2015); float64 `[outcomes]`."""
        return (self.predicted - self.happened).abs().sum(dim=1) / self.count.sum(dim=1)
