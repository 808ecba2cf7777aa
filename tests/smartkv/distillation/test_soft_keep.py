"""Soft and hard decisions which keys stay, and their footprint against plain loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smartkv.distillation.soft_keep import footprint, hard_keep, keep_share, queries_per_age


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(2, 30),
    ages=st.sets(st.integers(1, 34), min_size=1, max_size=3).map(sorted),
    sinks=st.integers(0, 5),
    first_query=st.integers(0, 29),
    seed=st.integers(0, 99),
)
def test_the_footprint_is_the_share_that_queries_see(
    tokens: int, ages: list[int], sinks: int, first_query: int, seed: int
) -> None:
    first_query = min(first_query, tokens - 1)
    keep = torch.rand(3, tokens, len(ages), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    seen = full = 0.0
    aged = torch.zeros(tokens, len(ages), dtype=torch.int64)
    for i in range(first_query, tokens):
        for j in range(i + 1):
            reached = [number for number, age in enumerate(ages) if i - j >= age and j >= sinks]
            if reached:
                aged[j, reached[-1]] += 1
            seen += float(keep[:, j, reached[-1]].mean()) if reached else 1.0
            full += 1.0
    assert torch.equal(queries_per_age(tokens, ages, sinks, first_query), aged)
    assert float(footprint(keep, ages, sinks, first_query)) == pytest.approx(seen / full)


@given(st.lists(st.none() | st.integers(1, 25), min_size=1, max_size=4), st.integers(0, 19))
def test_layers_that_slide_count_as_in_a_full_cache_of_the_model(own: list[int | None], first_query: int) -> None:
    gated = own.count(None)
    keep = torch.rand(2 * gated, 20, 2, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    seen = full = 0.0
    for layer, window in enumerate(own):
        heads = keep[2 * own[:layer].count(None) :][:2]
        for i in range(first_query, 20):
            keys = [j for j in range(i + 1) if window is None or i - j < window]
            full += 2 * len(keys)
            ages = [next((a for a in (1, 0) if i - j >= (3, 7)[a] and j >= 1), None) for j in keys]
            whole = [window is not None or age is None for age in ages]
            seen += sum(
                2.0 if all_of_it else float(heads[:, j, age].sum())
                for j, age, all_of_it in zip(keys, ages, whole, strict=True)
            )
    if gated:
        assert float(footprint(keep, (3, 7), 1, first_query, own)) == pytest.approx(seen / full)


def test_what_is_worth_its_price_is_half_kept_and_the_log_does_not_underflow() -> None:
    keep, log_keep = keep_share(torch.tensor([[-3.0], [1.0], [-200.0]]), price=-3.0, temperature=0.5)
    assert keep[0] == 0.5 and keep[1] > 0.999
    torch.testing.assert_close(log_keep[:2], keep[:2].log())
    assert log_keep[2] == pytest.approx(-394)


def test_what_is_gone_at_one_age_is_gone_at_the_next() -> None:
    worth = torch.tensor([[2.0, -9.0, 2.0], [2.0, 2.0, 0.5], [-0.1, 3.0, 3.0]])
    assert hard_keep(worth, 0.0).tolist() == [[True, False, False], [True, True, True], [False, False, False]]
    keep, log_keep = keep_share(worth, 0.0, 0.01)
    torch.testing.assert_close(keep, hard_keep(worth, 0.0).float(), atol=1e-4, rtol=0)
    assert (log_keep.diff(dim=-1) <= 0).all()
