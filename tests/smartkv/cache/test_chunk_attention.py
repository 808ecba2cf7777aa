"""Attention of one chunk against plain loops, and the keys that it leaves."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smartkv.cache.chunk_attention import LENGTH_RATIO, ChunkResult, Limit, Span, chunk_attention, group_by_length
from smartkv.cache.ragged import Fields, Ragged
from smartkv.models.softmax import Softmax
from smartkv.policies.capacity import Cap
from smartkv.policies.lifetimes import HOLE
from tests.smartkv.cache.stores import HEAD_DIM, keys_of, plain_attention, random_store, softmaxes

TOKENS, START = 7, 24
PLAIN = Softmax(0.3)


def new_keys(pairs: int) -> Fields:
    """The keys of a chunk from position `START`, of which some expire within it; the first token is padding."""
    generator = torch.Generator().manual_seed(9)
    key, value = (torch.randn(pairs, TOKENS, HEAD_DIM, generator=generator) for _ in range(2))
    position = (START - 1 + torch.arange(TOKENS)).int().repeat(pairs, 1)
    position[:, 0] = HOLE
    expiry = position + torch.randint(1, TOKENS + 3, (pairs, TOKENS), generator=generator).int()
    return Fields(key, value, position, expiry)


def attended(
    store: Ragged, new: Fields, cap: Cap | None = None, softmax: Softmax = PLAIN
) -> tuple[torch.Tensor, ChunkResult]:
    pairs = len(store.counts)
    query = torch.randn(1, 2 * pairs, TOKENS, HEAD_DIM, generator=torch.Generator().manual_seed(7))
    start, end = torch.full((pairs,), START), torch.full((pairs,), START + TOKENS - 1)
    limit: Limit | None = None
    if cap is not None:
        limit = lambda position, expiry, score: cap.ends(position, expiry, score, start, TOKENS + 1)  # noqa: E731
    return query, chunk_attention(
        query, store, new, limit, Span(start, end, end), softmax, START + 2, None, padded=True
    )


@pytest.mark.parametrize("kind", range(4))
@pytest.mark.parametrize("mask_elements", [1, 2**21])
@pytest.mark.parametrize("counts", [[9, 0, 30], [8, 9], [24]])
def test_queries_see_the_keys_that_have_not_expired_and_the_rest_is_dropped(
    counts: list[int], mask_elements: int, kind: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smartkv.cache.chunk_attention.MASK_ELEMENTS", mask_elements)
    store, new = random_store(counts), new_keys(len(counts))
    softmax = softmaxes(2 * len(counts))[kind]
    query, result = attended(store, new, softmax=softmax)
    assert not result.output[:, :, 0].any()  # padding
    for pair in range(len(counts)):
        keys = keys_of(store, pair)
        keys += [
            (new.key[pair, token], new.value[pair, token], START - 1 + token, int(new.expiry[pair, token]))
            for token in range(1, TOKENS)
        ]
        seen = 0
        for token in range(1, TOKENS):
            at = START - 1 + token
            visible = [(k, v) for k, v, born, expiry in keys if born <= at < expiry]
            seen += len(visible) if at >= START + 2 else 0
            for head in range(2 * pair, 2 * pair + 2):
                want = plain_attention(query[0, head, token], visible, softmax, head)
                torch.testing.assert_close(result.output[0, head, token], want, atol=1e-5, rtol=0)
        assert int(result.visible[pair]) == seen
        survivors = [key for key in keys if key[3] > START + TOKENS - 1]
        got = keys_of(result.store, pair)
        assert [key[2:] for key in got] == [key[2:] for key in survivors]
        assert all(torch.equal(one[0], other[0]) for one, other in zip(got, survivors, strict=True))


def test_the_keys_that_a_cap_drops_are_gone() -> None:
    store, new = random_store([20, 20]), new_keys(2)
    new.expiry.fill_(1000)
    store.fields.expiry.fill_(1000)
    cap = Cap(room=6, heads=1, window=2, sinks=1)
    _, result = attended(store, new, cap)
    # the sink, the 6 youngest for which there is room, and the window of 2 without the next query's own key
    expected = [0, 19, *range(START, START + TOKENS - 1)]
    assert [part.position.tolist() for part in result.store.by_pair()] == [expected] * 2


@given(st.lists(st.integers(0, 2000), min_size=1, max_size=12), st.integers(1, 256))
def test_groups_have_like_lengths_and_every_pair_once(counts: list[int], tokens: int) -> None:
    groups = group_by_length(counts, tokens)
    assert sorted(pair for group in groups for pair in group) == list(range(len(counts)))
    for group in groups:
        lengths = [counts[pair] + tokens for pair in group]
        assert max(lengths) <= LENGTH_RATIO * min(lengths) and group == sorted(group)
    longest = [max(counts[pair] for pair in group) for group in groups]
    assert longest == sorted(longest)
