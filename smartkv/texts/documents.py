"""A document: a text or a conversation, and its id, which decides its split where its source has none of its own."""

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Message:
    """One message of a conversation.

    Attributes:
        role: system, user or assistant.
        content: The text.
    """

    role: str
    content: str


@dataclass(frozen=True)
class Document:
    """One text of a source: a book, a problem with its solution, a web page, a conversation.

    Attributes:
        id: Name of the document, unique within its source.
        text: The text; empty for a conversation, which is text only in the format of a model.
        messages: The messages of a conversation; empty for any other text.
    """

    id: str
    text: str
    messages: tuple[Message, ...] = ()


def split_of(document_id: str) -> str:
    """Return the split that a hash of a document's id puts it into: train (80 %), validation or test (10 % each)."""
    share = int(hashlib.sha256(document_id.encode("utf-8", "surrogatepass")).hexdigest()[:8], 16) / 2**32
    return "train" if share < 0.8 else "validation" if share < 0.9 else "test"
