"""The counts of a footprint, query by query."""

import pytest
import torch

from smartkv.cache.footprint_count import FootprintCount, count_queries
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
    count = FootprintCount.zeros(2, 1, first_query, torch.device("cpu"))
    for start, end in (([0, 0], [5, 2]), ([5, 2], [6, 9])):
        count = count.plus(torch.zeros(2, dtype=torch.int64), torch.tensor(start), torch.tensor(end), sliding_window)
    for row, tokens in enumerate((6, 9)):
        assert int(count.full[row]) == sum(min(i + 1, sliding_window) for i in range(first_query, tokens))


def test_what_pairs_saw_is_added_by_row_and_head_and_rows_can_be_selected() -> None:
    count = FootprintCount.zeros(2, 3, 0, torch.device("cpu"))
    for _ in range(2):
        count = count.plus(torch.arange(6), torch.tensor([0, 0]), torch.tensor([0, 4]), FOREVER)
    assert count.visible.tolist() == [[0, 2, 4], [6, 8, 10]]
    selected = count.select(torch.tensor([1, 1, 0]))
    assert selected.visible.tolist() == [[6, 8, 10], [6, 8, 10], [0, 2, 4]]
    assert selected.full.tolist() == [20, 20, 0] and selected.first_query == 0
