"""Ranges against attention key by key and against pages: what each query sees, and what is counted."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smartkv.cache.paged import Pages
from smartkv.cache.ragged import Ragged
from smartkv.cache.ranges import Ranges, ranges_serve
from smartkv.models.softmax import Softmax
from smartkv.policies.lifetimes import FOREVER
from tests.smartkv.cache.stores import HEAD_DIM, keys_of, plain_attention, random_store, softmaxes

SPARE, NOW = 12, 24


def arguments(store: Ragged) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Slots, counts and ages of the keys of a store that are alive at position `NOW`, and the positions."""
    live = (store.fields.expiry > NOW).nonzero().flatten()
    counts = torch.bincount(store.pair()[live], minlength=len(store.counts))
    return live, counts, store.fields.expiry[live].long() - NOW, torch.full((len(counts),), NOW)


def tokens(pairs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values `[pairs, spare, head_dim]`, queries `[pairs, spare, 2, head_dim]`."""
    generator = torch.Generator().manual_seed(5)
    key, value = (torch.randn(pairs, SPARE, HEAD_DIM, generator=generator) for _ in range(2))
    return key, value, torch.randn(pairs, SPARE, 2, HEAD_DIM, generator=generator)


def call(store: Pages | Ranges, here: slice, softmax: Softmax) -> Tensor:
    """Attention of some of the tokens, `[pairs, tokens, 2, head_dim]`."""
    key, value, query = (tensor[:, here] for tensor in tokens(len(store.counts)))
    seen = store.write(here.start, key, value)
    return store.attend(query.flatten(1, 2), softmax, seen).unflatten(1, (-1, 2))


@pytest.mark.parametrize("counts", [[20, 3, 0, 40], [7, 7], [0, 0], [60]])
@pytest.mark.parametrize("kind", range(4))
@pytest.mark.parametrize("together", [1, 2, 5])
def test_each_query_sees_its_token_the_earlier_ones_and_the_keys_that_have_not_expired(
    counts: list[int], kind: int, together: int
) -> None:
    store, softmax = random_store(counts), softmaxes(2 * len(counts))[kind]
    ranges = Ranges(store.fields, *arguments(store), SPARE)
    key, value, query = tokens(len(counts))
    starts = range(0, SPARE, together)
    output = torch.cat([call(ranges, slice(start, min(SPARE, start + together)), softmax) for start in starts], dim=1)
    for step in range(SPARE):
        for pair in range(len(counts)):
            seen = [(k, v) for k, v, _, expiry in keys_of(store, pair) if expiry > NOW + step]
            seen += [(key[pair, earlier], value[pair, earlier]) for earlier in range(step + 1)]
            assert int(ranges.live(step + 1)[pair]) == len(seen)
            for head in range(2):
                want = plain_attention(query[pair, step, head], seen, softmax, 2 * pair + head)
                torch.testing.assert_close(output[pair, step, head], want, atol=1e-5, rtol=0)


@settings(deadline=None, max_examples=30, derandomize=True)
@given(counts=st.lists(st.integers(0, 30), min_size=1, max_size=5), hidden=st.booleans(), scored=st.booleans())
def test_they_hold_what_pages_hold(counts: list[int], hidden: bool, scored: bool) -> None:
    """Hidden: some keys are gone already, and stay for a rollback."""
    store = random_store(counts, scored=scored)
    live, alive, ages, now = arguments(store)
    ages = ages - 3 * hidden
    pages = Pages(store.fields, live, alive, ages, now, SPARE, torch.float32)
    ranges = Ranges(store.fields, live, alive, ages, now, SPARE)
    assert torch.equal(ranges.hidden, pages.hidden)
    for step in range(SPARE):
        for each in (pages, ranges):
            call(each, slice(step, step + 1), Softmax(0.3))
        assert torch.equal(ranges.live(step + 1), pages.live(step + 1))
    for each in (pages, ranges):
        each.judge(torch.arange(4 * len(counts)).view(-1, 4) + 40, torch.ones(len(counts), 4) if scored else None)
    for pair in range(len(counts)):
        found = [
            {field.position[slot].item(): [tensor[slot].tolist() for tensor in field if tensor is not None]
             for slot in (each.pair() == pair).nonzero().flatten() if field.position[slot] >= 0}
            for each in (pages, ranges) for field in [each.fields]
        ]  # fmt: skip
        assert found[0] == found[1]


def test_the_keys_of_a_pair_lie_in_the_order_in_which_they_go_and_are_told_by_position() -> None:
    store = random_store([20, 3, 0, 40])
    ranges = Ranges(store.fields, *arguments(store), SPARE)
    index, filled = ranges.side_by_side()
    assert ranges.slots.tolist() == filled.sum(dim=1).tolist() and int(ranges.slots.sum()) == len(ranges.pair())
    for pair in range(4):
        own = (ranges.pair() == pair).nonzero().flatten()
        keys = own[: int(ranges.counts[pair])]
        assert ranges.fields.expiry[keys].tolist() == sorted(ranges.fields.expiry[keys].tolist())
        assert sorted(index[pair, filled[pair]].tolist()) == own.tolist()
        assert ranges.fields.position[index[pair, filled[pair]]].diff().ge(0).all()
    alive = ranges.fields.expiry > NOW + 5
    kept = ranges.in_order(alive)
    assert sorted(kept.tolist()) == alive.nonzero().flatten().tolist()
    place = ranges.pair()[kept] * 1000 + ranges.fields.position[kept]
    assert place.diff().ge(0).all()


def test_tokens_that_are_taken_back_are_not_seen() -> None:
    store, softmax = random_store([20, 3, 0, 40]), Softmax(0.3)
    ranges, untouched = (Ranges(store.fields, *arguments(store), SPARE) for _ in range(2))
    for each in (ranges, untouched):
        call(each, slice(0, 2), softmax)
    call(ranges, slice(2, 11), softmax)
    ranges.take_back(2, 11)
    for step in range(2, SPARE):
        here = slice(step, step + 1)
        torch.testing.assert_close(call(ranges, here, softmax), call(untouched, here, softmax))


def test_new_tokens_stay_until_they_are_judged() -> None:
    store = random_store([5, 9])
    ranges = Ranges(store.fields, *arguments(store), SPARE)
    assert ranges.fields.position[ranges.new_slots].tolist() == [[NOW + step] * 2 for step in range(SPARE)]
    assert ranges.fields.expiry[ranges.new_slots].unique().tolist() == [FOREVER]


def test_a_cpu_decodes_from_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not ranges_serve(torch.device("cpu"))
