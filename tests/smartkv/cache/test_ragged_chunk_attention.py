"""Attention of one chunk over the slots of all pairs, against that of pairs padded to the longest."""

from importlib.util import find_spec

import pytest
import torch

from smartkv.cache.chunk_attention import ChunkResult, Limit, Span, chunk_attention
from smartkv.cache.ragged_chunk_attention import QUERIES, ragged_chunk_attention, tile_tokens
from smartkv.models.softmax import Softmax
from smartkv.policies.capacity import Cap
from smartkv.quantization.per_token import PackedRows
from tests.smartkv.cache.stores import HEAD_DIM, random_store, softmaxes
from tests.smartkv.cache.test_chunk_attention import START, TOKENS, new_keys

INTERPRETED = pytest.param(True, marks=pytest.mark.skipif(find_spec("triton") is None, reason="make test-triton"))


def both(counts: list[int], softmax: Softmax, kernels: bool, cap: Cap | None = None) -> tuple[ChunkResult, ChunkResult]:
    pairs = len(counts)
    query = torch.randn(1, 2 * pairs, TOKENS, HEAD_DIM, generator=torch.Generator().manual_seed(7))
    start, end = torch.full((pairs,), START), torch.full((pairs,), START + TOKENS - 1)
    limit: Limit | None = None
    if cap is not None:
        limit = lambda position, expiry, score: cap.ends(position, expiry, score, start, TOKENS + 1)  # noqa: E731
    inputs = query, random_store(counts), new_keys(pairs), limit, Span(start, end, end), softmax, START + 2
    return ragged_chunk_attention(*inputs, kernels), chunk_attention(*inputs, None, padded=True)


@pytest.mark.parametrize("kernels", [False, INTERPRETED])
@pytest.mark.parametrize("kind", range(4))
@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize("counts", [[9, 0, 30], [24], [0, 0]])
def test_it_gives_what_pairs_give_that_are_padded_to_the_longest(
    counts: list[int], capped: bool, kind: int, kernels: bool
) -> None:
    cap = Cap(room=6, heads=1, window=2, sinks=1) if capped else None
    got, want = both(counts, softmaxes(2 * len(counts))[kind], kernels, cap)
    torch.testing.assert_close(got.output, want.output, atol=1e-5, rtol=0)
    assert torch.equal(got.visible, want.visible) and torch.equal(got.deaths, want.deaths)
    assert torch.equal(got.store.counts, want.store.counts)
    for one, other in zip(got.store.fields, want.store.fields, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


def test_a_cpu_and_keys_in_few_bits_attend_in_small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smartkv.cache.ranges.ranges_serve", lambda device: device.type == "cuda")
    monkeypatch.setattr("smartkv.cache.ragged_chunk_attention.QUERIES_ON_GPU", 1024)
    assert tile_tokens(torch.device("cpu"), None) == tile_tokens(torch.device("cuda"), PackedRows((6, 4))) == QUERIES
    assert tile_tokens(torch.device("cuda"), None) > QUERIES
