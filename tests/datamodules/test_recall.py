"""Text that asks back: facts that are stated, asked for and answered, other ones for each split."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.recall import TEXTS, RecallPacker, draw_fact
from datamodules.sources import Document
from smartkv.errors import SmartKVError
from tests.models import tiny_tokenizer

SPLITS = ("train", "validation", "test")
WINDOW = 2048
PROSE = "The road went on over the hill. Nobody said a word! Was it far? It was. " * 400


def windows(split: str, count: int = 12, seed: int = 0, window: int = WINDOW) -> list[np.ndarray]:
    packer = RecallPacker(tiny_tokenizer(), window, 4, [seed], split)
    return [w.tokens for w in packer.pack([Document(str(n), PROSE) for n in range(count)], count)]


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(SPLITS), st.integers(0, 10_000))
def test_a_fact_states_its_answer_and_asks_for_it(split: str, seed: int) -> None:
    fact = draw_fact(split, np.random.default_rng(seed))
    words = re.findall(r"[\w-]+", fact.answer)
    assert all(word in fact.statement for word in words if any(c.isdigit() for c in word)) and words
    assert "{" not in fact.statement + fact.question + fact.answer


@pytest.mark.parametrize("split", SPLITS)
def test_a_window_has_its_length_and_facts_with_answers_after_them(split: str) -> None:
    tokenizer, answered = tiny_tokenizer(), 0
    for ids in windows(split):
        assert ids.shape == (WINDOW,) and ids.dtype == np.int32
        text = tokenizer.decode(ids.tolist())
        assert text.count("The road went on") > 5  # half of it is still the text
        numbers = re.findall(r"\d{4,6}", text)
        answered += sum(numbers.count(number) > 1 for number in set(numbers))
    assert answered >= 6


def test_splits_share_neither_forms_nor_words() -> None:
    for kind in ("forms", "asked"):
        parts = [{str(each) for each in TEXTS[kind][split]} for split in SPLITS]
        assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    assert len({TEXTS["again"][split] for split in SPLITS}) == 3
    drawn = {
        split: " ".join(draw_fact(split, np.random.default_rng(n)).statement for n in range(300)) for split in SPLITS
    }
    own = {split: set(re.findall(r"[a-z]+-[a-z]+\b", drawn[split])) for split in SPLITS}
    assert own["train"] and not own["train"] & own["test"] and not own["train"] & own["validation"]


def test_questions_come_at_many_distances() -> None:
    tokenizer, distances = tiny_tokenizer(), []
    for ids in windows("train", 40):
        text = tokenizer.decode(ids.tolist())
        for number in set(re.findall(r"\d{4,6}", text)):
            places = [found.start() for found in re.finditer(number, text)]
            distances += [after - places[0] for after in places[1:]]
    assert min(distances) < 300 and max(distances) > 1000


def test_the_same_seed_gives_the_same_windows_and_another_does_not() -> None:
    first, again, other = windows("train"), windows("train"), windows("train", seed=1)
    assert all(map(np.array_equal, first, again)) and not all(map(np.array_equal, first, other))


def test_a_window_too_short_for_a_fact_is_refused() -> None:
    with pytest.raises(SmartKVError, match=r"windows of 32 tokens are too short for facts"):
        windows("train", window=32)


def test_some_passages_are_said_again() -> None:
    tokenizer, window_ids = tiny_tokenizer(), windows("train", 24)
    marked = [text for ids in window_ids if "Say again the passage" in (text := tokenizer.decode(ids.tolist()))]
    assert 2 <= len(marked) <= 16
    for text in marked:
        before, passage = text.rsplit('":\n', 1)
        assert len(passage) >= 24 and passage in before
