"""Files of source code: which endings they have, which ones are worth reading, and their order."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, zip_longest
from pathlib import Path

from smartkv.errors import SmartKVError

ENDINGS = frozenset(
    ending
    for endings in (
        ".py .pyi .pyx .js .jsx .mjs .ts .tsx .vue .svelte .java .kt .scala .groovy .c .h .cc .cpp .cxx .hpp .hh .cu",
        ".cuh .cs .fs .go .rs .swift .m .mm .rb .php .pl .lua .r .jl .hs .ml .clj .ex .exs .erl .dart .zig .sh .bash",
        ".sql .css .scss .html .proto .tf .cmake .md .rst",
    )
    for ending in endings.split()
)
NO_CODE = frozenset(("__pycache__", "node_modules", "site-packages", "dist-packages", "venv", "env"))  # folders
LONGEST_FILE = 400_000  # characters; longer ones are tables
LONGEST_LINE = 1_000  # characters; longer ones are data or minified
LETTERS = 0.55  # least share of letters in what is not space; tables of figures have fewer
TABLE = 500  # characters that are not space; with less a file is not taken for a table
_GENERATED = re.compile(  # a comment that says so, or the beginning of a line
    r"^(\s*(#|//|/\*|\*|--|<!--|;|%).*|\W*)"
    r"(@generated|\bdo not edit|\b(auto[- ]?|automatically |machine[- ])generated)\b"
    r"|^\W*((this|the) (file|module|code) (is|was|has been) )?"
    r"generated (automatically|and used|by|from|with|using|on)\b",
    re.IGNORECASE | re.MULTILINE,
)


def read_source(path: Path) -> str | None:
    """Return the text of a file with line ends as newlines; None if it is not in UTF-8.

    Raises:
        SmartKVError: The file cannot be read.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise SmartKVError(f"{path} cannot be read: {error.strerror or error}") from error
    if b"\0" in content:
        return None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def why_not(text: str | None) -> str | None:
    """Return why a text is no code that people write and read, for a message; None if it is.

    Args:
        text: What `read_source` returned.
    """
    if text is None:
        return "not in UTF-8"
    if _GENERATED.search(text[:1500]):
        return "generated"
    if len(text) > LONGEST_FILE or max(map(len, text.split("\n"))) > LONGEST_LINE:
        return "of data or minified"
    letters, ink = len(re.findall("[^\\W\\d_]", text)), len(re.findall("\\S", text))
    return "of data or minified" if ink > TABLE and letters < LETTERS * ink else None


def in_turns(names: Mapping[str, Iterable[str]]) -> Iterator[str]:
    """Yield one name of each group in turn, so that no large group comes in one piece.

    Groups, and the names within a group, come in the order of their hashes: what comes first is a sample of all.

    Args:
        names: Names by group.
    """
    groups = [sorted(names[group], key=_hash) for group in sorted(names, key=_hash)]
    return (name for name in chain.from_iterable(zip_longest(*groups)) if name is not None)


def _hash(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
