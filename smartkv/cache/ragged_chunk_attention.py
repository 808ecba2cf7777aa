"""Attention of a chunk on a GPU: one kernel over the slots of all pairs, whatever their lengths.

It gives what `smartkv.cache.chunk_attention` gives, without masks and without padding pairs to the longest: the kernel
tests who sees a key by its position and its end. The host waits once, for the number of keys that are not freed.
"""

import torch
from torch import Tensor

from smartkv.cache import ranges
from smartkv.cache.chunk_attention import ChunkResult, Limit, Span, chunk_attention, limited_ends
from smartkv.cache.footprint_count import count_deaths, count_queries
from smartkv.cache.ragged import Fields, Ragged, ranks
from smartkv.models.softmax import Softmax
from smartkv.policies.lifetimes import HOLE
from smartkv.quantization.per_token import PackedRows

# tokens of a chunk that attend together: fewer free dead keys earlier, but copy the live ones more often
QUERIES, QUERIES_ON_GPU = 256, 1024


def tile_tokens(device: torch.device, packed: PackedRows | None) -> int:
    """Return how many tokens of a chunk attend together before dead keys are freed."""
    return QUERIES_ON_GPU if packed is None and ranges.ranges_serve(device) else QUERIES


def attend_chunk(
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
    """Compute attention of a chunk where it is fastest; arguments as in `smartkv.cache.chunk_attention`."""
    if packed is None and ranges.ranges_serve(query.device):
        return ragged_chunk_attention(
            query, store, new, limit, span, softmax, first_query, ranges.triton_runs(query.device)
        )
    return chunk_attention(query, store, new, limit, span, softmax, first_query, packed, padded)


def ragged_chunk_attention(
    query: Tensor,
    store: Ragged,
    new: Fields,
    limit: Limit | None,
    span: Span,
    softmax: Softmax,
    first_query: int,
    kernels: bool,
) -> ChunkResult:
    """Compute attention of a chunk, and drop the keys that no later query sees.

    Args:
        query, store, new, limit, span, softmax, first_query: as in `smartkv.cache.chunk_attention.chunk_attention`.
        kernels: whether Triton's kernels attend.
    """
    (batch, query_heads, tokens, head_dim), device = query.shape, query.device
    (start, end, final), stored, pairs = span, len(store.fields.position), len(store.counts)
    counts = store.counts + tokens
    first = counts.cumsum(0) - counts
    own, rank = ranks(store.counts, stored)
    old_slots = first[own] + rank
    new_slots = (first + store.counts)[:, None] + torch.arange(tokens, device=device)
    total = stored + pairs * tokens

    def side_by_side(old: Tensor, chunk: Tensor) -> Tensor:
        """Return the stored and the chunk's of each pair, `[slots, …]`."""
        both = old.new_empty(total, *old.shape[1:])
        return both.index_copy_(0, old_slots, old).index_copy_(0, new_slots.flatten(), chunk.flatten(0, 1))

    both = zip(store.fields, new, strict=True)
    fields = Fields(*(None if old is None else side_by_side(old, chunk) for old, chunk in both))  # type: ignore[arg-type]
    ends = fields.expiry
    if limit is not None:
        limited = limited_ends(store, new, limit)
        ends = side_by_side(limited[own, rank], limited[:, -tokens:]).int()
    ends = ends.masked_fill(fields.position == HOLE, 0)
    grouped = query.reshape(pairs, -1, tokens, head_dim)
    softmax = softmax.of_pairs(torch.arange(pairs, device=device), pairs // batch)
    attend = _attend if kernels else _attend_in_turn
    output = attend(grouped, fields, ends, first, counts, new.position, softmax)
    pair = torch.arange(pairs, device=device).repeat_interleave(counts, output_size=total)
    alive = ends > final[pair]
    seen = count_queries(fields.position, ends, start[pair], end[pair], first_query)
    visible, remaining = torch.zeros(2, pairs, dtype=torch.int64, device=device)
    visible.index_add_(0, pair, seen.long())
    remaining.index_add_(0, pair, alive.long())
    deaths = count_deaths(fields.position, ends, ~alive & (fields.position != HOLE))
    lasting = fields.at(alive.nonzero().flatten())
    result = Ragged(lasting, remaining)
    return ChunkResult(
        output.reshape(batch, query_heads, tokens, head_dim), result, visible, deaths, fields.nbytes + lasting.nbytes
    )


def _attend(
    query: Tensor, fields: Fields, ends: Tensor, first: Tensor, counts: Tensor, places: Tensor, softmax: Softmax
) -> Tensor:
    """Attend by Triton's kernel; arguments as in `smartkv.kernels.chunk_attention`."""
    from smartkv.kernels.chunk_attention import chunk_attention  # an extra

    sinks = None if softmax.learned_sinks is None else softmax.learned_sinks.view(query.shape[:2])
    return chunk_attention(
        query,
        *fields[:2],
        fields.position,
        ends,
        first.int(),
        counts.int(),
        places,
        softmax.scaling,
        softmax.cap,
        sinks,
    )


def _attend_in_turn(
    query: Tensor, fields: Fields, ends: Tensor, first: Tensor, counts: Tensor, places: Tensor, softmax: Softmax
) -> Tensor:
    """Attend a pair at a time, without kernels, for tests of what surrounds them."""
    sinks = None if softmax.learned_sinks is None else softmax.learned_sinks.view(query.shape[:2])
    outputs = []
    for pair, (start, count) in enumerate(zip(first.tolist(), counts.tolist(), strict=True)):
        here, at = slice(start, start + count), places[pair, :, None]
        mask = (fields.position[here] <= at) & (ends[here] > at)  # a query of padding sees the holes
        mask = torch.where(at == HOLE, fields.position[here] == HOLE, mask & (fields.position[here] != HOLE))
        key, value = (tensor[here][None] for tensor in fields[:2])
        own = softmax if sinks is None else softmax._replace(learned_sinks=sinks[pair])
        mixed = own.attend(query[pair][None], key, value, mask[None])
        outputs.append(mixed[0].masked_fill(places[pair, :, None] == HOLE, 0))
    return torch.stack(outputs)
