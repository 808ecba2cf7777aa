"""Ranking metrics: how well scores order the keys that a cache has to choose from."""

from dataclasses import dataclass

import torch
from torch import Tensor

AT_ONCE = 8  # gates compared in one step, which takes rows² of memory per gate


def top_share(score: Tensor, future: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Compute the share of all future attention that goes to the keys with the highest scores.

    Among ties it is the expected share of a random draw.

    Args:
        score: `[gates, rows]`.
        future: `[gates, rows]`, future attention of the same keys, at least 0.
        share: Share of the keys that are kept, in (0, 1).

    Returns:
        The share of each gate when each keeps its own best keys, float64 `[gates]` (NaN for a gate without any future
        attention), and the share when all gates keep the best keys of all by one price, float64 scalar.
    """
    score, future = score.double(), future.double()
    return _top_share(score, future, share), _top_share(score.flatten()[None], future.flatten()[None], share)[0]


def _top_share(score: Tensor, future: Tensor, share: float) -> Tensor:
    count = score.shape[1] * share
    ordered = score.sort(dim=1, descending=True).values
    price = ordered[:, min(score.shape[1] - 1, int(count))][:, None]
    above, tied = score > price, score == price
    drawn = (count - above.sum(dim=1)) / tied.sum(dim=1)
    return ((future * above).sum(dim=1) + drawn * (future * tied).sum(dim=1)) / future.sum(dim=1)


def concordance(score: Tensor, lifespan: Tensor) -> Tensor:
    """Compute the share of pairs of keys that the scores order as the lifespans do; tied scores count a half.

    Pairs with equal lifespans are left out. This is Harrell's C (Harrell et al. 1982) without censoring, since every
    key has the same follow-up.

    Args:
        score: `[gates, rows]`.
        lifespan: `[gates, rows]`, in any unit that rises with the lifespan.

    Returns:
        float64 `[gates]`; NaN where all lifespans are equal.
    """
    shares = []
    for scores, lifespans in zip(score.split(AT_ONCE), lifespan.split(AT_ONCE), strict=True):
        longer = lifespans[:, :, None] > lifespans[:, None, :]
        ahead = (scores[:, :, None] > scores[:, None, :]) & longer
        tied = (scores[:, :, None] == scores[:, None, :]) & longer
        right = ahead.sum(dim=(1, 2)).double() + 0.5 * tied.sum(dim=(1, 2))
        shares.append(right / longer.sum(dim=(1, 2)))
    return torch.cat(shares)


@dataclass
class Reliability:
    """Predicted probabilities beside observed outcomes, in bins of equal width.

    Attributes:
        count: Number of predictions, float64 `[outcomes, bins]`.
        predicted: Sum of their probabilities, float64 `[outcomes, bins]`.
        happened: Number of those that came true, float64 `[outcomes, bins]`.
    """

    count: Tensor
    predicted: Tensor
    happened: Tensor

    @classmethod
    def zeros(cls, outcomes: int, bins: int = 10) -> "Reliability":
        """Start from no predictions."""
        return cls(*(torch.zeros(outcomes, bins, dtype=torch.float64) for _ in range(3)))

    def update(self, probability: Tensor, outcome: Tensor) -> None:
        """Add predictions.

        Args:
            probability: `[…, outcomes]`, in [0, 1].
            outcome: `[…, outcomes]`, 0 or 1.
        """
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
        """Compute the expected calibration error (Naeini et al. 2015).

        It is the mean distance between a bin's mean probability and its share of true outcomes, weighted by the
        number of predictions in the bin.

        Returns:
            float64 `[outcomes]`.
        """
        return (self.predicted - self.happened).abs().sum(dim=1) / self.count.sum(dim=1)
