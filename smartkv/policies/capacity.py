"""Caps: at most so many keys per head, or per layer.

The rule applies token by token, as if each token were decoded alone. Sinks and the window are pinned. Of all other keys
the one with the earliest expiry is dropped first; ties go to the older key, then to the one with the lower score. A
dropped key never comes back.

A key *outranks* another if it would be dropped later. A key is dropped once as many keys outrank it as there is room
for. Each of these expires no earlier than it does, and is dropped only when as many keys outrank it in turn. The rule
therefore needs no memory: a query sees a key past its window iff fewer than `room` keys past their windows outrank it.
A chunk computes this for all of its queries at once.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from smartkv.policies.lifetimes import HOLE


@dataclass(frozen=True)
class Cap:
    """The number of keys that one layer may keep.

    Attributes:
        room: keys past their window that are kept in each pool. A pool is one head, or all heads of a row of the batch.
        heads: KV heads that share a pool.
        window: latest tokens that are pinned, at least 1.
        sinks: first tokens that are pinned. Room is reserved for them also when the model's own sliding window has
            passed them.
    """

    room: int
    heads: int
    window: int
    sinks: int

    def ends(self, position: Tensor, expiry: Tensor, score: Tensor | None, start: Tensor, steps: int) -> Tensor:
        """Return the first position whose query does not see a key, because it expired or was dropped.

        Drops are computed for the queries `start … start + steps − 1`; later drops are not known yet.

        Args:
            position: int `[pairs, keys]`, `HOLE` where there is no key. A pair is one row of the batch and one KV head,
                in the order (row, head).
            expiry: int `[pairs, keys]`.
            score: float `[pairs, keys]`, or None: no score.
            start: int64 `[pairs]`, position of the first query.
            steps: number of queries.

        Returns:
            int64 `[pairs, keys]`.
        """
        shape = position.shape
        position, expiry = (tensor.long().reshape(-1, self.heads * shape[1]) for tensor in (position, expiry))
        start = start.view(-1, self.heads)[:, :1]
        counts = (position >= self.sinks) & (position != HOLE)
        # keys of a pool from the last to be dropped to the first: by expiry, the younger first, score, head
        order = torch.arange(position.shape[1], device=position.device).expand_as(position)
        if score is not None:
            order = score.reshape(position.shape).argsort(dim=1, descending=True, stable=True)
        rank = ((expiry << 31) + position.clamp(min=0)).masked_fill(~counts, -1)
        order = order.gather(1, rank.gather(1, order).argsort(dim=1, descending=True, stable=True))
        # index of the query from which on a key is past its window, `steps` for what is no key that counts
        entry = (position + self.window - start).masked_fill(~counts, steps).gather(1, order)
        best, rest = entry[:, : self.room], entry[:, self.room :]  # only the rest can be outranked by `room` keys
        if not rest.shape[1]:
            return expiry.view(shape)
        outranking = _entered(best, steps).sum(dim=1, keepdim=True) + _entered(rest, steps).cumsum(dim=1)
        query = torch.arange(steps, device=position.device)
        past = rest[..., None] <= query
        dropped = past & (outranking > self.room)  # `outranking` counts the key itself too
        first = torch.where(dropped.any(dim=-1), dropped.int().argmax(dim=-1), 2**31) + start
        ends = expiry.gather(1, order)
        ends[:, self.room :] = torch.minimum(ends[:, self.room :], first)
        return torch.empty_like(expiry).scatter_(1, order, ends).view(shape)


def _entered(entry: Tensor, steps: int) -> Tensor:
    """Return whether each key is past its window at each query: `[pools, keys]` -> int16 `[pools, keys, steps]`."""
    return (entry[..., None] <= torch.arange(steps, device=entry.device)).short()
