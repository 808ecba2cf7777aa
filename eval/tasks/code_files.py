"""Files of code by package, and their lines that can be held out."""

import ast
import re
from pathlib import Path

from smartkv.texts.documents import Document

SHORTEST_LINE, LONGEST_LINE = 12, 100  # characters of a line that is held out, without its indentation
NAME = re.compile(r"[^\W\d]\w{3,}")


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
