"""The named sources: their splits and the text of their records, from a data folder."""

from pathlib import Path
from typing import Any

import pytest

from smartkv.errors import SmartKVError
from smartkv.shards.manifest import SPLITS
from smartkv.texts.known_sources import ALTERNATIVES, KIND, KNOWN, kind_of
from smartkv.texts.sources import NAMES, SourceConfig, resolve_source
from tests.smartkv.texts.fixtures import RECORDS, assert_disjoint, by_split, everything, ids, quiet, write_jsonl


def test_books_keep_the_splits_of_their_folders(local_data: Path) -> None:
    documents_by_split = by_split(resolve_source(SourceConfig("pg19"), quiet))
    assert {split: ids(documents) for split, documents in documents_by_split.items()} == {
        split: {f"{split}-book-{number}" for number in range(3)} for split in SPLITS
    }


def test_a_book_is_read_as_it_is_in_its_file(local_data: Path) -> None:
    book = next(resolve_source(SourceConfig("pg19"), quiet).documents("validation"))
    assert book.text == (local_data / "books" / "validation" / f"{book.id}.txt").read_text()


@pytest.mark.parametrize("name", ["math500", "aime24", "c4", "news"])
def test_splits_by_id_are_disjoint(local_data: Path, name: str) -> None:
    assert_disjoint(by_split(resolve_source(SourceConfig(name), quiet)))


@pytest.mark.parametrize("name", ["math500", "aime24", "c4", "news"])
def test_splits_by_id_cover_every_record(local_data: Path, name: str) -> None:
    assert len(everything(resolve_source(SourceConfig(name), quiet))) == 60


@pytest.mark.parametrize("name", ["math500", "aime24", "c4", "news"])
def test_splits_by_id_leave_no_split_empty(local_data: Path, name: str) -> None:
    assert all(by_split(resolve_source(SourceConfig(name), quiet)).values())


def test_math_problems_are_split_by_their_id_not_by_their_place(local_data: Path) -> None:
    before = by_split(resolve_source(SourceConfig("math500"), quiet))
    write_jsonl(local_data / "math/math500.jsonl", RECORDS["math/math500.jsonl"][::-1])
    after = by_split(resolve_source(SourceConfig("math500"), quiet))
    assert {split: ids(documents) for split, documents in after.items()} == {
        split: ids(documents) for split, documents in before.items()
    }


def test_gsm8k_train_file_is_divided_into_train_and_validation_without_overlap(local_data: Path) -> None:
    documents_by_split = by_split(resolve_source(SourceConfig("gsm8k"), quiet))
    assert documents_by_split["train"] and documents_by_split["validation"]
    assert_disjoint(documents_by_split)


def test_gsm8k_test_problems_are_only_in_split_test(local_data: Path) -> None:
    documents_by_split = by_split(resolve_source(SourceConfig("gsm8k"), quiet))
    assert len(documents_by_split["test"]) == 20
    assert all("evaluated" in document.text for document in documents_by_split["test"])
    assert not any(
        "evaluated" in document.text for document in documents_by_split["train"] + documents_by_split["validation"]
    )


def test_a_problem_is_rendered_with_its_solution(local_data: Path) -> None:
    problem = next(resolve_source(SourceConfig("gsm8k"), quiet).documents("test"))
    assert problem.text == "Question: evaluated 0?\nAnswer: secret 0"


@pytest.mark.parametrize("name", [name for name in KNOWN if name != "builtin"])
def test_documents_start_anew_at_each_call(local_data: Path, name: str) -> None:
    source = resolve_source(SourceConfig(name), quiet)
    assert list(source.documents("train")) == list(source.documents("train"))


@pytest.mark.parametrize("name", ["pg19", "gsm8k", "math500", "aime24", "c4", "encyclopaedia", "news"])
def test_ids_are_unique_within_a_source(local_data: Path, name: str) -> None:
    documents = everything(resolve_source(SourceConfig(name), quiet))
    assert len(ids(documents)) == len(documents)


@pytest.mark.parametrize(
    ("name", "file", "record"),
    [
        ("gsm8k", "gsm8k/train.jsonl", {"question": "and the answer?"}),
        ("math500", "math/math500.jsonl", {"unique_id": "a", "problem": "and the solution?"}),
        ("math500", "math/math500.jsonl", {"problem": "who am I?", "solution": "nobody knows"}),
        ("aime24", "math/aime24.jsonl", {"problem": "who am I?", "solution": "nobody knows"}),
        ("c4", "webtext/c4_sample.jsonl", {"url": "and the text?"}),
        ("news", "longctx/longbench_multi_news.jsonl", {"input": "and the context?"}),
    ],
    ids=["gsm8k answer", "math500 solution", "math500 id", "aime24 id", "c4 text", "news context"],
)
def test_a_local_record_that_lacks_a_field_is_told_in_one_line(
    local_data: Path, name: str, file: str, record: dict[str, Any]
) -> None:
    write_jsonl(local_data / file, [record])
    with pytest.raises(SmartKVError, match=Path(file).name):
        by_split(resolve_source(SourceConfig(name), quiet))


def test_a_web_page_is_read_from_one_field_or_from_two() -> None:
    render = KNOWN["c4"].render
    assert render({"text": "a page", "url": ""}) == render({"prefix": "a ", "gold_completion": "page"}) == "a page"


def test_a_local_file_of_articles_is_divided_and_its_test_articles_are_another_file(local_data: Path) -> None:
    documents_by_split = by_split(resolve_source(SourceConfig("encyclopaedia"), quiet))
    assert_disjoint(documents_by_split)
    assert ids(documents_by_split["test"]) == {f"Town {number}" for number in range(100, 120)}
    harvested = ids(documents_by_split["train"]) | ids(documents_by_split["validation"])
    assert len(documents_by_split["validation"]) > 5
    assert harvested == {f"Town {number}" for number in range(60)}


def test_news_on_one_event_are_one_text_without_marks_and_pages_that_are_no_article() -> None:
    lost = "Tweet with a location NEWLINE_CHAR NEWLINE_CHAR " + "You can add your city. " * 20
    first, second = "It rained. " * 20, "The mayor spoke. " * 20
    context = (
        f"Passage 1:\n{first} NEWLINE_CHAR NEWLINE_CHAR It stopped.\nPassage 2:\n{lost}\nPassage 3:\n{second}\n"
        "Passage 4:\nSee the pictures."
    )
    assert KNOWN["news"].render({"context": context}) == f"{first.strip()}\n\nIt stopped.\n\n{second.strip()}"


def test_every_named_source_has_a_kind() -> None:
    assert set(NAMES) <= set(KIND) and set(ALTERNATIVES) <= set(KIND)
    assert [kind_of(name) for name in ("gsm8k", "recall", "web/c4_sample/3", "mine", "mine/a")] == [
        "maths",
        "books",
        "web",
        "own",
        "own",
    ]
