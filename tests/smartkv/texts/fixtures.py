"""Records of the named sources, and shortcuts for reading a source, for the tests of texts."""

import json
from pathlib import Path
from typing import Any

from smartkv.shards.manifest import SPLITS
from smartkv.texts.documents import Document
from smartkv.texts.sources import Source

RECORDS = {
    "gsm8k/train.jsonl": [{"question": f"q{i}?", "answer": f"a{i}"} for i in range(60)],
    "gsm8k/test.jsonl": [{"question": f"evaluated {i}?", "answer": f"secret {i}"} for i in range(20)],
    "math/math500.jsonl": [{"unique_id": f"test/algebra/{i}.json", "problem": f"p{i}", "solution": f"s{i}"}
                           for i in range(60)],
    "math/aime24.jsonl": [{"id": i, "problem": f"p{i}", "solution": f"s{i}"} for i in range(60)],
    "webtext/c4_sample.jsonl": [{"prefix": f"page {i} ", "gold_completion": "goes on"} for i in range(60)],
    "webtext/fineweb_edu.jsonl": [{"id": f"<urn:{i}>", "text": f"lesson {i}"} for i in range(60)],
    "longctx/longbench_multi_news.jsonl": [{"context": f"Passage 1:\n{f'report {i} ' * 30}\nPassage 2:\nshort"}
                                           for i in range(60)],
}  # fmt: skip


def wikitext(first: int, count: int) -> str:
    """Articles in the form of WikiText, one line a paragraph."""
    return "".join(
        f" \n = Town {i} = \n \n Town {i} has 1 @,@ {i}00 people . \n \n = = History = = \n \n It was built in {i} . \n"
        for i in range(first, first + count)
    )


def write_jsonl(path: Path, records: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def quiet(_: str) -> None:
    pass


def by_split(source: Source) -> dict[str, list[Document]]:
    return {split: list(source.documents(split)) for split in SPLITS}


def everything(source: Source) -> list[Document]:
    return [document for documents in by_split(source).values() for document in documents]


def ids(documents: list[Document]) -> set[str]:
    return {document.id for document in documents}


def assert_disjoint(documents_by_split: dict[str, list[Document]]) -> None:
    assert not ids(documents_by_split["train"]) & ids(documents_by_split["validation"])
    assert not ids(documents_by_split["train"]) & ids(documents_by_split["test"])
    assert not ids(documents_by_split["validation"]) & ids(documents_by_split["test"])
