"""A document: text with a name and a split."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    """One text: a book, a problem with its solution, a web page. `id` is unique within its source."""

    id: str
    text: str
