"""What a model's attention looks like on real text: its distribution, and where its pre-RoPE keys are."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smartkv.labels.lifespans import LabelSpec, LayerLabels
from smartkv.models.backbone import Backbone
from smartkv.models.observation import observe_attention

PERCENTILES = (50, 75, 90, 95, 99, 99.9)
SUGGESTED = 99  # the percentile that is suggested as threshold
_SHIFT = 13  # float32 bits dropped: 10 bits of mantissa stay, bins 0.1 % wide
_BINS = (0x3F800000 >> _SHIFT) + 1  # up to probability 1.0


@dataclass
class AttentionDistribution:
    """Distribution of attention probabilities over all causal (query, key) pairs and query heads of some layers.

    Positive floats sort like their bits: a histogram over the leading bits gives any percentile to 0.1 % in one pass.
    What a sliding window hides counts as probability 0.
    """

    counts: Tensor
    total: float = 0.0
    sinks: float = 0.0
    rows: int = 0
    low: float = float("inf")
    high: float = 0.0

    @classmethod
    def empty(cls) -> "AttentionDistribution":
        return cls(torch.zeros(_BINS, dtype=torch.int64))

    def update(self, first_query: int, probabilities: Tensor, sinks: int) -> None:
        """`probabilities`: float32 `[kv_heads, group, queries, keys]`, zero in each query's future."""
        kv_heads, group, queries, _ = probabilities.shape
        bits = probabilities.contiguous().view(torch.int32) >> _SHIFT
        self.counts += torch.bincount(bits.flatten(), minlength=_BINS).cpu()
        self.counts[0] -= kv_heads * group * queries * (queries - 1) // 2  # the block's corner of future keys
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
        return cls(
            torch.stack([p.counts for p in parts]).sum(dim=0),
            sum(p.total for p in parts),
            sum(p.sinks for p in parts),
            sum(p.rows for p in parts),
            min(p.low for p in parts),
            max(p.high for p in parts),
        )

    def percentile(self, percent: float) -> float:
        """The probability below which `percent` of the pairs lie."""
        below = self.counts.cumsum(0)
        wanted = percent / 100 * int(below[-1])
        place = int(torch.searchsorted(below, torch.tensor(wanted, dtype=torch.float64)))
        edges = _edges()
        before = int(below[place - 1]) if place else 0
        inside = (wanted - before) / max(1, int(self.counts[place]))
        return min(float(edges[place] + inside * (edges[place + 1] - edges[place])), self.high)

    def share_above(self, threshold: float) -> dict[str, float]:
        """`pairs`: share of the pairs above the threshold; `attention`: share of the probability that these hold."""
        edges = _edges()
        middle = (edges[:-1] + edges[1:]) / 2
        above = middle > threshold
        mass = self.counts * middle
        return {
            "pairs": float(self.counts[above].sum() / self.counts.sum()),
            "attention": float(mass[above].sum() / mass.sum()),
        }

    def summary(self, thresholds: list[float]) -> dict[str, Any]:
        """Figures for reports; probabilities, and shares in 0–1."""
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
    """Edges of the bins, float64 `[bins + 1]`."""
    return (torch.arange(_BINS + 1, dtype=torch.int32) << _SHIFT).view(torch.float32).double()


class AttentionDistributionObserver:
    """Distribution of attention and labels, layer by layer, over the windows of a run."""

    def __init__(self, layers: int, spec: LabelSpec, sinks: int) -> None:
        self.spec, self.sinks = spec, sinks
        self.distributions = [AttentionDistribution.empty() for _ in range(layers)]
        self.lifespans: list[Tensor] = []  # a window each: int32 [thresholds, layers, kv_heads, tokens]
        self._labels: list[LayerLabels] = []

    def on_keys(self, layer: int, keys: Tensor) -> None:
        self._labels.append(LayerLabels(self.spec, keys.shape[0], keys.shape[1], keys.device))

    def on_rotated_keys(self, layer: int, keys: Tensor) -> None:
        pass

    def on_tile(self, layer: int, first_query: int, probabilities: Tensor) -> None:
        self._labels[layer].update(first_query, probabilities)
        self.distributions[layer].update(first_query, probabilities, self.sinks)

    @torch.inference_mode()
    def run(self, backbone: Backbone, tokens: Tensor) -> None:
        """One window, `[tokens]`."""
        self._labels = []
        with observe_attention(backbone.model, self):
            backbone.model.base_model(input_ids=tokens.long()[None].to(backbone.model.device), use_cache=False)
        self.lifespans.append(torch.stack([labels.lifespan for labels in self._labels], dim=1).cpu())
