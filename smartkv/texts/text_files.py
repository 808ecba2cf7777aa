"""Read files of text: plain ones, and lines of JSON. A file that cannot be read rightly is named.

Each name may end with `.gz`.
"""

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from smartkv.errors import SmartKVError
from smartkv.texts.documents import Message

ROLES = ("system", "user", "assistant")
MARKS = {  # at the start of a file; those of UTF-32 begin like those of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def read_text(path: Path) -> str:
    """Read a text in UTF-8, or in UTF-16 or UTF-32 if it begins with their byte order mark.

    The line ends of other systems become newlines.

    Raises:
        SmartKVError: The file cannot be read, is binary, or in another encoding.
    """
    with _opened(path) as file:
        content = file.read()
    encoding = next((name for mark, name in MARKS.items() if content.startswith(mark)), "utf-8")
    if encoding == "utf-8" and b"\0" in content:
        raise SmartKVError(f"{path} is no text: it is binary, or UTF-16 without a byte order mark")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise SmartKVError(
            f"{path} is not in {error.encoding.upper()} (byte {error.start}): convert it, for example with "
            "'iconv -f latin1 -t utf-8'"
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_records(path: Path, *fields: str) -> Iterator[dict[str, Any]]:
    """Yield the objects in the lines of a .jsonl file, each with strings in `fields`.

    Raises:
        SmartKVError: The file cannot be read; a line is not JSON in UTF-8, or has no text in one of the fields.
    """
    names = " and ".join(f"'{field}'" for field in fields)
    for number, record in _records(path):
        if not isinstance(record, dict) or not all(isinstance(record.get(field), str) for field in fields):
            raise SmartKVError(f"{path}, line {number}: expected an object with strings in {names}")
        for field in fields:
            _check_characters(record[field], f"{path}, line {number}: '{field}'")
        yield record


def read_conversations(path: Path) -> Iterator[tuple[Message, ...]]:
    """Yield the conversations in the lines of a .jsonl file, each with its messages in the field `messages`.

    Raises:
        SmartKVError: The file cannot be read; a line is not JSON in UTF-8, or has no such messages.
    """
    for number, record in _records(path):
        try:
            messages = messages_of(record)
        except SmartKVError as error:
            raise SmartKVError(f"{path}, line {number}: {error}") from error
        for message in messages:
            _check_characters(message.content, f"{path}, line {number}: a message")
        yield messages


def messages_of(record: Any) -> tuple[Message, ...]:
    """Return the messages of a record, a list of {role, content} in its field `messages`.

    Raises:
        SmartKVError: There is no such list, or a role is not system, user or assistant.
    """
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list) or not messages:
        raise SmartKVError("expected an object with a list of {role, content} in 'messages'")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise SmartKVError("each of 'messages' must be an object with a string in 'content'")
        if message.get("role") not in ROLES:
            raise SmartKVError(f"a role in 'messages' must be one of {', '.join(ROLES)}, got {message.get('role')!r}")
    return tuple(Message(message["role"], message["content"]) for message in messages)


def _records(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the number and the value of each line of a .jsonl file; empty lines are left out."""
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except ValueError as error:  # not UTF-8, or not JSON
                raise SmartKVError(f"{path}, line {number}: not JSON in UTF-8 ({error})") from error


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a file as bytes, unpacked if it is compressed; whatever fails inside is told with its name."""
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise SmartKVError(f"{path} is damaged, or no gzip file: {error}") from error
    except OSError as error:
        raise SmartKVError(f"{path} cannot be read: {error.strerror or error}") from error


def _check_characters(text: str, place: str) -> None:
    """Raise an error that begins with `place` if the text has half of a surrogate pair."""
    if (half := _half_of_a_pair(text)) is not None:
        raise SmartKVError(
            f"{place} has half of a surrogate pair (\\u{ord(half):04x}), which is no character: remove it, or write "
            "both halves"
        )


def _half_of_a_pair(text: str) -> str | None:
    """Return a surrogate that stands alone, which no encoding can write; None if there is none."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return text[error.start]
    return None
