"""Text sources: the settings of one, and the search for the first origin that has it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from smartkv.errors import SmartKVError
from smartkv.texts import lists
from smartkv.texts.documents import Document
from smartkv.texts.known_sources import KNOWN
from smartkv.texts.origins import (
    DATA_VARIABLE,
    SourceUnavailable,
    builtin_documents,
    hub_documents,
    local_documents,
)
from smartkv.texts.own_texts import OwnTexts

ORIGINS = ("local", "hub", "builtin")
RECALL = "recall"
LISTS = "lists"
BUILTIN = "builtin"  # the manual of Python itself


@dataclass
class SourceConfig:
    """Settings of one text source of a mix.

    Args:
        name: pg19, gsm8k, math500, aime24, c4, fineweb_edu or builtin. recall: facts in the text of pg19 (or of
            `path`) that are asked for later, see `smartkv.texts.recall`. lists: drawn texts in which every line may be
            asked for, see `smartkv.texts.lists`. Any other name needs a `path`.
        weight: Share of the windows, relative to the other sources.
        origins: Where to take the source from, in order of preference: local ($SMARTKV_DATA), hub, builtin (the prose
            that Python itself ships). The first that has the source is used, and printed. If none has it, the run
            stops.
        path: Your own folder or file: .txt or .md (one document a file) or .jsonl (one document a line, in the field
            `text`), also with .gz. Subfolders train, validation and test, if present, are the splits.
    """

    name: str
    weight: float = 1.0
    origins: list[str] = field(default_factory=lambda: ["local", "hub"])
    path: str | None = None

    def check(self) -> None:
        """Check the settings.

        Raises:
            SmartKVError: One of them is wrong. The message names the source.
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
    """A source whose documents can be read.

    Attributes:
        name: Name of the source.
        weight: Share of the windows, relative to the other sources.
        origin: Where its documents come from: local, hub, builtin or drawn.
        documents: Function that takes a split and yields its documents, in the same order at each call.
        recall: Whether facts are put into its windows, see `smartkv.texts.recall`.
        own: A user's own texts; None for other sources.
    """

    name: str
    weight: float
    origin: str
    documents: Callable[[str], Iterator[Document]]
    recall: bool = False
    own: OwnTexts | None = None


def resolve_source(config: SourceConfig, say: Callable[[str], None]) -> Source:
    """Find the first origin that has a source, and say which one it is.

    Args:
        config: Settings of the source.
        say: Called with a line for the user.

    Raises:
        SmartKVError: The settings are wrong, or no origin has the source. The message has the reason of each origin.
    """
    config.check()
    if config.name == RECALL:
        return replace(_resolve(config, "pg19", say), name=RECALL, recall=True)
    return _resolve(config, config.name, say)


def _resolve(config: SourceConfig, text: str, say: Callable[[str], None]) -> Source:
    """Find the first origin that has the text of a source. `text` is the name of the known source that has it."""
    told = f"source '{config.name}'" + ("" if text == config.name or config.path else f" (its text is {text})")
    if config.path is not None:
        try:
            own = OwnTexts.find(Path(config.path).expanduser())
        except SmartKVError as error:
            raise SmartKVError(f"{told}: {error}") from error
        rest = f"; not read: {own.skipped_in_words}" if own.skipped else ""
        say(f"{told}: {own.count} {'file' if own.count == 1 else 'files'} in {own.path}{rest}")
        return Source(config.name, config.weight, "local", own.documents, own=own)
    if config.name == BUILTIN:
        return Source(BUILTIN, config.weight, BUILTIN, builtin_documents)
    if config.name == LISTS:
        return Source(LISTS, config.weight, "drawn", lists.documents)
    known, reasons = KNOWN[text], list[str]()
    for origin in config.origins:
        try:
            if origin == "local":
                documents = local_documents(known)
            elif origin == "hub":
                documents = hub_documents(known)
            else:
                say(
                    f"{told} CANNOT BE HAD ({'; '.join(reasons)}): its share is taken from the "
                    "built-in prose, the manual of Python itself"
                    if reasons
                    else f"{told}: the built-in prose, the manual of Python itself"
                )
                return Source(BUILTIN, config.weight, BUILTIN, builtin_documents)
            say(f"{told}: {origin}")
            return Source(config.name, config.weight, origin, documents)
        except SourceUnavailable as reason:
            reasons.append(f"{origin}: {reason}")
    raise SmartKVError(
        f"{told} cannot be had ({'; '.join(reasons)}): point ${DATA_VARIABLE} at a folder that has it, "
        "or add 'builtin' to its origins to take Python's own manual instead"
    )
