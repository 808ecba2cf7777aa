"""Conversations of a user's own."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from smartkv.errors import SmartKVError
from smartkv.texts.documents import Document
from smartkv.texts.own_texts import OwnTexts
from smartkv.texts.text_files import read_conversations


def own_chats(own: OwnTexts) -> OwnTexts:
    """Read the .jsonl files of a user's folder, or a single one, as conversations. Other files are counted as not read.

    Raises:
        SmartKVError: There is no .jsonl file.
    """
    skipped = own.skipped.copy()
    files: dict[str, list[tuple[Path, Path]]] = {}
    for split, found in own.files.items():
        files[split] = [(root, file) for root, file in found if _holds_records(file)]
        skipped.update(file.suffix.lower() for _, file in found if not _holds_records(file))
    if not any(files.values()):
        raise SmartKVError(f"{own.path} holds no conversations: expected .jsonl (also .gz) with the field 'messages'")
    return replace(own, files=files, skipped=skipped, read=_conversations)


def _holds_records(file: Path) -> bool:
    return file.name.lower().removesuffix(".gz").endswith(".jsonl")


def _conversations(file: Path, name: str) -> Iterator[Document]:
    """Yield the conversations of a file. `name` is its path in the folder."""
    for number, messages in enumerate(read_conversations(file)):
        yield Document(f"{name.removesuffix('.jsonl')}/{number}", "", messages)
