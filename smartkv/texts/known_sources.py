"""The text sources that have a name: where their files lie, and how a record becomes text."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from smartkv.shards.manifest import SPLITS
from smartkv.texts.wikitext import articles


@dataclass(frozen=True)
class KnownSource:
    """Storage and format of a named source.

    Attributes:
        hub: Repository of the data set, its configuration or None, and the repository's split for each of ours. The
            key "*" stands for every split.
        local: Path in the data folder for each split. The key "*" stands for every split. A line of a .txt file is a
            record with the field `text`.
        render: Function that turns a record into text.
        id: Field of a record that identifies it. None if a record has only its number.
        fields: Fields that must be strings in a record of a local file.
        assemble: Function that puts the records of a file or of a split together to others. None if each is a document.
        use_all: Whether validation also takes what a hash gives to test, in a file for training and validation alone.
    """

    hub: tuple[str, str | None, dict[str, str]]
    local: dict[str, str]
    render: Callable[[dict[str, Any]], str]
    id: str | None = None
    fields: tuple[str, ...] = ()
    assemble: Callable[[Iterable[dict[str, Any]]], Iterator[dict[str, Any]]] | None = None
    use_all: bool = False


def _problem(record: dict[str, Any]) -> str:
    return f"Problem: {record['problem']}\nSolution: {record['solution']}"


def _question(record: dict[str, Any]) -> str:
    return f"Question: {record['question']}\nAnswer: {record['answer']}"


def _web_page(record: dict[str, Any]) -> str:
    """Return the text of a web page. The local sample of C4 stores it in two fields, the hub in one."""
    return record["text"] if "text" in record else record["prefix"] + record["gold_completion"]


_PASSAGE = re.compile(r"^Passage \d+:\n", re.MULTILINE)
_NO_NEWS = re.compile(  # what stands on a page in place of an article
    r"Starting in 1996, Alexa Internet|Tweet with a location|Add a location to your Tweets|These crawls are part of"
    r"|This is a set of web collections|The interactive transcript could not be loaded|Dow Jones Reprints:"
)
_SHORTEST_ARTICLE = 200  # characters


def _news(record: dict[str, Any]) -> str:
    """Return an article of CNN/DailyMail, or the articles on one event of Multi-News in the form of LongBench."""
    if "article" in record:
        return record["article"]
    passages = (
        re.sub(r"[ \n]*NEWLINE_CHAR[ \n]*(NEWLINE_CHAR[ \n]*)*", "\n\n", passage).strip()
        for passage in _PASSAGE.split(record["context"])
    )
    return "\n\n".join(p for p in passages if len(p) >= _SHORTEST_ARTICLE and not _NO_NEWS.match(p))


KNOWN: dict[str, KnownSource] = {
    "pg19": KnownSource(
        ("emozilla/pg19", None, {split: split for split in SPLITS}),
        {split: f"books/{split}" for split in SPLITS},
        lambda record: record["text"],
        "short_book_title",
    ),
    # Training and validation share the published training problems, so that the test problems are never harvested.
    "gsm8k": KnownSource(
        ("openai/gsm8k", "main", {"train": "train", "validation": "train", "test": "test"}),
        {"train": "gsm8k/train.jsonl", "validation": "gsm8k/train.jsonl", "test": "gsm8k/test.jsonl"},
        _question,
        fields=("question", "answer"),
    ),
    "math500": KnownSource(
        ("HuggingFaceH4/MATH-500", None, {"*": "test"}),
        {"*": "math/math500.jsonl"},
        _problem,
        "unique_id",
        ("problem", "solution"),
    ),
    "aime24": KnownSource(
        ("HuggingFaceH4/aime_2024", None, {"*": "train"}),
        {"*": "math/aime24.jsonl"},
        _problem,
        "id",
        ("problem", "solution"),
    ),
    "c4": KnownSource(("allenai/c4", "en", {"*": "validation"}), {"*": "webtext/c4_sample.jsonl"}, _web_page),
    "fineweb_edu": KnownSource(
        ("HuggingFaceFW/fineweb-edu", "sample-10BT", {"*": "train"}),
        {"*": "webtext/fineweb_edu.jsonl"},
        lambda record: record["text"],
        "id",
        ("text",),
    ),
    # WikiText-2 and -103 have the same validation and test articles: no test article is in a local file for training.
    "encyclopaedia": KnownSource(
        ("Salesforce/wikitext", "wikitext-103-raw-v1", {split: split for split in SPLITS}),
        {
            "train": "webtext/wikitext-2.valid.txt",
            "validation": "webtext/wikitext-2.valid.txt",
            "test": "webtext/wikitext-2-raw.test.txt",
        },
        lambda record: record["text"],
        "title",
        assemble=articles,
        use_all=True,
    ),
    "news": KnownSource(
        ("abisee/cnn_dailymail", "3.0.0", {split: split for split in SPLITS}),
        {"*": "longctx/longbench_multi_news.jsonl"},
        _news,
        fields=("context",),
    ),
}
ALTERNATIVES = {"web": ("fineweb_edu", "c4")}  # sources that are the first of others that an origin has

KIND = {
    **dict.fromkeys(("pg19", "recall"), "books"),
    **dict.fromkeys(("gsm8k", "math500", "aime24"), "maths"),
    **dict.fromkeys(("web", "c4", "fineweb_edu"), "web"),
    **{name: name for name in ("code", "encyclopaedia", "news", "chat", "lists")},
    "builtin": "manual",
}
"""Kind of text of each named source: books, maths, code, encyclopaedia, web, news, chat, lists or manual."""


def kind_of(source: str) -> str:
    """Return the kind of a source's texts, as in `KIND`; "own" for a source that only its user knows.

    Args:
        source: Name of a source, or of one of its documents, "source/id".
    """
    return KIND.get(source.partition("/")[0], "own")
