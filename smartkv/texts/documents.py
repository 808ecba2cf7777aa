"""A document: a text and its id."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    """One text of a source: a book, a problem with its solution, a web page.

    Attributes:
        id: Name of the document, unique within its source.
        text: The text.
    """

    id: str
    text: str
