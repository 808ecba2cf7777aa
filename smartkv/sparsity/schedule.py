"""How many keys stay at each step of a training."""

from abc import ABC, abstractmethod
from typing import Any

from smartkv.errors import SmartKVError


class Schedule(ABC):
    """`keep_ratio` of a step; state is saved and restored exactly."""

    @abstractmethod
    def keep_ratio(self, step: int, steps: int) -> float:
        """Share of the keys that stay, anchors apart, at `step` of `steps`."""

    def validated(self, loss: float) -> None:
        """Called after each validation, with its loss under eviction, nats a token."""
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
        self.ratio = ratio

    def keep_ratio(self, step: int, steps: int) -> float:
        return self.ratio


class Linear(Schedule):
    """A curriculum: from easy to hard in a straight line.

    Args:
        start, end: shares of the keys that stay at the first step and at the last.
    """

    def __init__(self, start: float = 0.9, end: float = 0.3) -> None:
        _check(start=start, end=end)
        self.start, self.end = start, end

    def keep_ratio(self, step: int, steps: int) -> float:
        share = min(1.0, max(0, step) / max(1, steps - 1))
        return self.start + (self.end - self.start) * share


class Adaptive(Schedule):
    """Harder as long as the model keeps up.

    After a validation whose loss is at most `tolerance` above the best so far, the ratio falls by `change`; after a
    worse one it rises by as much. It stays between `end` and `start`.

    Args:
        start, end: highest and lowest share of the keys that stay; it begins with the highest.
        change: of the ratio, at a validation.
        tolerance: nats a token.
    """

    def __init__(self, start: float = 0.9, end: float = 0.3, change: float = 0.05, tolerance: float = 0.02) -> None:
        _check(start=start, end=end, change=change)
        if end > start or tolerance < 0:
            raise SmartKVError(f"end must be at most start, tolerance at least 0, got {start}, {end}, {tolerance}")
        self.start, self.end, self.change, self.tolerance = start, end, change, tolerance
        self.ratio, self.best = start, float("inf")

    def keep_ratio(self, step: int, steps: int) -> float:
        return self.ratio

    def validated(self, loss: float) -> None:
        fine = loss <= self.best + self.tolerance
        self.best = min(self.best, loss)
        self.ratio = min(self.start, max(self.end, self.ratio + (-self.change if fine else self.change)))

    def state_dict(self) -> dict[str, Any]:
        return {"ratio": self.ratio, "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ratio, self.best = state["ratio"], state["best"]
