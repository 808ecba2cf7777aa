"""The floating price against a version in plain loops, token by token."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smartkv.policies.floating_price import CHEAPEST, MOVES, PINNED, FloatingPrice, Prices
from smartkv.policies.lifetimes import FOREVER, HOLE
from tests.smartkv.policies.naive_floating_price import AGES, naive

HEADS = 2


def text(tokens: int, seed: int, levels: int = 0) -> Tensor:
    """Return worths `[heads, tokens, ages]` that do not rise with age; `levels` makes ties."""
    generator = torch.Generator().manual_seed(seed)
    worth = torch.randn(HEADS, tokens, len(AGES), generator=generator).cummin(dim=-1).values
    worth = (worth * levels).round() / levels if levels else worth
    worth[:, :2] = PINNED
    return worth


def in_calls(
    worth: Tensor, sizes: list[int], budget: int, window: int, expiry: Tensor, ahead: int = 1
) -> tuple[Tensor, list[tuple[float, float]]]:
    """Return the same as `naive`, computed call by call, in which dead keys are freed after each call."""
    rule, tokens = FloatingPrice(AGES, HEADS, window), worth.shape[1]
    ends, prices, seen = torch.full((HEADS, tokens), FOREVER), [(-math.inf, -math.inf)], 0
    price, alive = Prices.of(1, torch.device("cpu")), torch.zeros(HEADS, tokens, dtype=torch.bool)
    for size in sizes:
        alive[:, seen : seen + size] = True
        position = torch.arange(tokens).expand(HEADS, -1).masked_fill(~alive, HOLE)
        start, now = torch.tensor([seen]), torch.tensor([seen + size])
        deaths = rule.ends(position, expiry, worth, start, now, now, size + ahead, torch.tensor([budget]), price)
        seen, price = seen + size, deaths.prices
        ends[alive] = torch.where(deaths.ends < seen + ahead, deaths.ends, FOREVER)[alive]
        alive &= deaths.ends > seen
        prices.append((float(price.now), float(price.next)))
    return ends, prices


def cuts(tokens: int, seed: int) -> list[int]:
    """Return random sizes of calls that sum to `tokens`."""
    generator, sizes = torch.Generator().manual_seed(seed), []
    while (left := tokens - sum(sizes)) > 0:
        sizes.append(min(left, int(torch.randint(1, 90, (), generator=generator))))
    return sizes


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 400),
    st.integers(0, 10**6),
    st.integers(40, 400),
    st.sampled_from([1, 5, 30, 70]),
    st.sampled_from([0, 2]),
    st.integers(1, 16),
)
def test_calls_of_any_size_see_the_deaths_of_the_naive_loop(
    tokens: int, seed: int, budget: int, window: int, levels: int, ahead: int
) -> None:
    worth, expiry = text(tokens, seed, levels), torch.full((HEADS, tokens), FOREVER)
    expected, expected_prices = naive(worth, tokens, budget, window, expiry)
    sizes = cuts(tokens, seed)
    ends, prices = in_calls(worth, sizes, budget, window, expiry, ahead)
    known = expected <= tokens
    assert torch.equal(ends <= tokens, known)
    assert torch.equal(ends[known], expected[known])
    marks = torch.tensor([0, *sizes]).cumsum(0).tolist()
    assert prices == [expected_prices[mark] for mark in marks]


@settings(deadline=None, max_examples=30)
@given(st.integers(100, 400), st.integers(0, 10**6), st.integers(60, 300))
def test_the_budget_holds_after_each_move(tokens: int, seed: int, budget: int) -> None:
    worth, expiry = text(tokens, seed), torch.full((HEADS, tokens), FOREVER)
    ends, _ = in_calls(worth, cuts(tokens, seed), budget, 1, expiry)
    for now in range(MOVES, tokens + 1, MOVES):
        born = torch.arange(tokens) < now
        assert int((born & (ends > now)).sum()) <= budget
    assert int((ends[:, :2] <= tokens).sum()) == 0  # pinned


def test_keys_that_expire_of_themselves_make_room() -> None:
    worth = text(300, 0)
    expiry = torch.arange(300).expand(HEADS, -1) + 100
    for budget in (340, 150):
        expected, prices = naive(worth, 300, budget, 1, expiry)
        ends, _ = in_calls(worth, cuts(300, 1), budget, 1, expiry)
        assert torch.equal(ends, torch.where(expected <= 300, expected, FOREVER))
        assert all(price == (CHEAPEST, CHEAPEST) for price in prices) == (budget == 340)  # 100 keys a head fit


def test_rows_of_unequal_length_are_as_if_each_were_alone() -> None:
    rule, worth = FloatingPrice(AGES, HEADS, 1), torch.stack([text(150, 1), text(150, 2)])
    lengths, budgets = torch.tensor([150, 97]), torch.tensor([90, 70])
    position = torch.arange(150).expand(2, HEADS, -1)
    position = position.masked_fill(position >= lengths[:, None, None], HOLE)
    expiry = torch.full_like(position, FOREVER)
    together = rule.ends(
        position.flatten(0, 1),
        expiry.flatten(0, 1),
        worth.flatten(0, 1),
        torch.zeros(2, dtype=torch.int64),
        lengths,
        lengths,
        151,
        budgets,
        Prices.of(2, lengths.device),
    )
    for row, length in enumerate(lengths.tolist()):
        own, alone = slice(row * HEADS, (row + 1) * HEADS), torch.tensor([length])
        deaths = rule.ends(
            position[row, :, :length],
            expiry[row, :, :length],
            worth[row, :, :length],
            torch.tensor([0]),
            alone,
            alone,
            length + 1,
            budgets[row : row + 1],
            Prices.of(1, lengths.device),
        )
        ends = together.ends[own, :length]
        known, expected = (torch.where(each <= length, each, FOREVER) for each in (ends, deaths.ends))
        assert torch.equal(known, expected)
        assert [price[row] for price in together.prices] == [price[0] for price in deaths.prices]
