"""Attention of a chunk of tokens over slots whose position and end decide who sees them.

A *pair* is one row of the batch and one KV head. The slots of a pair are consecutive in one arena `[slots, head_dim]`:
the stored keys, then those of the chunk in the order of its tokens. Query `i` sees the key at position `j` iff
`j ≤ i < end_j`. The kernel tests that in registers, so there is no mask in memory.
"""

import torch
from torch import Tensor

from smartkv.kernels.launching import BLOCKS, interpreted, padded, tl, triton
from smartkv.policies.lifetimes import HOLE

NOWHERE = tl.constexpr(HOLE)


@triton.jit
def _attend_tile(
    queries, keys, values, positions, ends, firsts, counts, places, sinks, outputs, tokens, scaling, cap,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_PAD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    CAPPED: tl.constexpr, SINKS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Attend with the query heads of some tokens of one pair; row `r` is head `r % GROUP` of token `r // GROUP`."""
    pair, tile = tl.program_id(0), tl.program_id(1)
    first = tl.load(firsts + pair).to(tl.int64)
    count = tl.load(counts + pair)
    row = tile * ROWS + tl.arange(0, ROWS)
    token, head = row // GROUP, row % GROUP
    dim, slot = tl.arange(0, HEAD_DIM_PAD), tl.arange(0, BLOCK)
    real, inside = dim < HEAD_DIM, token < tokens
    line = ((pair * GROUP + head) * tokens + token).to(tl.int64)
    query = tl.load(queries + line[:, None] * HEAD_DIM + dim[None, :], mask=inside[:, None] & real[None, :], other=0.0)
    if WIDE:
        query = query.to(tl.float32)
    place = tl.load(places + pair * tokens + token, mask=inside, other=NOWHERE)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    if SINKS:
        top = tl.load(sinks + pair * GROUP + head).to(tl.float32)
        total += 1.0
    mix = tl.zeros((ROWS, HEAD_DIM_PAD), tl.float32)
    last = tl.minimum(tile * ROWS + ROWS - 1, tokens * GROUP - 1) // GROUP  # token of the tile's last row
    until = count - tokens + last + 1  # the chunk's later tokens lie behind it
    for start in range(0, until, BLOCK):
        here = start + slot
        stored = here < until
        position = tl.load(positions + first + here, mask=stored, other=NOWHERE)
        end = tl.load(ends + first + here, mask=stored, other=0)
        seen = (position[None, :] != NOWHERE) & (position[None, :] <= place[:, None]) & (end[None, :] > place[:, None])
        key = tl.load(
            keys + (first + here)[None, :] * HEAD_DIM + dim[:, None], mask=stored[None, :] & real[:, None], other=0.0
        )
        value = tl.load(
            values + (first + here)[:, None] * HEAD_DIM + dim[None, :], mask=stored[:, None] & real[None, :], other=0.0
        )
        if WIDE:
            key, value = key.to(tl.float32), value.to(tl.float32)
        scores = tl.dot(query, key, input_precision="ieee").to(tl.float32) * scaling
        if CAPPED:
            scores = cap * (2 * tl.sigmoid(2 * scores / cap) - 1)  # tanh
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # of a row that has seen nothing yet
        shrink = tl.exp(top - base)
        weights = tl.exp(scores - base[:, None])
        mix = mix * shrink[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee").to(tl.float32)
        total = total * shrink + tl.sum(weights, 1)
        top = higher
    output = mix / tl.where(total == 0, 1.0, total)[:, None]
    output = tl.where((place == NOWHERE)[:, None], 0.0, output)
    tl.store(
        outputs + line[:, None] * HEAD_DIM + dim[None, :],
        output.to(outputs.dtype.element_ty),
        mask=inside[:, None] & real[None, :],
    )


def rows_and_warps(width: int, head_dim: int) -> tuple[int, int]:
    """Return the rows of a program, a query head of a token each, and its warps: as many as spill no registers.

    Args:
        width: Bytes of a number.
        head_dim: Padded.
    """
    if width == 2:
        return 128, 8
    return (64, 8) if head_dim <= 64 else (16, 4)


def chunk_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    ends: Tensor,
    firsts: Tensor,
    counts: Tensor,
    places: Tensor,
    scaling: float,
    cap: float | None = None,
    learned_sinks: Tensor | None = None,
) -> Tensor:
    """Compute attention of a chunk, in one launch and without waiting for the device. Sums are float32.

    Args:
        query: `[pairs, group, tokens, head_dim]`; float32, float16 or bfloat16.
        keys: `[slots, head_dim]`, contiguous, in the dtype of `query`; those of the chunk are stored already.
        values: Like `keys`.
        positions: int32 `[slots]`, of each key; `HOLE` where there is none.
        ends: int32 `[slots]`, first position whose query does not see the key.
        firsts: int32 `[pairs]`, first slot of each pair.
        counts: int32 `[pairs]`, slots of each pair that are in use; the last `tokens` are the chunk's, in order.
        places: int32 `[pairs, tokens]`, positions of the queries; `HOLE` for padding, whose output is zeros.
        scaling, cap: As in `smartkv.kernels.range_attention`.
        learned_sinks: `[pairs, group]`, as there.

    Returns:
        Shaped like `query`, in its dtype.
    """
    pairs, group, tokens, head_dim = query.shape
    output, width = torch.empty_like(query, memory_format=torch.contiguous_format), query.element_size()
    rows, warps = rows_and_warps(width, padded(head_dim))
    with torch.cuda.device_of(query):  # Triton launches on the current device
        _attend_tile[pairs, triton.cdiv(group * tokens, rows)](
            query.contiguous(), keys, values, positions, ends, firsts, counts, places.contiguous(),
            output if learned_sinks is None else learned_sinks.contiguous(), output, tokens, scaling, cap or 1.0,
            GROUP=group, HEAD_DIM=head_dim, HEAD_DIM_PAD=padded(head_dim), ROWS=rows, BLOCK=BLOCKS[width],
            CAPPED=cap is not None, SINKS=learned_sinks is not None,
            WIDE=interpreted() and query.dtype == torch.bfloat16, num_warps=warps,
        )  # fmt: skip
    return output
