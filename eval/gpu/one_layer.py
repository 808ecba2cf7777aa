"""Attention of one layer for one token a row: SmartKV's ranges and pages, flash over ranges, and over all keys."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from eval.gpu.shapes import Shape, pairs_of, ragged_store
from eval.gpu.timing import first_line, replay_seconds
from smartkv.cache.paged import LEAST_SPARE, Pages
from smartkv.cache.ranges import Ranges
from smartkv.models.softmax import Softmax
from smartkv.policies.lifetimes import FOREVER

SPLITS = (1, 8, 16)  # programs that share a range, which are tried
WORST = 0.02  # largest relative error against float64 that counts as right in bfloat16


def one_layer(
    shape: Shape, batch: int, context: int, share: float, device: torch.device, dtype: torch.dtype
) -> Iterator[dict[str, Any]]:
    """Yield the figures of each way: microseconds, GB/s of the keys and values that it needs, error against float64."""
    pairs, group, head_dim = batch * shape.kv_heads, shape.heads // shape.kv_heads, shape.head_dim
    store = ragged_store(pairs, int(share * context), context, head_dim, device, dtype)
    query = torch.randn(batch, shape.heads, 1, head_dim, device=device, dtype=dtype)
    queries, scale = pairs_of(query, pairs), head_dim**-0.5
    live = torch.arange(len(store.fields.position), device=device)
    lasting = torch.full_like(live, FOREVER)
    now = torch.full((pairs,), context, device=device)
    pages = Pages(store.fields, live, store.counts, lasting, now, LEAST_SPARE, dtype)
    new = torch.randn(2, pairs, 1, head_dim, device=device, dtype=dtype)
    bias = pages.write(0, *new)

    def by_pair() -> Iterator[tuple[Tensor, Tensor]]:
        """Yield what each pair sees, its own token last."""
        keys = store.by_pair()
        for pair in range(pairs):
            yield torch.cat([keys[pair].key, new[0, pair]]), torch.cat([keys[pair].value, new[1, pair]])

    want = torch.stack([_exact(queries[pair], *seen, scale) for pair, seen in enumerate(by_pair())])
    needed = (len(live) + pairs) * 2 * head_dim * dtype.itemsize
    yield _timed("SmartKV, pages", lambda: pages.attend(queries, Softmax(scale), bias), needed, device, want)
    ranges = Ranges(store.fields, live, store.counts, lasting, now, LEAST_SPARE)
    ranges.write(0, *new)
    for splits in SPLITS:
        over = _triton_over_ranges(queries, ranges, scale, splits)
        yield _timed(f"SmartKV, ranges in {splits} parts", over, needed, device, want)
    lengths = (store.counts + 1).int()
    keys, values = (torch.cat(parts).unsqueeze(1) for parts in zip(*by_pair(), strict=True))
    yield _timed("flash over ranges", _flash_over_ranges(queries, keys, values, lengths, scale), needed, device, want)
    all_of = (batch, shape.kv_heads, context, head_dim)
    key, value = (torch.randn(all_of, device=device, dtype=dtype) for _ in range(2))
    everything = 2 * key.numel() * dtype.itemsize

    def all_keys() -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=group > 1)

    yield _timed("all keys, flash", all_keys, everything, device, None)


def _exact(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Compute attention of `[group, head_dim]` over the keys of one pair, in float64."""
    scores = query.double() @ key.double().mT * scale
    return scores.softmax(dim=-1) @ value.double()


def _triton_over_ranges(queries: Tensor, ranges: Ranges, scale: float, splits: int) -> Callable[[], Tensor]:
    """Return SmartKV's kernel, each range divided among `splits` programs; without Triton it says so when it is called.

    Args:
        queries: `[pairs, group, head_dim]`.
        ranges: after the first token was written.
        scale: on the products.
        splits: a power of 2.
    """

    def attend() -> Tensor:
        if not ranges.kernels:
            raise RuntimeError("needs a GPU with Triton")
        from smartkv.kernels.range_attention import range_attention  # an extra

        starts, lengths = ranges.starts[0], ranges.lengths[0]
        return range_attention(queries, *ranges.fields[:2], starts, lengths, scale, splits=splits)

    return attend


def _flash_over_ranges(
    queries: Tensor, key: Tensor, value: Tensor, lengths: Tensor, scale: float
) -> Callable[[], Tensor]:
    """Return torch's flash kernel over ranges of one arena: a pair is a sequence with `group` heads and one KV head.

    Args:
        queries: `[pairs, group, head_dim]`.
        key, value: `[keys, 1, head_dim]`, pair by pair.
        lengths: int32 `[pairs]`.
        scale: on the products.
    """
    starts = F.pad(lengths.cumsum(0), (1, 0)).int()
    ones = torch.arange(len(queries) + 1, device=queries.device, dtype=torch.int32)
    longest = int(lengths.max())

    def attend() -> Tensor:
        return torch.ops.aten._flash_attention_forward(
            queries, key, value, ones, starts, 1, longest, 0.0, False, False, scale=scale, seqused_k=lengths
        )[0]

    return attend


def _timed(
    way: str, call: Callable[[], Tensor], needed: int, device: torch.device, want: Tensor | None
) -> dict[str, Any]:
    """Return a way's figures, or a note why there are none."""
    try:
        error = None if want is None else float((call().double() - want).norm() / want.norm())
        taken = replay_seconds(call, device)
    except RuntimeError as reason:  # the device or this version of torch has no such kernel
        return {"way": way, "note": first_line(reason)}
    if error is not None and not error < WORST:
        return {"way": way, "note": f"wrong: relative error {error:.2g} against float64"}
    return {"way": way, "microseconds": 1e6 * taken, "gb_per_s": needed / taken / 1e9, "error": error}
