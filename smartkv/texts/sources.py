"""Named text sources: where each can be had from, and its documents by split.

Splits are by document, never by token. Where a source comes with splits they are kept; otherwise a document's id
decides (80 % train, 10 % validation, 10 % test, by hash), so for the maths problems that are evaluated later.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from smartkv.errors import SmartKVError
from smartkv.shards.manifest import SPLITS
from smartkv.texts import lists
from smartkv.texts.documents import Document

DATA_VARIABLE = "SMARTKV_DATA"
ORIGINS = ("local", "hub", "builtin")
RECALL = "recall"
LISTS = "lists"
BUILTIN = "builtin"  # the manual of Python itself


class SourceUnavailable(Exception):
    """This origin does not have the source; another may. The message says why."""


@dataclass
class SourceConfig:
    """One text source of a mix.

    Args:
        name: pg19, gsm8k, math500, aime24, c4, fineweb_edu or builtin; recall: facts in the text of pg19 (or of `path`)
            that are asked for later (see `smartkv.texts.recall`); lists: drawn texts in which every line may be asked
            for (see `smartkv.texts.lists`); any other name goes with `path`.
        weight: share of the windows, relative to the other sources.
        origins: where to take it from, in order of preference: local ($SMARTKV_DATA), hub, builtin (the prose that
            Python itself ships). The first that can be had is used, and said; if none can, the run stops.
        path: a folder or file of your own, .txt (a document a file) or .jsonl (a document a line, field `text`).
            Subfolders train, validation and test are its splits if they are there.
    """

    name: str
    weight: float = 1.0
    origins: list[str] = field(default_factory=lambda: ["local", "hub"])
    path: str | None = None

    def check(self) -> None:
        """
        Raises:
            SmartKVError: naming the source and what is wrong with it.
        """
        if self.weight <= 0:
            raise SmartKVError(f"source '{self.name}': weight must be above 0, got {self.weight}")
        if self.path is None and self.name not in (*KNOWN, BUILTIN, RECALL, LISTS):
            names = ", ".join((*KNOWN, BUILTIN, RECALL, LISTS))
            raise SmartKVError(f"source '{self.name}' is unknown: expected {names}, or give it a path")
        for origin in self.origins:
            if origin not in ORIGINS:
                raise SmartKVError(
                    f"source '{self.name}': origin '{origin}' is unknown: expected some of {', '.join(ORIGINS)}"
                )


@dataclass(frozen=True)
class Source:
    """A source that can be had. `documents(split)` starts anew at each call, in a fixed order; `recall`: facts are put
    into them."""

    name: str
    weight: float
    origin: str
    documents: Callable[[str], Iterator[Document]]
    recall: bool = False


@dataclass(frozen=True)
class _Known:
    """How a named source is stored.

    Attributes:
        hub: (repository, configuration or None, {our split: its split}).
        local: file or folder under the data folder, by our split; "*" serves all splits.
        render: record -> text.
        id: the record's field that names it, or None: its number.
        fields: the record's fields that `render` needs, in a local file.
    """

    hub: tuple[str, str | None, dict[str, str]]
    local: dict[str, str]
    render: Callable[[dict[str, Any]], str]
    id: str | None = None
    fields: tuple[str, ...] = ()


def _problem(record: dict[str, Any]) -> str:
    return f"Problem: {record['problem']}\nSolution: {record['solution']}"


def _question(record: dict[str, Any]) -> str:
    return f"Question: {record['question']}\nAnswer: {record['answer']}"


def _web(record: dict[str, Any]) -> str:
    return record["text"] if "text" in record else record["prefix"] + record["gold_completion"]


_PG19_SPLITS = {split: split for split in SPLITS}
KNOWN: dict[str, _Known] = {
    "pg19": _Known(
        ("emozilla/pg19", None, _PG19_SPLITS),
        {split: f"books/{split}" for split in SPLITS},
        lambda record: record["text"],
        "short_book_title",
    ),
    # the published test problems are never harvested for training or validation
    "gsm8k": _Known(
        ("openai/gsm8k", "main", {"train": "train", "validation": "train", "test": "test"}),
        {"train": "gsm8k/train.jsonl", "validation": "gsm8k/train.jsonl", "test": "gsm8k/test.jsonl"},
        _question,
        fields=("question", "answer"),
    ),
    "math500": _Known(
        ("HuggingFaceH4/MATH-500", None, {"*": "test"}),
        {"*": "math/math500.jsonl"},
        _problem,
        "unique_id",
        ("problem", "solution"),
    ),
    "aime24": _Known(
        ("HuggingFaceH4/aime_2024", None, {"*": "train"}),
        {"*": "math/aime24.jsonl"},
        _problem,
        "id",
        ("problem", "solution"),
    ),
    "c4": _Known(("allenai/c4", "en", {"*": "validation"}), {"*": "webtext/c4_sample.jsonl"}, _web),
    "fineweb_edu": _Known(
        ("HuggingFaceFW/fineweb-edu", "sample-10BT", {"*": "train"}),
        {"*": "webtext/fineweb_edu.jsonl"},
        lambda record: record["text"],
        "id",
        ("text",),
    ),
}


def resolve_source(config: SourceConfig, say: Callable[[str], None]) -> Source:
    """Find where a source can be had and say it.

    Raises:
        SmartKVError: nowhere, with the reason for each origin that was tried.
    """
    config.check()
    if config.name == RECALL:
        text = resolve_source(replace(config, name="text" if config.path else "pg19"), say)
        return replace(text, name=RECALL, recall=True)
    if config.path is not None:
        path = Path(config.path).expanduser()
        if not path.exists():
            raise SmartKVError(f"source '{config.name}': path {path} does not exist")
        return Source(config.name, config.weight, "local", lambda split: _own_texts(path, split))
    if config.name == BUILTIN:
        return Source(BUILTIN, config.weight, BUILTIN, _builtin)
    if config.name == LISTS:
        return Source(LISTS, config.weight, "drawn", lists.documents)
    known, reasons = KNOWN[config.name], list[str]()
    for origin in config.origins:
        try:
            if origin == "local":
                documents = _local(known)
            elif origin == "hub":
                documents = _hub(known)
            else:
                say(
                    f"source '{config.name}' CANNOT BE HAD ({'; '.join(reasons)}): its share is taken from the "
                    "built-in prose, the manual of Python itself"
                )
                return Source(BUILTIN, config.weight, BUILTIN, _builtin)
            say(f"source '{config.name}': {origin}")
            return Source(config.name, config.weight, origin, documents)
        except SourceUnavailable as reason:
            reasons.append(f"{origin}: {reason}")
    raise SmartKVError(
        f"source '{config.name}' cannot be had ({'; '.join(reasons)}): point ${DATA_VARIABLE} at a folder that has it, "
        "or add 'builtin' to its origins to take Python's own manual instead"
    )


def _own_split(name: str, known_split: bool, split: str) -> bool:
    """Whether a document belongs to `split`, where the source does not say: 80 / 10 / 10 by a hash of its id."""
    if known_split:
        return True
    share = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32
    return split == ("train" if share < 0.8 else "validation" if share < 0.9 else "test")


def _records(path: Path, *fields: str) -> Iterator[dict[str, Any]]:
    """The lines of a .jsonl file; each must have these fields."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8"))
            except ValueError as error:  # not UTF-8, or not JSON
                raise SmartKVError(f"{path}, line {number}: not JSON in UTF-8 ({error})") from error
            if not isinstance(record, dict) or not all(isinstance(record.get(field), str) for field in fields):
                wanted = " and ".join(f"'{field}'" for field in fields)
                raise SmartKVError(f"{path}, line {number}: expected an object with strings in {wanted}")
            yield record


def _select(
    records: Iterator[dict[str, Any]], known: _Known, where: str, split: str, settled: bool
) -> Iterator[Document]:
    for number, record in enumerate(records):
        try:
            name = str(record[known.id]) if known.id else f"{Path(where).stem}/{number}"
            text = known.render(record)
        except KeyError as missing:
            raise SmartKVError(f"{where}, record {number + 1}: the field {missing} is missing") from missing
        if _own_split(name, settled, split):
            yield Document(name, text)


def _local(known: _Known) -> Callable[[str], Iterator[Document]]:
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
            # a file that serves several splits is divided by id
            settled = list(paths.values()).count(path) == 1
            yield from _select(_records(path, *known.fields), known, path.name, split, settled)

    return documents


def _hub(known: _Known) -> Callable[[str], Iterator[Document]]:
    from huggingface_hub import HfApi

    repository, configuration, splits = known.hub
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        raise SourceUnavailable("HF_HUB_OFFLINE is set")
    try:
        HfApi().dataset_info(repository, timeout=10)
    except Exception as error:  # whatever the network, the hub or its client says, the answer is the same
        raise SourceUnavailable(f"{repository} does not answer ({type(error).__name__})") from error

    def documents(split: str) -> Iterator[Document]:
        import datasets

        theirs = splits.get(split, splits.get("*", ""))
        settled = list(splits.values()).count(theirs) == 1 and "*" not in splits
        try:
            stream = datasets.load_dataset(repository, configuration, split=theirs, streaming=True)
            yield from _select(iter(stream), known, theirs, split, settled)
        except SmartKVError:
            raise
        except Exception as error:  # as above
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise SmartKVError(
                f"{repository} broke off ({reason}): give the same command again, or have the texts in $SMARTKV_DATA"
            ) from error

    return documents


def _text_file(path: Path, name: str) -> Document:
    return Document(name, path.read_text(encoding="utf-8", errors="replace"))


def _own_texts(path: Path, split: str) -> Iterator[Document]:
    """Documents of a user's own folder or file, named by their path in it."""
    settled = path.is_dir() and (path / split).is_dir()
    if path.is_dir() and not settled and any((path / other).is_dir() for other in SPLITS):
        return  # it has splits, but not this one
    root = path / split if settled else path
    for file in sorted(root.rglob("*")) if root.is_dir() else [root]:
        name = str(file.relative_to(root).with_suffix("")) if root.is_dir() else file.stem
        if file.suffix == ".txt":
            documents = iter([_text_file(file, name)])
        elif file.suffix == ".jsonl":
            records = enumerate(_records(file, "text"))
            documents = (Document(f"{name}/{number}", record["text"]) for number, record in records)
        else:
            continue
        yield from (document for document in documents if _own_split(document.id, settled, split))


def _builtin(split: str) -> Iterator[Document]:
    """The language reference that CPython carries for its own `help()`: 79 topics, about 113,000 tokens."""
    from pydoc_data.topics import topics

    for name, text in topics.items():
        document = Document(f"python/{name}", text)
        if _own_split(document.id, False, split):
            yield document
