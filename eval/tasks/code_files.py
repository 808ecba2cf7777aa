"""Source files by package, and their lines that can be held out."""

import ast
import re
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

from smartkv.errors import SmartKVError
from smartkv.texts.documents import Document, split_of
from smartkv.texts.sources import SourceConfig

TESTS = ("test", "tests", "testing", "idle_test")
COPIES = ("vendor", "_vendor", "vendored", "_vendored", "externals", "third_party", "extern")
LEFT_OUT = frozenset((*TESTS, *COPIES, "site-packages", "dist-packages", "__pycache__", "pydoc_data"))  # folders
LONGEST = 400_000  # characters of a file; longer ones are tables
SHORTEST_LINE, LONGEST_LINE = 12, 100  # characters of a line that is held out, without its indentation
NAME = re.compile(r"[^\W\d]\w{3,}")


def code_documents(source: SourceConfig, split: str, say: Callable[[str], None]) -> Iterator[Document]:
    """Yield the files of a split of a source of code; a document's id is its path, the package first.

    Args:
        source: with a `path`, the .py files below that folder, of which each subfolder is a package; without one, the
            packages of Python's standard library and those that are installed beside it. All files of a package are in
            the split that a hash of its name decides.
        split: train, validation or test.
        say: called with a line for the user.

    Raises:
        SmartKVError: the folder does not exist, or holds no Python file of the split.
    """
    paths = sysconfig.get_paths()
    roots = [Path(source.path).expanduser()] if source.path else [Path(paths["stdlib"]), Path(paths["purelib"])]
    names: dict[str, Path] = {}
    for root in roots:
        if not root.is_dir():
            raise SmartKVError(f"source '{source.name}': {root} is no folder: give the path of a folder with code")
        for path in sorted(root.rglob("*.py")):
            if not LEFT_OUT & set(path.relative_to(root).parts):
                names.setdefault(path.relative_to(root).as_posix(), path)
    chosen = {name: path for name, path in names.items() if split_of(package_of(name)) == split}
    where = ", ".join(map(str, roots))
    if not chosen:
        raise SmartKVError(
            f"source '{source.name}': none of the {len(names)} Python files in {where} is in split {split} (a hash of "
            "each package's name decides): give a folder with more packages, or another split"
        )
    say(f"source '{source.name}': {len(chosen)} files of split {split} in {where}")
    for name, path in chosen.items():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):  # such as a test of encodings: no file to complete
            continue
        if len(text) <= LONGEST:
            yield Document(name, text)


def package_of(name: str) -> str:
    """Return the package of a file: the first folder of its path, or the module itself."""
    return name.partition("/")[0].removesuffix(".py")


def held_lines(document: Document) -> list[int]:
    """Return the indices of the lines of a file that can be held out: whole statements with names in them.

    Imports and docstrings are left out, and so are lines that are too short or too long to say anything. In files that
    are no Python, all lines count that are no comment.

    Args:
        document: a file.
    """
    lines = document.text.split("\n")
    if document.id.endswith(".py"):
        try:
            tree = ast.parse(document.text)
        except (SyntaxError, ValueError, RecursionError):  # another version's Python
            return []
        kinds = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Return, ast.Raise, ast.Expr)
        numbers = {
            node.lineno - 1
            for node in ast.walk(tree)
            if isinstance(node, kinds) and node.lineno == node.end_lineno and not _is_text(node)
        }
    else:
        marks = ("#", "//", "/*", "*", "--", "import ", "from ", "using ", "use ")
        numbers = {number for number, line in enumerate(lines) if not line.strip().startswith(marks)}
    return [
        number
        for number in sorted(numbers)
        if SHORTEST_LINE <= len(lines[number].strip()) <= LONGEST_LINE and NAME.search(lines[number])
    ]


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def related_first(document: Document, others: list[Document]) -> list[Document]:
    """Order the other files of a package: those that a file imports first, then the rest as they come."""
    imports = " ".join(line for line in document.text.split("\n") if line.lstrip().startswith(("import ", "from ")))
    named = set(re.findall(r"\w+", imports))
    return sorted(others, key=lambda other: Path(other.id).stem not in named)  # a stable sort
