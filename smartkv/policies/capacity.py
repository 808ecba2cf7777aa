"""A cap: at most so many keys a head, or a layer.

The rule, token by token (as if each were decoded alone): sinks and the window are pinned; of all other keys the one
that expires first goes first, of equals the older, then the one with the lower score. A dropped key never comes back.

A key that is dropped was outranked by as many keys as there is room for. Each of them expires no earlier than it and
is dropped only when as many outrank *it*. So the rule needs no memory: past the window, a key is seen by a query iff
fewer than `room` keys past their window outrank it. Chunks compute that for all of their queries at once.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from smartkv.policies.lifetimes import HOLE


@dataclass(frozen=True)
class Cap:
    """What one layer may keep.

    Attributes:
        room: keys past their window that are kept, in each pool; the pool is a head, or all heads of a row.
        heads: KV heads that share a pool.
        window: tokens that are pinned, at least 1.
        sinks: tokens at the start that are pinned (their places are kept also when a model's own sliding window has
            passed them).
    """

    room: int
    heads: int
    window: int
    sinks: int

    def ends(self, position: Tensor, expiry: Tensor, score: Tensor | None, start: Tensor, steps: int) -> Tensor:
        """First position whose query does not see a key, by its expiry or because the cap drops it.

        Drops are found for the queries `start … start + steps − 1`; later ones are not known yet.

        Args:
            position: int `[pairs, keys]` (pairs: row by row, the KV heads of each), `HOLE` where there is no key.
            expiry: int `[pairs, keys]`.
            score: float `[pairs, keys]`, or None.
            start: int64 `[pairs]`, position of the first query.
            steps: queries.

        Returns:
            int64 `[pairs, keys]`.
        """
        shape = position.shape
        position, expiry = (tensor.long().reshape(-1, self.heads * shape[1]) for tensor in (position, expiry))
        start = start.view(-1, self.heads)[:, :1]
        counts = (position >= self.sinks) & (position != HOLE)
        # the best first: by expiry, then the younger, then the score, then the head
        order = torch.arange(position.shape[1], device=position.device).expand_as(position)
        if score is not None:
            order = score.reshape(position.shape).argsort(dim=1, descending=True, stable=True)
        rank = ((expiry << 31) + position.clamp(min=0)).masked_fill(~counts, -1)
        order = order.gather(1, rank.gather(1, order).argsort(dim=1, descending=True, stable=True))
        # the query from which on a key is past its window: -1 already, `steps` not among these queries
        entry = (position + self.window - start).clamp(-1, steps).masked_fill(~counts, steps).gather(1, order)
        best, rest = entry[:, : self.room], entry[:, self.room :]  # only the rest can be outranked by `room`
        if not rest.shape[1]:
            return expiry.view(shape)
        outranking = _entered(best, steps).sum(dim=1, keepdim=True) + _entered(rest, steps).cumsum(dim=1)
        query = torch.arange(steps, device=position.device)
        past = rest[..., None] <= query  # includes the key itself: it is outranked by one fewer
        dropped = past & (outranking > self.room)
        first = torch.where(dropped.any(dim=-1), dropped.int().argmax(dim=-1), 2**31) + start
        ends = expiry.gather(1, order)
        ends[:, self.room :] = torch.minimum(ends[:, self.room :], first)
        return torch.empty_like(expiry).scatter_(1, order, ends).view(shape)


def _entered(entry: Tensor, steps: int) -> Tensor:
    """Whether each key is past its window at each query: `[pools, keys]` -> int16 `[pools, keys, steps]`."""
    return (entry[..., None] <= torch.arange(steps, device=entry.device)).short()
