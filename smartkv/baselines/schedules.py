"""When keys go, and how many stay: the same number in every head, as these methods are published."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch

from smartkv.errors import FootprintOutOfReach, SmartKVError


class Schedule(Protocol):
    """Attributes `window`, `sinks`: the latest and the first tokens, which always stay."""

    window: int
    sinks: int

    def blocks(self, tokens: int) -> Iterator[tuple[int, int, int | None]]:
        """(first token, token after the last, keys that each head keeps after it; None: all it has)."""


def _check(budget: int, window: int, sinks: int) -> None:
    if min(window, sinks) < 0 or window < 1:
        raise SmartKVError(f"window must be at least 1 and sinks at least 0, got {window} and {sinks}")
    if budget < window + sinks:
        raise SmartKVError(
            f"a budget of {budget} keys has no room for {sinks} sinks and a window of {window}: give a larger one"
        )


@dataclass(frozen=True)
class Streaming:
    """Text is read `chunk` tokens at a time; after each chunk every head keeps `budget` keys.

    A query sees what was kept, and its own chunk up to itself.
    """

    budget: int
    window: int
    sinks: int = 4
    chunk: int = 32

    def __post_init__(self) -> None:
        _check(self.budget, self.window, self.sinks)
        if self.chunk < 1:
            raise SmartKVError(f"chunk must be at least 1 token, got {self.chunk}")

    def blocks(self, tokens: int) -> Iterator[tuple[int, int, int | None]]:
        for start in range(0, tokens, self.chunk):
            yield start, min(start + self.chunk, tokens), self.budget

    @classmethod
    def for_footprint(
        cls, footprint: float, tokens: int, first_query: int, recent: float = 0.25, sinks: int = 4, chunk: int = 32
    ) -> "Streaming":
        """The largest budget with which the queries `first_query ≤ i < tokens − 1` see at most that share of a full
        cache; of it, the share `recent` is the window.

        Raises:
            FootprintOutOfReach: sinks and chunk alone are more.
        """
        if not 0 < recent <= 1 or not 0 <= first_query < tokens - 1:
            raise SmartKVError(
                f"recent must lie in (0, 1] and first_query in the text, got {recent} and {first_query} of {tokens}"
            )
        query = torch.arange(first_query, tokens - 1)
        start = query - query % chunk

        def share(budget: int) -> float:
            return int((start.clamp(max=budget) + query - start + 1).sum()) / int((query + 1).sum())

        low, high = sinks + 1, tokens
        if share(low) > footprint:
            raise FootprintOutOfReach(
                f"{sinks} sinks and chunks of {chunk} tokens are more than {footprint:.3g} of the cache"
            )
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if share(middle) <= footprint else (low, middle - 1)
        return cls(low, max(1, int(recent * (low - sinks))), sinks, chunk)


@dataclass(frozen=True)
class Once:
    """The first `prefill` tokens are read with a full cache, then every head keeps `budget` of their keys; all later
    ones stay. (The setting of NVIDIA's kvpress.)"""

    prefill: int
    budget: int
    window: int
    sinks: int = 4
    block: int = 128

    def __post_init__(self) -> None:
        _check(self.budget, self.window, self.sinks)
        if self.prefill < 1:
            raise SmartKVError(f"prefill must be at least 1 token, got {self.prefill}")

    def blocks(self, tokens: int) -> Iterator[tuple[int, int, int | None]]:
        edges = [*range(0, min(self.prefill, tokens), self.block), *range(self.prefill, tokens, self.block), tokens]
        for start, stop in pairwise(edges):
            yield start, stop, self.budget if stop == self.prefill else None
