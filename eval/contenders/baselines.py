"""Published eviction rules as contenders. They need no training."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from eval.contenders.base import EvictionProtocol, Reading
from smartkv.baselines import (
    H2O,
    TOVA,
    ExpectedAttention,
    KeyDiff,
    KeyNorm,
    Method,
    Once,
    Random,
    Schedule,
    SnapKV,
    Streaming,
    simulated_eviction,
)
from smartkv.errors import FootprintOutOfReach
from smartkv.metrics.perplexity import query_before, token_losses
from smartkv.models.backbone import Backbone

METHODS: dict[str, Callable[[], Method]] = {
    "key_norm": KeyNorm,
    "keydiff": KeyDiff,
    "snapkv": SnapKV,
    "tova": TOVA,
    "h2o": H2O,
    "expected_attention": ExpectedAttention,
}
BASELINES = ("random", *METHODS)
SEEDS = (0, 1, 2, 3, 4)  # of `random`
SINKS = 4
# Share of a budget that goes to the latest tokens, whatever their score. Each is the one of 0.25, 0.5 and 0.75 that
# loses least on validation books (docs/experiments.md).
RECENT = {
    "random": 0.75,
    "key_norm": 0.75,
    "keydiff": 0.75,
    "snapkv": 0.5,
    "tova": 0.25,
    "h2o": 0.75,
    "expected_attention": 0.5,
}


@dataclass
class BaselineContender:
    """A method that keeps the same number of keys in every head. It is simulated by a mask, and nothing is freed.

    Attributes:
        lm: the model.
        name: its name in results.
        method: scores keys.
        tokens: tokens of a text for which budgets are solved.
        first_query: queries from this one on count for the footprint.
        protocol: stream or once.
        kind: see `Contender`.
    """

    lm: Backbone
    name: str
    method: Method
    tokens: int
    first_query: int
    protocol: EvictionProtocol
    kind: str = "rule"

    @property
    def recent(self) -> float:
        """Share of the budget that goes to the latest tokens."""
        return RECENT[self.name.partition(":")[0]]

    @property
    def needs(self) -> str:
        """Input at inference; see `Contender`."""
        return "nothing" if self.name.startswith("random") else self.method.needs

    def solved(self, footprint: float) -> Any:
        """Find the budget; see `Contender.solved`."""
        if self.protocol == "once":
            prefill = self.first_query + 1
            if round(footprint * prefill) <= SINKS:
                raise FootprintOutOfReach(f"{footprint:.3g} of {prefill} tokens leaves no key beside {SINKS} sinks")
            return {"share": footprint, "recent": self.recent}
        schedule = Streaming.for_footprint(footprint, self.tokens, self.first_query, self.recent, SINKS)
        return {"budget": schedule.budget, "window": schedule.window, "chunk": schedule.chunk}

    def read(self, setting: Any, tokens: Tensor, first_token: int, first_query: int, prefill: int | None) -> Reading:
        """Read a text under the simulated rule; see `Contender.read`."""
        schedule: Schedule
        if prefill is None:
            schedule = Streaming(setting["budget"], setting["window"], SINKS, setting["chunk"])  # type: ignore[assignment]
        else:
            budget = round(setting["share"] * prefill)
            window = max(1, int(setting["recent"] * (budget - SINKS)))
            schedule = Once(prefill, budget, window, SINKS)  # type: ignore[assignment]
        with simulated_eviction(self.lm.model, self.method, schedule) as simulation:
            losses = token_losses(self.lm.model, tokens, first_token)
        return Reading(*losses, float(simulation.footprint_by_head(first_query).mean()), None)


def baseline(
    name: str, lm: Backbone, tokens: int, first_token: int, protocol: EvictionProtocol, seed: int
) -> BaselineContender:
    """Make the contender of a published rule.

    Args:
        name: one of `BASELINES`.
        lm: the model.
        tokens: tokens of a window.
        first_token: tokens from this one on are scored.
        protocol: stream or once.
        seed: of `random`; other rules draw nothing.
    """
    if name == "random":
        return BaselineContender(lm, f"random:{seed}", Random(seed), tokens, query_before(first_token), protocol)
    return BaselineContender(lm, name, METHODS[name](), tokens, query_before(first_token), protocol)
