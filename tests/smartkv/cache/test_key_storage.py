"""A layer's storage without a model: its two write paths, its figures, and its rows."""

import pytest
import torch
from torch import Tensor

from smartkv.cache.key_edits import EditableKeys
from smartkv.cache.key_storage import KeyStorage
from smartkv.cache.ragged import Fields
from smartkv.models.softmax import Softmax
from smartkv.policies.lifetimes import FOREVER
from tests.smartkv.cache.stores import HEAD_DIM, plain_attention

BATCH, HEADS, PROMPT, TOKENS, SOFTMAX = 2, 2, 10, 40, Softmax(0.3)
GENERATOR = torch.Generator().manual_seed(3)
KEY, VALUE, QUERY = (torch.randn(BATCH, HEADS, TOKENS, HEAD_DIM, generator=GENERATOR) for _ in range(3))
WINDOW = 4
# about half of the keys live for the window, the others longer
EXPIRY = torch.arange(TOKENS) + WINDOW + torch.randint(0, 30, (BATCH, HEADS, TOKENS), generator=GENERATOR) % 20


def prompted(bits: int | None = None) -> EditableKeys:
    """Storage that has taken in the prompt as a chunk."""
    storage = EditableKeys(WINDOW, bits=bits)
    storage.lazy_initialization(KEY, VALUE)
    here = slice(0, PROMPT)
    position = torch.arange(PROMPT).int().expand(BATCH * HEADS, PROMPT)
    new = Fields(
        KEY[:, :, here].flatten(0, 1), VALUE[:, :, here].flatten(0, 1), position, EXPIRY[:, :, here].flatten(0, 1).int()
    )
    storage.chunk(QUERY[:, :, here], new, None, SOFTMAX)
    return storage


def stepped(storage: KeyStorage, token: int, tokens: int = 1) -> Tensor:
    """One more token or a few; room is made where there is too little."""
    if storage.spare_slots < tokens:
        first = storage.columns - storage.pending
        expiry = EXPIRY[:, :, first : storage.columns] if storage.pending else None
        storage.free_dead(expiry, None, pack=True)
    here = slice(token, token + tokens)
    storage.pending_keys.append(KEY[:, :, here].clone())
    return storage.step(QUERY[:, :, here], KEY[:, :, here], VALUE[:, :, here], SOFTMAX)


@pytest.mark.parametrize("together", [1, 2, 3])
def test_tokens_after_a_chunk_attend_to_the_keys_that_have_not_expired(together: int) -> None:
    storage = prompted()
    outputs = [stepped(storage, token, together) for token in range(PROMPT, TOKENS, together)]
    output = torch.cat(outputs, dim=2)
    assert int(storage.live.sum()) == int((EXPIRY > TOKENS - 1).sum())
    for token in range(PROMPT, TOKENS):
        for row in range(BATCH):
            for head in range(HEADS):
                seen = [j for j in range(token + 1) if int(EXPIRY[row, head, j]) > token]
                keys = [(KEY[row, head, j], VALUE[row, head, j]) for j in seen]
                want = plain_attention(QUERY[row, head, token], keys, SOFTMAX)
                torch.testing.assert_close(output[row, head, token - PROMPT], want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("together", [1, 2])
def test_the_live_keys_are_those_that_the_last_query_saw(together: int) -> None:
    storage = prompted()
    for token in range(PROMPT, TOKENS, together):
        stepped(storage, token, together)
        last = token + together - 1
        assert torch.equal(storage.live, (EXPIRY[:, :, : last + 1] > last).sum(dim=2))


@pytest.mark.parametrize("together", [1, 2])
def test_pending_tokens_are_dropped_without_moving_a_key(together: int) -> None:
    storage, untouched = prompted(), prompted()
    for each in (storage, untouched):
        each.free_dead(None, None, pack=True)
        stepped(each, PROMPT)
    for token in range(PROMPT + 1, PROMPT + 3, together):
        stepped(storage, token, together)
    place = storage.store.fields.key.data_ptr()
    storage.drop_pending(2)
    assert storage.store.fields.key.data_ptr() == place
    assert (storage.pending, storage.columns) == (1, PROMPT + 1)
    assert storage.cached_storage_bytes == storage.storage_bytes == untouched.storage_bytes
    for token in range(PROMPT + 1, TOKENS):
        torch.testing.assert_close(stepped(storage, token), stepped(untouched, token))
    assert torch.equal(storage.counted().visible, untouched.counted().visible)


def test_freeing_leaves_the_keys_that_the_next_query_sees_and_no_slot_beside_them() -> None:
    storage = prompted()
    for token in range(PROMPT, 25):
        stepped(storage, token)
    assert not storage.settled
    first = storage.columns - storage.pending
    storage.free_dead(EXPIRY[:, :, first:25], None, pack=False)
    assert storage.settled and storage.pending == 0 and storage.seen.tolist() == [25, 25]
    alive = (EXPIRY[:, :, :25] > 25).sum(dim=2)
    assert torch.equal(storage.live, alive) and torch.equal(storage.slots, alive)


@pytest.mark.parametrize("bits", [None, 4])
def test_the_cached_bytes_are_those_of_all_tensors_at_any_time(bits: int | None) -> None:
    storage = prompted(bits)
    before = storage.storage_bytes
    assert storage.cached_storage_bytes == before > 0
    for token in range(PROMPT, 30):
        stepped(storage, token)
        assert storage.cached_storage_bytes == storage.storage_bytes
        if storage.pending == 1:  # keys were just moved
            moved = storage.resting_bytes + before
            decoded = storage.resting_bytes + 2 * int(storage.slots.sum()) * HEAD_DIM * 4  # a step decodes all of them
            assert storage.call_peak_bytes == (max(moved, decoded) if bits else moved)
        before = storage.storage_bytes
    pending = len(storage.pending_keys) * BATCH * HEADS * HEAD_DIM * 4
    stored = 0 if bits else 2 * storage.store.fields.key.nbytes
    assert storage.exact_bytes == stored + pending


def test_the_count_includes_the_pending_tokens() -> None:
    storage = prompted()
    for token in range(PROMPT, 20):
        stepped(storage, token)
    seen = [
        [sum(int(EXPIRY[r, h, j]) > i for i in range(20) for j in range(i + 1)) for h in range(HEADS)]
        for r in range(BATCH)
    ]
    assert storage.counted().visible.tolist() == seen
    assert storage.counted().full.tolist() == [20 * 21 // 2] * BATCH


@pytest.mark.parametrize("bits", [None, 4])
def test_selected_rows_go_on_as_they_would_have(bits: int | None) -> None:
    storage, twice, whole = prompted(bits), prompted(bits), prompted(bits)
    twice.select(torch.tensor([1, 1]))
    before = storage.storage_bytes
    storage.select(torch.tensor([1]))
    assert storage.call_peak_bytes == before + storage.storage_bytes == before + storage.resting_bytes
    assert twice.seen.tolist() == [PROMPT] * 2
    assert torch.equal(twice.live, storage.live.repeat(2, 1))
    assert torch.equal(twice.visible_keys, storage.visible_keys.repeat(2, 1))
    want = stepped(whole, PROMPT)[1]
    here = slice(PROMPT, PROMPT + 1)
    for each, rows in ((twice, [1, 1]), (storage, [1])):
        each.free_dead(None, None, pack=True)
        key, value, query = (tensor[rows, :, here] for tensor in (KEY, VALUE, QUERY))
        each.pending_keys.append(key.clone())
        for row in each.step(query, key, value, SOFTMAX):
            torch.testing.assert_close(row, want, atol=1e-5, rtol=0)


def test_pages_cannot_take_a_chunk_or_select_rows() -> None:
    storage = prompted()
    storage.free_dead(None, None, pack=True)
    assert storage.spare_slots == WINDOW and not storage.settled
    for call in (lambda: storage.chunk(QUERY, None, None, SOFTMAX), lambda: storage.select(torch.tensor([0]))):  # type: ignore[arg-type]
        with pytest.raises(RuntimeError, match="call free_dead"):
            call()


def test_reset_storage_is_as_new() -> None:
    storage = prompted(4)
    storage.reset()
    assert not storage.is_initialized and storage.storage_bytes == storage.exact_bytes == storage.columns == 0
    assert storage.sliding_window == FOREVER and storage.packed is not None and storage.packed.centre is None
