"""Attention of a chunk of queries over the keys that a layer holds and the chunk's own; what survives it."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from smartkv.cache.footprint_count import count_queries
from smartkv.cache.ragged import Fields, Ragged
from smartkv.policies.capacity import Cap
from smartkv.policies.lifetimes import HOLE
from smartkv.quantization.per_token import PackedRows

MASK_ELEMENTS = 2**21  # of a mask at once: for 256 queries it would be as large as keys and values of 64 dimensions
LIKE = 1.25  # pairs whose lengths differ by less stand side by side, padded to the longest


@dataclass
class ChunkResult:
    """What a chunk leaves.

    Attributes:
        output: `[batch, query_heads, tokens, head_dim]`; zeros for padding.
        store: the keys that the next query sees.
        visible: int64 `[pairs]`, keys that the counted queries saw.
        bytes_at_work: the largest sum of keys that were held beside the old store.
    """

    output: Tensor
    store: Ragged
    visible: Tensor
    bytes_at_work: int


def chunk_attention(
    query: Tensor,
    store: Ragged,
    new: Fields,
    cap: Cap | None,
    start: Tensor,
    end: Tensor,
    scaling: float,
    first_query: int,
    packed: PackedRows | None,
    padded: bool,
) -> ChunkResult:
    """Query `i` of a pair sees key `j` iff `j ≤ i < end of j`.

    Args:
        query: `[batch, query_heads, tokens, head_dim]`.
        store: what is held.
        new: the chunk's keys, `[pairs, tokens]`; position `HOLE` where the token is padding.
        cap: of the layer; None: none.
        start, end: int64 `[pairs]`, position of the first real token, and of the next one after the chunk.
        scaling: of the scores.
        first_query: position of the first query that is counted.
        packed: how keys and values are packed, and queries turned; None: they are not.
        padded: some tokens may be padding.
    """
    batch, query_heads, tokens, head_dim = query.shape
    pairs, device = len(start), query.device
    grouped = query.reshape(pairs, -1, tokens, head_dim)  # [pairs, group, tokens, head_dim]
    output = torch.empty_like(grouped)
    visible, counts = torch.zeros_like(start), torch.zeros_like(start)
    drops = None if cap is None else _dropped(store, new, cap, start, tokens)
    held = store.sizes
    kept: dict[int, Fields] = {}  # of each pair
    most = kept_bytes = 0
    for group in group_by_length(held, tokens):
        longest = max(held[pair] for pair in group)
        fields = _padded(store, new, group, longest)
        rows = torch.tensor(group, device=device)
        ends = fields.expiry
        if drops is not None:
            ends = torch.cat([drops[rows, :longest], drops[rows, -tokens:]], dim=1)
        ends = ends.masked_fill(fields.position == HOLE, 0)
        if len(group) == pairs:
            output = _masked_attention(grouped, fields, ends, new.position, scaling, packed, padded)
        else:
            queries, at = grouped.index_select(0, rows), new.position[rows]
            found = _masked_attention(queries, fields, ends, at, scaling, packed, padded)
            output.index_copy_(0, rows, found)
        alive = ends > end[rows, None]
        saw = count_queries(fields.position, ends, start[rows, None], end[rows, None], first_query)
        visible[rows], counts[rows] = saw.sum(dim=1), alive.sum(dim=1)
        flat, index = fields.map(lambda tensor: tensor.flatten(0, 1)), alive.flatten().nonzero().flatten()
        all_alive = len(index) == alive.numel()  # then they lie as they shall: no copy
        lasting = flat if all_alive else flat.at(index)
        kept |= zip(group, lasting.split(counts[rows].tolist()), strict=True)
        read = 0 if packed is None else 2 * fields.position.numel() * head_dim * query.element_size()
        most = max(most, kept_bytes + fields.nbytes + max(read, 0 if all_alive else lasting.nbytes))
        kept_bytes += lasting.nbytes
    survivors = kept[0] if pairs == 1 else Fields.cat([kept[pair] for pair in range(pairs)])
    most = max(most, kept_bytes + survivors.nbytes)
    output = output.reshape(batch, query_heads, tokens, head_dim)  # attention on GPUs may leave it in another order
    left = Ragged(survivors, counts)
    left.sizes = [len(kept[pair].position) for pair in range(pairs)]
    return ChunkResult(output, left, visible, most)


def _masked_attention(
    query: Tensor, fields: Fields, ends: Tensor, at: Tensor, scaling: float, packed: PackedRows | None, padded: bool
) -> Tensor:
    """Attention under the rule, for so many queries at once that the mask stays small beside the keys.

    Args:
        query: `[pairs, group, tokens, head_dim]`.
        fields: `[pairs, keys]`, the last `tokens` of them the queries' own.
        ends: int `[pairs, keys]`, first position whose query does not see the key; 0 where there is none.
        at: int `[pairs, tokens]`, positions of the queries, `HOLE` for padding.
        packed, padded: see `chunk_attention`.

    Returns:
        Like `query`; zeros for padding.
    """
    (pairs, group, tokens, head_dim), keys = query.shape, fields.position.shape[1]
    stored = fields[:2] if packed is None else packed.read(*fields[:2], query.dtype)
    key, value = (tensor[:, None].expand(pairs, group, keys, head_dim) for tensor in stored)
    parts = []
    step = max(16, MASK_ELEMENTS // (pairs * keys))
    for first in range(0, tokens, step):
        here = at[:, first : first + step, None]
        # a query of padding, at HOLE, sees the holes, itself among them: a softmax over nothing would be NaN
        mask = (fields.position[:, None] <= here) & (ends[:, None] > here)
        queries = query[:, :, first : first + step]
        found = F.scaled_dot_product_attention(queries, key, value, attn_mask=mask[:, None], scale=scaling)
        parts.append(found.masked_fill((here == HOLE)[:, None], 0) if padded else found)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _padded(store: Ragged, new: Fields, pairs: list[int], longest: int) -> Fields:
    """Keys of these pairs side by side, `[pairs, longest + tokens]`: what is held, holes up to `longest`, the chunk's.

    One copy: heads that hold much are what the peak is made of.
    """
    held = store.by_pair()
    hole = new.map(lambda tensor: tensor.new_zeros(longest, *tensor.shape[2:]))
    hole.position.fill_(HOLE)
    parts = []
    for pair in pairs:
        missing = longest - len(held[pair].position)
        parts += [held[pair], *([hole.row(0, missing)] if missing else []), new.row(pair)]
    return Fields.cat(parts).map(lambda tensor: tensor.unflatten(0, (len(pairs), -1)))


def group_by_length(counts: list[int], tokens: int) -> list[list[int]]:
    """Pairs whose lengths (counts + tokens) are alike, in groups in order, each pair once; the shortest group first."""
    groups: list[list[int]] = []
    for pair in sorted(range(len(counts)), key=counts.__getitem__):
        if groups and counts[pair] + tokens <= LIKE * (counts[groups[-1][0]] + tokens):
            groups[-1].append(pair)
        else:
            groups.append([pair])
    return [sorted(group) for group in groups]


def _dropped(store: Ragged, new: Fields, cap: Cap, start: Tensor, tokens: int) -> Tensor:
    """First position whose query does not see each key under the cap, int64 `[pairs, longest + tokens]`."""
    position, expiry, score = new.position, new.expiry, new.score
    if len(store.fields.position):
        index, filled = store.side_by_side()
        held = store.fields
        position = torch.cat([held.position[index].masked_fill(~filled, HOLE), position], dim=1)
        expiry = torch.cat([held.expiry[index], expiry], dim=1)
        score = None if score is None or held.score is None else torch.cat([held.score[index], score], dim=1)
    return cap.ends(position, expiry, score, start, tokens + 1)
