"""Schedules of the keep ratio, the share of keys that stay at a training step."""

from abc import ABC, abstractmethod
from typing import Any

from smartkv.errors import SmartKVError
from smartkv.io.class_names import Persisted


class Schedule(Persisted, ABC):
    """Base class of schedules of the keep ratio. Their state is saved and restored exactly.

    Attributes:
        needs_end: Whether the ratio depends on the total number of steps.
        needs_validation: Whether the ratio changes at validations alone.
    """

    needs_end = False
    needs_validation = False

    @abstractmethod
    def keep_ratio(self, step: int, steps: int) -> float:
        """Compute the share of keys, anchors not counted, that stay at a step.

        Args:
            step: Index of the step.
            steps: Total number of steps.
        """

    def validated(self, cost: float) -> None:
        """Take note of a validation.

        Args:
            cost: NLL under eviction minus NLL with a full cache, in nats per token.
        """
        return

    def state_dict(self) -> dict[str, Any]:
        """Return all that changes during training, for JSON."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        return


def _check(**shares: float) -> None:
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise SmartKVError(f"{name} must be between 0 and 1, got {share}")


class Fixed(Schedule):
    """A constant keep ratio.

    Args:
        ratio: Share of the keys that stay.

    Raises:
        SmartKVError: The share is not between 0 and 1.
    """

    def __init__(self, ratio: float = 0.5) -> None:
        _check(ratio=ratio)
        self.ratio, self.arguments = ratio, {"ratio": ratio}

    def keep_ratio(self, step: int, steps: int) -> float:
        """Return the ratio."""
        return self.ratio


class Linear(Schedule):
    """A linear curriculum, usually from easy to hard.

    Args:
        start: Share of the keys that stay at the first step.
        end: Share of the keys that stay at the last step.

    Raises:
        SmartKVError: A share is not between 0 and 1.
    """

    needs_end = True

    def __init__(self, start: float = 0.9, end: float = 0.3) -> None:
        _check(start=start, end=end)
        self.start, self.end, self.arguments = start, end, {"start": start, "end": end}

    def keep_ratio(self, step: int, steps: int) -> float:
        """Interpolate between `start` and `end`."""
        share = min(1.0, max(0, step) / max(1, steps - 1))
        return self.start + (self.end - self.start) * share


class Adaptive(Schedule):
    """A curriculum that becomes harder while the model keeps up.

    After a validation in which eviction at the current ratio cost at most `tolerance`, the ratio falls by `change`.
    After a validation in which it cost more, the ratio rises by `change`. It stays between `end` and `start`. From 0.9
    to 0.3 by 0.05 takes at least twelve validations.

    Args:
        start: Highest share of the keys that stay, with which the training begins.
        end: Lowest share of the keys that stay.
        change: Change of the share at a validation.
        tolerance: Cost of eviction in nats per token; 0.05 is 5 % of perplexity.

    Raises:
        SmartKVError: A share is not between 0 and 1, `end` is above `start`, or the tolerance is below 0.
    """

    needs_validation = True

    def __init__(self, start: float = 0.9, end: float = 0.3, change: float = 0.05, tolerance: float = 0.05) -> None:
        _check(start=start, end=end, change=change)
        if end > start or tolerance < 0:
            raise SmartKVError(
                f"end must be at most start and tolerance at least 0, got end {end}, start {start} and "
                f"tolerance {tolerance}"
            )
        self.start, self.end, self.change, self.tolerance = start, end, change, tolerance
        self.arguments = {"start": start, "end": end, "change": change, "tolerance": tolerance}
        self.ratio = start

    def keep_ratio(self, step: int, steps: int) -> float:
        """Return the current ratio."""
        return self.ratio

    def validated(self, cost: float) -> None:
        """Lower or raise the ratio."""
        change = -self.change if cost <= self.tolerance else self.change
        self.ratio = min(self.start, max(self.end, self.ratio + change))

    def state_dict(self) -> dict[str, Any]:
        """Return the current ratio."""
        return {"ratio": self.ratio}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the ratio."""
        self.ratio = state["ratio"]
