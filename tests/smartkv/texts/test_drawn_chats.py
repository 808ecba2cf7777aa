"""Conversations that are drawn from problems and passages: their answers are those of the texts."""

import re
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from smartkv.errors import SmartKVError
from smartkv.shards.manifest import SPLITS
from smartkv.texts.documents import Document
from smartkv.texts.drawn_chats import (
    COUNT,
    EXCHANGES,
    FORMS,
    Conversation,
    cut_passage,
    drawn_chats,
    has_passages,
    parse,
)
from smartkv.texts.sources import Source, SourceConfig, resolve_source
from tests.smartkv.texts.fixtures import quiet, write_jsonl

WORDS = {"train": "rivers", "validation": "hills", "test": "towns"}  # each split's texts have a word of their own
QUESTION = "Ann counts {n} {word} in May. She counts twice as many in June. How many does she count?"
ANSWER = (
    "In June she counts {n}*2 = <<{n}*2={d}>>{d} {word}.\nShe counts {n}+{d} = <<{n}+{d}={t}>>{t} in all.\n#### {t}"
)


def paragraph(word: str, number: int) -> str:
    ordinal = " ".join(["very"] * (number % 5) + [f"old{number}"])
    return (
        f"There were many {ordinal} {word} in the land of the king who liked them. Nobody knew how many {word} "
        f"there were or ever had been. The {number} wise men of the court were asked to count all of them at once. "
        f"They walked for a year and a day and wrote down each of the {word}. Then they came home again."
    )


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split, word in WORDS.items():
        folder = tmp_path / "books" / split
        folder.mkdir(parents=True)
        (folder / "book.txt").write_text("\n\n".join(paragraph(word, number) for number in range(60)))
    for file, word in (("train", "boats"), ("test", "trains")):
        numbers = [{"n": n, "d": 2 * n, "t": 3 * n, "word": word} for n in range(10, 70)]
        records = [{"question": QUESTION.format(**each), "answer": ANSWER.format(**each)} for each in numbers]
        write_jsonl(tmp_path / "gsm8k" / f"{file}.jsonl", records)
    monkeypatch.setenv("SMARTKV_DATA", str(tmp_path))


def drawn(lines: list[str] | None = None) -> Source:
    return resolve_source(SourceConfig("chat", origins=["drawn"]), quiet if lines is None else lines.append)


def test_conversations_have_so_many_exchanges_in_turn(data: None) -> None:
    lines: list[str] = []
    documents = list(drawn(lines).documents("validation"))
    assert lines == ["source 'chat': drawn, from gsm8k (local) and pg19 (local)"]
    assert len(documents) == COUNT["validation"] == len({document.id for document in documents})
    for document in documents:
        assert [message.role for message in document.messages] == ["user", "assistant"] * (len(document.messages) // 2)
    lengths = {len(document.messages) // 2 for document in documents}
    assert (min(lengths), max(lengths)) == EXCHANGES


def test_splits_have_problems_passages_and_wordings_of_their_own(data: None) -> None:
    said = {split: " ".join(m.content for d in first(split) for m in d.messages) for split in SPLITS}
    for split, word in WORDS.items():
        assert word in said[split] and not any(word in said[other] for other in SPLITS if other != split)
    assert "trains" in said["test"] and "boats" in said["train"] and "boats" in said["validation"]
    assert "trains" not in said["train"] + said["validation"] and "boats" not in said["test"]
    for forms in FORMS.values():
        assert not {form[0] for form in forms["train"]} & {form[0] for form in forms["other"]}
    assert "I am stuck with my homework" in said["train"] and "I am stuck" not in said["validation"] + said["test"]


def first(split: str) -> list[Document]:
    return list(islice(drawn().documents(split), 60))


def test_the_same_conversations_are_drawn_at_each_call(data: None) -> None:
    assert first("test") == first("test") != first("validation")


def test_answers_refer_back_to_what_was_said(data: None) -> None:
    """Each kind of question is answered from the earlier turns by means of its own here."""
    checked = dict.fromkeys(("final", "given", "after", "other number"), 0)
    for document in drawn().documents("test"):
        contents = [message.content for message in document.messages]
        for place in range(0, len(contents), 2):
            asked, answer, before = contents[place], contents[place + 1], " ".join(contents[:place])
            if match := re.fullmatch(r"Which number did you find for \"(.*)\"\?", asked):
                assert match[1] in before and answer == f"For that I found {3 * int(match[1].split()[2])}."
                checked["final"] += 1
            elif match := re.fullmatch(r"Complete what I told you: (.*)___(.*)", asked):
                assert answer.startswith(match[1]) and answer.endswith(match[2]) and answer in before
                checked["given"] += 1
            elif match := re.fullmatch(r"Quote the sentence that stands behind this one: (.*)", asked):
                assert f"{match[1]} {answer}" in before
                checked["after"] += 1
            elif match := re.fullmatch(r"Above you had (\d+ [+*] \d+)\. And if it were (\d+) and not (\d+)\?", asked):
                assert match[1].replace(" ", "") in before and match[1].startswith(match[3])
                left, _, right = answer.partition(" = ")
                assert left.split()[0] == match[2] and eval(left) == int(right)
                checked["other number"] += 1
    assert min(checked.values()) > 3, checked


def test_without_data_the_manual_of_python_gives_passages(no_data: None) -> None:
    lines: list[str] = []
    documents = list(islice(drawn(lines).documents("train"), 5))
    assert lines == ["source 'chat': drawn, from the manual of Python itself"] and len(documents) == 5


def test_a_passage_is_whole_sentences_of_the_text() -> None:
    text = "\n\n".join(paragraph("rivers", number) for number in range(20))
    for seed in range(10):
        passage = cut_passage(text, np.random.default_rng(seed))
        assert passage is not None and passage.text in " ".join(text.split()) and len(passage.sentences) > 2
        assert all(sentence[0].isupper() and sentence.endswith(".") for sentence in passage.sentences)
    assert cut_passage("no sentence " * 400, np.random.default_rng(0)) is None


def test_a_problem_of_another_form_is_left_out() -> None:
    assert parse("Question: what?\nAnswer: 7") is None
    assert Conversation([], [], "train", np.random.default_rng(0)).draw() == ()


def test_the_origin_is_for_conversations_alone(no_data: None) -> None:
    with pytest.raises(SmartKVError, match=r"'gsm8k': origin 'drawn' is unknown: expected some of local, hub, builtin"):
        resolve_source(SourceConfig("gsm8k", origins=["drawn"]), quiet)
    with pytest.raises(SmartKVError, match=r"'chat': origin 'builtin' is unknown: expected some of local, hub, drawn"):
        resolve_source(SourceConfig("chat", origins=["builtin"]), quiet)
    with pytest.raises(SmartKVError, match="add 'drawn' to its origins"):
        resolve_source(SourceConfig("chat"), quiet)


@pytest.mark.parametrize("text", ["no paragraph " * 20_000, "not.\n\na sentence\n\n" * 5_000])
def test_a_text_without_passages_is_left_out_at_once(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not has_passages(text)
    for split in ("train", "validation", "test"):
        (tmp_path / "books" / split).mkdir(parents=True)
        (tmp_path / "books" / split / "book.txt").write_text(text)
    monkeypatch.setenv("SMARTKV_DATA", str(tmp_path))
    start = time.monotonic()
    assert not list(drawn_chats(["local"])[0]("train"))
    assert time.monotonic() - start < 10
