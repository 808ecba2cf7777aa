"""The default mix of texts that gates learn from, and which of it can be had here."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from smartkv.errors import SmartKVError
from smartkv.io.hub import hub_trouble
from smartkv.texts.sources import BUILTIN, SourceConfig, resolve_source

FACTS = ("recall", "recall_code", "recall_chat", "lists")  # sources that teach to recall; the report asks facts apart
MANUAL = "manual"  # kind of the built-in prose
PROSE = ("books", "encyclopaedia", "web")  # kinds that the built-in prose stands in for where none can be had


@dataclass(frozen=True)
class Part:
    """One source of the mix.

    Attributes:
        kind: what the report calls this kind of text.
        name: name of the source, as in `SourceConfig`.
        weight: share of the windows.
        origins: as in `SourceConfig`.
        path: a folder or file of the user's own; None: a named source.
    """

    kind: str
    name: str
    weight: float
    origins: list[str] = field(default_factory=lambda: ["local", "hub"])
    path: str | None = None

    @property
    def source(self) -> dict[str, Any]:
        """The source as it stands in a config."""
        settings = asdict(self)
        del settings["kind"]
        return {name: value for name, value in settings.items() if name != "path" or value is not None}

    @property
    def measured(self) -> bool:
        """Whether the report measures the loss on this source's own text."""
        return self.name not in FACTS


# The default: no kind of text above a third. Weights sum to 1.
MIX = (
    Part("books", "pg19", 0.15),
    Part("books", "recall", 0.10),
    Part("code", "code", 0.12),
    Part("code", "recall_code", 0.08),
    Part("chat", "chat", 0.12, ["local", "hub", "drawn"]),
    Part("chat", "recall_chat", 0.08, ["local", "hub", "drawn"]),
    Part("encyclopaedia", "encyclopaedia", 0.10),
    Part("web", "web", 0.10),
    Part("maths", "gsm8k", 0.05),
    Part("maths", "math500", 0.05),
    Part("lists", "lists", 0.05),
)


def own_mix(sources: list[SourceConfig]) -> list[Part]:
    """Return the parts of a mix that the user gives; each source is a kind of its own.

    Raises:
        SmartKVError: there is none, two sources have one name, or one of them cannot be had.
    """
    if not sources:
        raise SmartKVError("sources is empty: give at least one, or leave it out for the default mix")
    names = [source.name for source in sources]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise SmartKVError(f"two sources are named '{twice[0]}': give each a name of its own")
    for source in sources:
        resolve_source(source, lambda line: None)
    return [Part(each.name, each.name, each.weight, list(each.origins), each.path) for each in sources]


def default_mix(say: Callable[[str], None], mix: tuple[Part, ...] = MIX) -> list[Part]:
    """Return the parts of the default mix that can be had here.

    Where no prose can be had, the prose that Python itself carries takes its share, with facts in it.

    Args:
        say: called with a line for each part that is left out.
        mix: the parts to choose from.
    """
    trouble = hub_trouble()
    chosen, missing = list[Part](), list[Part]()
    for part in mix:
        reason = _why_not(part, trouble)
        if isinstance(reason, Part):
            chosen.append(reason)
        else:
            missing.append(part)
            say(f"left out: {part.name} ({part.weight:.0%} of the mix): {reason}")
    if not any(part.measured and part.kind in PROSE for part in chosen):
        prose = [part for part in missing if part.kind in PROSE]
        weight = sum(part.weight for part in prose if part.measured)
        facts = sum(part.weight for part in prose if not part.measured)
        say("in place of books and web pages: the manual of Python itself, which Python carries")
        chosen.append(Part(MANUAL, BUILTIN, weight, [BUILTIN]))
        if facts:
            chosen.append(Part(MANUAL, "recall", facts, [BUILTIN]))
    return chosen


def _why_not(part: Part, trouble: str | None) -> Part | str:
    """Return the part with the one origin that has it, or the reason why none has."""
    origins = [origin for origin in part.origins if origin != "hub" or not trouble]
    config = SourceConfig(part.name, part.weight, origins)
    try:
        config.check()
    except SmartKVError:
        return "this version of SmartKV has no such source"
    try:
        found = resolve_source(config, lambda line: None).origin
    except SmartKVError as error:
        reason = str(error).partition("cannot be had (")[2].rpartition("):")[0] or str(error)
        return f"{reason}; hub: {trouble}" if trouble else reason
    return Part(part.kind, part.name, part.weight, [found] if found in ("local", "hub") else origins)
