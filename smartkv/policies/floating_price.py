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
        position, ends: int64 `[rows, keys]`.
        worth: float32 `[rows, keys, ages]`.
    """

    position: Tensor
    ends: Tensor
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
        rows, shape = len(start), position.shape
        place, ends = (tensor.long().reshape(rows, -1) for tensor in (position, expiry))
        keys = Keys(place, torch.where(place == HOLE, HOLE, ends), worth.float().reshape(rows, -1, worth.shape[-1]))
        last, since, move, result = start + steps - 1, start, _next_move(start), prices
        while True:
            stop, change = torch.minimum(move, last + 1), move - MOVES + self.delay
            keys = self._age(keys, since, torch.minimum(change, stop), prices.now)
            keys = self._age(keys, torch.maximum(since, change - 1), stop, prices.next)
            due = move <= last
            if not due.any():
                break
            keys = self._move(keys, move, due, (move - known).clamp(min=0), budget)
            moved = Prices(prices.next, self._price(keys, move, budget, prices.next))
            prices = moved.where(due, prices)
            result = moved.where(due & (move <= until), result)
            since, move = move, move + MOVES
        changed = until >= until // MOVES * MOVES + self.delay
        return Deaths(keys.ends.view(shape), Prices(torch.where(changed, result.next, result.now), result.next))

    def _age(self, keys: Keys, since: Tensor, until: Tensor, price: Tensor) -> Keys:
        """Let the keys go that reach an age after `since` and before `until` with a worth that is not above the price.

        Args:
            keys: those of a row.
            since, until: int64 `[rows]`.
            price: float32 `[rows]`.
        """
        position, ends, worth = keys
        reached = self._reached(position)
        goes = (reached > since[:, None, None]) & (reached < until[:, None, None]) & (worth <= price[:, None, None])
        first = reached.masked_fill(~goes, FOREVER).amin(dim=-1)
        return keys._replace(ends=torch.where(position == HOLE, ends, torch.minimum(ends, first)))

    def _move(self, keys: Keys, move: Tensor, due: Tensor, coming: Tensor, budget: Tensor) -> Keys:
        """Let the least worthy keys go that do not fit.

        Args:
            keys: those of a row.
            move: int64 `[rows]`, the position of the move.
            due: bool `[rows]`, rows that get as far.
            coming: int64 `[rows]`, tokens before `move` that are not among the keys yet.
            budget: int64 `[rows]`.
        """
        position, ends, worth = keys
        held, reached = _held(keys, move), (self._reached(position) <= move[:, None, None]).sum(dim=-1)
        here = worth.gather(2, (reached - 1).clamp(min=0)[..., None])[..., 0]
        here = here.masked_fill(reached == 0, PINNED).masked_fill(~held, CHEAPEST)
        order = here.argsort(dim=1, descending=True, stable=True)
        places = torch.arange(order.shape[1], device=order.device).expand_as(order)
        rank = torch.empty_like(order).scatter_(1, order, places)
        fits = (budget - coming * self.heads).clamp(min=0)
        goes = held & (rank >= fits[:, None]) & (here < PINNED) & due[:, None]
        return keys._replace(ends=torch.where(goes, torch.minimum(ends, move[:, None]), ends))

    def _reached(self, position: Tensor) -> Tensor:
        """Return where each key reaches each age, int64 `[rows, keys, ages]`."""
        return torch.stack([position + age for age in self.ages], dim=-1)  # ages as a tensor would wait for a GPU

    def _price(self, keys: Keys, move: Tensor, budget: Tensor, standing: Tensor) -> Tensor:
        """Choose a price so that the budget will hold at the next move, if the coming keys are like the youngest.

        Args:
            keys: those of a row, after the move. All keys before `move` are known.
            move: int64 `[rows]`, the position of the move.
            budget: int64 `[rows]`.
            standing: float32 `[rows]`, the price until the new one takes effect.

        Returns:
            float32 `[rows]`.
        """
        change, after = move + self.delay, move + MOVES
        position, ends, worth = self._age(keys, move, change, standing)
        held = _held(keys, move)
        stays = held & (ends > after[:, None])
        # what each key is worth at the last age that it reaches while the new price stands: the least of its worths
        reached = self._reached(position)
        here = (reached >= change[:, None, None]) & (reached <= after[:, None, None])
        judged = worth.masked_fill(~here, PINNED).amin(dim=-1)
        # each of the youngest keys stands for several of the coming ones that will be judged before the next move
        young = (position >= (move - self.delay)[:, None]) & (position < move[:, None])
        likeness = max(0, MOVES - self.youngest) / self.delay
        values = torch.cat([judged.masked_fill(~stays, PINNED), worth[..., 0].masked_fill(~young, PINNED)], dim=1)
        shares = torch.cat([torch.ones_like(judged), torch.full_like(judged, likeness)], dim=1)
        values, order = values.sort(dim=1, stable=True)
        gone = shares.gather(1, order).masked_fill(values == PINNED, 0).cumsum(dim=1)
        expected = stays.sum(dim=1) + MOVES * self.heads
        # where all keys of a text compete on equal terms, the new ones get MOVES / move of the budget
        excess = expected - budget * (1 + (MOVES / move).clamp(min=MARGIN))
        enough = gone >= excess[:, None]
        first = torch.where(enough.any(dim=1), enough.int().argmax(dim=1), (values < PINNED).sum(dim=1) - 1)
        price = values.gather(1, first.clamp(min=0)[:, None])[:, 0]
        return price.masked_fill((excess <= 0) | (first < 0) | (price == PINNED), CHEAPEST)


def _next_move(position: Tensor) -> Tensor:
    """Return the first move after a position."""
    return (position // MOVES + 1) * MOVES


def _held(keys: Keys, position: Tensor) -> Tensor:
    """Return which keys the query at a position sees, the key of its own token excluded, bool `[rows, keys]`."""
    came = (keys.position != HOLE) & (keys.position < position[:, None])
    return came & (keys.ends > position[:, None])
