"""Attention of a chunk of queries over the keys that a layer holds and the chunk's own; what survives it."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from smartkv.blocks import HOLE, Fields, Ragged
from smartkv.caps import Cap

LIKE = 1.25  # pairs whose lengths differ by less stand side by side, padded to the longest


@dataclass
class ChunkResult:
    """What a chunk leaves.

    Attributes:
        output: `[batch, query_heads, tokens, head_dim]`; zeros for padding.
        store: the keys that the next query sees.
        visible: int64 `[pairs]`, keys that the counted queries saw.
        bytes_at_work: the largest sum of what was held beside the old store.
    """

    output: Tensor
    store: Ragged
    visible: Tensor
    bytes_at_work: int


def queries_that_saw(position: Tensor, ends: Tensor, start: Tensor, end: Tensor, count_from: int) -> Tensor:
    """How many of the queries `start ≤ i < end` from position `count_from` on saw each key; all broadcast."""
    first = torch.maximum(position, start.clamp(min=count_from))
    return (torch.minimum(ends, end) - first).clamp(min=0).masked_fill(position == HOLE, 0)


def chunk_attention(
    query: Tensor,
    store: Ragged,
    new: Fields,
    cap: Cap | None,
    start: Tensor,
    end: Tensor,
    scaling: float,
    count_from: int,
) -> ChunkResult:
    """Query `i` of a pair sees key `j` iff `j ≤ i < end of j`.

    Args:
        query: `[batch, query_heads, tokens, head_dim]`.
        store: what is held.
        new: the chunk's keys, `[pairs, tokens]`; position `HOLE` where the token is padding.
        cap: of the layer; None: none.
        start, end: int64 `[pairs]`, position of the first real token, and of the next one after the chunk.
        scaling: of the scores.
        count_from: position of the first query that is counted.
    """
    batch, query_heads, tokens, head_dim = query.shape
    pairs, device = len(start), query.device
    grouped = query.reshape(pairs, -1, tokens, head_dim)  # [pairs, group, tokens, head_dim]
    output = torch.empty_like(grouped)
    visible = torch.zeros_like(start)
    drops = None if cap is None else _dropped(store, new, cap, start, tokens)
    order, kept, counts, most = [], [], torch.zeros_like(start), 0
    for group in like_lengths(store.counts, tokens):
        fields, ends = new.at(group), new.expiry[group]
        if int(store.counts[group].max()):
            index, filled = store.side_by_side(group)
            old = store.fields.at(index)
            fields = old._replace(position=old.position.masked_fill(~filled, HOLE)).join(fields, dim=1)
            ends = fields.expiry
        if drops is not None:
            longest = fields.position.shape[1] - tokens
            ends = torch.cat([drops[group, :longest], drops[group, -tokens:]], dim=1)
        at, there = new.position[group], fields.position != HOLE
        mask = (fields.position[:, None] <= at[..., None]) & (ends[:, None] > at[..., None]) & there[:, None]
        # a query of padding sees nothing: let it see itself, for a softmax over nothing is NaN
        mask[..., -tokens:] |= torch.eye(tokens, dtype=torch.bool, device=device) & (at == HOLE)[..., None]
        shape = (len(group), grouped.shape[1], fields.position.shape[1], head_dim)
        keys, values = (tensor[:, None].expand(shape) for tensor in fields[:2])
        found = F.scaled_dot_product_attention(grouped[group], keys, values, attn_mask=mask[:, None], scale=scaling)
        output[group] = found.masked_fill((at == HOLE)[:, None, :, None], 0)
        alive = there & (ends > end[group, None])
        saw = queries_that_saw(fields.position, ends, start[group, None], end[group, None], count_from)
        visible[group], counts[group] = saw.sum(dim=1), alive.sum(dim=1)
        kept.append(fields.at(alive))
        order.append(group)
        most = max(most, fields.nbytes + mask.nbytes + sum(part.nbytes for part in kept))
    fields = kept[0]
    for part in kept[1:]:
        fields = fields.join(part, dim=0)
    pair = torch.cat(order)
    store = Ragged(fields, counts[pair])
    if len(kept) > 1:
        most = max(most, 2 * fields.nbytes)
        store = store.select(pair.argsort())
    return ChunkResult(output.view(batch, query_heads, tokens, head_dim), store, visible, most)


def like_lengths(counts: Tensor, tokens: int) -> list[Tensor]:
    """Pairs whose lengths (counts + tokens) are alike, in groups: int64 `[chosen]` each, all of them once."""
    lengths, order = (counts + tokens).sort(descending=True)
    groups, first = [], 0
    for place, length in enumerate(lengths.tolist()):
        if length * LIKE < lengths[first]:
            groups.append(order[first:place].sort().values)
            first = place
    return [*groups, order[first:].sort().values]


def _dropped(store: Ragged, new: Fields, cap: Cap, start: Tensor, tokens: int) -> Tensor:
    """First position whose query does not see each key under the cap, int64 `[pairs, longest + tokens]`."""
    small = Fields(new.position, new.position, new.position, new.expiry, new.score)
    if int(store.counts.max()):
        index, filled = store.side_by_side()
        held = store.fields._replace(key=store.fields.position, value=store.fields.position).at(index)
        small = held._replace(position=held.position.masked_fill(~filled, HOLE)).join(small, dim=1)
    return cap.ends(small.position, small.expiry, small.score, start, tokens + 1)
