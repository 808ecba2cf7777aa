"""Read the documents of a source: from the data folder, the hub, or the prose in Python itself.

Splits are by document, never by token. Where a source has splits of its own they are kept. Otherwise a hash of a
document's id puts it into train (80 %), validation (10 %) or test (10 %).
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from smartkv.errors import SmartKVError
from smartkv.shards.manifest import SPLITS
from smartkv.texts.documents import Document, split_of
from smartkv.texts.known_sources import KnownSource
from smartkv.texts.text_files import read_records, read_text

DATA_VARIABLE = "SMARTKV_DATA"


class SourceUnavailable(Exception):
    """The reason why one origin does not have a source. Another origin may have it."""


def local_documents(known: KnownSource) -> Callable[[str], Iterator[Document]]:
    """Find a named source in the folder `$SMARTKV_DATA`.

    Returns:
        A function that takes a split and yields its documents.

    Raises:
        SourceUnavailable: The variable is not set, or a file or folder of the source is missing.
    """
    folder = os.environ.get(DATA_VARIABLE)
    if not folder:
        raise SourceUnavailable(f"${DATA_VARIABLE} is not set")
    paths = {split: Path(folder).expanduser() / known.local.get(split, known.local.get("*", "")) for split in SPLITS}
    for path in paths.values():
        if not path.exists():
            raise SourceUnavailable(f"{path} does not exist")

    def documents(split: str) -> Iterator[Document]:
        path = paths[split]
        if path.is_dir():
            for file in sorted(path.glob("*.txt")):
                yield _text_file(file, file.stem)
        else:
            has_splits = list(paths.values()).count(path) == 1  # else the file serves several splits
            records = _lines(path) if path.suffix == ".txt" else read_records(path, *known.fields)
            yield from _of_split(records, known, path.name, split, has_splits)

    return documents


def hub_documents(known: KnownSource) -> Callable[[str], Iterator[Document]]:
    """Find a named source on the Hugging Face hub.

    Returns:
        A function that takes a split and streams its documents. It raises a SmartKVError if the stream breaks off.

    Raises:
        SourceUnavailable: `HF_HUB_OFFLINE` is set, or the hub does not answer.
    """
    from huggingface_hub import HfApi

    repository, configuration, splits = known.hub
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        raise SourceUnavailable("HF_HUB_OFFLINE is set")
    try:
        HfApi().dataset_info(repository, timeout=10)
    except Exception as error:  # network, hub and client raise many classes, and all mean the same here
        raise SourceUnavailable(f"{repository} does not answer ({type(error).__name__})") from error

    def documents(split: str) -> Iterator[Document]:
        import datasets

        hub_split = splits.get(split, splits.get("*", ""))
        has_splits = list(splits.values()).count(hub_split) == 1 and "*" not in splits
        try:
            stream = datasets.load_dataset(repository, configuration, split=hub_split, streaming=True)
            yield from _of_split(iter(stream), known, hub_split, split, has_splits)
        except SmartKVError:
            raise
        except Exception as error:  # as above
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise SmartKVError(
                f"{repository} broke off ({reason}): give the same command again, or have the texts in $SMARTKV_DATA"
            ) from error

    return documents


def builtin_documents(split: str) -> Iterator[Document]:
    """Yield one split of the language reference that Python carries for `help()`: 79 topics, about 113,000 tokens."""
    from pydoc_data.topics import topics

    for name, text in topics.items():
        document = Document(f"python/{name}", text)
        if split_of(document.id) == split:
            yield document


def _of_split(
    records: Iterator[dict[str, Any]], known: KnownSource, place: str, split: str, has_splits: bool
) -> Iterator[Document]:
    """Yield the records that belong to `split`, as documents. `place` is the file or hub split that they are from."""
    for number, record in enumerate(known.assemble(records) if known.assemble else records):
        try:
            name = str(record[known.id]) if known.id else f"{Path(place).stem}/{number}"
            text = known.render(record)
        except KeyError as missing:
            raise SmartKVError(f"{place}, record {number + 1}: the field {missing} is missing") from missing
        hashed = split_of(name)
        if known.use_all and hashed == "test":
            hashed = "validation"
        if has_splits or hashed == split:
            yield Document(name, text)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a file as records."""
    return ({"text": line} for line in read_text(path).split("\n"))


def _text_file(path: Path, name: str) -> Document:
    return Document(name, path.read_text(encoding="utf-8", errors="replace"))
