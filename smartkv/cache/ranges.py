"""Storage for decoding on a GPU: the keys of a pair sorted by when they go, so that a query sees one range of slots.

A *pair* is one row of the batch and one KV head. When keys are packed it is known which of them go before the next
packing. Those that go first lie first. What the query of a coming token sees is then one range of its pair's slots,
from the first key that is not gone to the token itself. Attention needs no mask, and a step changes no table.
"""

import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

from smartkv.cache.paged import Pages
from smartkv.cache.ragged import Fields, ranks, storage_bytes
from smartkv.models.softmax import Softmax
from smartkv.policies.lifetimes import FOREVER
from smartkv.quantization.per_token import PackedRows


class Ranges:
    """Keys of each pair by the query that first misses them, with room for the next tokens behind them.

    It takes the same arguments as `smartkv.cache.paged.Pages` and gives the same answers. Keys are not packed in few
    bits here.

    Args:
        fields: the stored tensors `[slots]` from which the keys are copied.
        live: int64 `[keys]`, the slots of `fields` that hold live keys, pair by pair.
        counts: int64 `[pairs]`, live keys of each pair.
        ages: int64 `[keys]`, index of the first of the coming queries that does not see each key; 0 is the next query.
            Keys that are hidden already, for a rollback, have 0 or less.
        now: int64 `[pairs]`, position of the next query.
        spare: number of tokens that can be written before keys must be packed again.

    Attributes:
        fields: `[slots]`; the slots of a pair are consecutive.
        new_slots: int64 `[spare, pairs]`, the slots of the coming tokens.
        starts: int32 `[spare, pairs]`, first slot that the query of each coming token sees.
        lengths: int32 `[spare, pairs]`, number of slots that it sees.
        hidden: int64 `[pairs]`, keys of each pair that no query sees unless the latest tokens are dropped.
        kernels: whether Triton's kernels attend.
    """

    def __init__(self, fields: Fields, live: Tensor, counts: Tensor, ages: Tensor, now: Tensor, spare: int) -> None:
        pairs, device = len(counts), counts.device
        self.counts, self.spare = counts, spare
        pair, rank = ranks(counts, len(live))
        ages, order = _by_pair(pair, ages)
        self.room = counts + spare
        first = self.room.cumsum(0) - self.room
        self.total = len(live) + pairs * spare
        filled = first[pair] + rank
        source = live[:1].expand(self.total).clone() if len(live) else None
        if source is not None:
            source[filled] = live[order]
            self.fields = fields.at(source)
        else:
            self.fields = fields.map(lambda tensor: tensor.new_zeros(self.total, *tensor.shape[1:]))
        steps = torch.arange(spare, device=device)[:, None]
        self.new_slots = first + counts + steps
        self.fields.position[self.new_slots] = (now + steps).int()
        self.fields.expiry[self.new_slots] = FOREVER
        # the keys that each coming query misses: a search among the sorted ages of its pair
        bounds = (torch.arange(pairs, device=device) << 32) + steps
        gone = torch.searchsorted(ages, bounds, right=True) - (counts.cumsum(0) - counts)
        self.hidden = gone[0]
        self.starts = (first + gone).int()
        self.lengths = (counts - gone + steps + 1).int()
        self.kernels = triton_runs(device)
        # without kernels slices need the numbers on the host
        self._ranges = [] if self.kernels else torch.stack([self.starts, self.lengths], dim=-1).tolist()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, as allocated."""
        tables = [self.counts, self.room, self.hidden, self.new_slots, self.starts, self.lengths]
        return self.fields.nbytes + storage_bytes(tables)

    @property
    def slots(self) -> Tensor:
        """Slots of each pair, live or not, int64 `[pairs]`."""
        return self.room

    def live(self, steps: int) -> Tensor:
        """Return the number of keys that the last of `steps` queries saw, int64 `[pairs]`."""
        return self.lengths[steps - 1].long() if steps else self.counts - self.hidden

    def write(self, step: int, key: Tensor, value: Tensor) -> slice:
        """Store keys and values of the next tokens.

        Args:
            step: index of the first token since keys were packed, 0 … spare − 1.
            key, value: `[pairs, tokens, head_dim]`.

        Returns:
            What their queries see.
        """
        tokens = key.shape[1]
        self.fields.put(self.new_slots[step : step + tokens], key, value)
        return slice(step, step + tokens)

    def take_back(self, start: int, stop: int) -> None:
        """Forget the tokens from `start` to before `stop`, the latest written: the next ones take their slots."""

    def attend(self, query: Tensor, softmax: Softmax, seen: slice) -> Tensor:
        """Compute attention of a few queries per head over the keys that they see.

        Args:
            query: `[pairs, tokens · group, head_dim]`, for each token the query heads of a pair's group.
            softmax: of the pairs, the step from products of queries and keys to probabilities.
            seen: what `write` returned for these tokens.

        Returns:
            Shaped like `query`, in its dtype.
        """
        pairs, tokens = len(query), seen.stop - seen.start
        queries = query.unflatten(1, (tokens, -1))  # [pairs, tokens, group, head_dim]
        if not self.kernels:
            return self._attend_in_turn(queries, softmax, self._ranges[seen]).flatten(1, 2)
        from smartkv.kernels.range_attention import range_attention  # an extra

        sinks = softmax.learned_sinks
        if sinks is not None:
            sinks = sinks.view(pairs, 1, -1).expand(queries.shape[:3]).flatten(0, 1)
        starts, lengths = (table[seen].T.flatten() for table in (self.starts, self.lengths))
        output = range_attention(
            queries.flatten(0, 1), *self.fields[:2], starts, lengths, softmax.scaling, softmax.cap, sinks
        )
        return output.view_as(query)

    def _attend_in_turn(self, queries: Tensor, softmax: Softmax, ranges: list[list[list[int]]]) -> Tensor:
        """Attend a pair and a token at a time, without kernels; `queries` `[pairs, tokens, group, head_dim]`."""
        output = torch.empty_like(queries)
        sinks = None if softmax.learned_sinks is None else softmax.learned_sinks.view(len(queries), -1)
        for token, of_token in enumerate(ranges):
            for pair, (start, length) in enumerate(of_token):
                query = queries[pair, token]  # [group, head_dim]
                key, value = (field[start : start + length] for field in self.fields[:2])
                if softmax.plain:
                    mixed = F.scaled_dot_product_attention(query[None], key[None], value[None], scale=softmax.scaling)
                else:
                    own = softmax if sinks is None else softmax._replace(learned_sinks=sinks[pair])
                    all_of_it = torch.ones(1, 1, 1, length, dtype=torch.bool)
                    mixed = own.attend(query[None, None, :, None], key[None, None], value[None, None], all_of_it)
                output[pair, token] = mixed.view_as(query)
        return output

    def judge(self, expiry: Tensor, score: Tensor | None) -> None:
        """Store the decision about the first tokens that came since keys were packed.

        Args:
            expiry: int64 `[pairs, tokens]`.
            score: float32 `[pairs, tokens]`, or None: no score is stored.
        """
        self.fields.judge(self.new_slots[: expiry.shape[1]].T, expiry, score)

    def pair(self) -> Tensor:
        """Return the pair of each slot, int64 `[slots]`."""
        return torch.arange(len(self.room), device=self.room.device).repeat_interleave(
            self.room, output_size=self.total
        )

    def side_by_side(self) -> tuple[Tensor, Tensor]:
        """Return the indices of each pair's slots as a padded table, in the order of their positions.

        Returns:
            Indices into `fields`, int64 `[pairs, most slots of a pair]`; and a bool mask of the same shape, False for
            padding.
        """
        order = self.by_position()
        first = self.room.cumsum(0) - self.room
        place = torch.arange(int(self.room.max()), device=order.device)
        filled = place < self.room[:, None]
        return order[torch.where(filled, first[:, None] + place, 0)], filled

    def in_order(self, alive: Tensor) -> Tensor:
        """Return the slots where `alive` holds, bool `[slots]`, in the order of `Ragged`: by pair, then by position."""
        order = self.by_position()
        return order[alive[order]]

    def by_position(self) -> Tensor:
        """Return the slots pair by pair, in the order of their positions, int64 `[slots]`."""
        return _by_pair(self.pair(), self.fields.position.long())[1]


def _by_pair(pair: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
    """Sort by pair and then by a number from 0 to 2³¹ − 1; smaller ones count as 0.

    Returns:
        `pair · 2³² + number` in rising order, and the order, both int64 and shaped like `number`.
    """
    return ((pair << 32) + number.clamp(min=0, max=FOREVER)).sort(stable=True)


def decoding_store(
    fields: Fields,
    live: Tensor,
    counts: Tensor,
    ages: Tensor,
    now: Tensor,
    spare: int,
    dtype: torch.dtype,
    packed: PackedRows | None,
) -> Pages | Ranges:
    """Copy keys to where tokens come one by one: ranges where Triton's kernels run, else pages.

    Args:
        fields, live, counts, ages, now, spare: as for `Ranges`.
        dtype, packed: as for `Pages`.
    """
    if packed is None and ranges_serve(live.device):
        return Ranges(fields, live, counts, ages, now, spare)
    return Pages(fields, live, counts, ages, now, spare, dtype, packed)


def ranges_serve(device: torch.device) -> bool:
    """Say whether layers on a device decode from ranges."""
    return triton_runs(device)


def triton_runs(device: torch.device) -> bool:
    """Say whether Triton's kernels run on a device: on a GPU, or in Triton's interpreter."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return (device.type == "cuda" or interpreted) and _triton_is_installed()


@cache
def _triton_is_installed() -> bool:
    return find_spec("triton") is not None
