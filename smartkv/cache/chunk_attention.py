"""Attention of a chunk of queries over the stored keys and its own, and the keys that survive the chunk.

A *pair* is one row of the batch and one KV head. Pairs of like lengths attend together, padded to the longest of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from smartkv.cache.footprint_count import count_deaths, count_queries, no_deaths
from smartkv.cache.ragged import Fields, Ragged
from smartkv.models.softmax import Softmax
from smartkv.policies.lifetimes import HOLE
from smartkv.quantization.per_token import PackedRows

MASK_ELEMENTS = 2**21  # of one mask: for 256 queries a whole mask would be as large as keys and values of 64 dimensions
LENGTH_RATIO = 1.25  # pairs whose lengths differ by at most this factor are padded to the longest and attend together


Limit = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Function that lets keys go before their expiry.

Args: positions `[pairs, keys]`, `HOLE` where there is no key; expiries of the same shape; scores `[pairs, keys, …]`.
Returns: the first position whose query does not see each key, int64 `[pairs, keys]`.
"""


class Span(NamedTuple):
    """Positions of a chunk, int64 `[pairs]` each.

    Attributes:
        start: of its first real token.
        end: after its last real token.
        final: before which deaths are final. Keys that went before it are freed; those that went later stay, hidden.
    """

    start: Tensor
    end: Tensor
    final: Tensor


@dataclass
class ChunkResult:
    """The outcome of a chunk.

    Attributes:
        output: `[batch, query_heads, tokens, head_dim]`, zeros for padding.
        store: the keys that are not freed.
        visible: int64 `[pairs]`, the sum over counted queries of the keys that each saw.
        deaths: int64 `[ages]`, the keys that are freed, by age (see `count_deaths`).
        peak_bytes: the most bytes of keys and values that were allocated beside the old store.
    """

    output: Tensor
    store: Ragged
    visible: Tensor
    deaths: Tensor
    peak_bytes: int


def chunk_attention(
    query: Tensor,
    store: Ragged,
    new: Fields,
    limit: Limit | None,
    span: Span,
    softmax: Softmax,
    first_query: int,
    packed: PackedRows | None,
    padded: bool,
) -> ChunkResult:
    """Compute attention of a chunk, and drop the keys that no later query sees.

    Query `i` of a pair sees key `j` iff `j ≤ i < ends_j`, where `ends_j` is the key's expiry, or earlier if the limit
    lets the key go.

    Args:
        query: `[batch, query_heads, tokens, head_dim]`.
        store: the stored keys.
        new: the chunk's keys, `[pairs, tokens]`; their position is `HOLE` where the token is padding.
        limit: of the layer; None: none.
        span: positions of the chunk.
        softmax: the step from products of queries and keys to probabilities.
        first_query: position of the first counted query.
        packed: packs keys and values in few bits; `query`, `store` and `new` are already encoded by it. None: they are
            not packed.
        padded: whether any token may be padding.
    """
    batch, query_heads, tokens, head_dim = query.shape
    (start, end, final), device = span, query.device
    pairs = len(start)
    grouped = query.reshape(pairs, -1, tokens, head_dim)  # [pairs, group, tokens, head_dim]
    output = torch.empty_like(grouped)
    visible, counts, deaths = torch.zeros_like(start), torch.zeros_like(start), no_deaths(device)
    limited = None if limit is None else limited_ends(store, new, limit)
    stored = store.sizes
    survivors: dict[int, Fields] = {}  # by pair
    peak = survivor_bytes = 0
    for group in group_by_length(stored, tokens):
        longest = max(stored[pair] for pair in group)
        fields = _padded(store, new, group, longest)
        rows = torch.tensor(group, device=device)
        ends = fields.expiry
        if limited is not None:
            ends = torch.cat([limited[rows, :longest], limited[rows, -tokens:]], dim=1)
        ends = ends.masked_fill(fields.position == HOLE, 0)
        here = softmax.of_pairs(rows, pairs // batch)
        if len(group) == pairs:
            output = _masked_attention(grouped, fields, ends, new.position, here, packed, rows, padded)
        else:
            queries, at = grouped.index_select(0, rows), new.position[rows]
            group_output = _masked_attention(queries, fields, ends, at, here, packed, rows, padded)
            output.index_copy_(0, rows, group_output)
        alive = ends > final[rows, None]
        seen = count_queries(fields.position, ends, start[rows, None], end[rows, None], first_query)
        deaths += count_deaths(fields.position, ends, ~alive & (fields.position != HOLE))
        visible[rows], counts[rows] = seen.sum(dim=1), alive.sum(dim=1)
        flat, index = fields.map(lambda tensor: tensor.flatten(0, 1)), alive.flatten().nonzero().flatten()
        all_alive = len(index) == alive.numel()  # then no copy is needed
        lasting = flat if all_alive else flat.at(index)
        survivors |= zip(group, lasting.split(counts[rows].tolist()), strict=True)
        decoded = 0 if packed is None else 2 * fields.position.numel() * head_dim * query.element_size()
        peak = max(peak, survivor_bytes + fields.nbytes + max(decoded, 0 if all_alive else lasting.nbytes))
        survivor_bytes += lasting.nbytes
    merged = survivors[0] if pairs == 1 else Fields.cat([survivors[pair] for pair in range(pairs)])
    peak = max(peak, survivor_bytes + merged.nbytes)
    output = output.reshape(batch, query_heads, tokens, head_dim)  # GPU kernels may leave another memory order
    remaining = Ragged(merged, counts)
    remaining.sizes = [len(survivors[pair].position) for pair in range(pairs)]
    return ChunkResult(output, remaining, visible, deaths, peak)


def _masked_attention(
    query: Tensor,
    fields: Fields,
    ends: Tensor,
    at: Tensor,
    softmax: Softmax,
    packed: PackedRows | None,
    rows: Tensor,
    padded: bool,
) -> Tensor:
    """Compute masked attention, a tile of queries at a time, so that the mask stays small beside the keys.

    Args:
        query: `[pairs, group, tokens, head_dim]`.
        fields: `[pairs, keys]`; the last `tokens` keys are those of the queries' own tokens.
        ends: int `[pairs, keys]`, first position whose query does not see the key; 0 where there is no key.
        at: int `[pairs, tokens]`, positions of the queries, `HOLE` for padding.
        softmax: of these pairs.
        packed, padded: as in `chunk_attention`.
        rows: int64 `[pairs]`, which pairs these are.

    Returns:
        Shaped like `query`, zeros for padding.
    """
    (pairs, group, tokens, head_dim), keys = query.shape, fields.position.shape[1]
    stored = fields[:2] if packed is None else packed.decode(*fields[:2], query.dtype, None if softmax.plain else rows)
    key, value = (tensor[:, None].expand(pairs, group, keys, head_dim) for tensor in stored)
    outputs = []
    step = max(16, MASK_ELEMENTS // (pairs * keys * (1 if softmax.plain else group)))  # else scores are as large
    for first in range(0, tokens, step):
        here = at[:, first : first + step, None]
        # a query of padding has position HOLE and sees the holes, itself included: a softmax over nothing would be NaN
        mask = (fields.position[:, None] <= here) & (ends[:, None] > here)
        queries = query[:, :, first : first + step]
        if softmax.plain:
            output = F.scaled_dot_product_attention(queries, key, value, attn_mask=mask[:, None], scale=softmax.scaling)
        else:
            output = softmax.attend(queries, *stored, mask)
        outputs.append(output.masked_fill((here == HOLE)[:, None], 0) if padded else output)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def _padded(store: Ragged, new: Fields, pairs: list[int], longest: int) -> Fields:
    """Return the keys of some pairs side by side: the stored ones, holes up to `longest`, then the chunk's.

    It makes a single copy, because the heads with the most keys determine the peak of memory.

    Returns:
        `[pairs, longest + tokens]`.
    """
    stored = store.by_pair()
    hole = new.map(lambda tensor: tensor.new_zeros(longest, *tensor.shape[2:]))
    hole.position.fill_(HOLE)
    parts = []
    for pair in pairs:
        missing = longest - len(stored[pair].position)
        parts += [stored[pair], *([hole.row(0, missing)] if missing else []), new.row(pair)]
    return Fields.cat(parts).map(lambda tensor: tensor.unflatten(0, (len(pairs), -1)))


def group_by_length(counts: list[int], tokens: int) -> list[list[int]]:
    """Group the pairs by their lengths, `counts + tokens`, so that they differ by at most `LENGTH_RATIO` in a group.

    Args:
        counts: stored keys of each pair.
        tokens: of the chunk.

    Returns:
        Each pair in exactly one group, in order within it; the group with the shortest pairs first.
    """
    groups: list[list[int]] = []
    for pair in sorted(range(len(counts)), key=counts.__getitem__):
        if groups and counts[pair] + tokens <= LENGTH_RATIO * (counts[groups[-1][0]] + tokens):
            groups[-1].append(pair)
        else:
            groups.append([pair])
    return [sorted(group) for group in groups]


def limited_ends(store: Ragged, new: Fields, limit: Limit) -> Tensor:
    """Return the first position whose query does not see each key, int64 `[pairs, longest + tokens]`."""
    position, expiry, score = new.position, new.expiry, new.score
    if len(store.fields.position):
        index, filled = store.side_by_side()
        stored = store.fields
        position = torch.cat([stored.position[index].masked_fill(~filled, HOLE), position], dim=1)
        expiry = torch.cat([stored.expiry[index], expiry], dim=1)
        score = None if score is None or stored.score is None else torch.cat([stored.score[index], score], dim=1)
    return limit(position, expiry, score)
