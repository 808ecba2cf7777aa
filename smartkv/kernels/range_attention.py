"""Attention of one token over the range of slots that each KV head sees.

A *pair* is one row of the batch and one KV head. The keys of all pairs lie in one arena `[slots, head_dim]`. What the
query of a pair sees is one range of it, so the kernel needs no mask, and reads no key that is not seen.

A range is divided among several programs (split-K), whose partial results a second kernel merges: with few pairs there
would not be enough programs for a GPU otherwise. Each pair's range is divided evenly, however long it is.
"""

from typing import Any

import torch
from torch import Tensor

from smartkv.kernels.launching import BLOCKS, interpreted, padded, tl, triton

SPLITS = 8  # programs that share the range of a pair


@triton.jit
def _attend_split(
    queries, keys, values, starts, lengths, tops, totals, mixes, scaling, cap,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_PAD: tl.constexpr,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr, CAPPED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Attend to one part of one pair's range: the largest score, the sum of weights and the weighted sum of values."""
    pair, split = tl.program_id(0), tl.program_id(1)
    start = tl.load(starts + pair).to(tl.int64)
    length = tl.load(lengths + pair)
    part = tl.cdiv(tl.cdiv(length, BLOCK), SPLITS) * BLOCK
    low = split * part
    high = tl.minimum(low + part, length)
    head, dim, slot = tl.arange(0, GROUP_PAD), tl.arange(0, HEAD_DIM_PAD), tl.arange(0, BLOCK)
    real = dim < HEAD_DIM
    query = tl.load(
        queries + (pair * GROUP + head[:, None]) * HEAD_DIM + dim[None, :],
        mask=(head[:, None] < GROUP) & real[None, :],
        other=0.0,
    )
    if WIDE:
        query = query.to(tl.float32)
    top = tl.full((GROUP_PAD,), float("-inf"), tl.float32)
    total = tl.zeros((GROUP_PAD,), tl.float32)
    mix = tl.zeros((GROUP_PAD, HEAD_DIM_PAD), tl.float32)
    for first in range(low, high, BLOCK):
        here = first + slot
        inside = here < high
        key = tl.load(
            keys + (start + here)[None, :] * HEAD_DIM + dim[:, None], mask=inside[None, :] & real[:, None], other=0.0
        )
        value = tl.load(
            values + (start + here)[:, None] * HEAD_DIM + dim[None, :], mask=inside[:, None] & real[None, :], other=0.0
        )
        if WIDE:
            key, value = key.to(tl.float32), value.to(tl.float32)
        scores = tl.dot(query, key, input_precision="ieee").to(tl.float32) * scaling
        if CAPPED:
            scores = cap * (2 * tl.sigmoid(2 * scores / cap) - 1)  # tanh
        scores = tl.where(inside[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        shrink = tl.exp(top - higher)
        weights = tl.exp(scores - higher[:, None])
        mix = mix * shrink[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee").to(tl.float32)
        total = total * shrink + tl.sum(weights, 1)
        top = higher
    at = (pair * SPLITS + split) * GROUP_PAD + head
    tl.store(tops + at, top)
    tl.store(totals + at, total)
    tl.store(mixes + at[:, None] * HEAD_DIM_PAD + dim[None, :], mix)


@triton.jit
def _merge_splits(
    tops, totals, mixes, sinks, outputs,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_PAD: tl.constexpr,
    SPLITS: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Add the parts of one query head. A head that sees nothing gets zeros."""
    pair, head = tl.program_id(0), tl.program_id(1)
    dim, split = tl.arange(0, HEAD_DIM_PAD), tl.arange(0, SPLITS)
    at = (pair * SPLITS + split) * GROUP_PAD + head
    parts = tl.load(tops + at)
    top = tl.max(parts, 0)
    if SINKS:
        sink = tl.load(sinks + pair * GROUP + head).to(tl.float32)
        top = tl.maximum(top, sink)
    top = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.exp(parts - top)
    total = tl.sum(tl.load(totals + at) * weights, 0)
    if SINKS:
        total += tl.exp(sink - top)
    mix = tl.sum(tl.load(mixes + at[:, None] * HEAD_DIM_PAD + dim[None, :]) * weights[:, None], 0)
    output = mix / tl.where(total == 0, 1.0, total)
    tl.store(outputs + (pair * GROUP + head) * HEAD_DIM + dim, output.to(outputs.dtype.element_ty), mask=dim < HEAD_DIM)


def range_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    lengths: Tensor,
    scaling: float,
    cap: float | None = None,
    learned_sinks: Tensor | None = None,
    splits: int = SPLITS,
    block: int | None = None,
) -> Tensor:
    """Compute attention of one token per pair over ranges of an arena.

    Two launches, no mask, no wait for the device. Scores and sums are float32.

    Args:
        query: `[pairs, group, head_dim]`, the query heads that share each KV head; float32, float16 or bfloat16.
        keys: `[slots, head_dim]`, contiguous, in the dtype of `query`.
        values: Like `keys`.
        starts: int32 `[pairs]`, first slot that the query of each pair sees.
        lengths: int32 `[pairs]`, number of slots that it sees; 0 gives zeros.
        scaling: Factor of the products of queries and keys.
        cap: Soft cap of the scores, `cap · tanh(score / cap)`; None if there is none.
        learned_sinks: `[pairs, group]`, scores that take weight and have no value; None if there are none.
        splits: Programs that share a pair's range, a power of 2.
        block: Slots that a program reads at once, a power of 2, at least 16; None: that of `BLOCKS`.

    Returns:
        Shaped like `query`, in its dtype.
    """
    pairs, group, head_dim = query.shape
    group_pad, head_dim_pad = padded(group), padded(head_dim)
    partial: dict[str, Any] = {"dtype": torch.float32, "device": query.device}
    tops = torch.empty(pairs, splits, group_pad, **partial)
    totals = torch.empty_like(tops)
    mixes = torch.empty(pairs, splits, group_pad, head_dim_pad, **partial)
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    sizes = {"GROUP": group, "GROUP_PAD": group_pad, "HEAD_DIM": head_dim, "HEAD_DIM_PAD": head_dim_pad}
    with torch.cuda.device_of(query):  # Triton launches on the current device
        _attend_split[pairs, splits](
            query.contiguous(), keys, values, starts, lengths, tops, totals, mixes, scaling, cap or 1.0,
            **sizes, BLOCK=block or BLOCKS[query.element_size()], SPLITS=splits, CAPPED=cap is not None,
            WIDE=interpreted() and query.dtype == torch.bfloat16,
        )  # fmt: skip
        sinks = tops if learned_sinks is None else learned_sinks.contiguous()
        _merge_splits[pairs, group](
            tops, totals, mixes, sinks, output, **sizes, SPLITS=splits, SINKS=learned_sinks is not None
        )
    return output
