"""A price that floats: each layer of a row holds a budget of keys.

All keys stay until the budget is reached. At positions that are multiples of `MOVES`, the *moves*, the least worthy of
the keys that are old enough to be judged go, until the budget holds. Between two moves a price stands: a key that
reaches an age goes if its worth at that age is not above the price. The price is chosen at a move so that the budget
will hold at the next one if the coming keys are like the youngest. So the number of keys stays near the budget at all
times, and few keys must go at a move.

All heads of a layer share its budget. Pinned keys, sinks and keys younger than the first age stay, and count. Ties go
to the younger key of the later head, so the budget is held exactly at a move where enough keys can go.

The rule depends on positions alone. So no death depends on how many tokens a call has, and `ends` can tell the deaths
of the coming tokens before they come. For that a new price takes effect `delay` tokens after its move: by then the
keys from which it was chosen have come.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from smartkv.policies.lifetimes import FOREVER, HOLE

MOVES = 64  # tokens between two moves
MARGIN = 0.1  # least share of the budget by which the price lets in more than fits, so that a move chooses among them
CHEAPEST = float("-inf")  # the price at which everything stays
PINNED = float("inf")  # the worth of keys that stay whatever the price


class Prices(NamedTuple):
    """The prices of some rows at a position, float32 `[rows]` each.

    Attributes:
        now: what stands.
        next: what will stand `delay` tokens after the last move; equal to `now` from there on.
    """

    now: Tensor
    next: Tensor

    @classmethod
    def of(cls, rows: int, device: torch.device) -> "Prices":
        """Return the prices at which everything stays."""
        return cls(*(torch.full((rows,), CHEAPEST, device=device) for _ in range(2)))

    def where(self, condition: Tensor, other: "Prices") -> "Prices":
        """Return these prices where the condition holds, bool `[rows]`, and others elsewhere."""
        return Prices(*(torch.where(condition, a, b) for a, b in zip(self, other, strict=True)))


class Deaths(NamedTuple):
    """What `FloatingPrice.ends` computes.

    Attributes:
        ends: int64 `[pairs, keys]`, the first position whose query does not see each key.
        prices: at the position `until`.
    """

    ends: Tensor
    prices: Prices


class Keys(NamedTuple):
    """The keys of each row, all heads side by side.

    Attributes:
        position, ends: int64 `[rows, keys]`; `ends` is `HOLE` where there is no key.
        reached: int64 `[rows, keys, ages]`, the position at which each key reaches each age.
        worth: float32 `[rows, keys, ages]`.
    """

    position: Tensor
    ends: Tensor
    reached: Tensor
    worth: Tensor


class FloatingPrice:
    """The rule of one layer.

    Args:
        ages: in tokens, rising: a key is judged when it reaches one. A window longer than an age takes its place.
        heads: KV heads of the layer, which share the budget.
        window: number of latest tokens that always stay.

    Attributes:
        ages: the ages at which keys are judged.
        delay: tokens after a move from which on its price stands.
    """

    def __init__(self, ages: Sequence[int], heads: int, window: int) -> None:
        self.ages, self.heads = tuple(max(age, window) for age in ages or (window,)), heads
        self.delay = min(self.youngest, MOVES - 1)

    @property
    def youngest(self) -> int:
        """Age at which a key is judged for the first time: so many tokens may come before any of them can go."""
        return self.ages[0]

    def ends(
        self,
        position: Tensor,
        expiry: Tensor,
        worth: Tensor,
        start: Tensor,
        known: Tensor,
        until: Tensor,
        steps: int,
        budget: Tensor,
        prices: Prices,
    ) -> Deaths:
        """Return the first position whose query does not see each key.

        Deaths are computed for the queries up to `start + steps - 1`; later deaths are not known yet.

        Args:
            position: int `[pairs, keys]`, `HOLE` where there is no key. A pair is one row of the batch and one KV head,
                in the order (row, head).
            expiry: int `[pairs, keys]`, first position whose query does not see the key at any price.
            worth: float `[pairs, keys, ages]`, `PINNED` for keys that stay. It does not rise with age.
            start: int64 `[rows]`, position of the first query. Deaths up to it have happened.
            known: int64 `[rows]`, position after the last key that is known, at least `start`. Deaths are right up to
                `delay` tokens after it.
            until: int64 `[rows]`, the position whose prices are returned, from `start` to `known`.
            steps: number of queries.
            budget: int64 `[rows]`, keys that all heads of the layer may hold together.
            prices: at `start`.
        """
        rows, shape, first_change = len(start), position.shape, start // MOVES * MOVES + self.delay
        place, expires = (tensor.long().reshape(rows, -1) for tensor in (position, expiry))
        keys = Keys(
            place,
            torch.where(place == HOLE, HOLE, expires),
            torch.stack([place + age for age in self.ages], dim=-1),  # ages as a tensor would wait for a GPU
            worth.float().reshape(rows, -1, worth.shape[-1]),
        )
        last, move, result = start + steps - 1, _next_move(start), prices
        standing = torch.where(keys.reached < _by_key(first_change), _by_key(prices.now), _by_key(prices.next))
        keys = _age(keys, start, torch.minimum(move, last + 1), standing)
        for _ in range(-(-steps // MOVES)):  # as many moves as there can be
            due, change = move <= last, move + self.delay
            if due.device.type == "cpu" and not due.any():  # elsewhere an answer would have to be waited for
                break
            keys = self._move(keys, move, due, (move - known).clamp(min=0), budget)
            keys = _age(keys, move, torch.where(due, change, move), _by_key(prices.next))
            moved = Prices(prices.next, self._price(keys, move, budget))
            prices = moved.where(due, prices)
            result = moved.where(due & (move <= until), result)
            move = move + MOVES
            keys = _age(keys, change - 1, torch.minimum(move, last + 1), _by_key(prices.next))
        changed = until >= until // MOVES * MOVES + self.delay
        return Deaths(keys.ends.view(shape), Prices(torch.where(changed, result.next, result.now), result.next))

    def _move(self, keys: Keys, move: Tensor, due: Tensor, coming: Tensor, budget: Tensor) -> Keys:
        """Let the least worthy keys go that do not fit.

        Args:
            keys: those of a row.
            move: int64 `[rows]`, the position of the move.
            due: bool `[rows]`, rows that get as far.
            coming: int64 `[rows]`, tokens before `move` that are not among the keys yet.
            budget: int64 `[rows]`.
        """
        position, ends, reached, worth = keys
        held = (position < move[:, None]) & (ends > move[:, None])
        # what each key is worth at its age: the least so far, since worth does not rise with age
        here = torch.where(reached <= _by_key(move), worth, PINNED).amin(dim=-1)
        order = torch.where(held, here, CHEAPEST).argsort(dim=1, descending=True, stable=True)
        places = torch.arange(order.shape[1], device=order.device).expand_as(order)
        rank = torch.empty_like(order).scatter_(1, order, places)
        fits = (budget - coming * self.heads).clamp(min=0)
        goes = held & (rank >= fits[:, None]) & (here < PINNED) & due[:, None]
        return keys._replace(ends=torch.where(goes, torch.minimum(ends, move[:, None]), ends))

    def _price(self, keys: Keys, move: Tensor, budget: Tensor) -> Tensor:
        """Choose a price so that the budget will hold at the next move, if the coming keys are like the youngest.

        Args:
            keys: those of a row, after the move, and without those that go before the new price stands. All keys before
                `move` are known.
            move: int64 `[rows]`, the position of the move.
            budget: int64 `[rows]`.

        Returns:
            float32 `[rows]`.
        """
        change, after = move + self.delay, move + MOVES
        position, ends, reached, worth = keys
        known = position < move[:, None]
        stays = known & (ends > after[:, None])
        # what each key is worth at the last age that it reaches while the new price stands: the least of its worths
        here = (reached >= _by_key(change)) & (reached <= _by_key(after)) & stays[..., None]
        judged = torch.where(here, worth, PINNED).amin(dim=-1)
        # each of the youngest keys stands for several of the coming ones that will be judged before the next move
        young = known & (position >= (move - self.delay)[:, None])
        likeness = max(0, MOVES - self.youngest) / self.delay
        values, order = torch.cat([judged, torch.where(young, worth[..., 0], PINNED)], dim=1).sort(dim=1, stable=True)
        weight, lasts = torch.where(order < judged.shape[1], 1.0, likeness), values == PINNED
        gone = weight.masked_fill(lasts, 0).cumsum(dim=1)
        expected = stays.sum(dim=1) + MOVES * self.heads
        # where all keys of a text compete on equal terms, the new ones get MOVES / move of the budget
        excess = expected - budget * (1 + (MOVES / move).clamp(min=MARGIN))
        first = torch.minimum((gone < excess[:, None]).sum(dim=1), (~lasts).sum(dim=1) - 1)
        price = values.gather(1, first.clamp(min=0)[:, None])[:, 0]
        return price.masked_fill((excess <= 0) | (first < 0), CHEAPEST)


def _age(keys: Keys, since: Tensor, until: Tensor, price: Tensor) -> Keys:
    """Let the keys go that reach an age after `since` and before `until` with a worth that is not above the price.

    Args:
        keys: those of a row.
        since, until: int64 `[rows]`.
        price: float32 `[rows, keys or 1, ages or 1]`.
    """
    goes = (keys.reached > _by_key(since)) & (keys.reached < _by_key(until)) & (keys.worth <= price)
    first = torch.where(goes, keys.reached, FOREVER).amin(dim=-1)
    return keys._replace(ends=torch.minimum(keys.ends, first))


def _by_key(rows: Tensor) -> Tensor:
    """Return a figure of each row, `[rows]`, as `[rows, 1, 1]`."""
    return rows[:, None, None]


def _next_move(position: Tensor) -> Tensor:
    """Return the first move after a position."""
    return (position // MOVES + 1) * MOVES
