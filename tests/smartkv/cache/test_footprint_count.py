"""The counts of a footprint, query by query."""

import pytest
import torch

from smartkv.cache.footprint_count import count_full, count_queries
from smartkv.policies.lifetimes import FOREVER, HOLE


@pytest.mark.parametrize("first_query", [0, 5, 100])
def test_a_key_is_counted_for_each_query_that_sees_it(first_query: int) -> None:
    generator = torch.Generator().manual_seed(first_query)
    position = torch.randint(-1, 12, (40,), generator=generator)
    ends = position + torch.randint(0, 12, (40,), generator=generator)
    start, end = torch.tensor(3), torch.tensor(10)
    got = count_queries(position, ends, start, end, first_query)
    for place, (born, until) in enumerate(zip(position.tolist(), ends.tolist(), strict=True)):
        queries = [i for i in range(3, 10) if i >= first_query and born <= i < until and born != HOLE]
        assert int(got[place]) == len(queries)


@pytest.mark.parametrize("sliding_window", [3, FOREVER])
@pytest.mark.parametrize("first_query", [0, 4, 50])
def test_a_full_cache_holds_every_key_up_to_the_query_within_the_models_window(
    sliding_window: int, first_query: int
) -> None:
    tokens = torch.tensor([6, 9, 0])
    want = [sum(min(i + 1, sliding_window) for i in range(first_query, seen)) for seen in tokens.tolist()]
    assert count_full(tokens, first_query, sliding_window).tolist() == want
