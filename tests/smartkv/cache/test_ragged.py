"""Ragged storage against plain loops."""

import pytest
import torch

from smartkv.cache.ragged import Fields, Ragged, ranks, storage_bytes
from tests.smartkv.cache.stores import HEAD_DIM, random_store

COUNTS = [3, 0, 5, 1]


def assert_same(got: Fields, want: Fields) -> None:
    for one, other in zip(got, want, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


def test_ranks_are_the_pair_and_the_place_of_each_key() -> None:
    pair, place = ranks(torch.tensor(COUNTS), sum(COUNTS))
    want = [(pair, place) for pair, count in enumerate(COUNTS) for place in range(count)]
    assert list(zip(pair.tolist(), place.tolist(), strict=True)) == want


@pytest.mark.parametrize("scored", [False, True])
def test_keys_by_pair_are_views_that_make_up_the_store(scored: bool) -> None:
    store = random_store(COUNTS, scored=scored)
    parts = store.by_pair()
    assert [len(part.position) for part in parts] == COUNTS == store.sizes
    assert_same(Fields.cat(parts), store.fields)
    assert {part.key.untyped_storage().data_ptr() for part in parts} == {store.fields.key.untyped_storage().data_ptr()}
    assert store.pair().tolist() == [pair for pair, count in enumerate(COUNTS) for _ in range(count)]


def test_side_by_side_finds_every_key_of_every_pair() -> None:
    store = random_store(COUNTS)
    index, filled = store.side_by_side()
    assert index.shape == filled.shape == (4, 5)
    for pair, part in enumerate(store.by_pair()):
        assert filled[pair].tolist() == [place < COUNTS[pair] for place in range(5)]
        assert torch.equal(store.fields.key[index[pair, filled[pair]]], part.key)


@pytest.mark.parametrize("pairs", [[2], [3, 0], [0, 0, 2, 1, 2]])
def test_selected_pairs_may_come_in_any_order_and_repeat(pairs: list[int]) -> None:
    store = random_store(COUNTS, scored=True)
    selected = store.select(torch.tensor(pairs))
    assert selected.counts.tolist() == [COUNTS[pair] for pair in pairs]
    for got, pair in zip(selected.by_pair(), pairs, strict=True):
        assert_same(got, store.by_pair()[pair])


def test_an_index_takes_the_same_keys_of_every_tensor() -> None:
    fields = random_store(COUNTS, scored=True).fields
    for index in (torch.tensor([4, 0, 4]), torch.arange(9) % 2 == 0, torch.tensor([[1, 2], [3, 0]])):
        assert_same(fields.at(index), Fields(*(None if t is None else t[index] for t in fields)))
    assert_same(fields.row(2, 5), fields.at(torch.arange(2, 5)))


def test_bytes_are_those_of_whole_storages() -> None:
    store = random_store(COUNTS)
    assert store.nbytes == 9 * (2 * HEAD_DIM * 4 + 2 * 4) + 4 * 8
    assert storage_bytes([torch.zeros(10)[:2], None]) == 40  # a view keeps its whole storage alive


def test_every_slot_holds_a_live_key() -> None:
    store = Ragged(random_store(COUNTS).fields, torch.tensor(COUNTS))
    assert store.slots.tolist() == store.live().tolist() == COUNTS
