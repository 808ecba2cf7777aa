"""Text that asks back: facts that are stated, asked for and answered, other ones for each split."""

import re
from pathlib import Path

import numpy as np
import pytest

from smartkv.errors import SmartKVError
from smartkv.shards.manifest import SPLITS
from smartkv.texts.documents import Document
from smartkv.texts.facts import TEXTS
from smartkv.texts.recall import RecallPacker
from smartkv.texts.sources import SourceConfig, resolve_source
from smartkv.texts.windows import plan_windows
from tests.lightning_fixtures import prose
from tests.models import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
WINDOW = 2048
PROSE = "The road went on over the hill. Nobody said a word! Was it far? It was. " * 400


def windows(split: str, count: int = 12, seed: int = 0, window: int = WINDOW) -> list[np.ndarray]:
    packer = RecallPacker(TOKENIZER, window, 4, [seed], split)
    return [w.tokens for w in packer.pack([Document(str(n), PROSE) for n in range(count)], count)]


@pytest.mark.parametrize("split", SPLITS)
def test_a_window_has_its_length_and_facts_with_answers_after_them(split: str) -> None:
    answered = 0
    for ids in windows(split):
        assert ids.shape == (WINDOW,) and ids.dtype == np.int32
        text = TOKENIZER.decode(ids.tolist())
        assert text.count("The road went on") > 5  # half of it is still the text
        numbers = re.findall(r"\d{4,6}", text)
        answered += sum(numbers.count(number) > 1 for number in set(numbers))
    assert answered >= 6


def test_questions_come_at_many_distances() -> None:
    distances = []
    for ids in windows("train", 40):
        text = TOKENIZER.decode(ids.tolist())
        for number in set(re.findall(r"\d{4,6}", text)):
            places = [match.start() for match in re.finditer(number, text)]
            distances += [after - places[0] for after in places[1:]]
    assert min(distances) < 300 and max(distances) > 1000


def test_the_same_seed_gives_the_same_windows_and_another_does_not() -> None:
    first, again, other = windows("train"), windows("train"), windows("train", seed=1)
    assert all(map(np.array_equal, first, again)) and not all(map(np.array_equal, first, other))


def test_a_window_too_short_for_a_fact_is_refused() -> None:
    with pytest.raises(SmartKVError, match=r"windows of 32 tokens are too short for facts"):
        windows("train", window=32)


def test_some_passages_are_said_again() -> None:
    window_ids = windows("train", 24)
    marked = [text for ids in window_ids if "Say again the passage" in (text := TOKENIZER.decode(ids.tolist()))]
    assert 2 <= len(marked) <= 16
    for text in marked:
        before, passage = text.rsplit('":\n', 1)
        assert len(passage) >= 24 and passage in before


def test_a_source_of_recall_puts_facts_into_windows_of_each_split(tmp_path: Path) -> None:
    for split in SPLITS:
        (tmp_path / split).mkdir()
        (tmp_path / split / "text.txt").write_text(prose(8000, seed=SPLITS.index(split)))
    counts = {"train": 2, "validation": 2, "test": 2}
    plan = plan_windows([SourceConfig("recall", path=str(tmp_path))], counts, TOKENIZER, WINDOW, say=str)
    plain = plan_windows([SourceConfig("mine", path=str(tmp_path))], counts, TOKENIZER, WINDOW, say=str)
    assert plan.tokens.shape == plain.tokens.shape and plan.documents == ["recall/text"] * 3
    texts = {split: TOKENIZER.decode(plan.of_split(split)[0].tolist()) for split in SPLITS}
    for split in SPLITS:
        facts = [form[0].split("{")[0].strip() for form in TEXTS["forms"][split]] + [TEXTS["chains"][split][0][:4]]
        assert sum(fact in texts[split] for fact in facts if len(fact) > 3) > 0
        assert not sum(fact in TOKENIZER.decode(plain.tokens[0].tolist()) for fact in facts if len(fact) > 3)


# -- where its text comes from ----------------------------------------------------------------------------------------


def test_its_text_is_that_of_books(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split in SPLITS:
        (tmp_path / "books" / split).mkdir(parents=True)
        (tmp_path / "books" / split / "book.txt").write_text(f"a book to {split} on")
    monkeypatch.setenv("SMARTKV_DATA", str(tmp_path))
    source = resolve_source(SourceConfig("recall", weight=0.5, origins=["local"]), str)
    assert (source.name, source.weight, source.origin, source.recall) == ("recall", 0.5, "local", "books")
    assert [document.text for split in SPLITS for document in source.documents(split)] == [
        f"a book to {split} on" for split in SPLITS
    ]
    assert not resolve_source(SourceConfig("pg19", origins=["local"]), str).recall


def test_its_text_may_be_a_folder_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("a text of my own")
    source = resolve_source(SourceConfig("recall", path=str(tmp_path)), str)
    texts = [document.text for split in SPLITS for document in source.documents(split)]
    assert source.name == "recall" and source.recall and texts == ["a text of my own"]


def test_it_falls_back_like_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SMARTKV_DATA", raising=False)
    lines: list[str] = []
    source = resolve_source(SourceConfig("recall", origins=["local", "builtin"]), lines.append)
    assert source.name == "recall" and source.recall and source.origin == "builtin" and "CANNOT BE HAD" in lines[0]
