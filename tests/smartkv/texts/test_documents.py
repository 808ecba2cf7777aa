"""Documents are values."""

from dataclasses import FrozenInstanceError

import pytest

from smartkv.texts.documents import Document, split_of


def test_a_document_cannot_be_changed_and_equals_its_copy() -> None:
    document = Document("books/emma", "Emma Woodhouse, handsome, clever, and rich")
    assert {document, Document(document.id, document.text)} == {document}
    with pytest.raises(FrozenInstanceError):
        document.text = "another"  # type: ignore[misc]


def test_a_hash_of_the_id_divides_documents_four_fifths_a_tenth_and_a_tenth() -> None:
    splits = [split_of(f"book-{number}") for number in range(5000)]
    shares = {split: splits.count(split) / 5000 for split in ("train", "validation", "test")}
    assert shares == pytest.approx({"train": 0.8, "validation": 0.1, "test": 0.1}, abs=0.02)
    train, validation, test = "train", "validation", "test"
    golden = [train, test, test, test, test, validation, train]  # a harvest of 0.1.0 that goes on finds its splits
    assert [split_of(f"text{number}") for number in range(7)] == golden
