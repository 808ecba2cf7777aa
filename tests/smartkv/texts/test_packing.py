"""Documents -> windows of equal length."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from smartkv.texts.documents import Document
from smartkv.texts.packing import Packer, Window, shares
from tests.lightning_fixtures import WINDOW, prose
from tests.models import tiny_tokenizer

TOKENIZER = tiny_tokenizer()  # a token a byte


def bos_tokenizer() -> PreTrainedTokenizerFast:
    """The same, but it opens every text with its BOS token, as Llama's does."""
    tokenizer = tiny_tokenizer()
    opening = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = opening
    return tokenizer


def packer(windows_per_document: int = 2, seed: int = 0, tokenizer: PreTrainedTokenizerFast = TOKENIZER) -> Packer:
    return Packer(tokenizer, WINDOW, windows_per_document, seed)


def long_documents(number: int, windows: int) -> list[Document]:
    """Texts of exactly so many windows each."""
    return [Document(f"long{i}", prose(windows * WINDOW, seed=i)) for i in range(number)]


def short_documents(number: int) -> list[Document]:
    """Texts of 10 to 29 tokens, each of its own characters."""
    return [Document(f"short{i}", f"{chr(65 + i)}:" + chr(97 + i % 26) * (8 + 7 * i % 20)) for i in range(number)]


def text(window: Window, tokenizer: PreTrainedTokenizerFast = TOKENIZER) -> str:
    return tokenizer.decode(window.tokens.tolist())


def owners(windows: list[Window]) -> Counter[int]:
    """How many windows each document gave; long documents only."""
    return Counter(int(window.document[0]) for window in windows)


def same(a: list[Window], b: list[Window]) -> bool:
    return [w.tokens.tolist() for w in a] == [w.tokens.tolist() for w in b]


# -- long documents ---------------------------------------------------------------------------------------------------


def test_a_long_document_gives_no_more_than_its_windows_while_others_are_left() -> None:
    windows = packer(windows_per_document=2).pack(long_documents(5, windows=10), 10)
    assert owners(windows) == {0: 2, 1: 2, 2: 2, 3: 2, 4: 2}


def test_documents_that_are_not_needed_are_not_used() -> None:
    packing = packer(windows_per_document=2)
    packing.pack(long_documents(5, windows=10), 6)
    assert packing.documents == ["long0", "long1", "long2"]


def test_long_documents_give_more_windows_in_turn_when_the_source_runs_out() -> None:
    windows = packer(windows_per_document=2).pack(long_documents(2, windows=10), 12)
    assert owners(windows) == {0: 6, 1: 6}


def test_no_window_is_given_twice() -> None:
    windows = packer(windows_per_document=2).pack(long_documents(2, windows=10), 20)
    assert len({tuple(window.tokens.tolist()) for window in windows}) == 20


def test_the_windows_of_a_long_document_are_cut_out_of_its_text() -> None:
    documents = long_documents(3, windows=5)
    for window in packer().pack(documents, 6):
        assert text(window) in documents[window.document[0]].text


def test_a_source_that_runs_out_gives_what_it_has() -> None:
    assert len(packer().pack(long_documents(2, windows=3), 100)) == 6


# -- short documents --------------------------------------------------------------------------------------------------


def test_packed_windows_start_with_a_document_s_first_token() -> None:
    documents = short_documents(12)
    windows = packer().pack(documents, 3)
    assert len(windows) == 3
    for window in windows:
        assert text(window).startswith(documents[window.document[0]].text)


def test_short_documents_follow_one_another_with_a_blank_line_between() -> None:
    documents = short_documents(12)
    window = packer().pack(documents, 1)[0]
    assert text(window) == "\n\n".join(document.text for document in documents)[:WINDOW]


def test_each_token_of_a_packed_window_names_its_document() -> None:
    documents = short_documents(12)
    for window in packer().pack(documents, 3):
        for index in np.unique(window.document):
            piece = TOKENIZER.decode(window.tokens[window.document == index].tolist())
            assert (documents[index].text + "\n\n").startswith(piece)


def test_no_short_document_is_in_two_windows() -> None:
    windows = packer().pack(short_documents(20), 5)
    used = [index for window in windows for index in np.unique(window.document)]
    assert len(windows) > 1
    assert len(used) == len(set(used))


def test_short_documents_that_fill_no_window_give_none() -> None:
    assert packer().pack(short_documents(2), 3) == []


def test_empty_documents_are_passed_over() -> None:
    packing = packer()
    packing.pack([Document("empty", ""), *long_documents(1, windows=2)], 1)
    assert packing.documents == ["long0"]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 3 * WINDOW), max_size=30),
    count=st.integers(1, 12),
    windows_per_document=st.integers(1, 3),
    bos=st.booleans(),
)
def test_every_window_is_full_whatever_the_documents(
    lengths: list[int], count: int, windows_per_document: int, bos: bool
) -> None:
    documents = [Document(str(i), prose(length, seed=i)) for i, length in enumerate(lengths)]
    windows = packer(windows_per_document, tokenizer=BOS if bos else TOKENIZER).pack(documents, count)
    assert len(windows) <= count
    assert all(len(window.tokens) == len(window.document) == WINDOW for window in windows)


# -- the seed ---------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_windows() -> None:
    documents = long_documents(3, windows=10)
    assert same(packer(seed=3).pack(documents, 6), packer(seed=3).pack(documents, 6))


def test_another_seed_gives_other_windows() -> None:
    documents = long_documents(3, windows=10)
    assert not same(packer(seed=3).pack(documents, 6), packer(seed=4).pack(documents, 6))


# -- what the model expects first -------------------------------------------------------------------------------------

BOS = bos_tokenizer()


@pytest.mark.parametrize("documents", [long_documents(2, windows=4), short_documents(12)], ids=["long", "short"])
def test_every_window_opens_with_bos_where_the_tokenizer_adds_it(documents: list[Document]) -> None:
    windows = packer(tokenizer=BOS).pack(documents, 3)
    assert [int(window.tokens[0]) for window in windows] == [BOS.bos_token_id] * 3


@pytest.mark.parametrize("documents", [long_documents(2, windows=4), short_documents(12)], ids=["long", "short"])
def test_bos_is_only_at_the_opening(documents: list[Document]) -> None:
    for window in packer(tokenizer=BOS).pack(documents, 3):
        assert BOS.bos_token_id not in window.tokens[1:]


@pytest.mark.parametrize("documents", [long_documents(2, windows=4), short_documents(12)], ids=["long", "short"])
def test_there_is_no_bos_where_the_tokenizer_adds_none(documents: list[Document]) -> None:
    for window in packer().pack(documents, 3):
        assert TOKENIZER.bos_token_id not in window.tokens


def test_bos_belongs_to_the_window_s_first_document() -> None:
    for window in packer(tokenizer=BOS).pack(short_documents(12), 3):
        assert window.document[0] == window.document[1]


# -- shares -----------------------------------------------------------------------------------------------------------

WEIGHTS = st.lists(st.floats(0.01, 100), min_size=1, max_size=8)


@given(weights=WEIGHTS, count=st.integers(0, 1000))
def test_shares_sum_to_the_count(weights: list[float], count: int) -> None:
    assert sum(shares(weights, count)) == count


@given(weights=WEIGHTS, count=st.integers(0, 1000))
def test_each_share_is_within_one_of_the_exact_one(weights: list[float], count: int) -> None:
    for part, weight in zip(shares(weights, count), weights, strict=True):
        assert part >= 0
        assert abs(part - weight / sum(weights) * count) < 1 + 1e-9


@pytest.mark.parametrize(
    ("count", "want"), [(24, [16, 5, 2, 1]), (12, [8, 2, 1, 1]), (128, [90, 26, 10, 2]), (0, [0] * 4)]
)
def test_a_source_of_small_weight_has_a_window_in_a_small_split_too(count: int, want: list[int]) -> None:
    assert shares([0.70, 0.20, 0.08, 0.02], count) == want  # the mix of configs/harvest, whose last is AIME 2024
