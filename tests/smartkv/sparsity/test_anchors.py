"""Token classes, and which of them are anchors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smartkv.errors import SmartKVError
from smartkv.sparsity.anchors import CLASSES, Anchors, _token_class, token_classes
from tests.models import tiny_tokenizer


def test_tokens_have_the_class_of_what_they_are() -> None:
    tokenizer = tiny_tokenizer()
    kinds = token_classes(tokenizer)

    def kind(text: str) -> str:
        (number,) = tokenizer(text)["input_ids"]
        return CLASSES[kinds[number]]

    assert [kind(text) for text in (".", ",", "$", "\n", "7", "a")] == [
        "punctuation",
        "punctuation",
        "punctuation",
        "newline",
        "number",
        "word_rest",
    ]
    assert CLASSES[kinds[tokenizer.eos_token_id]] == "special" and len(kinds) == len(tokenizer)


@given(st.integers(0, 6), st.booleans(), st.booleans(), st.lists(st.integers(0, 256), min_size=8, max_size=40))
def test_each_anchor_stays_when_it_is_asked_for_and_nothing_else_does(
    sinks: int, special: bool, punctuation: bool, ids: list[int]
) -> None:
    tokenizer = tiny_tokenizer()
    anchors = Anchors(sinks, 8, special, punctuation)
    stays = anchors.always(torch.tensor([ids]), anchors.table(tokenizer))[0]
    kinds = token_classes(tokenizer)
    for place, number in enumerate(ids):
        kind = CLASSES[kinds[number]]
        want = place < sinks or (special and kind == "special")
        want |= punctuation and kind in ("punctuation", "newline")
        assert bool(stays[place]) == want


def test_sinks_are_counted_from_the_first_real_token() -> None:
    tokenizer = tiny_tokenizer()
    ids, real = torch.full((1, 10), 65), torch.tensor([[False] * 4 + [True] * 6])
    anchors = Anchors(sinks=3, recent=1, special=False, punctuation=False)
    stays = anchors.always(ids, anchors.table(tokenizer), real)[0]
    assert stays.tolist() == [False] * 4 + [True] * 3 + [False] * 3


def test_parts_of_a_letter_are_no_punctuation() -> None:
    assert _token_class("\ufffd", "\ufffd") == "word_rest" and _token_class(" \ufffd\ufffd", "Ġ") == "word_rest"


def test_anchors_that_are_none_are_refused() -> None:
    for wrong in ({"sinks": -1}, {"recent": 0}):
        with pytest.raises(SmartKVError):
            Anchors(**wrong)
