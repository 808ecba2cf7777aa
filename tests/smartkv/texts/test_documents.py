"""Documents are values."""

from dataclasses import FrozenInstanceError

import pytest

from smartkv.texts.documents import Document


def test_a_document_cannot_be_changed_and_equals_its_copy() -> None:
    document = Document("books/emma", "Emma Woodhouse, handsome, clever, and rich")
    assert {document, Document(document.id, document.text)} == {document}
    with pytest.raises(FrozenInstanceError):
        document.text = "another"  # type: ignore[misc]
