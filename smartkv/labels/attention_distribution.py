"""Distribution of a model's attention probabilities on real text, from which a hit threshold is chosen."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smartkv.labels.lifespans import LabelSpec, LayerLabels
from smartkv.models.backbone import Backbone
from smartkv.models.observation import observe_attention
from smartkv.models.wrappers import input_device

PERCENTILES = (50, 75, 90, 95, 99, 99.9)
SUGGESTED = 99  # the percentile that is suggested as hit threshold
_SHIFT = 13  # low bits of a float32 that are dropped; 10 bits of mantissa stay, so a bin is 0.1 % wide
_BINS = (0x3F800000 >> _SHIFT) + 1  # 0x3F800000 is the float32 1.0


@dataclass
class AttentionDistribution:
    """Distribution of attention probabilities over all causal (query, key) pairs and query heads of some layers.

    Positive floats sort like their bits, so a histogram over the leading bits gives any percentile to 0.1 % in one
    pass. A key that a sliding window hides counts with probability 0.

    Attributes:
        counts: Pairs in each bin of probability, int64 `[bins]`.
        total: Sum of all probabilities.
        sinks: Sum of the probabilities on the sinks.
        rows: Number of queries, times query heads.
        low: Smallest probability.
        high: Largest probability.
    """

    counts: Tensor
    total: float = 0.0
    sinks: float = 0.0
    rows: int = 0
    low: float = float("inf")
    high: float = 0.0

    @classmethod
    def empty(cls) -> "AttentionDistribution":
        """Return a distribution over no pairs."""
        return cls(torch.zeros(_BINS, dtype=torch.int64))

    def update(self, first_query: int, probabilities: Tensor, sinks: int) -> None:
        """Add a tile of queries.

        Args:
            first_query: Position of the tile's first query.
            probabilities: float32 `[kv_heads, group, queries, keys]`, 0 in each query's future.
            sinks: Number of sinks.
        """
        kv_heads, group, queries, _ = probabilities.shape
        bits = probabilities.contiguous().view(torch.int32) >> _SHIFT
        self.counts += torch.bincount(bits.flatten(), minlength=_BINS).cpu()
        self.counts[0] -= kv_heads * group * queries * (queries - 1) // 2  # future keys are no pairs
        self.total += float(probabilities.sum(dtype=torch.float64))
        self.sinks += float(probabilities[..., :sinks].sum(dtype=torch.float64))
        self.rows += kv_heads * group * queries
        self.high = max(self.high, float(probabilities.amax()))
        future = torch.ones(queries, queries, dtype=torch.bool, device=probabilities.device).triu(1)
        self.low = min(self.low, float(probabilities[..., first_query:].masked_fill(future, torch.inf).amin()))
        if first_query:
            self.low = min(self.low, float(probabilities[..., :first_query].amin()))

    @classmethod
    def merged(cls, parts: "list[AttentionDistribution]") -> "AttentionDistribution":
        """Return the distribution over the pairs of all `parts` together."""
        return cls(
            torch.stack([part.counts for part in parts]).sum(dim=0),
            sum(part.total for part in parts),
            sum(part.sinks for part in parts),
            sum(part.rows for part in parts),
            min(part.low for part in parts),
            max(part.high for part in parts),
        )

    def percentile(self, percent: float) -> float:
        """Return the probability below which `percent` (0–100) of the pairs lie."""
        cumulative = self.counts.cumsum(0)
        rank = percent / 100 * int(cumulative[-1])
        bin_ = int(torch.searchsorted(cumulative, torch.tensor(rank, dtype=torch.float64)))
        edges = _edges()
        before = int(cumulative[bin_ - 1]) if bin_ else 0
        inside = (rank - before) / max(1, int(self.counts[bin_]))
        return min(float(edges[bin_] + inside * (edges[bin_ + 1] - edges[bin_])), self.high)

    def share_above(self, threshold: float) -> dict[str, float]:
        """Return two shares in 0–1 of what lies above a threshold.

        Returns:
            `pairs`: the share of the pairs. `attention`: the share of the summed probability that these pairs have.
        """
        edges = _edges()
        middle = (edges[:-1] + edges[1:]) / 2
        above = middle > threshold
        mass = self.counts * middle
        return {
            "pairs": float(self.counts[above].sum() / self.counts.sum()),
            "attention": float(mass[above].sum() / mass.sum()),
        }

    def summary(self, thresholds: list[float]) -> dict[str, Any]:
        """Return the figures of a report: counts, probabilities, and shares in 0–1.

        Args:
            thresholds: Thresholds for which `share_above` is reported, beside the suggested one.
        """
        suggested = self.percentile(SUGGESTED)
        return {
            "pairs": int(self.counts.sum()),
            "min": self.low,
            "max": self.high,
            "mean": self.total / int(self.counts.sum()),
            "median": self.percentile(50),
            "percentiles": {f"{p:g}": self.percentile(p) for p in PERCENTILES},
            "suggested_threshold": suggested,
            "share_above": {f"{t:.4g}": self.share_above(t) for t in [*thresholds, suggested]},
            "share_on_sinks": self.sinks / self.total,
        }


def _edges() -> Tensor:
    """Return the edges of the bins, float64 `[bins + 1]`."""
    return (torch.arange(_BINS + 1, dtype=torch.int32) << _SHIFT).view(torch.float32).double()


class AttentionDistributionObserver:
    """Attention observer that measures attention distributions and lifespans over several windows.

    Args:
        layers: Layers of the model.
        spec: Thresholds of the lifespans.
        sinks: Number of sinks.

    Attributes:
        distributions: The attention distribution of each layer.
        lifespans: For each window, int32 `[thresholds, layers, kv_heads, tokens]`.
    """

    def __init__(self, layers: int, spec: LabelSpec, sinks: int) -> None:
        self.spec, self.sinks = spec, sinks
        self.distributions = [AttentionDistribution.empty() for _ in range(layers)]
        self.lifespans: list[Tensor] = []
        self._labels: list[LayerLabels] = []

    def on_keys(self, layer: int, keys: Tensor) -> None:
        """Start the labels of a layer."""
        self._labels.append(LayerLabels(self.spec, keys.shape[0], keys.shape[1], keys.device))

    def on_rotated_keys(self, layer: int, keys: Tensor) -> None:
        """Do nothing: only attention is measured."""

    def on_tile(self, layer: int, first_query: int, probabilities: Tensor) -> None:
        """Add a tile of queries to the layer's labels and distribution."""
        self._labels[layer].update(first_query, probabilities)
        self.distributions[layer].update(first_query, probabilities, self.sinks)

    @torch.inference_mode()
    def run(self, backbone: Backbone, tokens: Tensor) -> None:
        """Measure one window, token ids `[tokens]`."""
        self._labels = []
        with observe_attention(backbone.model, self):
            backbone.model.base_model(input_ids=tokens.long()[None].to(input_device(backbone.model)), use_cache=False)
        self.lifespans.append(torch.stack([labels.lifespan.cpu() for labels in self._labels], dim=1))
