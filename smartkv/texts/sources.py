"""Text sources: the settings of one, and the search for the first origin that has it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from smartkv.errors import SmartKVError
from smartkv.texts import lists
from smartkv.texts.chats import own_chats
from smartkv.texts.documents import Document
from smartkv.texts.drawn_chats import drawn_chats
from smartkv.texts.installed_code import InstalledCode
from smartkv.texts.known_sources import ALTERNATIVES, KNOWN
from smartkv.texts.origins import (
    DATA_VARIABLE,
    SourceUnavailable,
    builtin_documents,
    hub_documents,
    local_documents,
)
from smartkv.texts.own_texts import OwnTexts

ORIGINS = ("local", "hub", "builtin")
DRAWN = "drawn"  # an origin of conversations
RECALL = {  # name -> the source of its text, the kind of its text
    "recall": ("pg19", "books"),
    "recall_code": ("code", "code"),
    "recall_chat": ("chat", "chat"),
}
CHAT = "chat"
CHATS = (CHAT, "recall_chat")
LISTS = "lists"
CODE = "code"
BUILTIN = "builtin"  # the manual of Python itself
NAMES = (*KNOWN, *ALTERNATIVES, CODE, BUILTIN, *RECALL, LISTS)  # sources that need no path
ONE_PLACE = {  # sources that are nowhere else
    CODE: "it is the code that is installed beside SmartKV",
    LISTS: "its lists are drawn",
    BUILTIN: "it is the manual that comes with Python",
}


@dataclass
class SourceConfig:
    """Settings of one text source of a mix.

    Args:
        name: pg19 (books), gsm8k, math500, aime24 (maths), encyclopaedia, news, fineweb_edu, c4, web (the first of
            these two that can be had), chat or builtin. code: the Python files of the standard library and of the
            packages installed beside it, or the source files in `path`. recall, recall_code and recall_chat: facts in
            the text of pg19, code and chat (or of `path`) that are asked for later, see `smartkv.texts.recall`. lists:
            drawn texts in which every line may be asked for, see `smartkv.texts.lists`. Any other name needs a `path`.
        weight: Share of the windows, relative to the other sources.
        origins: Where to take the source from, in order of preference: local ($SMARTKV_DATA), hub, builtin (the prose
            that Python itself ships; for conversations in its place drawn, see `smartkv.texts.drawn_chats`). The first
            that has the source is used, and printed. If none has it, the run stops. code, lists and builtin need none
            of them.
        path: Your own folder or file: .txt or .md (one document a file) or .jsonl (one document a line, in the field
            `text`), also with .gz. Subfolders train, validation and test, if present, are the splits. With the names
            code and recall_code: source files (.py, .js, .c, .rs, .md and others). With chat and recall_chat: .jsonl
            with a list of {role, content} in the field `messages`.
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
        if self.path is None and self.name not in NAMES:
            raise SmartKVError(f"source '{self.name}' is unknown: expected {', '.join(NAMES)}, or give it a path")
        text = RECALL[self.name][0] if self.name in RECALL else self.name
        if self.path is None and text in ONE_PLACE and set(self.origins) == {"hub"}:
            raise SmartKVError(
                f"source '{self.name}' is not on the hub: {ONE_PLACE[text]}. Leave its origins out"
                + (", or give it a path" if text == CODE else "")
            )
        possible = ("local", "hub", DRAWN) if self.name in CHATS else ORIGINS
        for origin in self.origins:
            if origin not in possible:
                raise SmartKVError(
                    f"source '{self.name}': origin '{origin}' is unknown: expected some of {', '.join(possible)}"
                )


@dataclass(frozen=True)
class Source:
    """A source whose documents can be read.

    Attributes:
        name: Name of the source.
        weight: Share of the windows, relative to the other sources.
        origin: Where its documents come from: local, hub, builtin, installed or drawn.
        documents: Function that takes a split and yields its documents, in the same order at each call.
        recall: Kind of the text into whose windows facts are put, see `smartkv.texts.recall`: books, code or chat.
            None: no facts.
        own: A user's own texts; None for other sources.
        about: What else was used, as JSON values: the number of packages of installed code, or the named source that
            has the text of another.
    """

    name: str
    weight: float
    origin: str
    documents: Callable[[str], Iterator[Document]]
    recall: str | None = None
    own: OwnTexts | None = None
    about: dict[str, Any] = field(default_factory=dict)


def resolve_source(config: SourceConfig, say: Callable[[str], None]) -> Source:
    """Find the first origin that has a source, and say which one it is.

    Args:
        config: Settings of the source.
        say: Called with a line for the user.

    Raises:
        SmartKVError: The settings are wrong, or no origin has the source. The message has the reason of each origin.
    """
    config.check()
    if config.name in RECALL:
        text, kind = RECALL[config.name]
        return replace(_resolve(config, text, say), name=config.name, recall=kind)
    return _resolve(config, config.name, say)


def _resolve(config: SourceConfig, text: str, say: Callable[[str], None]) -> Source:
    """Find the first origin that has the text of a source. `text` is the name of the known source that has it."""
    told = f"source '{config.name}'" + ("" if text == config.name or config.path else f" (its text is {text})")
    if config.path is not None:
        try:
            own = OwnTexts.find(Path(config.path).expanduser(), code=text == CODE)
            own = own_chats(own) if text == CHAT else own
        except SmartKVError as error:
            raise SmartKVError(f"{told}: {error}") from error
        rest = f"; not read: {own.skipped_in_words}" if own.skipped else ""
        say(f"{told}: {own.count} {'file' if own.count == 1 else 'files'} in {own.path}{rest}")
        return Source(config.name, config.weight, "local", own.documents, own=own)
    if config.name == BUILTIN:
        return Source(BUILTIN, config.weight, BUILTIN, builtin_documents)
    if config.name == LISTS:
        return Source(LISTS, config.weight, "drawn", lists.documents)
    if text == CODE:
        code = InstalledCode.find()
        say(f"{told}: {code.count} files of {len(code.files)} installed packages and modules")
        return Source(config.name, config.weight, "installed", code.documents, about={"packages": len(code.files)})
    reasons = list[str]()
    for origin, choice in product(config.origins, ALTERNATIVES.get(text, (text,))):
        try:
            if origin == "local":
                documents = local_documents(KNOWN[choice])
            elif origin == "hub":
                documents = hub_documents(KNOWN[choice])
            elif origin == DRAWN:
                documents, drawn_from = drawn_chats([each for each in config.origins if each in ("local", "hub")])
                say(f"{told}: drawn, from {drawn_from}")
                return Source(config.name, config.weight, DRAWN, documents)
            else:
                say(
                    f"{told} CANNOT BE HAD ({'; '.join(reasons)}): its share is taken from the "
                    "built-in prose, the manual of Python itself"
                    if reasons
                    else f"{told}: the built-in prose, the manual of Python itself"
                )
                return Source(BUILTIN, config.weight, BUILTIN, builtin_documents)
            say(f"{told}: {origin}" + (f" {choice}" if choice != text else ""))
            about = {"text": choice} if choice != text else {}
            return Source(config.name, config.weight, origin, documents, about=about)
        except SourceUnavailable as reason:
            if (why := f"{origin}: {reason}") not in reasons:
                reasons.append(why)
    raise SmartKVError(
        f"{told} cannot be had ({'; '.join(reasons)}): point ${DATA_VARIABLE} at a folder that has it, "
        + (
            "or add 'drawn' to its origins to draw conversations from problems and passages instead"
            if text == CHAT
            else "or add 'builtin' to its origins to take Python's own manual instead"
        )
    )
