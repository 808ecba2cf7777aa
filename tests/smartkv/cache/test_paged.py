"""Paged storage against attention key by key: what each query sees, and what is counted."""

from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from smartkv.cache.paged import FEW_KEYS, MAX_SPARE, Pages, page_size, spare_tokens
from smartkv.cache.ragged import Ragged
from smartkv.models.softmax import Softmax
from smartkv.policies.lifetimes import FOREVER, HOLE
from tests.smartkv.cache.stores import HEAD_DIM, keys_of, plain_attention, random_store, softmaxes

SPARE, NOW = 12, 24


def pages_of(store: Ragged, spare: int = SPARE) -> Pages:
    """Pages with the keys of a store that are alive at position `NOW`."""
    live = (store.fields.expiry > NOW).nonzero().flatten()
    counts = torch.bincount(store.pair()[live], minlength=len(store.counts))
    ages = store.fields.expiry[live].long() - NOW
    now = torch.full((len(counts),), NOW)
    return Pages(store.fields, live, counts, ages, now, spare, torch.float32)


def tokens(pairs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values `[pairs, spare, head_dim]`, queries `[pairs, spare, 2, head_dim]`."""
    generator = torch.Generator().manual_seed(5)
    key, value = (torch.randn(pairs, SPARE, HEAD_DIM, generator=generator) for _ in range(2))
    return key, value, torch.randn(pairs, SPARE, 2, HEAD_DIM, generator=generator)


def call(pages: Pages, here: slice, softmax: Softmax) -> Tensor:
    """Attention of some of the tokens, `[pairs, tokens, 2, head_dim]`."""
    key, value, query = (tensor[:, here] for tensor in tokens(len(pages.counts)))
    bias = pages.write(here.start, key, value)
    return pages.attend(query.flatten(1, 2), softmax, bias).unflatten(1, (-1, 2))


@pytest.mark.parametrize("counts", [[20, 3, 0, 40], [7, 7], [0, 0], [60]])
@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize("kind", range(4))
@pytest.mark.parametrize("together", [1, 2, 5])
def test_each_query_sees_its_token_the_earlier_ones_and_the_keys_that_have_not_expired(
    counts: list[int], one_by_one: bool, kind: int, together: int
) -> None:
    store, softmax = random_store(counts), softmaxes(2 * len(counts))[kind]
    with patch("smartkv.cache.paged.FEW_PAIRS", len(counts) if one_by_one else 0):
        pages = pages_of(store)
    key, value, query = tokens(len(counts))
    starts = range(0, SPARE, together)
    output = torch.cat([call(pages, slice(start, min(SPARE, start + together)), softmax) for start in starts], dim=1)
    assert output.shape == query.shape
    for step in range(SPARE):
        for pair in range(len(counts)):
            seen = [(k, v) for k, v, _, expiry in keys_of(store, pair) if expiry > NOW + step]
            seen += [(key[pair, earlier], value[pair, earlier]) for earlier in range(step + 1)]
            assert int(pages.live(step + 1)[pair]) == len(seen)
            for head in range(2):
                want = plain_attention(query[pair, step, head], seen, softmax, 2 * pair + head)
                torch.testing.assert_close(output[pair, step, head], want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("counts", [[20, 3, 0, 40], [7, 7]])
@pytest.mark.parametrize("together", [1, 3])
def test_tokens_that_are_taken_back_hide_nothing_and_are_not_seen(counts: list[int], together: int) -> None:
    softmax, pages, untouched = Softmax(0.3), pages_of(random_store(counts)), pages_of(random_store(counts))
    for each in (pages, untouched):
        call(each, slice(0, 2), softmax)
    for start in range(2, 11, together):
        call(pages, slice(start, start + together), softmax)
    before, want = pages.bias.clone(), untouched.bias.clone()
    pages.take_back(2, 11)
    assert not torch.equal(before, want) and torch.equal(pages.bias, want)
    for step in range(2, SPARE):
        here = slice(step, step + 1)
        torch.testing.assert_close(call(pages, here, softmax), call(untouched, here, softmax))


def test_pairs_share_no_page_and_the_table_finds_every_slot() -> None:
    pages = pages_of(random_store([20, 3, 0, 40]))
    index, filled = pages.side_by_side()
    last = pages.bias.numel() - pages.size  # from here on lies the empty page, which counts for the first pair
    for pair in range(4):
        own = (pages.pair()[:last] == pair).nonzero().flatten()
        assert index[pair, filled[pair]][: len(own)].tolist() == own.tolist()
        assert (index[pair, filled[pair]][len(own) :] >= last).all()
    assert int(pages.slots.sum()) == pages.fields.key.shape[0] == pages.bias.numel()


def test_new_tokens_stand_at_their_positions_and_stay_until_they_are_judged() -> None:
    store = random_store([5, 9], scored=True)
    pages = pages_of(store)
    assert pages.fields.position[pages.new_slots].tolist() == [[NOW + step] * 2 for step in range(SPARE)]
    assert pages.fields.expiry[pages.new_slots].unique().tolist() == [FOREVER]
    expiry, score = torch.arange(6).view(2, 3) + 30, torch.arange(6.0).view(2, 3)
    pages.judge(expiry, score)
    assert pages.fields.expiry[pages.new_slots[:3]].T.tolist() == expiry.tolist()
    assert pages.fields.score is not None and torch.equal(pages.fields.score[pages.new_slots[:3]].T, score)
    assert pages.fields.expiry[pages.new_slots[3:]].unique().tolist() == [FOREVER]


def test_slots_without_a_key_have_no_position() -> None:
    pages = pages_of(random_store([5, 9]))
    real = pages.fields.position != HOLE
    assert int(real.sum()) == int(pages.counts.sum()) + pages.new_slots.numel()


def test_packing_waits_no_longer_than_the_first_new_key_may_live() -> None:
    assert spare_tokens(10_000, 5) == 5 and spare_tokens(0, 0) == 1
    assert spare_tokens(10_000, FOREVER) == MAX_SPARE and spare_tokens(10, FOREVER) == 16
    assert spare_tokens(512, FOREVER) == 32


def test_pages_grow_with_the_keys_of_a_pair() -> None:
    assert [page_size(keys) for keys in (0, 767, 768, 1536, 3072, 1e6)] == [16, 16, 32, 64, 128, 128]
    assert FEW_KEYS == 768  # pairs that attend one by one have the smallest pages
