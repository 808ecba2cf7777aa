"""Schedules of eviction, and the budgets that fit a footprint."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from smartkv.baselines import Once, Streaming
from smartkv.errors import SmartKVError


def share(budget: int, chunk: int, tokens: int, first: int) -> float:
    """Footprint in plain loops: a query sees the keys kept before its chunk, and its chunk up to itself."""
    seen = full = 0
    for query in range(first, tokens - 1):
        start = query // chunk * chunk
        seen += min(start, budget) + query - start + 1
        full += query + 1
    return seen / full


@given(
    tokens=st.integers(40, 300),
    first=st.integers(0, 30),
    chunk=st.integers(1, 8),
    footprint=st.floats(0.3, 1),
    recent=st.floats(0.01, 1),
)
def test_a_footprint_gives_the_largest_budget_within_it(
    tokens: int, first: int, chunk: int, footprint: float, recent: float
) -> None:
    assume(share(5, chunk, tokens, first) <= footprint)
    schedule = Streaming.for_footprint(footprint, tokens, first, recent, 4, chunk)
    assert share(schedule.budget, chunk, tokens, first) <= footprint
    assert schedule.budget == tokens or share(schedule.budget + 1, chunk, tokens, first) > footprint
    assert schedule.window == max(1, int(recent * (schedule.budget - 4)))


@given(tokens=st.integers(1, 300), chunk=st.integers(1, 40))
def test_streaming_reads_every_token_once_and_keeps_its_budget_after_each_chunk(tokens: int, chunk: int) -> None:
    tiles = list(Streaming(9, 4, 2, chunk).tiles(tokens))
    assert [i for start, stop, _ in tiles for i in range(start, stop)] == list(range(tokens))
    assert all(stop - start <= chunk and budget == 9 for start, stop, budget in tiles)


@given(tokens=st.integers(1, 300), prefill=st.integers(1, 300), tile=st.integers(1, 40))
def test_once_reads_every_token_once_and_drops_only_when_the_prefill_is_over(
    tokens: int, prefill: int, tile: int
) -> None:
    tiles = list(Once(prefill, 9, 4, 2, tile).tiles(tokens))
    assert [i for start, stop, _ in tiles for i in range(start, stop)] == list(range(tokens))
    assert [stop for _, stop, budget in tiles if budget is not None] == ([prefill] if prefill <= tokens else [])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Streaming(5, 4, 2), "a budget of 5 keys has no room for 2 sinks and a window of 4"),
        (lambda: Streaming(9, 0, 2), "window must be at least 1"),
        (lambda: Streaming(9, 4, -1), "sinks at least 0"),
        (lambda: Streaming(9, 4, 2, 0), "chunk must be at least 1"),
        (lambda: Once(0, 9, 4, 2), "prefill must be at least 1"),
        (lambda: Once(8, 5, 4, 2), "a budget of 5 keys"),
        (lambda: Streaming.for_footprint(0.01, 100, 10), "more than 0.01 of the cache"),
        (lambda: Streaming.for_footprint(0.5, 100, 99), "first_query in the text"),
        (lambda: Streaming.for_footprint(0.5, 100, 10, recent=0), "recent must lie in"),
    ],
)
def test_mistakes_are_told(make: object, message: str) -> None:
    with pytest.raises(SmartKVError, match=message):
        make()  # type: ignore[operator]
