"""Figures of the order in which scores put keys, window by window. Gates of every objective have them."""

from typing import Any

import torch
from torch import Tensor

from smartkv.errors import SmartKVError
from smartkv.metrics.bootstrap import bootstrap, mean_over
from smartkv.metrics.ranking import concordance, top_share
from smartkv.shards.labelled_keys import LabelledKeys
from smartkv.shards.manifest import RowBlock

SHARES = (0.1, 0.25)  # of the keys
AGE = 128  # tokens; of the harvested ages, future attention is taken from the one nearest to this
COMPARED = 256  # evenly spread keys of a window, all pairs of which are compared
ORACLE = "oracle"
MEANING = {
    "concordance": "share of pairs of keys of a head with different lifespans that are in order",
    "top_10": "share of future attention held by the top tenth of each head's keys, mean over heads",
    "top_25": "the same of a quarter",
    "top_10_all": "the same of a tenth of all heads' keys, by one price",
    "top_25_all": "the same of a quarter",
}


class RankingScores:
    """Order figures of each named score on each window; sinks are left out.

    Args:
        rows: labelled keys. Without future attention there is only the concordance.
    """

    def __init__(self, rows: LabelledKeys) -> None:
        self.rows = rows
        self.figures: dict[str, dict[str, list[float]]] = {}
        ages = rows.manifest.spec.ages
        self.age = min(ages, key=lambda age: abs(age - AGE)) if ages else None

    def note(self, name: str, window: int, score: Tensor, block: RowBlock) -> None:
        """Add the figures of one window.

        Args:
            name: of the score.
            window: number of the window.
            score: float `[gates, rows]`; a higher one means a key to keep.
            block: the window's rows.
        """
        labels = self.rows.labels(block)
        figures = self.figures.setdefault(name, {})
        spread = torch.linspace(0, score.shape[1] - 1, min(COMPARED, score.shape[1])).long()
        pairs = concordance(score[:, spread], labels.log4_lifespan[:, spread])
        figures.setdefault("concordance", []).append(float(pairs.nanmean()))
        if self.age is not None:
            future = self._future(block)
            known = ~future.isnan().any(dim=0)
            for share in SHARES:
                each, together = top_share(score[:, known], future[:, known], share)
                figures.setdefault(f"top_{share * 100:.0f}", []).append(float(each.nanmean()))
                figures.setdefault(f"top_{share * 100:.0f}_all", []).append(float(together))

    def oracle(self, window: int, block: RowBlock) -> None:
        """Add the figures of the true labels: future attention, or lifespans where there is none."""
        known = self.age is not None
        self.note(ORACLE, window, self._future(block).nan_to_num(0.0) if known else self.rows.target(block), block)

    def _future(self, block: RowBlock) -> Tensor:
        labels = self.rows.labels(block)
        if labels.future_attention is None or self.age is None:
            raise SmartKVError("these shards hold no future attention: harvest them with ages")
        return labels.future_attention[labels.ages.index(self.age)]

    def summary(self) -> dict[str, dict[str, Any]]:
        """Return of each name and figure the mean over windows and its 95 % interval."""
        return {
            name: {figure: _mean(values) for figure, values in figures.items()}
            for name, figures in self.figures.items()
        }


def _mean(values: list[float]) -> dict[str, Any]:
    each = torch.tensor(values, dtype=torch.float64)
    interval = bootstrap(len(each), lambda weight: mean_over(weight, each))
    return {"mean": float(each.mean()), "interval_95": list(interval)}
