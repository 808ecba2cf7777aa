"""How many keys stay at each step of a training."""

from abc import ABC, abstractmethod
from typing import Any

from smartkv.errors import SmartKVError
from smartkv.io.class_names import Persisted


class Schedule(Persisted, ABC):
    """`keep_ratio` of a step; state is saved and restored exactly.

    Attributes:
        needs_end: the ratio hangs on how many steps there will be.
    """

    needs_end = False

    @abstractmethod
    def keep_ratio(self, step: int, steps: int) -> float:
        """Share of the keys that stay, anchors apart, at `step` of `steps`."""

    def validated(self, cost: float) -> None:
        """Called after each validation, with what eviction cost then: NLL under it less NLL with a full cache, nats a
        token."""
        return

    def state_dict(self) -> dict[str, Any]:
        """For JSON: all that changes while it runs."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        return


def _check(**shares: float) -> None:
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise SmartKVError(f"{name} must be between 0 and 1, got {share}")


class Fixed(Schedule):
    """The same all the time.

    Args:
        ratio: share of the keys that stay.
    """

    def __init__(self, ratio: float = 0.5) -> None:
        _check(ratio=ratio)
        self.ratio, self.arguments = ratio, {"ratio": ratio}

    def keep_ratio(self, step: int, steps: int) -> float:
        return self.ratio


class Linear(Schedule):
    """A curriculum: from easy to hard in a straight line.

    Args:
        start, end: shares of the keys that stay at the first step and at the last.
    """

    needs_end = True

    def __init__(self, start: float = 0.9, end: float = 0.3) -> None:
        _check(start=start, end=end)
        self.start, self.end, self.arguments = start, end, {"start": start, "end": end}

    def keep_ratio(self, step: int, steps: int) -> float:
        share = min(1.0, max(0, step) / max(1, steps - 1))
        return self.start + (self.end - self.start) * share


class Adaptive(Schedule):
    """Harder as long as the model keeps up.

    After a validation in which eviction, at the ratio of then, cost at most `tolerance`, the ratio falls by `change`;
    after one in which it cost more it rises by as much. It stays between `end` and `start`: from 0.9 to 0.3 by 0.05
    takes twelve validations.

    Args:
        start, end: highest and lowest share of the keys that stay; it begins with the highest.
        change: of the ratio, at a validation.
        tolerance: nats a token; 0.05: 5 % of perplexity.
    """

    def __init__(self, start: float = 0.9, end: float = 0.3, change: float = 0.05, tolerance: float = 0.05) -> None:
        _check(start=start, end=end, change=change)
        if end > start or tolerance < 0:
            raise SmartKVError(f"end must be at most start, tolerance at least 0, got {start}, {end}, {tolerance}")
        self.start, self.end, self.change, self.tolerance = start, end, change, tolerance
        self.arguments = {"start": start, "end": end, "change": change, "tolerance": tolerance}
        self.ratio = start

    def keep_ratio(self, step: int, steps: int) -> float:
        return self.ratio

    def validated(self, cost: float) -> None:
        change = -self.change if cost <= self.tolerance else self.change
        self.ratio = min(self.start, max(self.end, self.ratio + change))

    def state_dict(self) -> dict[str, Any]:
        return {"ratio": self.ratio}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ratio = state["ratio"]
