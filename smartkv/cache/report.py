"""CacheReport: what a cache holds beside what it may hold, by layer."""

from dataclasses import dataclass
from typing import Any

from smartkv.cache.footprint_count import DEATH_AGES
from smartkv.cache.usage import CacheUsage
from smartkv.policies.planned_budget import Budget

HEADINGS = ["layer", "budget", "held", "of full", "kB", "price"]
AGES = ["<" + str(age) for age in DEATH_AGES] + [f"≥{DEATH_AGES[-1]}"]


@dataclass(frozen=True)
class LayerReport:
    """One layer. Keys are a KV head and row, in the mean.

    Attributes:
        budget: keys it may hold; None: the layer has no budget.
        held: keys that the next query sees.
        full: keys of a full cache.
        bytes: of its storage, for all rows.
        price: the floating price, mean over rows; None: it has none.
        deaths: keys of all rows and heads that were freed, by age: younger than each of `DEATH_AGES`, and older.
    """

    budget: float | None
    held: float
    full: float
    bytes: int
    price: float | None
    deaths: list[int]


@dataclass(frozen=True)
class CacheReport:
    """What a cache holds. `print` shows it as a table.

    Attributes:
        asked: what the user asked for; None: the policy decides.
        tokens: in the cache, padding included.
        storage_bytes, peak_bytes: as in `CacheUsage`.
        layers: one entry per layer.
    """

    asked: str | None
    tokens: int
    storage_bytes: int
    peak_bytes: int
    layers: list[LayerReport]

    @classmethod
    def of(cls, cache: CacheUsage, asked: Budget | None, tokens: int) -> "CacheReport":
        """Read a cache that has seen a token."""
        layers = []
        for storage in cache.storage:
            heads, limit = storage.kv_heads, storage.limit
            seen = (storage.seen + storage.pending).double()
            layers.append(
                LayerReport(
                    None if limit.budget is None else float(limit.budget.double().mean()) / heads,
                    float(storage.live.double().mean()),
                    float(seen.clamp(max=storage.sliding_window).mean()),
                    storage.storage_bytes,
                    float(limit.prices.now.mean()) if limit.floats else None,
                    storage.deaths.tolist(),
                )
            )
        return cls(None if asked is None else str(asked), tokens, cache.storage_bytes, cache.peak_bytes, layers)

    @property
    def budget(self) -> float | None:
        """Keys a KV head that the layers may hold, mean over layers; None: a layer has no budget."""
        budgets = [layer.budget for layer in self.layers]
        return None if None in budgets else sum(each for each in budgets if each is not None) / len(budgets)

    @property
    def held(self) -> float:
        """Keys a KV head that the next query sees, mean over layers."""
        return sum(layer.held for layer in self.layers) / len(self.layers)

    @property
    def full(self) -> float:
        """Keys a KV head of a full cache, mean over layers."""
        return sum(layer.full for layer in self.layers) / len(self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON holds it."""
        layers = [dict(layer.__dict__) for layer in self.layers]
        return {**self.__dict__, "layers": layers, "budget": self.budget, "held": self.held}

    def __str__(self) -> str:
        """Return a table: keys are a KV head and row."""
        rows = [[str(number), *_cells(layer)] for number, layer in enumerate(self.layers)]
        deaths = [sum(layer.deaths[n] for layer in self.layers) for n in range(len(AGES))]
        whole = LayerReport(self.budget, self.held, self.full, self.storage_bytes, None, deaths)
        rows = [[*HEADINGS, *AGES], *rows, ["all", *_cells(whole)]]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        title = f"{self.asked or 'as the policy says'}: {self.tokens:,} tokens, {self.storage_bytes / 1e6:.1f} MB"
        ages = "budget and held: keys a KV head; last columns: keys that were freed, by age in tokens"
        return "\n".join([f"{title} (at most {self.peak_bytes / 1e6:.1f} MB)", *lines, ages])


def _cells(layer: LayerReport) -> list[str]:
    """Return the columns of the table after the first."""
    budget = "" if layer.budget is None else f"{layer.budget:.1f}"
    price = "" if layer.price is None else f"{layer.price:.2f}"
    share = f"{layer.held / layer.full:.1%}" if layer.full else ""
    return [budget, f"{layer.held:.1f}", share, f"{layer.bytes / 1e3:,.0f}", price, *(f"{n:,}" for n in layer.deaths)]
