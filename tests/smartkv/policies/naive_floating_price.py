"""The floating price in plain loops, token by token."""

import math

from torch import Tensor

from smartkv.policies.floating_price import MARGIN, MOVES

AGES = (16, 64, 100)


def reached(worth: Tensor, head: int, key: int, age: int, ages: list[int]) -> float:
    """What a key is worth at an age; infinity while it is younger than the first."""
    passed = [number for number, each in enumerate(ages) if age >= each]
    return float(worth[head, key, passed[-1]]) if passed else math.inf


def naive(
    worth: Tensor, tokens: int, budget: int, window: int, expiry: Tensor
) -> tuple[Tensor, list[tuple[float, float]]]:
    """The first position whose query does not see each key `[heads, tokens]`, and the prices at each position."""
    heads, ages = len(worth), [max(age, window) for age in AGES]
    delay = min(ages[0], MOVES - 1)
    ends, price, coming, prices = expiry.clone(), -math.inf, -math.inf, []
    for now in range(tokens + 1):
        held = [(h, j) for h in range(heads) for j in range(min(now, tokens)) if ends[h, j] > now]
        if now % MOVES == delay:
            price = coming
        if now and now % MOVES == 0:
            ranked = [(-reached(worth, h, j, now - j, ages), place, h, j) for place, (h, j) in enumerate(held)]
            for minus, _, head, key in sorted(ranked)[budget:]:
                if minus != -math.inf:
                    ends[head, key] = now
            held = [(h, j) for h, j in held if ends[h, j] > now]
            price, coming = coming, forecast(worth, held, now, budget, coming, ages, delay, ends)
        else:
            for head, key in held:
                for number, age in enumerate(ages):
                    if now - key == age and worth[head, key, number] <= price:
                        ends[head, key] = now
        prices.append((price, coming))
    return ends, prices


def forecast(
    worth: Tensor,
    held: list[tuple[int, int]],
    now: int,
    budget: int,
    standing: float,
    ages: list[int],
    delay: int,
    ends: Tensor,
) -> float:
    """The lowest price at which the budget will hold at the next move, if the coming keys are like the youngest."""
    change, after, stays, weights = now + delay, now + MOVES, 0, []
    for head, key in held:
        here = [(key + age, float(worth[head, key, number])) for number, age in enumerate(ages)]
        if any(now < at < change and value <= standing for at, value in here) or ends[head, key] <= after:
            continue
        stays += 1
        judged = [value for at, value in here if change <= at <= after]
        weights.append((judged[-1] if judged else math.inf, 1.0))
    for head in range(len(worth)):
        for key in range(now - delay, now):
            weights.append((float(worth[head, key, 0]), max(0, MOVES - ages[0]) / delay))
    excess = stays + MOVES * len(worth) - budget * (1 + max(MARGIN, MOVES / now))
    if excess <= 0:
        return -math.inf
    gone, price = 0.0, -math.inf
    for value, weight in sorted((value, weight) for value, weight in weights if value != math.inf):
        if gone >= excess - 1e-4:
            break
        gone, price = gone + weight, value
    return price
