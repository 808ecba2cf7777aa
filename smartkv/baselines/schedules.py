"""Schedules of when keys are evicted and how many stay: the same number in every head, as published."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch

from smartkv.errors import FootprintOutOfReach, SmartKVError


class Schedule(Protocol):
    """When keys are evicted and how many stay.

    Attributes:
        window: Number of latest tokens that always stay.
        sinks: Number of tokens at the start that always stay.
    """

    window: int
    sinks: int

    def tiles(self, tokens: int) -> Iterator[tuple[int, int, int | None]]:
        """Cut a text into tiles of queries, after each of which keys may be evicted.

        Args:
            tokens: Length of the text.

        Yields:
            Index of the first token, index after the last token, and number of keys that each head keeps afterwards.
            None keeps all keys.
        """


def _check(budget: int, window: int, sinks: int) -> None:
    if min(window, sinks) < 0 or window < 1:
        raise SmartKVError(f"window must be at least 1 and sinks at least 0, got {window} and {sinks}")
    if budget < window + sinks:
        raise SmartKVError(
            f"a budget of {budget} keys has no room for {sinks} sinks and a window of {window}: "
            f"give at least {window + sinks}"
        )


@dataclass(frozen=True)
class Streaming:
    """Eviction after every chunk of tokens.

    A query sees the keys that were kept and its own chunk up to itself.

    Attributes:
        budget: Number of keys that each head keeps after each chunk.
        window: Number of latest tokens that always stay.
        sinks: Number of tokens at the start that always stay.
        chunk: Tokens per chunk.
    """

    budget: int
    window: int
    sinks: int = 4
    chunk: int = 32

    def __post_init__(self) -> None:
        _check(self.budget, self.window, self.sinks)
        if self.chunk < 1:
            raise SmartKVError(f"chunk must be at least 1 token, got {self.chunk}")

    def tiles(self, tokens: int) -> Iterator[tuple[int, int, int | None]]:
        """Cut a text into chunks, with an eviction after each."""
        for start in range(0, tokens, self.chunk):
            yield start, min(start + self.chunk, tokens), self.budget

    @classmethod
    def for_footprint(
        cls, footprint: float, tokens: int, first_query: int, recent: float = 0.25, sinks: int = 4, chunk: int = 32
    ) -> "Streaming":
        """Choose the largest budget whose footprint is within a given one.

        The footprint is over the queries `first_query ≤ i < tokens − 1`.

        Args:
            footprint: Share of a full cache's keys that these queries see at most.
            tokens: Length of the text.
            first_query: Index of the first query that counts.
            recent: Share of the budget, sinks left out, that is the window.
            sinks: Number of tokens at the start that always stay.
            chunk: Tokens per chunk.

        Raises:
            FootprintOutOfReach: Sinks and chunk alone exceed the footprint.
            SmartKVError: `recent` is not in (0, 1], or `first_query` is not in the text.
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
                f"{sinks} sinks and chunks of {chunk} tokens are more than {footprint:.3g} of the cache: "
                "choose a larger footprint or smaller chunks"
            )
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if share(middle) <= footprint else (low, middle - 1)
        return cls(low, max(1, int(recent * (low - sinks))), sinks, chunk)


@dataclass(frozen=True)
class Once:
    """One eviction after the prefill, as in NVIDIA's kvpress.

    The prefill is read with a full cache. All keys after it stay.

    Attributes:
        prefill: Number of tokens in the prefill.
        budget: Number of keys of the prefill that each head keeps.
        window: Number of latest tokens of the prefill that always stay.
        sinks: Number of tokens at the start that always stay.
        tile: Queries per tile.
    """

    prefill: int
    budget: int
    window: int
    sinks: int = 4
    tile: int = 128

    def __post_init__(self) -> None:
        _check(self.budget, self.window, self.sinks)
        if self.prefill < 1:
            raise SmartKVError(f"prefill must be at least 1 token, got {self.prefill}")

    def tiles(self, tokens: int) -> Iterator[tuple[int, int, int | None]]:
        """Cut a text into tiles, with an eviction at the end of the prefill."""
        edges = [*range(0, min(self.prefill, tokens), self.tile), *range(self.prefill, tokens, self.tile), tokens]
        for start, stop in pairwise(edges):
            yield start, stop, self.budget if stop == self.prefill else None
