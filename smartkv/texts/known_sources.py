"""The text sources that have a name: where their files lie, and how a record becomes text."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from smartkv.shards.manifest import SPLITS
from smartkv.texts.documents import Message
from smartkv.texts.text_files import messages_of


@dataclass(frozen=True)
class KnownSource:
    """Storage and format of a named source.

    Attributes:
        hub: Repository of the data set, its configuration or None, and the repository's split for each of ours. The
            key "*" stands for every split.
        local: Path in the data folder for each split. The key "*" stands for every split.
        render: Function that turns a record into text, or into the messages of a conversation.
        id: Field of a record that identifies it. None if a record has only its number.
        fields: Fields that must be strings in a record of a local file.
    """

    hub: tuple[str, str | None, dict[str, str]]
    local: dict[str, str]
    render: Callable[[dict[str, Any]], str | tuple[Message, ...]]
    id: str | None = None
    fields: tuple[str, ...] = ()


def _problem(record: dict[str, Any]) -> str:
    return f"Problem: {record['problem']}\nSolution: {record['solution']}"


def _question(record: dict[str, Any]) -> str:
    return f"Question: {record['question']}\nAnswer: {record['answer']}"


def _web_page(record: dict[str, Any]) -> str:
    """Return the text of a web page. The local sample of C4 stores it in two fields, the hub in one."""
    return record["text"] if "text" in record else record["prefix"] + record["gold_completion"]


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
    "chat": KnownSource(
        ("HuggingFaceH4/ultrachat_200k", None, {"train": "train_sft", "validation": "train_sft", "test": "test_sft"}),
        {"train": "chat/train.jsonl", "validation": "chat/train.jsonl", "test": "chat/test.jsonl"},
        messages_of,
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
}
